"""Registers of a vCPU as user space reads and writes them (arch/x86/kvm/x86.c, cpuid.c; v7.2).

System registers are sregs.py, MSRs msrs.py.  What a VMM sets here is what sev_es_sync_vmsa() puts into the measured VMSA.  Once the state is
protected a VM with has_protected_state refuses every access (EINVAL), and an SEV-ES VM of the
legacy kind, which has not that flag, keeps a dead copy.
"""

from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import (
    KvmCpuidEntry2,
    KvmDebugregs,
    KvmFpu,
    KvmGuestDebug,
    KvmMpState,
    KvmRegs,
    KvmXcrs,
    MpState,
)
from softcvm.kernel.arch.x86.kvm.cpuid_runtime import update_cpuid_entries
from softcvm.kernel.arch.x86.kvm.xcr import kvm_set_xcr
from softcvm.kernel.errors import KernelError

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "KVM_MAX_CPUID_ENTRIES",
    "get_debugregs",
    "get_fpu",
    "get_mpstate",
    "get_regs",
    "get_xcrs",
    "is_64_bit_mode",
    "kvm_get_linear_rip",
    "refuse_protected",
    "set_cpuid2",
    "set_debugregs",
    "set_fpu",
    "set_guest_debug",
    "set_mpstate",
    "set_regs",
    "set_xcrs",
)

KVM_MAX_CPUID_ENTRIES = 256
_EFER_LMA = 1 << 10
_GUESTDBG_ENABLE = 1
_RFLAGS_FIXED = 2


def refuse_protected(vcpu: "KvmVcpu", what: str) -> None:
    if vcpu.kvm.arch.has_protected_state and vcpu.arch.guest_state_protected:
        raise KernelError(
            EINVAL, f"{what} of vCPU {vcpu.vcpu_id}: the guest's state is protected"
        )


def is_64_bit_mode(vcpu: "KvmVcpu") -> bool:
    """Long mode, and in a 64-bit code segment."""
    sregs = vcpu.arch.sregs
    return bool(sregs.efer & _EFER_LMA) and bool(sregs.segment("cs").l)


def kvm_get_linear_rip(vcpu: "KvmVcpu") -> int:
    """0 when RIP cannot be read."""
    arch = vcpu.arch
    if arch.guest_state_protected:
        return 0
    if is_64_bit_mode(vcpu):
        return arch.regs.rip
    return arch.sregs.segment("cs").base + arch.regs.rip & 0xFFFF_FFFF


def get_regs(vcpu: "KvmVcpu") -> KvmRegs:
    refuse_protected(vcpu, "KVM_GET_REGS")
    return KvmRegs(bytes(vcpu.arch.regs))


def set_regs(vcpu: "KvmVcpu", regs: KvmRegs) -> None:
    refuse_protected(vcpu, "KVM_SET_REGS")
    vcpu.arch.regs = KvmRegs(bytes(regs))
    vcpu.arch.regs.rflags |= _RFLAGS_FIXED


def get_fpu(vcpu: "KvmVcpu") -> KvmFpu:
    refuse_protected(vcpu, "KVM_GET_FPU")
    return KvmFpu(bytes(vcpu.arch.fpu))


def set_fpu(vcpu: "KvmVcpu", fpu: KvmFpu) -> None:
    """KVM_SET_FPU; Linux leaves MXCSR out."""
    refuse_protected(vcpu, "KVM_SET_FPU")
    mxcsr = vcpu.arch.fpu.mxcsr
    vcpu.arch.fpu = KvmFpu(bytes(fpu))
    vcpu.arch.fpu.mxcsr = mxcsr


def get_xcrs(vcpu: "KvmVcpu") -> KvmXcrs:
    refuse_protected(vcpu, "KVM_GET_XCRS")
    xcr0 = bytes(8) + vcpu.arch.xcr0.to_bytes(8, "little")
    return KvmXcrs(nr_xcrs=1, xcrs=xcr0.ljust(256, b"\0"))


def set_xcrs(vcpu: "KvmVcpu", xcrs: KvmXcrs) -> None:
    refuse_protected(vcpu, "KVM_SET_XCRS")
    if xcrs.nr_xcrs > 16 or xcrs.flags:
        raise KernelError(EINVAL, f"{xcrs.nr_xcrs} XCRs, flags {xcrs.flags:#x}")
    for i in range(xcrs.nr_xcrs):
        entry = xcrs.xcrs[16 * i : 16 * i + 16]
        if int.from_bytes(entry[:4], "little") == 0:
            value = int.from_bytes(entry[8:], "little")
            if not kvm_set_xcr(vcpu, 0, value):
                raise KernelError(EINVAL, f"XCR0 {value:#x}")
            break


def get_debugregs(vcpu: "KvmVcpu") -> KvmDebugregs:
    refuse_protected(vcpu, "KVM_GET_DEBUGREGS")
    return KvmDebugregs(bytes(vcpu.arch.debugregs))


def set_debugregs(vcpu: "KvmVcpu", regs: KvmDebugregs) -> None:
    refuse_protected(vcpu, "KVM_SET_DEBUGREGS")
    if regs.flags or regs.dr6 >> 32 or regs.dr7 >> 32:
        raise KernelError(EINVAL, f"flags {regs.flags:#x} DR6 {regs.dr6:#x} DR7 {regs.dr7:#x}")
    vcpu.arch.debugregs = KvmDebugregs(bytes(regs))


def set_guest_debug(vcpu: "KvmVcpu", debug: KvmGuestDebug) -> None:
    if vcpu.arch.guest_state_protected:
        raise KernelError(EINVAL, f"vCPU {vcpu.vcpu_id}: the guest's state is protected")
    vcpu.arch.guest_debug = debug.control if debug.control & _GUESTDBG_ENABLE else 0


def get_mpstate(vcpu: "KvmVcpu") -> KvmMpState:
    return KvmMpState(mp_state=vcpu.arch.mp_state)


def set_mpstate(vcpu: "KvmVcpu", state: KvmMpState) -> None:
    """Anything but RUNNABLE needs an in-kernel APIC."""
    try:
        wanted = MpState(state.mp_state)
    except ValueError:
        raise KernelError(EINVAL, f"mp_state {state.mp_state}") from None
    if wanted is not MpState.RUNNABLE and not vcpu.kvm.arch.irqchip:
        raise KernelError(EINVAL, f"mp_state {wanted.name} without an in-kernel APIC")
    if wanted is MpState.SIPI_RECEIVED:
        wanted, vcpu.arch.apic_sipi = MpState.INIT_RECEIVED, True
    vcpu.arch.mp_state = wanted


def set_cpuid2(vcpu: "KvmVcpu", entries: list[KvmCpuidEntry2]) -> None:
    """KVM_SET_CPUID2: once the vCPU has run, only the same values again."""
    if len(entries) > KVM_MAX_CPUID_ENTRIES:
        raise KernelError(E2BIG, f"{len(entries)} CPUID entries")
    update_cpuid_entries(vcpu, entries)
    if vcpu.arch.has_run and entries != vcpu.arch.cpuid_entries:
        raise KernelError(EINVAL, f"CPUID of vCPU {vcpu.vcpu_id} after it ran")
    vcpu.arch.cpuid_entries = entries
