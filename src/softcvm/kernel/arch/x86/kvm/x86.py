"""KVM_RUN and what surrounds a guest entry (arch/x86/kvm/x86.c, v7.2).

Owns the order of KVM_RUN's checks, the completion of an exit when the VMM enters again,
blocking of vCPUs that cannot run, and the MAP_GPA_RANGE hypercall.  Entering the guest and the
#VMEXIT's own dispatch is the vendor's vcpu_run hook; registers are regs.py.

Locks: vcpu->mutex held by the caller; kvm->srcu for read, dropped while the vCPU blocks.
"""

from errno import EAGAIN, EINTR, EINVAL, EIO
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import KVM_HC_MAP_GPA_RANGE
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.kvm.vcpu import MpState
from softcvm.kernel.arch.x86.kvm.lapic import (
    kvm_apic_accept_events,
    kvm_apic_has_pending_init_or_sipi,
    kvm_vcpu_reset,
)
from softcvm.kernel.arch.x86.kvm.sync_regs import check_sync_regs, store_regs, sync_regs
from softcvm.kernel.arch.x86.kvm.vcpu import KvmRequest
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PAGE_MASK
from softcvm.sim.steps import Point, Steps, Wait

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "KVM_EXIT_HYPERCALL_LONG_MODE",
    "KvmUserspaceExit",
    "kvm_arch_vcpu_ioctl_run",
    "kvm_emulate_hypercall",
    "kvm_vcpu_has_events",
)

KVM_EXIT_HYPERCALL_LONG_MODE = 1
_KVM_ENOSYS, _KVM_EPERM = 1000, 1
_VCPU_RUN = Point("vcpu_run")
_U64 = (1 << 64) - 1


class KvmUserspaceExit(NamedTuple):
    """KVM_RUN returns (trace_kvm_userspace_exit); `errno` 0 is success."""

    vm: int
    vcpu: int
    reason: str
    errno: int


def kvm_arch_vcpu_ioctl_run(vcpu: "KvmVcpu", proc: "Process") -> Steps[int]:
    """KVM_RUN with vcpu->mutex held.  Returns 0 with kvm_run filled."""
    kvm = vcpu.kvm
    run = vcpu.run
    wants_to_run = not run.immediate_exit
    run.flags = 0
    vcpu.proc = proc
    kvm.linux.lockdep.current.sigmask = vcpu.sigset
    errno = 0
    yield from kvm.srcu.acquire_read()
    try:
        yield from _ioctl_run(vcpu, proc, wants_to_run)
    except KernelError as error:
        errno = error.errno
        raise
    finally:
        if (
            kvm.linux.lockdep.current in kvm.srcu.readers
        ):  # not after a failure inside of the guest
            kvm.srcu.release_read()
        vcpu.proc = None
        kvm.linux.lockdep.current.sigmask = None
        store_regs(vcpu)
        run.ready_for_interrupt_injection = int(not kvm.arch.irqchip)
        run.cr8 = vcpu.arch.sregs.cr8
        run.apic_base = vcpu.arch.sregs.apic_base
        kvm.linux.counters.kvm_exits += 1
        if kvm.linux.tp.emit:
            reason = run.exit_reason
            name = KvmExit(reason).name if reason in KvmExit._value2member_map_ else str(reason)
            kvm.linux.tp.emit(KvmUserspaceExit(kvm.id, vcpu.vcpu_id, name, errno))
    return 0


def _ioctl_run(vcpu: "KvmVcpu", proc: "Process", wants_to_run: bool) -> Steps[None]:
    kvm, run, arch = vcpu.kvm, vcpu.run, vcpu.arch
    if arch.mp_state is MpState.UNINITIALIZED:
        if not wants_to_run:
            raise KernelError(EINTR, "immediate_exit")
        yield from _block(vcpu, proc)
        yield from kvm_apic_accept_events(vcpu)
        if proc.signal_pending():
            run.exit_reason = KvmExit.INTR
            raise KernelError(EINTR, "signal while the vCPU was blocked")
        raise KernelError(EAGAIN, "the vCPU has left UNINITIALIZED; enter again")
    check_sync_regs(vcpu)
    if run.kvm_dirty_regs:
        sync_regs(vcpu)
    if not kvm.arch.irqchip:
        if run.cr8 & ~0xF:
            raise KernelError(EINVAL, f"cr8 {run.cr8:#x}")
        arch.sregs.cr8 = run.cr8
    complete = arch.complete_userspace_io
    if complete is not None:
        arch.complete_userspace_io = None
        if not (yield from complete(vcpu)):
            return
    if not wants_to_run:
        raise KernelError(EINTR, "immediate_exit")
    kvm.ops.vcpu_pre_run(vcpu)
    run.exit_reason = KvmExit.UNKNOWN
    while (yield from _vcpu_step(vcpu, proc)):
        if proc.signal_pending():
            run.exit_reason = KvmExit.INTR
            vcpu.stat["signal_exits"] += 1
            raise KernelError(EINTR, "signal")
        if kvm.linux.task_work.pending:  # xfer_to_guest_mode_handle_work()
            kvm.srcu.release_read()
            yield from kvm.linux.task_work.run()
            yield from kvm.srcu.acquire_read()
        yield _VCPU_RUN


def _vcpu_step(vcpu: "KvmVcpu", proc: "Process") -> Steps[int]:
    """vcpu_enter_guest() or vcpu_block()."""
    if vcpu.arch.mp_state is MpState.RUNNABLE:
        return (yield from _vcpu_enter_guest(vcpu))
    if not _runnable(vcpu):
        yield from _block(vcpu, proc)
        if not _runnable(vcpu):
            return 1  # a signal
    yield from kvm_apic_accept_events(vcpu)
    if vcpu.arch.mp_state in (MpState.HALTED, MpState.AP_RESET_HOLD):
        vcpu.arch.mp_state = MpState.RUNNABLE
    return 1


def _vcpu_enter_guest(vcpu: "KvmVcpu") -> Steps[int]:
    """What was asked of the vCPU meanwhile, then one entry into the guest."""
    kvm, arch = vcpu.kvm, vcpu.arch
    if kvm.vm_dead:  # KVM_REQ_VM_DEAD, which is never cleared
        raise KernelError(EIO, "the VM is dead")
    if arch.requests & KvmRequest.DIRTY_RING_SOFT_FULL:
        if vcpu.dirty_ring is not None and vcpu.dirty_ring.soft_full:
            vcpu.run.exit_reason = (
                KvmExit.DIRTY_RING_FULL
            )  # asked again until the ring is reset
            return 0
        arch.requests &= ~KvmRequest.DIRTY_RING_SOFT_FULL
    if arch.requests & KvmRequest.UPDATE_PROTECTED_GUEST_STATE:
        arch.requests &= ~KvmRequest.UPDATE_PROTECTED_GUEST_STATE
        yield from kvm_vcpu_reset(vcpu)
        if arch.mp_state is not MpState.RUNNABLE:
            return 1
    if arch.requests & KvmRequest.MSR_FILTER_CHANGED:
        arch.requests &= ~KvmRequest.MSR_FILTER_CHANGED
        kvm.ops.msr_filter_changed(vcpu)
    yield from kvm_apic_accept_events(vcpu)
    if arch.mp_state is MpState.INIT_RECEIVED:
        return 1
    arch.has_run = True
    vcpu.stat["exits"] += 1
    return (yield from kvm.ops.vcpu_run(vcpu))


def _runnable(vcpu: "KvmVcpu") -> bool:
    """kvm_arch_vcpu_runnable(): it runs, or something is there for it.

    A dead VM is no reason to wake up (KVM_REQUEST_NO_WAKEUP).
    """
    return vcpu.arch.mp_state is MpState.RUNNABLE or kvm_vcpu_has_events(vcpu)


def kvm_vcpu_has_events(vcpu: "KvmVcpu") -> bool:
    """Whether something waits for a vCPU that does not run."""
    return bool(
        vcpu.arch.requests & KvmRequest.UPDATE_PROTECTED_GUEST_STATE
    ) or kvm_apic_has_pending_init_or_sipi(vcpu)


def _block(vcpu: "KvmVcpu", proc: "Process") -> Steps[None]:
    """kvm_vcpu_block(): sleep until there is something for the vCPU, or a signal."""
    wait = Wait(
        f"wake-up of vCPU {vcpu.vcpu_id}",
        lambda: _runnable(vcpu) or proc.signal_on_its_way,
    )
    vcpu.kvm.srcu.release_read()
    while not _runnable(vcpu) and not proc.signal_pending():
        yield Point(f"block vCPU {vcpu.vcpu_id}", wait)
    yield from vcpu.kvm.srcu.acquire_read()


def kvm_emulate_hypercall(
    vcpu: "KvmVcpu", nr: int, args: tuple[int, int, int, int], *, long_mode: bool, cpl: int
) -> int | None:
    """A VMMCALL: the value for the guest's RAX, or None when it leaves to user space.

    MAP_GPA_RANGE changes nothing here: it tells the VMM, whose ioctl does.
    """
    if not long_mode:
        nr, args = nr & 0xFFFF_FFFF, tuple(a & 0xFFFF_FFFF for a in args)  # type: ignore[assignment]
    vcpu.stat["hypercalls"] += 1
    if cpl:
        return -_KVM_EPERM & _U64
    if nr != KVM_HC_MAP_GPA_RANGE:
        return -_KVM_ENOSYS & _U64
    if not vcpu.kvm.arch.hypercall_exit_enabled >> KVM_HC_MAP_GPA_RANGE & 1:
        return -_KVM_ENOSYS & _U64
    gpa, npages, attrs, _ = args
    if gpa & PAGE_MASK or not npages or (gpa >> 12) + npages > _U64:
        return -EINVAL & _U64
    run = vcpu.run
    run.exit_reason = KvmExit.HYPERCALL
    run.hypercall_nr = KVM_HC_MAP_GPA_RANGE
    run.hypercall_args = b"".join(
        a.to_bytes(8, "little") for a in (gpa, npages, attrs, 0, 0, 0)
    )
    run.hypercall_flags = KVM_EXIT_HYPERCALL_LONG_MODE if long_mode else 0
    if vcpu.kvm.linux.profile.hypercall_ret_cleared:
        run.hypercall_ret = 0
    vcpu.arch.complete_userspace_io = (
        _complete_hypercall_64 if long_mode else _complete_hypercall_32
    )
    return None


def _complete_hypercall_64(vcpu: "KvmVcpu") -> Steps[int]:
    vcpu.kvm.ops.complete_hypercall(vcpu, vcpu.run.hypercall_ret)
    yield from ()  # a completion is Steps; this one never blocks
    return 1


def _complete_hypercall_32(vcpu: "KvmVcpu") -> Steps[int]:
    vcpu.kvm.ops.complete_hypercall(vcpu, vcpu.run.hypercall_ret & 0xFFFF_FFFF)
    yield from ()  # a completion is Steps; this one never blocks
    return 1
