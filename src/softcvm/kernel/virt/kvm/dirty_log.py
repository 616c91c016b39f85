"""The ioctls of dirty logging as far as a VM without a log answers them (virt/kvm/kvm_main.c, v7.2).

Owns KVM_CLEAR_DIRTY_LOG's refusals and KVM_RESET_DIRTY_RINGS of a VM that has no ring, which is every
VM here: enabling one is Unmodelled.  KVM_GET_DIRTY_LOG is memslots.py.  No slot with a guest_memfd logs
(KVM_SET_USER_MEMORY_REGION2 refuses the flag); what a slot that does log has collected is Unmodelled.

Locks: slots_lock.
"""

from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING

from softcvm.abi.kvm.memory import KvmClearDirtyLog, MemFlag
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.virt.kvm.memslots import KVM_USER_MEM_SLOTS
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = ("kvm_vm_ioctl_clear_dirty_log", "kvm_vm_ioctl_reset_dirty_pages")

_BITS_PER_LONG = 64


def kvm_vm_ioctl_clear_dirty_log(kvm: "Kvm", log: KvmClearDirtyLog) -> Steps[None]:
    """KVM_CLEAR_DIRTY_LOG.  EINVAL: slot number, first_page, range.  ENOENT: no log."""
    yield from kvm.slots_lock.acquire()
    try:
        _check_clear(kvm, log)
        raise Unmodelled("KVM_CLEAR_DIRTY_LOG of a slot with KVM_MEM_LOG_DIRTY_PAGES")
    finally:
        kvm.slots_lock.release()


def _check_clear(kvm: "Kvm", log: KvmClearDirtyLog) -> None:
    as_id, slot_id = log.slot >> 16, log.slot & 0xFFFF
    if as_id >= len(kvm.memslots) or slot_id >= KVM_USER_MEM_SLOTS:
        raise KernelError(EINVAL, f"no slot {log.slot:#x}")
    if log.first_page % _BITS_PER_LONG:
        raise KernelError(EINVAL, f"first_page {log.first_page:#x} is not the first of a word")
    slot = kvm.memslots[as_id].by_id.get(slot_id)
    if slot is None or not slot.flags & MemFlag.LOG_DIRTY_PAGES:
        raise KernelError(ENOENT, f"slot {log.slot:#x} keeps no dirty bitmap")
    left = slot.npages - log.first_page
    if log.num_pages > left or (log.num_pages < left and log.num_pages % _BITS_PER_LONG):
        raise KernelError(
            EINVAL, f"pages {log.first_page:#x} + {log.num_pages:#x} of {slot.npages:#x}"
        )


def kvm_vm_ioctl_reset_dirty_pages(kvm: "Kvm") -> int:
    """KVM_RESET_DIRTY_RINGS.  EINVAL: the VM has no rings."""
    raise KernelError(EINVAL, f"VM {kvm.id} has no dirty rings")
