"""XCR0, the features whose state XSAVE handles: as user space and the guest set it (arch/x86/kvm/x86.c, v6.12)."""

from typing import TYPE_CHECKING

from softcvm.kernel.arch.x86.kvm.cpuid_runtime import kvm_update_cpuid_runtime
from softcvm.kernel.arch.x86.kvm.xsave import guest_supported_xcr0

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("kvm_set_xcr",)

_FP, _SSE, _YMM = 1 << 0, 1 << 1, 1 << 2
_BNDREGS, _BNDCSR = 1 << 3, 1 << 4
_AVX512, _XTILE = 7 << 5, 3 << 17


def kvm_set_xcr(vcpu: "KvmVcpu", index: int, value: int) -> bool:
    """__kvm_set_xcr(): False for another XCR than 0, features that the guest has not, or half of a group."""
    if index or not value & _FP or (value & _YMM and not value & _SSE):
        return False
    if value & ~(guest_supported_xcr0(vcpu) | _FP):
        return False
    if bool(value & _BNDREGS) != bool(value & _BNDCSR):
        return False
    if value & _AVX512 and (not value & _YMM or value & _AVX512 != _AVX512):
        return False
    if value & _XTILE not in (0, _XTILE):
        return False
    vcpu.arch.xcr0 = value
    kvm_update_cpuid_runtime(vcpu)
    return True
