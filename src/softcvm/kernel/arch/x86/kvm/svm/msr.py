"""RDMSR and WRMSR that leave a guest, by themselves or by VMGEXIT (arch/x86/kvm/x86.c, lapic.c, svm/svm.c, v7.2).

Owns the MSRs of the local APIC, by which a guest starts its other processors, and the refusal of those that
an SEV-ES guest accesses without KVM.  Every other MSR is that of the ioctls (msrs.py), or Unmodelled.
"""

from typing import TYPE_CHECKING

from softcvm.abi.svm import EventInj, Vector
from softcvm.kernel.arch.x86.kvm.lapic import (
    X2APIC_ICR,
    X2APIC_ID,
    kvm_set_apic_base,
    kvm_x2apic_icr_write,
    x2apic_mode,
)
from softcvm.kernel.arch.x86.kvm.msrs import kvm_get_msr, kvm_set_msr
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_es_guest
from softcvm.kernel.errors import Unmodelled

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("msr_interception",)

_U32 = (1 << 32) - 1
_APIC_BASE = 0x1B
_X2APIC_MSRS = range(0x800, 0x900)
_EVTINJ_GP = int(Vector.GP | EventInj.TYPE_EXCEPTION | EventInj.VALID)
_PASSED_THROUGH = frozenset(
    {
        *(0x174, 0x175, 0x176),  # SYSENTER_CS, ESP, EIP
        0x277,  # PAT
        *range(0xC000_0080, 0xC000_0085),  # EFER, STAR, LSTAR, CSTAR, SYSCALL_MASK
        *range(0xC000_0100, 0xC000_0103),  # FS_BASE, GS_BASE, KERNEL_GS_BASE
    }
)
"""MSRs in the VMSA that KVM does not intercept: it cannot serve them (sev_es_prevent_msr_access())."""


def msr_interception(vcpu: "KvmVcpu") -> bool:
    """One access; a refusal is #GP, which an SEV-ES guest raises itself when it finds it in the GHCB."""
    regs, svm = vcpu.arch.regs, vcpu.arch.svm
    index = regs.rcx & _U32
    if vcpu.arch.svm.vmcb.exit_info_1:
        done = _set(vcpu, index, (regs.rdx & _U32) << 32 | regs.rax & _U32)
    else:
        value = _get(vcpu, index)
        done = value is not None
        if value is not None:
            regs.rax, regs.rdx = value & _U32, value >> 32
    if done:
        return True
    if svm.sev_es.ghcb is not None:
        svm.sev_es.ghcb.set(sw_exit_info_1=1, sw_exit_info_2=_EVTINJ_GP)
    else:
        svm.vmcb.event_inj = _EVTINJ_GP | EventInj.ERROR_CODE_VALID  # kvm_inject_gp(vcpu, 0)
    return False


def _get(vcpu: "KvmVcpu", index: int) -> int | None:
    if not sev_es_guest(vcpu.kvm) and index != _APIC_BASE and index not in _X2APIC_MSRS:
        return kvm_get_msr(vcpu, index, host=False)
    if index in _PASSED_THROUGH or (index in _X2APIC_MSRS and not x2apic_mode(vcpu)):
        return None
    match index:
        case _ if index == _APIC_BASE:
            return vcpu.arch.sregs.apic_base
        case _ if index == X2APIC_ID:
            return vcpu.vcpu_id
        case _:
            raise Unmodelled(f"VMGEXIT RDMSR {index:#x}")


def _set(vcpu: "KvmVcpu", index: int, value: int) -> bool:
    if not sev_es_guest(vcpu.kvm) and index != _APIC_BASE and index not in _X2APIC_MSRS:
        return kvm_set_msr(vcpu, index, value, host=False)
    if index in _PASSED_THROUGH or (index in _X2APIC_MSRS and not x2apic_mode(vcpu)):
        return False
    match index:
        case _ if index == _APIC_BASE:
            return kvm_set_apic_base(vcpu, value, host=False)
        case _ if index == X2APIC_ICR:
            return kvm_x2apic_icr_write(vcpu, value)
        case _:
            raise Unmodelled(f"VMGEXIT WRMSR {index:#x}")
