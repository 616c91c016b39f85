"""KVM_GET_SUPPORTED_CPUID: what KVM can give a guest of the processor's CPUID
(arch/x86/kvm/cpuid.c, v7.2).

Leaves KVM does not pass on are left out, features it does not virtualise are cleared, and
features it emulates are set whether or not the processor has them.  What a vCPU is then told is
user space's choice.
"""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmCpuidEntry2
from softcvm.hw.cpu.cpuid import CpuidResult, leaves
from softcvm.hw.profile import CpuProfile

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "KVM_CPUID_SIGNATURE",
    "amd_compatible",
    "cpuid_maxphyaddr",
    "guest_cpuid_has",
    "guest_pv_has",
    "kvm_cpu_cap_has",
    "kvm_get_supported_cpuid",
)

KVM_CPUID_SIGNATURE = 0x4000_0000
KVM_CPUID_FEATURES = 0x4000_0001
_KVM_FEATURES = (
    0x0100_7EFB  # KVM_FEATURE_*: clock, async page fault, steal time, PV EOI and the like
)

# Features that KVM clears in, and sets in, a register of a leaf.
_MONITOR, _X2APIC, _TSC_DEADLINE, _HYPERVISOR = 1 << 3, 1 << 21, 1 << 24, 1 << 31
_TSC_ADJUST = 1 << 1
_OSXSAVE, _OSPKE = 1 << 27, 1 << 4  # the guest's CR4 decides (cpuid_runtime.py)
_SVM = 1 << 2  # 8000_0001 ECX
_SEV_PASSED_ON = 0x1F | 1 << 10 | 1 << 14  # 8000_001F EAX

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
_INDEXED = frozenset({0x4, 0x7, 0xB, 0xD, 0x8000_001D})


def kvm_get_supported_cpuid(linux: "Linux") -> list[KvmCpuidEntry2]:
    """In ascending order, the hypervisor's own leaves between standard and extended ones."""
    return list(_supported(linux.soc.profile))


@cache
def _supported(profile: CpuProfile) -> tuple[KvmCpuidEntry2, ...]:
    table = {leaf: _virtualised(leaf, result) for leaf, result in leaves(profile).items()}
    signature = int.from_bytes(b"KVMK", "little"), int.from_bytes(b"VMKV", "little")
    table[KVM_CPUID_SIGNATURE, 0] = CpuidResult(
        KVM_CPUID_FEATURES, *signature, int.from_bytes(b"M\0\0\0", "little")
    )
    table[KVM_CPUID_FEATURES, 0] = CpuidResult(_KVM_FEATURES)
    return tuple(
        KvmCpuidEntry2(
            function=function,
            index=index,
            flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX if function in _INDEXED else 0,
            **result._asdict(),
        )
        for (function, index), result in sorted(table.items())
    )


def cpuid_maxphyaddr(vcpu: "KvmVcpu") -> int:
    """Width of the guest's physical addresses as its CPUID says; 36 if that says nothing."""
    told = {e.function: e.eax for e in vcpu.arch.cpuid_entries}
    if told.get(0x8000_0000, 0) < 0x8000_0008 or 0x8000_0008 not in told:
        return 36
    return told[0x8000_0008] & 0xFF


def guest_cpuid_has(vcpu: "KvmVcpu", leaf: int, register: str, bit: int) -> bool:
    """Whether the guest's CPUID has a feature.  Leaf Dh has it in subleaf 1, the others in 0."""
    return _has(vcpu.arch.cpuid_entries, leaf, register, bit)


def kvm_cpu_cap_has(linux: "Linux", leaf: int, register: str, bit: int) -> bool:
    """Whether KVM can give a guest the feature on this processor."""
    return _has(kvm_get_supported_cpuid(linux), leaf, register, bit)


def guest_pv_has(vcpu: "KvmVcpu", bit: int) -> bool:
    """KVM's own features: all of them, until user space asks to go by the guest's CPUID."""
    return not vcpu.arch.pv_enforce or _has(
        vcpu.arch.cpuid_entries, KVM_CPUID_FEATURES, "eax", bit
    )


def amd_compatible(vcpu: "KvmVcpu") -> bool:
    """guest_cpuid_is_amd_or_hygon()"""
    names = ((0x6874_7541, 0x444D_4163, 0x6974_6E65), (0x6F67_7948, 0x656E_6975, 0x6E65_476E))
    return any(
        (e.ebx, e.ecx, e.edx) in names for e in vcpu.arch.cpuid_entries if e.function == 0
    )


def _has(entries: Iterable[KvmCpuidEntry2], leaf: int, register: str, bit: int) -> bool:
    index = 1 if leaf == 0xD else 0
    return any(
        getattr(e, register) >> bit & 1
        for e in entries
        if e.function == leaf and (e.index == index or not e.flags & 1)
    )


def _virtualised(leaf: tuple[int, int], result: CpuidResult) -> CpuidResult:
    match leaf:
        case (0x1, 0):
            ecx = result.ecx & ~(_MONITOR | _OSXSAVE) | _X2APIC | _TSC_DEADLINE | _HYPERVISOR
            return result._replace(ebx=result.ebx & 0xFFFF, ecx=ecx)
        case (0x5, 0):
            return CpuidResult()
        case (0x6, 0):
            return CpuidResult(eax=0x4)  # ARAT
        case (0x7, 0):
            return result._replace(ebx=result.ebx | _TSC_ADJUST, ecx=result.ecx & ~_OSPKE)
        case (0x8000_0008, 0):
            return result._replace(eax=result.eax & 0xFFFF | (result.eax & 0xFF) << 16, edx=0)
        case (0x8000_0007, 0):
            return CpuidResult(edx=result.edx & 1 << 8)  # invariant TSC
        case (0x8000_000A, 0):
            return CpuidResult()  # kvm_amd with nested=0: no SVM in guests
        case (0x8000_0001, 0):
            return result._replace(ecx=result.ecx & ~_SVM)
        case (0x8000_0019 | 0x8000_001B, 0):
            return CpuidResult()
        case (0x8000_001E, 0):
            return CpuidResult()
        case (0x8000_001F, 0):
            # "PA bits reduction" is in the address width already, VMPLs are not KVM's.
            return result._replace(eax=result.eax & _SEV_PASSED_ON, ebx=result.ebx & ~0xFFC0)
        case _:
            return result
