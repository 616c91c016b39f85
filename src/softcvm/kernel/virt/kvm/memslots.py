"""Memslots: which guest addresses are backed, and by what (virt/kvm/kvm_main.c, v7.2).

Owns struct kvm_memory_slot, the address spaces, and KVM_SET_USER_MEMORY_REGION(2) with every
check in its order.  A slot with a guest_memfd has two backings: private pages from the gmem,
shared ones from its user address.  Binding the gmem is guest_memfd.py; attributes are
mem_attributes.py and need no slot.

Locks: slots_lock around every change; synchronize_srcu() after each, so that nobody uses the
slots as they were when what they mapped is zapped or write-protected.  A change waits for running notifier invalidations, which must find the same
memslots at their end.
"""

from bisect import bisect_left, bisect_right, insort
from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import KvmUserspaceMemoryRegion2, MemFlag, VmType
from softcvm.kernel.arch.x86.kvm.mmu.tdp_mmu import (
    kvm_mmu_unmap_gfn_range,
    kvm_mmu_write_protect,
    kvm_mmu_zap_all,
)
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import access_ok
from softcvm.kernel.virt.kvm.guest_memfd import GmemFile, kvm_gmem_bind, kvm_gmem_unbind
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, Gfn, Hva, PgLevel, Pgoff, pages_per_level
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State
from softcvm.sim.steps import Steps, preempt

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = (
    "KVM_MEM_SLOTS_NUM",
    "KVM_USER_MEM_SLOTS",
    "KvmMemorySlot",
    "MemslotChange",
    "Memslots",
    "kvm_free_memslots",
    "kvm_set_memory_region",
    "kvm_vm_ioctl_set_memory_region",
    "nr_memslot_as_ids",
)

KVM_MEM_SLOTS_NUM = 32767
KVM_USER_MEM_SLOTS = KVM_MEM_SLOTS_NUM - 3  # three are KVM's own on x86
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7
_U64 = (1 << 64) - 1
_GUEST_MEMFD = int(MemFlag.GUEST_MEMFD)


class MemslotChange(NamedTuple):
    """A memslot was created, deleted, moved, or its flags changed."""

    vm: int
    change: str
    slot: int
    gfn: int
    npages: int
    flags: int


class KvmMemorySlot(State):
    """struct kvm_memory_slot.  Never changed once visible, except `invalid`, the gmem's weak
    pointer and the bits of the dirty bitmap."""

    saved = (
        "as_id",
        "id",
        "base_gfn",
        "npages",
        "flags",
        "userspace_addr",
        "gmem_file",
        "gmem_pgoff",
        "gmem_only",
        "invalid",
        "dirty_bitmap",
    )

    def __init__(
        self,
        as_id: int,
        slot_id: int,
        base_gfn: Gfn,
        npages: int,
        flags: int,
        userspace_addr: Hva,
    ) -> None:
        self.as_id = as_id
        self.id = slot_id
        self.base_gfn = base_gfn
        self.npages = npages
        self.flags = flags
        """MemFlag, as the plain number: faults look at it."""
        self.userspace_addr = userspace_addr
        self.gmem_file: GmemFile | None = None
        """Not a reference: guest_memfd.kvm_gmem_get_file() takes one, if there still is a
        file."""
        self.gmem_pgoff = Pgoff(0)
        self.gmem_only = False
        """KVM_MEMSLOT_GMEM_ONLY (6.18): a guest_memfd that can be mapped serves shared faults
        too."""
        self.invalid = False
        self.dirty_bitmap: RangeMap[bool] | None = None
        """By page of the slot; there while it has KVM_MEM_LOG_DIRTY_PAGES (dirty_log.py)."""

    @property
    def end_gfn(self) -> Gfn:
        return Gfn(self.base_gfn + self.npages)

    @property
    def key(self) -> int:
        """Names the slot inside its VM, as user space does."""
        return self.as_id << 16 | self.id

    @property
    def can_be_private(self) -> bool:
        """kvm_slot_can_be_private(), kvm_slot_has_gmem() from 6.18."""
        return bool(self.flags & _GUEST_MEMFD)

    def hva(self, gfn: int) -> Hva:
        return Hva(self.userspace_addr + (gfn - self.base_gfn << PAGE_SHIFT))

    def lpage_disallowed(self, gfn: int, level: PgLevel) -> bool:
        """lpage_info without the MIXED bit: whether geometry forbids a huge page at gfn.

        A page that leaves the slot, or a user address aligned differently from the gfn; the
        latter counts for private pages too.
        """
        size = pages_per_level(level)
        if (self.base_gfn ^ self.userspace_addr >> PAGE_SHIFT) & (size - 1):
            return True
        base = gfn - gfn % size
        return base < self.base_gfn or base + size > self.end_gfn


class Memslots(State):
    """One address space: slots by id and by gfn."""

    saved = ("by_id",)
    derived = {"_bases": "base gfns of by_id, sorted", "_by_base": "by_id by base gfn"}

    def __init__(self) -> None:
        self.by_id: dict[int, KvmMemorySlot] = {}
        self._bases: list[int] = []
        self._by_base: dict[int, KvmMemorySlot] = {}

    def at(self, gfn: int) -> KvmMemorySlot | None:
        """The slot that holds a gfn, INVALID or not."""
        i = bisect_right(self._bases, gfn)
        if not i:
            return None
        slot = self._by_base[self._bases[i - 1]]
        return slot if gfn < slot.base_gfn + slot.npages else None

    def overlapping(self, start: int, end: int) -> list[KvmMemorySlot]:
        """Slots that touch [start, end), in order of gfn."""
        first = max(bisect_right(self._bases, start) - 1, 0)
        last = bisect_left(self._bases, end, first)
        slots = [self._by_base[base] for base in self._bases[first:last]]
        if slots and slots[0].end_gfn <= start:
            del slots[0]
        return slots

    def insert(self, slot: KvmMemorySlot) -> None:
        """A slot that overlaps none."""
        insort(self._bases, slot.base_gfn)
        self._by_base[slot.base_gfn] = slot
        self.by_id[slot.id] = slot

    def remove(self, slot: KvmMemorySlot) -> None:
        if self._by_base.get(slot.base_gfn) is not slot:
            raise ValueError(f"slot {slot.id} is not where its gfn says")
        del self._bases[bisect_left(self._bases, slot.base_gfn)]
        del self._by_base[slot.base_gfn], self.by_id[slot.id]

    def all(self) -> list[KvmMemorySlot]:
        """In order of gfn."""
        return [self._by_base[base] for base in self._bases]


def nr_memslot_as_ids(kvm: "Kvm") -> int:
    """Address spaces: no SMM for guests with private memory."""
    return 1 if kvm.arch.has_private_mem else 2


def kvm_vm_ioctl_set_memory_region(
    kvm: "Kvm", proc: "Process", mem: KvmUserspaceMemoryRegion2
) -> Steps[None]:
    """KVM_SET_USER_MEMORY_REGION2, after the copy-in; the first version with the tail zero."""
    if mem.slot & 0xFFFF >= KVM_USER_MEM_SLOTS:
        raise KernelError(EINVAL, f"slot {mem.slot & 0xFFFF} is KVM's own or beyond the last")
    yield from kvm_set_memory_region(kvm, proc, mem)


def kvm_set_memory_region(
    kvm: "Kvm", proc: "Process", mem: KvmUserspaceMemoryRegion2
) -> Steps[None]:
    """Create, delete, move or reflag one slot, under slots_lock."""
    yield from kvm.slots_lock.acquire()
    try:
        yield from _set_memory_region(kvm, proc, mem)
    finally:
        kvm.slots_lock.release()


def _check_flags(kvm: "Kvm", flags: int) -> None:
    """check_memory_region_flags()"""
    private = flags & MemFlag.GUEST_MEMFD
    valid = 0 if private else int(MemFlag.LOG_DIRTY_PAGES)
    if kvm.arch.has_private_mem or kvm.linux.profile.gmem_mmap:
        valid |= MemFlag.GUEST_MEMFD.value
    if not private and not kvm.arch.has_protected_state:
        valid |= MemFlag.READONLY.value
    if flags & ~valid:
        raise KernelError(EINVAL, f"flags {flags:#x}, of which this VM allows {valid:#x}")


def _check_region(kvm: "Kvm", mem: KvmUserspaceMemoryRegion2) -> None:
    """The checks that need no slot; deletions go through them too."""
    size = mem.memory_size
    if size & PAGE_MASK:
        raise KernelError(EINVAL, f"memory_size {size:#x} is not page aligned")
    if mem.guest_phys_addr & PAGE_MASK:
        raise KernelError(
            EINVAL, f"guest_phys_addr {mem.guest_phys_addr:#x} is not page aligned"
        )
    if mem.userspace_addr & PAGE_MASK or not access_ok(mem.userspace_addr, size):
        raise KernelError(EINVAL, f"userspace_addr {mem.userspace_addr:#x} + {size:#x}")
    offset = mem.guest_memfd_offset
    if mem.flags & MemFlag.GUEST_MEMFD and (offset & PAGE_MASK or offset + size > _U64):
        raise KernelError(EINVAL, f"guest_memfd_offset {offset:#x} + {size:#x}")
    if mem.slot >> 16 >= nr_memslot_as_ids(kvm) or mem.slot & 0xFFFF >= KVM_MEM_SLOTS_NUM:
        raise KernelError(EINVAL, f"no address space {mem.slot >> 16}")
    if mem.guest_phys_addr + size > _U64:
        raise KernelError(EINVAL, "guest_phys_addr + memory_size wraps")
    if size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES:
        raise KernelError(EINVAL, "more pages than a slot may have")


def _set_memory_region(
    kvm: "Kvm", proc: "Process", mem: KvmUserspaceMemoryRegion2
) -> Steps[None]:
    """__kvm_set_memory_region()"""
    _check_flags(kvm, mem.flags)
    _check_region(kvm, mem)
    slots = kvm.memslots[mem.slot >> 16]
    old = slots.by_id.get(mem.slot & 0xFFFF)
    npages = mem.memory_size >> PAGE_SHIFT
    if not npages:
        if old is None:
            raise KernelError(EINVAL, f"no slot {mem.slot:#x} to delete")
        yield from _delete(kvm, slots, old)
        return
    new = KvmMemorySlot(
        mem.slot >> 16,
        mem.slot & 0xFFFF,
        Gfn(mem.guest_phys_addr >> PAGE_SHIFT),
        npages,
        mem.flags,
        Hva(mem.userspace_addr),
    )
    if old is None:
        if kvm.nr_memslot_pages + npages > _U64:
            raise KernelError(EINVAL, "pages of all slots together wrap")
    else:
        _check_modify(old, new)
        if new.base_gfn == old.base_gfn:
            if new.flags != old.flags:
                yield from _change_flags(kvm, slots, old, new)
            return
    if any(s.id != new.id for s in slots.overlapping(new.base_gfn, new.end_gfn)):
        raise KernelError(EEXIST, f"GFN {new.base_gfn:#x} + {npages:#x} overlaps another slot")
    if old is not None:
        yield from _move(kvm, slots, old, new)
        return
    yield from _create(kvm, proc, slots, new, mem)


def _check_modify(old: KvmMemorySlot, new: KvmMemorySlot) -> None:
    if new.flags & MemFlag.GUEST_MEMFD:
        raise KernelError(EINVAL, "a guest_memfd slot can only be deleted")
    if new.userspace_addr != old.userspace_addr or new.npages != old.npages:
        raise KernelError(EINVAL, "userspace_addr or memory_size of an existing slot")
    if (new.flags ^ old.flags) & (MemFlag.READONLY | MemFlag.GUEST_MEMFD):
        raise KernelError(EINVAL, "READONLY or GUEST_MEMFD of an existing slot")


def _prepare_dirty_bitmap(kvm: "Kvm", old: KvmMemorySlot | None, new: KvmMemorySlot) -> None:
    """kvm_prepare_memory_region(): a slot that goes on logging keeps its bitmap."""
    if not new.flags & MemFlag.LOG_DIRTY_PAGES or kvm.dirty_ring_size:
        return
    if old is not None and old.dirty_bitmap is not None:
        new.dirty_bitmap = old.dirty_bitmap
        return
    new.dirty_bitmap = RangeMap(False, new.npages)
    if kvm.dirty_log_initially_set:
        new.dirty_bitmap.set(0, new.npages, True)


def _change_flags(
    kvm: "Kvm", slots: Memslots, old: KvmMemorySlot, new: KvmMemorySlot
) -> Steps[None]:
    """KVM_MR_FLAGS_ONLY, which switches dirty logging; kvm_mmu_slot_apply_flags() write-protects what is mapped.

    Not where all bits are set from the start: each is write-protected when user space clears it.
    """
    _prepare_dirty_bitmap(kvm, old, new)
    yield from _replace(kvm, slots, old, new, "FLAGS_ONLY")
    if not new.flags & MemFlag.LOG_DIRTY_PAGES or new.flags & MemFlag.READONLY:
        return
    if kvm.dirty_log_initially_set:
        return
    yield from kvm.mmu_lock.acquire_write()
    kvm_mmu_write_protect(kvm, new, new.base_gfn, new.end_gfn)
    kvm.mmu_lock.release_write()
    kvm.flush_remote_tlbs()


def _check_max_gfn(kvm: "Kvm", slot: KvmMemorySlot) -> None:
    """kvm_arch_prepare_memory_region()"""
    if slot.end_gfn - 1 > (1 << (kvm.linux.soc.profile.phys_bits - PAGE_SHIFT)) - 1:
        raise KernelError(EINVAL, f"GFN {slot.end_gfn - 1:#x} is beyond the host's MAXPHYADDR")


def _create(
    kvm: "Kvm",
    proc: "Process",
    slots: Memslots,
    new: KvmMemorySlot,
    mem: KvmUserspaceMemoryRegion2,
) -> Steps[None]:
    if new.can_be_private:
        yield from kvm_gmem_bind(kvm, proc, new, mem.guest_memfd, mem.guest_memfd_offset)
    try:
        _check_max_gfn(kvm, new)
    except KernelError:
        if new.can_be_private:
            yield from kvm_gmem_unbind(new)
        raise
    _prepare_dirty_bitmap(kvm, None, new)
    yield from _wait_for_notifiers(kvm)
    slots.insert(new)
    yield from _synchronize_srcu(kvm)
    kvm.nr_memslot_pages += new.npages
    _tell(kvm, "CREATE", new)


def _wait_for_notifiers(kvm: "Kvm") -> Steps[None]:
    """kvm_swap_active_memslots(): until no invalidation of user addresses is under way."""
    while kvm.mn_active_invalidate_count:
        yield from preempt("wait for mmu notifiers")


def _synchronize_srcu(kvm: "Kvm") -> Steps[None]:
    """The end of kvm_swap_active_memslots(): until nobody uses the slots as they were before."""
    yield from kvm.srcu.acquire_write()
    kvm.srcu.release_write()


def _invalidate(kvm: "Kvm", slot: KvmMemorySlot) -> Steps[None]:
    """kvm_invalidate_memslot(): no new use of the slot, wait for the running ones, zap what it
    mapped."""
    slot.invalid = True
    yield from _synchronize_srcu(kvm)
    yield from kvm.mmu_lock.acquire_write()
    if (
        kvm.arch.vm_type is VmType.DEFAULT
        and not kvm.arch.disabled_quirks & KVM_X86_QUIRK_SLOT_ZAP_ALL
    ):
        flush = kvm_mmu_zap_all(kvm)
    else:
        flush = kvm_mmu_unmap_gfn_range(kvm, slot, slot.base_gfn, slot.end_gfn)
    if flush:
        kvm.flush_remote_tlbs()
    kvm.mmu_lock.release_write()
    kvm.ops.guest_memory_reclaimed(kvm)


def _delete(kvm: "Kvm", slots: Memslots, old: KvmMemorySlot) -> Steps[None]:
    yield from _invalidate(kvm, old)
    yield from _wait_for_notifiers(kvm)
    slots.remove(old)
    yield from _synchronize_srcu(kvm)
    kvm.nr_memslot_pages -= old.npages
    _tell(kvm, "DELETE", old)
    if old.can_be_private:
        yield from kvm_gmem_unbind(old)


def _move(kvm: "Kvm", slots: Memslots, old: KvmMemorySlot, new: KvmMemorySlot) -> Steps[None]:
    yield from _invalidate(kvm, old)
    try:
        _check_max_gfn(kvm, new)
    except KernelError:
        old.invalid = False
        raise
    _prepare_dirty_bitmap(kvm, old, new)
    yield from _replace(kvm, slots, old, new, "MOVE")


def _replace(
    kvm: "Kvm", slots: Memslots, old: KvmMemorySlot, new: KvmMemorySlot, change: str
) -> Steps[None]:
    yield from _wait_for_notifiers(kvm)
    slots.remove(old)
    slots.insert(new)
    yield from _synchronize_srcu(kvm)
    _tell(kvm, change, new)


def _tell(kvm: "Kvm", change: str, slot: KvmMemorySlot) -> None:
    if kvm.linux.tp.emit:
        kvm.linux.tp.emit(
            MemslotChange(kvm.id, change, slot.key, slot.base_gfn, slot.npages, int(slot.flags))
        )


def kvm_free_memslots(kvm: "Kvm") -> Steps[None]:
    """At VM destruction: unbind what is still bound."""
    for slots in kvm.memslots:
        for slot in slots.all():
            slots.remove(slot)
            if slot.can_be_private:
                yield from kvm_gmem_unbind(slot)
    kvm.nr_memslot_pages = 0
