"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS: what is on its way to a vCPU (arch/x86/kvm/x86.c, v6.12).

An exception waits in the VMCB until the next entry delivers it.  Interrupts and NMIs that user space wants delivered
are Unmodelled, an INIT that the local APIC holds back is what lapic.py keeps.
"""

from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmVcpuEvents, MpState
from softcvm.abi.svm import EventInj
from softcvm.kernel.errors import KernelError, Unmodelled

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("get_vcpu_events", "set_vcpu_events")

_NMI_PENDING, _SIPI_VECTOR, _SHADOW, _SMM, _PAYLOAD, _TRIPLE_FAULT = (1 << n for n in range(6))
_ALL = _NMI_PENDING | _SIPI_VECTOR | _SHADOW | _SMM | _PAYLOAD | _TRIPLE_FAULT
_NMI_VECTOR = 2
_SOFT = frozenset({3, 4})
"""kvm_exception_is_soft(): #BP, #OF"""


def get_vcpu_events(vcpu: "KvmVcpu") -> KvmVcpuEvents:
    arch = vcpu.kvm.arch
    flags = _NMI_PENDING | _SHADOW | _SMM
    flags |= _PAYLOAD if arch.exception_payload_enabled else 0
    flags |= _TRIPLE_FAULT if arch.triple_fault_event else 0
    events = KvmVcpuEvents(flags=flags)
    queued = vcpu.arch.svm.vmcb.event_inj
    if queued & EventInj.VALID:
        events.exception_nr = queued & 0xFF
        events.exception_has_error_code = int(bool(queued & EventInj.ERROR_CODE_VALID))
        events.exception_error_code = queued >> 32
        pending = not vcpu.arch.exception_injected
        events.exception_pending = int(pending)
        # Who has not asked to tell them apart sees a pending one as injected too.
        events.exception_injected = int(not pending or not arch.exception_payload_enabled)
    return events


def set_vcpu_events(vcpu: "KvmVcpu", events: KvmVcpuEvents) -> None:
    """EINVAL: flags, a payload that is not enabled, a vector that is no exception, SMM, which this kernel has not."""
    arch, flags = vcpu.kvm.arch, events.flags
    if flags & ~_ALL:
        raise KernelError(EINVAL, f"kvm_vcpu_events flags {flags:#x}")
    if flags & _PAYLOAD:
        if not arch.exception_payload_enabled:
            raise KernelError(EINVAL, "KVM_CAP_EXCEPTION_PAYLOAD is off")
        pending, injected = events.exception_pending, events.exception_injected
        injected = 0 if pending else injected
    else:
        pending, injected = 0, events.exception_injected
    if (injected or pending) and (
        events.exception_nr > 31 or events.exception_nr == _NMI_VECTOR
    ):
        raise KernelError(EINVAL, f"exception {events.exception_nr}")
    smm = events.smi_smm or events.smi_pending
    if flags & _SMM and smm and vcpu.arch.mp_state is MpState.INIT_RECEIVED:
        raise KernelError(EINVAL, "SMM of a vCPU that waits for SIPI")
    wanted = (
        (pending and events.exception_has_payload)
        or ((injected or pending) and events.exception_nr in _SOFT)
        or events.interrupt_injected
        or events.nmi_injected
        or events.nmi_masked
        or (flags & _NMI_PENDING and events.nmi_pending)
        or (flags & _SHADOW and events.interrupt_shadow)
        or (flags & _SIPI_VECTOR and arch.irqchip)
    )
    if wanted:
        raise Unmodelled("KVM_SET_VCPU_EVENTS with an event to deliver")
    _queue(vcpu, events, injected=bool(injected), pending=bool(pending))
    if flags & _SMM:
        if smm or events.smi_smm_inside_nmi:
            raise KernelError(EINVAL, "SMM in a kernel without CONFIG_KVM_SMM")
        if arch.irqchip:
            vcpu.arch.apic_init = bool(events.smi_latched_init)
    if flags & _TRIPLE_FAULT:
        if not arch.triple_fault_event:
            raise KernelError(EINVAL, "KVM_CAP_X86_TRIPLE_FAULT_EVENT is off")
        if events.triple_fault_pending:
            raise Unmodelled("KVM_SET_VCPU_EVENTS with a triple fault")


def _queue(vcpu: "KvmVcpu", events: KvmVcpuEvents, *, injected: bool, pending: bool) -> None:
    """What was queued before is gone."""
    vmcb, arch = vcpu.arch.svm.vmcb, vcpu.arch
    vmcb.event_inj, arch.exception_injected = 0, injected
    if not injected and not pending:
        return
    vmcb.event_inj = int(EventInj.VALID | EventInj.TYPE_EXCEPTION) | events.exception_nr
    if events.exception_has_error_code:
        vmcb.event_inj |= EventInj.ERROR_CODE_VALID | events.exception_error_code << 32
