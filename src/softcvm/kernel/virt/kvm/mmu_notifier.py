"""KVM hears of changes in the VMM's address space (kvm_mmu_notifier_*, virt/kvm/kvm_main.c,
v7.2).

Zaps shared mappings whose user address range changes, between start and end of an invalidation,
so that no fault can bring the old page back.  A range that no memslot uses costs nothing and
bumps no sequence count.

Locks: mmu_lock; never slots_lock, because the caller holds mmap_lock.
"""

from typing import TYPE_CHECKING

from softcvm.kernel.arch.x86.kvm.mmu.tdp_mmu import kvm_mmu_unmap_gfn_range, kvm_mmu_zap_all
from softcvm.sim.addr import PAGE_SHIFT, Hva
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = ("KvmMmuNotifier",)


class KvmMmuNotifier:
    """struct mmu_notifier of one VM."""

    __slots__ = ("kvm",)

    def __init__(self, kvm: "Kvm") -> None:
        self.kvm = kvm

    def invalidate_range_start(self, start: Hva, end: Hva) -> Steps[None]:
        kvm = self.kvm
        kvm.mn_active_invalidate_count += 1
        hits = self._hits(start, end)
        if not hits:
            return
        yield from kvm.mmu_lock.acquire_write()
        kvm.mmu_invalidate_begin()
        flush = False
        for slot, lo, hi in hits:
            kvm.mmu_invalidate_range_add(lo, hi)
            flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)
        if flush:
            kvm.flush_remote_tlbs()
        kvm.mmu_lock.release_write()
        kvm.ops.guest_memory_reclaimed(kvm)

    def invalidate_range_end(self, start: Hva, end: Hva) -> Steps[None]:
        kvm = self.kvm
        if self._hits(start, end):
            yield from kvm.mmu_lock.acquire_write()
            kvm.mmu_invalidate_end()
            kvm.mmu_lock.release_write()
        kvm.mn_active_invalidate_count -= 1

    def mm_release(self) -> Steps[None]:
        """kvm_flush_shadow_all(): the address space, or the VM, goes away."""
        kvm = self.kvm
        yield from kvm.mmu_lock.acquire_write()
        kvm_mmu_zap_all(kvm)
        kvm.mmu_lock.release_write()

    def _hits(self, start: Hva, end: Hva) -> "list[tuple[KvmMemorySlot, int, int]]":
        """Memslots with user addresses in [start, end), and the gfns there."""
        found = []
        for space in self.kvm.memslots:
            for slot in space.all():
                lo = max(start, slot.userspace_addr)
                hi = min(end, slot.userspace_addr + (slot.npages << PAGE_SHIFT))
                if lo < hi:
                    base = slot.base_gfn - (slot.userspace_addr >> PAGE_SHIFT)
                    found.append((slot, base + (lo >> PAGE_SHIFT), base + (hi >> PAGE_SHIFT)))
        return found
