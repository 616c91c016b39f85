"""KVM_GET_XSAVE, KVM_GET_XSAVE2 and KVM_SET_XSAVE: FPU state in the format of XSAVE (arch/x86/kvm/x86.c,
arch/x86/kernel/fpu/xstate.c; v6.12).

x87 and SSE are VcpuArch.fpu, in the legacy area.  What comes behind it is kept as it was set; the model's
processor executes nothing that uses it.
"""

import struct
from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmFpu
from softcvm.kernel.arch.x86.kvm.cpuid import kvm_get_supported_cpuid
from softcvm.kernel.errors import KernelError

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("XSAVE_SIZE", "get_xsave", "guest_supported_xcr0", "kvm_supported_xcr0", "set_xsave")

XSAVE_SIZE = 4096
"""struct kvm_xsave without `extra`."""
_LEGACY, _HEADER = 512, 64
_FP_SSE, _YMM = 3, 4
_MXCSR_MASK = 0x2_FFFF
_XSTATE_LEAF = 0xD


def _protected(vcpu: "KvmVcpu") -> bool:
    """fpstate_is_confidential(): EINVAL, or nothing at all for a legacy SEV-ES VM."""
    if not vcpu.arch.guest_state_protected:
        return False
    if vcpu.kvm.arch.has_protected_state:
        raise KernelError(EINVAL, f"vCPU {vcpu.vcpu_id}: the guest's state is protected")
    return True


def get_xsave(vcpu: "KvmVcpu", size: int) -> bytes:
    """State of the features that the guest has.  EINVAL."""
    if _protected(vcpu):
        return bytes(size)
    arch, fpu = vcpu.arch, vcpu.arch.fpu
    legacy = struct.pack(
        "<HHBxHQQII",
        *(fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.last_ip, fpu.last_dp),
        *(fpu.mxcsr, _MXCSR_MASK),
    )
    legacy = (legacy + fpu.fpr + fpu.xmm).ljust(_LEGACY, b"\0")
    features = arch.xstate_bv & (guest_supported_xcr0(vcpu) | _FP_SSE)
    header = struct.pack("<Q", features).ljust(_HEADER, b"\0")
    return (legacy + header + arch.xsave_extended).ljust(size, b"\0")[:size]


def set_xsave(vcpu: "KvmVcpu", data: bytes) -> None:
    """EINVAL: features that the host has not, a compacted or reserved header, reserved bits of MXCSR."""
    if _protected(vcpu):
        return
    features, compacted, *reserved = struct.unpack_from("<8Q", data, _LEGACY)
    if features & ~kvm_supported_xcr0(vcpu.kvm.linux) or compacted or any(reserved):
        raise KernelError(EINVAL, f"XSAVE header with features {features:#x}")
    (mxcsr,) = struct.unpack_from("<I", data, 24)
    if features & (_FP_SSE | _YMM) and mxcsr & ~_MXCSR_MASK:
        raise KernelError(EINVAL, f"MXCSR {mxcsr:#x}")
    arch = vcpu.arch
    fpu = KvmFpu(fcw=0x37F, mxcsr=0x1F80)
    if features & 1:
        (
            fpu.fcw,
            fpu.fsw,
            fpu.ftwx,
            fpu.last_opcode,
            fpu.last_ip,
            fpu.last_dp,
        ) = struct.unpack_from("<HHBxHQQ", data)
        fpu.fpr = data[32:160]
    if features & (_FP_SSE | _YMM):
        fpu.mxcsr = mxcsr
    if features & 2:
        fpu.xmm = data[160:416]
    arch.fpu = fpu
    arch.xstate_bv = features
    arch.xsave_extended = data[_LEGACY + _HEADER : XSAVE_SIZE]


def kvm_supported_xcr0(linux: "Linux") -> int:
    """XCR0 bits that KVM supports: CPUID D as it reports it."""
    for entry in kvm_get_supported_cpuid(linux):
        if (entry.function, entry.index) == (_XSTATE_LEAF, 0):
            return entry.edx << 32 | entry.eax | _FP_SSE
    return _FP_SSE


def guest_supported_xcr0(vcpu: "KvmVcpu") -> int:
    """XCR0 bits that KVM supports and the guest's CPUID has."""
    for entry in vcpu.arch.cpuid_entries:
        if (entry.function, entry.index) == (_XSTATE_LEAF, 0):
            return (entry.edx << 32 | entry.eax) & kvm_supported_xcr0(vcpu.kvm.linux)
    return 0
