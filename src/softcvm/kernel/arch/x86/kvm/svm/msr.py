"""RDMSR and WRMSR that leave a guest, by themselves or by VMGEXIT (arch/x86/kvm/x86.c, lapic.c, svm/svm.c, v7.2).

Owns the MSRs of the local APIC, by which a guest starts its other processors, and the refusal of those that
an SEV-ES guest accesses without KVM.  Every other MSR is that of the ioctls (msrs.py), or Unmodelled.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.svm import EventInj, Vector
from softcvm.kernel.arch.x86.kvm.lapic import (
    X2APIC_ICR,
    X2APIC_ID,
    kvm_set_apic_base,
    kvm_x2apic_icr_write,
    x2apic_mode,
)
from softcvm.kernel.arch.x86.kvm.msr_filter import (
    MSR_READ,
    MSR_WRITE,
    MsrExit,
    kvm_msr_allowed,
    kvm_msr_user_space,
)
from softcvm.kernel.arch.x86.kvm.msrs import MsrFault, guest_get_msr, guest_set_msr
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_es_guest
from softcvm.kernel.errors import Unmodelled
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("msr_interception", "svm_msr_filter_changed")

_U32 = (1 << 32) - 1
_APIC_BASE = 0x1B
_X2APIC_MSRS = range(0x800, 0x900)
_EVTINJ_GP = int(Vector.GP | EventInj.TYPE_EXCEPTION | EventInj.VALID)
_REASONS = {MsrFault.UNSUPPORTED: MsrExit.UNKNOWN, MsrFault.REFUSED: MsrExit.INVAL}
_PASSED_THROUGH = frozenset(
    {
        *(0x174, 0x175, 0x176),  # SYSENTER_CS, ESP, EIP
        0x277,  # PAT
        *range(0xC000_0080, 0xC000_0085),  # EFER, STAR, LSTAR, CSTAR, SYSCALL_MASK
        *range(0xC000_0100, 0xC000_0103),  # FS_BASE, GS_BASE, KERNEL_GS_BASE
    }
)
"""MSRs in the VMSA that KVM does not intercept: it cannot serve them (sev_es_prevent_msr_access())."""


def svm_msr_filter_changed(vcpu: "KvmVcpu") -> None:
    """MSRs that the guest accesses without KVM leave it where the filter denies them."""
    vmcb = vcpu.arch.svm.vmcb
    vmcb.rdmsr_exits, vmcb.wrmsr_exits = (
        frozenset(n for n in _PASSED_THROUGH if not kvm_msr_allowed(vcpu, n, access))
        for access in (MSR_READ, MSR_WRITE)
    )


def msr_interception(vcpu: "KvmVcpu", skip: Callable[["KvmVcpu"], int]) -> int:
    """One access; a refusal is #GP, or user space's where it asked to be told.

    `skip` is svm_skip_emulated_instruction(); its result, or 0 to leave to user space.
    """
    regs = vcpu.arch.regs
    index = regs.rcx & _U32
    if vcpu.arch.svm.vmcb.exit_info_1:
        data = (regs.rdx & _U32) << 32 | regs.rax & _U32
        fault = MsrExit.FILTER
        if kvm_msr_allowed(vcpu, index, MSR_WRITE):
            refused = _set(vcpu, index, data)
            if refused is None:
                return skip(vcpu)
            fault = _REASONS[refused]
        exit_ = KvmExit.X86_WRMSR
    else:
        data, fault = 0, MsrExit.FILTER
        if kvm_msr_allowed(vcpu, index, MSR_READ):
            value = _get(vcpu, index)
            if not isinstance(value, MsrFault):
                regs.rax, regs.rdx = value & _U32, value >> 32
                return skip(vcpu)
            fault = _REASONS[value]
        exit_ = KvmExit.X86_RDMSR

    def complete_msr_access(vcpu: "KvmVcpu") -> Steps[int]:
        """complete_fast_rdmsr(), complete_fast_msr_access(): user space has decided."""
        yield from ()
        run, regs = vcpu.run, vcpu.arch.regs
        if run.msr_error:
            return _inject_gp(vcpu)
        if exit_ is KvmExit.X86_RDMSR:
            regs.rax, regs.rdx = run.msr_data & _U32, run.msr_data >> 32
        return skip(vcpu)

    if kvm_msr_user_space(vcpu, exit_, index, data, fault, complete_msr_access):
        return 0
    return _inject_gp(vcpu)


def _inject_gp(vcpu: "KvmVcpu") -> int:
    """An SEV-ES guest raises it itself when it finds it in the GHCB."""
    svm = vcpu.arch.svm
    if svm.sev_es.ghcb is not None:
        svm.sev_es.ghcb.set(sw_exit_info_1=1, sw_exit_info_2=_EVTINJ_GP)
    else:
        svm.vmcb.event_inj = _EVTINJ_GP | EventInj.ERROR_CODE_VALID  # kvm_inject_gp(vcpu, 0)
    return 1


def _get(vcpu: "KvmVcpu", index: int) -> "int | MsrFault":
    if not sev_es_guest(vcpu.kvm) and index != _APIC_BASE and index not in _X2APIC_MSRS:
        return guest_get_msr(vcpu, index)
    if index in _PASSED_THROUGH or (index in _X2APIC_MSRS and not x2apic_mode(vcpu)):
        return MsrFault.REFUSED
    match index:
        case _ if index == _APIC_BASE:
            return vcpu.arch.sregs.apic_base
        case _ if index == X2APIC_ID:
            return vcpu.vcpu_id
        case _:
            raise Unmodelled(f"VMGEXIT RDMSR {index:#x}")


def _set(vcpu: "KvmVcpu", index: int, value: int) -> MsrFault | None:
    if not sev_es_guest(vcpu.kvm) and index != _APIC_BASE and index not in _X2APIC_MSRS:
        return guest_set_msr(vcpu, index, value)
    if index in _PASSED_THROUGH or (index in _X2APIC_MSRS and not x2apic_mode(vcpu)):
        return MsrFault.REFUSED
    match index:
        case _ if index == _APIC_BASE:
            return None if kvm_set_apic_base(vcpu, value, host=False) else MsrFault.REFUSED
        case _ if index == X2APIC_ICR:
            return None if kvm_x2apic_icr_write(vcpu, value) else MsrFault.REFUSED
        case _:
            raise Unmodelled(f"VMGEXIT WRMSR {index:#x}")
