"""The order of the kernel's locks, outermost first; sim.steps raises LockOrder when it is
broken.

Documentation/virt/kvm/locking.rst and the comments at each lock, v7.2.  Two locks of equal rank
may be held together only where Linux nests them (two VMs' kvm->lock during an intra-host
migration).
"""

from enum import IntEnum

from softcvm.kernel.profile import KernelProfile

__all__ = ("Rank", "invalidate_lock_rank")


class Rank(IntEnum):
    """Rank of each lock: one may be taken while holding only locks of the same or a smaller
    rank."""

    KVM_LOCK = 10
    VCPU_MUTEX = 20
    SLOTS_LOCK = 30
    KVM_SRCU = 40
    GUEST_REQ_MUTEX = 41  # guest pages are copied with it held
    INVALIDATE_LOCK_BEFORE_7_0 = 42  # invalidate_lock before 7.0, see invalidate_lock_rank()
    SNP_VMSA_MUTEX = 43  # of the target of an AP creation; its page is looked up with it held
    MMAP_LOCK = 45
    INVALIDATE_LOCK = 50
    FOLIO_LOCK = 60
    MMU_LOCK = 70
    SEV_BITMAP_LOCK = 75
    SEV_DEACTIVATE_LOCK = 78
    SEV_MIRROR_LOCK = 80
    SEV_CMD_MUTEX = 90


def invalidate_lock_rank(profile: KernelProfile) -> Rank:
    """Where a guest_memfd's mapping->invalidate_lock stands relative to mmap_lock.

    Until 7.0 populate copied from user memory with it held, so it came first; 2a62345b3052
    turned the order round, because the host fault of an in-place converted page takes it inside
    mmap_lock.
    """
    return (
        Rank.INVALIDATE_LOCK if profile.populate_per_page else Rank.INVALIDATE_LOCK_BEFORE_7_0
    )
