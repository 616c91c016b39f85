"""Registers in kvm_run (KVM_CAP_SYNC_REGS): what user space changed goes in before KVM_RUN, what it wants to see comes
out after it (sync_regs(), store_regs(); arch/x86/kvm/x86.c, v6.12).
"""

from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmRegs, KvmSregs, KvmVcpuEvents
from softcvm.kernel.arch.x86.kvm.events import get_vcpu_events, set_vcpu_events
from softcvm.kernel.arch.x86.kvm.regs import get_regs, set_regs
from softcvm.kernel.arch.x86.kvm.sregs import get_sregs, set_sregs
from softcvm.kernel.errors import KernelError

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("KVM_SYNC_X86_VALID_FIELDS", "check_sync_regs", "store_regs", "sync_regs")

_REGS, _SREGS, _EVENTS = 1, 2, 4
KVM_SYNC_X86_VALID_FIELDS = _REGS | _SREGS | _EVENTS
_SREGS_AT, _EVENTS_AT = KvmRegs.SIZE, KvmRegs.SIZE + KvmSregs.SIZE
_END = _EVENTS_AT + KvmVcpuEvents.SIZE


def check_sync_regs(vcpu: "KvmVcpu") -> None:
    """EINVAL: a field that there is not, or any, where a VM protects its guests' state."""
    run = vcpu.run
    valid = 0 if vcpu.kvm.arch.has_protected_state else KVM_SYNC_X86_VALID_FIELDS
    if (run.kvm_valid_regs | run.kvm_dirty_regs) & ~valid:
        raise KernelError(EINVAL, "kvm_valid_regs or kvm_dirty_regs")


def sync_regs(vcpu: "KvmVcpu") -> None:
    """Take what kvm_dirty_regs names, and clear its bit.  EINVAL."""
    run, data = vcpu.run, vcpu.run.sync_regs
    if run.kvm_dirty_regs & _REGS:
        set_regs(vcpu, KvmRegs(data[:_SREGS_AT]))
        run.kvm_dirty_regs &= ~_REGS
    if run.kvm_dirty_regs & _SREGS:
        set_sregs(vcpu, KvmSregs(data[_SREGS_AT:_EVENTS_AT]))
        run.kvm_dirty_regs &= ~_SREGS
    if run.kvm_dirty_regs & _EVENTS:
        set_vcpu_events(vcpu, KvmVcpuEvents(data[_EVENTS_AT:_END]))
        run.kvm_dirty_regs &= ~_EVENTS


def store_regs(vcpu: "KvmVcpu") -> None:
    """Give what kvm_valid_regs names, unless the guest's state is protected."""
    run = vcpu.run
    if not run.kvm_valid_regs or vcpu.arch.guest_state_protected:
        return
    data = bytearray(run.sync_regs)
    if run.kvm_valid_regs & _REGS:
        data[:_SREGS_AT] = bytes(get_regs(vcpu))
    if run.kvm_valid_regs & _SREGS:
        data[_SREGS_AT:_EVENTS_AT] = bytes(get_sregs(vcpu))
    if run.kvm_valid_regs & _EVENTS:
        data[_EVENTS_AT:_END] = bytes(get_vcpu_events(vcpu))
    run.sync_regs = bytes(data)
