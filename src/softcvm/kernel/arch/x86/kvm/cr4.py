"""Which values CR4 may have (__cr4_reserved_bits(), kvm_is_valid_cr4(); arch/x86/kvm/x86.h, x86.c; v6.12).

A bit is reserved when KVM cannot give it on this processor, and when the guest's CPUID lacks its feature.
"""

from typing import TYPE_CHECKING

from softcvm.kernel.arch.x86.kvm.cpuid import guest_cpuid_has, kvm_cpu_cap_has

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("kvm_is_valid_cr4",)

_ALWAYS = 0x7FF
"""VME to OSXMMEXCPT: no feature of their own."""
_FEATURES = (
    (11, (0x7, "ecx", 2)),  # UMIP
    (12, (0x7, "ecx", 16)),  # LA57
    (13, (0x1, "ecx", 5)),  # VMXE
    (16, (0x7, "ebx", 0)),  # FSGSBASE
    (17, (0x1, "ecx", 17)),  # PCIDE
    (18, (0x1, "ecx", 26)),  # OSXSAVE
    (20, (0x7, "ebx", 7)),  # SMEP
    (21, (0x7, "ebx", 20)),  # SMAP
    (22, (0x7, "ecx", 3)),  # PKE
)
_CET = 23, (0x7, "ecx", 7)  # from 6.18, with shadow stacks


def kvm_is_valid_cr4(vcpu: "KvmVcpu", cr4: int) -> bool:
    linux = vcpu.kvm.linux
    host = guest = _ALWAYS
    for bit, feature in (*_FEATURES, *((_CET,) if linux.profile.x86_one_reg else ())):
        host |= kvm_cpu_cap_has(linux, *feature) << bit
        guest |= guest_cpuid_has(vcpu, *feature) << bit
    if not vcpu.arch.cpuid_entries:
        guest = host  # cr4_guest_rsvd_bits is of KVM_SET_CPUID2
    return not cr4 & ~(host & guest)
