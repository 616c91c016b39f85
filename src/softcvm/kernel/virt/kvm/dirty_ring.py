"""Dirty rings: each vCPU tells user space which pages it wrote (virt/kvm/dirty_ring.c, v7.2).

The ring lies in pages that user space maps from the vCPU's fd.  KVM publishes an entry with DIRTY; user space
collects it and sets RESET; KVM_RESET_DIRTY_RINGS takes the entry back and write-protects its page.  A ring that
is nearly full keeps its vCPU out of the guest.  Owns the ring and both its indices; when a page is dirty is
dirty_log.py's.

Locks: slots_lock for a reset; the vCPU's mutex for a push.
"""

from softcvm.abi.kvm.memory import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KvmDirtyGfn
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.state import State

__all__ = ("KVM_DIRTY_RING_MAX_ENTRIES", "KVM_DIRTY_RING_RSVD_ENTRIES", "KvmDirtyRing")

KVM_DIRTY_RING_MAX_ENTRIES = 65536
KVM_DIRTY_RING_RSVD_ENTRIES = 64
"""Entries kept free for what is logged before the vCPU is stopped; SVM adds none of its own."""


class KvmDirtyRing(State):
    """struct kvm_dirty_ring.  `dirty_index` and `reset_index` only grow; `size` is a power of two."""

    saved = ("pages", "size", "dirty_index", "reset_index")

    def __init__(self, nbytes: int) -> None:
        self.size = nbytes // KvmDirtyGfn.SIZE
        self.pages = [bytearray(PAGE_SIZE) for _ in range(nbytes >> PAGE_SHIFT)]
        self.dirty_index = 0
        self.reset_index = 0

    @property
    def used(self) -> int:
        """A u32: huge when user space has made up entries and had them reset."""
        return self.dirty_index - self.reset_index & (1 << 32) - 1

    @property
    def full(self) -> bool:
        return self.used >= self.size

    @property
    def soft_full(self) -> bool:
        """kvm_dirty_ring_soft_full(): only the reserve is left."""
        return self.used >= self.size - KVM_DIRTY_RING_RSVD_ENTRIES

    def push(self, slot: int, offset: int) -> None:
        """kvm_dirty_ring_push(): publish a page; over the oldest one when the ring is full."""
        self._store(
            self.dirty_index, KvmDirtyGfn(flags=KVM_DIRTY_GFN_F_DIRTY, slot=slot, offset=offset)
        )
        self.dirty_index += 1

    def pop_harvested(self) -> KvmDirtyGfn | None:
        """The oldest entry, if user space has set RESET in it; invalid from here on."""
        entry = self._load(self.reset_index)
        if not entry.flags & KVM_DIRTY_GFN_F_RESET:
            return None
        self._store(
            self.reset_index, KvmDirtyGfn(flags=0, slot=entry.slot, offset=entry.offset)
        )
        self.reset_index += 1
        return entry

    def _place(self, index: int) -> tuple[bytearray, int]:
        at = index % self.size * KvmDirtyGfn.SIZE
        return self.pages[at >> PAGE_SHIFT], at % PAGE_SIZE

    def _load(self, index: int) -> KvmDirtyGfn:
        page, at = self._place(index)
        return KvmDirtyGfn(page[at : at + KvmDirtyGfn.SIZE])

    def _store(self, index: int, entry: KvmDirtyGfn) -> None:
        page, at = self._place(index)
        page[at : at + KvmDirtyGfn.SIZE] = entry.data
