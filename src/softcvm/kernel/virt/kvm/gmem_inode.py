"""The storage behind a guest_memfd: inode, page cache, invalidation, fallocate
(virt/kvm/guest_memfd.c, v7.2).

The inode is the physical storage; a gmem_file is one VM's view of it.  Folios live as long as
the inode. How files come and go, bind to memslots and hand pages to a guest is guest_memfd.py;
mapping them into the host is gmem_mmap.py; what the RMP does when a page leaves is the arch's
gmem_invalidate hook.

Locks, outermost first: inode.invalidate_lock, folio locks, kvm.mmu_lock.
"""

from errno import EINTR, EINVAL, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import GmemFlag
from softcvm.kernel.arch.x86.kvm.mmu.tdp_mmu import kvm_mmu_unmap_gfn_range
from softcvm.kernel.errors import KernelError
from softcvm.kernel.fs.file import File
from softcvm.kernel.locks import Rank, invalidate_lock_rank
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PTRS_PER_PMD, Pfn, Pgoff
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State
from softcvm.sim.steps import Mutex, Point, RwSem, Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.mm.mmap import MmStruct, Vma
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "FALLOC_FL_KEEP_SIZE",
    "FALLOC_FL_PUNCH_HOLE",
    "Folio",
    "FolioRun",
    "GmemAllocate",
    "GmemFile",
    "GmemFree",
    "GmemInode",
    "kvm_gmem_allocate",
    "kvm_gmem_error_folio",
    "kvm_gmem_fallocate",
    "kvm_gmem_get_file",
    "kvm_gmem_get_folio",
    "kvm_gmem_invalidate_end",
    "kvm_gmem_invalidate_end_file",
    "kvm_gmem_invalidate_start",
    "kvm_gmem_invalidate_start_file",
    "kvm_gmem_migrate_folio",
    "kvm_gmem_punch_hole",
    "truncate_inode_pages_range",
)

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
_PMD_ORDER = 9


class GmemAllocate(NamedTuple):
    """Folios entered the page cache of a guest_memfd."""

    inode: int
    pgoff: int
    npages: int
    pfn: int
    order: int


class GmemFree(NamedTuple):
    """Folios left the page cache of a guest_memfd."""

    inode: int
    pgoff: int
    npages: int
    pfn: int


class Folio(NamedTuple):
    """What the page cache holds at an index: pfn = index + delta, in a folio of this order.

    `uptodate` means what the kernel version says it means (profile); with 2M folios it is kept per page.
    """

    delta: int
    order: int
    uptodate: bool = False
    hwpoison: bool = False


class FolioRun(NamedTuple):
    """Neighbouring pages [pgoff, pgoff + npages) of like folios; `lock` is what unlock_folios()
    takes."""

    pgoff: Pgoff
    npages: int
    pfn: Pfn
    order: int
    uptodate: bool
    hwpoison: bool
    lock: tuple[int, int]


class GmemInode(State):
    """The physical storage."""

    saved = ("ino", "size", "flags", "folios", "files", "i_mmap")
    derived = {
        "linux": "the host",
        "invalidate_lock": "free at quiescent points",
        "_locked": "no folio is locked at quiescent points",
    }

    def __init__(self, linux: "Linux", size: int, flags: GmemFlag) -> None:
        self.linux = linux
        self.ino = linux.next_ino
        linux.next_ino += 1
        self.size = size
        self.flags = flags
        self.folios: RangeMap[Folio | None] = RangeMap(None, size >> PAGE_SHIFT)
        """The page cache (mapping->i_pages)."""
        self.files: list[GmemFile] = []
        """mapping->i_private_list: every VM's view."""
        self.i_mmap: list[tuple[MmStruct, Vma]] = []
        rank = invalidate_lock_rank(linux.profile)
        self.invalidate_lock = RwSem(linux.lockdep, "gmem invalidate_lock", rank)
        self._locked: dict[tuple[int, int], Mutex] = {}
        linux.gmem_inodes.append(self)

    @property
    def npages(self) -> int:
        return self.size >> PAGE_SHIFT

    def mark_uptodate(self, start: int, end: int) -> None:
        """folio_mark_uptodate() of what the page cache holds in [start, end)."""
        for s, e, folio in self.folios.runs(start, end):
            if folio is not None and not folio.uptodate:
                self.folios.set(s, e, Folio(folio.delta, folio.order, True, folio.hwpoison))

    def lock_folios(self, start: int, end: int) -> Steps[tuple[int, int]]:
        """folio_lock() of every folio that touches [start, end); what it gives is for
        unlock_folios()."""
        if self.linux.profile.gmem_max_order:
            start &= ~(PTRS_PER_PMD - 1)
            end = -(-end // PTRS_PER_PMD) * PTRS_PER_PMD
        lock = Mutex(self.linux.lockdep, f"folio lock {start:#x}", Rank.FOLIO_LOCK)
        while self._locked and (held := self._lock_over(start, end)) is not None:
            yield Point(f"wait {held.name}", held)
        locked = start, end
        self._locked[locked] = lock
        yield from lock.acquire()
        return locked

    def unlock_folios(self, locked: tuple[int, int]) -> None:
        self._locked.pop(locked).release()

    def _lock_over(self, start: int, end: int) -> Mutex | None:
        over = (lock for (s, e), lock in self._locked.items() if s < end and start < e)
        return next(over, None)


class GmemFile(State):
    """struct gmem_file: one VM's view of an inode.  Holds a reference to the VM."""

    saved = ("inode", "bindings", "slots")
    derived = {"kvm": "the VM it views the inode for", "file": "the struct file around it"}

    file: File

    def __init__(self, inode: GmemInode, kvm: "Kvm") -> None:
        self.inode = inode
        self.kvm = kvm
        self.bindings: RangeMap[int | None] = RangeMap(None)
        """index -> key of the memslot bound to it."""
        self.slots: dict[int, KvmMemorySlot] = {}

    def bound(self, start: int, end: int) -> "list[KvmMemorySlot]":
        """The memslots bound to any index in [start, end), in order."""
        runs = self.bindings.runs(start, end)
        if len(runs) == 1:
            key = runs[0][2]
            return [self.slots[key]] if key is not None else []
        keys = dict.fromkeys(key for _, _, key in runs)
        return [self.slots[key] for key in keys if key is not None]


def kvm_gmem_get_file(slot: "KvmMemorySlot") -> File | None:
    """A reference to the file behind a slot, unless it is closed or being closed."""
    return slot.gmem_file.file.get_active() if slot.gmem_file is not None else None


# Page cache


def kvm_gmem_get_folio(inode: GmemInode, index: int, end: int) -> Steps[FolioRun]:
    """The folios from `index` on, allocated where the file has a hole, locked.  ENOMEM.

    At most up to `end`, and at most as far as they are alike: what the loop over single pages
    gives first.
    """
    while True:
        found = inode.folios.run(index)
        start, stop, folio = found
        last = min(end, stop)
        lock = yield from inode.lock_folios(index, last)
        if (
            inode.folios.run(index) != found
        ):  # truncated, or filled, while we waited for the lock
            inode.unlock_folios(lock)
            continue
        if folio is None:
            try:
                _allocate(inode, start, stop, index, last)
            except KernelError:
                if inode.folios[index] is None:
                    inode.unlock_folios(lock)
                    raise  # else memory ran out later: what there is comes first
            _, stop, folio = inode.folios.run(index)
            if folio is None:
                raise ValueError(
                    f"hole at index {index:#x} of inode {inode.ino} after allocation"
                )
        npages = min(last, stop) - index
        delta, order, uptodate, hwpoison = folio
        return FolioRun(
            Pgoff(index), npages, Pfn(index + delta), order, uptodate, hwpoison, lock
        )


def _allocate(inode: GmemInode, hole_start: int, hole_end: int, index: int, end: int) -> None:
    """Fill the hole at [index, end) with the folios that single faults in ascending order would
    take."""
    if inode.linux.profile.gmem_max_order < _PMD_ORDER:
        _allocate_order(inode, index, end - index, 0)
        return
    page = index
    while page < end:
        base = page & ~(PTRS_PER_PMD - 1)
        if base >= hole_start and base + PTRS_PER_PMD <= hole_end:
            last = min(-(-end // PTRS_PER_PMD), hole_end // PTRS_PER_PMD) * PTRS_PER_PMD
            taken = _allocate_huge(inode, base, last)
            if taken > base:
                page = taken
                hole_start = taken
                continue
        stop = min(end, base + PTRS_PER_PMD)
        _allocate_order(inode, page, stop - page, 0)
        page = hole_start = stop


def _allocate_huge(inode: GmemInode, base: int, end: int) -> int:
    """2M folios for [base, end) as far as memory has them; where that stopped."""
    try:
        _allocate_order(inode, base, end - base, _PMD_ORDER)
    except KernelError as error:
        if error.errno != ENOMEM:
            raise
        while base < end and inode.folios[base] is not None:
            base += PTRS_PER_PMD
        return base
    return end


def _allocate_order(inode: GmemInode, index: int, npages: int, order: int) -> None:
    """ENOMEM in the middle leaves what was allocated before it."""
    emit = inode.linux.tp.emit
    end = index + npages
    while index < end:
        for pfn, count in inode.linux.page_alloc.alloc_some(end - index, order):
            inode.folios.set(index, index + count, Folio(pfn - index, order))
            if emit:
                emit(GmemAllocate(inode.ino, index, count, pfn, order))
            index += count


def truncate_inode_pages_range(inode: GmemInode, start: int, end: int) -> Steps[None]:
    """Remove folios from the page cache; each is invalidated by the arch the moment it leaves.

    A reference that somebody still holds keeps the frame from being reused, not from being
    invalidated.
    """
    linux = inode.linux
    if linux.profile.gmem_max_order:
        _split_huge(inode, start)
        _split_huge(inode, end)
    for first, last, folio in inode.folios.held(start, end):
        if folio is None:
            continue
        lock = yield from inode.lock_folios(first, last)
        for mm, vma in list(inode.i_mmap):
            yield from mm.zap_file_pages(vma, first, last)
        inode.folios.set(first, last, None)
        pfn = Pfn(first + folio.delta)
        linux.kvm_x86_ops.gmem_invalidate(linux, pfn, Pfn(pfn + last - first))
        inode.unlock_folios(lock)
        if linux.tp.emit:
            linux.tp.emit(GmemFree(inode.ino, first, last - first, pfn))
        linux.page_alloc.free_run(pfn, last - first)


def _split_huge(inode: GmemInode, index: int) -> None:
    """split_folio() of a 2M folio that a range ends inside of."""
    if index % PTRS_PER_PMD == 0 or index >= inode.npages:
        return
    folio = inode.folios[index]
    if folio is not None and folio.order:
        base = index & ~(PTRS_PER_PMD - 1)
        inode.folios.update(
            base, base + PTRS_PER_PMD, lambda part: part and part._replace(order=0)
        )


# Invalidation: every binding of every file, begin and end over the same set


def kvm_gmem_invalidate_start(inode: GmemInode, start: int, end: int) -> Steps[None]:
    """Zap every VM's view of [start, end).  Named kvm_gmem_invalidate_begin() in v6.12."""
    for gmem in inode.files:
        yield from kvm_gmem_invalidate_start_file(gmem, start, end)


def kvm_gmem_invalidate_start_file(gmem: GmemFile, start: int, end: int) -> Steps[None]:
    slots = gmem.bound(start, end)
    if not slots:
        return
    kvm = gmem.kvm
    yield from kvm.mmu_lock.acquire_write()
    kvm.mmu_invalidate_begin()
    flush = False
    for slot in slots:
        lo = slot.base_gfn + max(slot.gmem_pgoff, start) - slot.gmem_pgoff
        hi = slot.base_gfn + min(slot.gmem_pgoff + slot.npages, end) - slot.gmem_pgoff
        kvm.mmu_invalidate_range_add(lo, hi)
        flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)
    if flush:
        kvm.flush_remote_tlbs()
    kvm.mmu_lock.release_write()


def kvm_gmem_invalidate_end(inode: GmemInode, start: int, end: int) -> Steps[None]:
    for gmem in inode.files:
        yield from kvm_gmem_invalidate_end_file(gmem, start, end)


def kvm_gmem_invalidate_end_file(gmem: GmemFile, start: int, end: int) -> Steps[None]:
    bound = gmem.bindings.runs(start, end)
    if len(bound) == 1 and bound[0][2] is None:
        return
    yield from gmem.kvm.mmu_lock.acquire_write()
    gmem.kvm.mmu_invalidate_end()
    gmem.kvm.mmu_lock.release_write()


# fallocate


def kvm_gmem_fallocate(
    inode: GmemInode, proc: "Process", mode: int, offset: int, length: int
) -> Steps[None]:
    """fallocate(2), after the checks of the VFS."""
    if not mode & FALLOC_FL_KEEP_SIZE:
        raise KernelError(
            EOPNOTSUPP, "the size of a guest_memfd never changes: KEEP_SIZE is needed"
        )
    if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
        raise KernelError(EOPNOTSUPP, f"fallocate mode {mode:#x}")
    if (offset | length) & PAGE_MASK:
        raise KernelError(EINVAL, "offset or length is not page aligned")
    if mode & FALLOC_FL_PUNCH_HOLE:
        return kvm_gmem_punch_hole(inode, offset, length)
    return kvm_gmem_allocate(inode, proc, offset, length)


def kvm_gmem_allocate(
    inode: GmemInode, proc: "Process", offset: int, length: int
) -> Steps[None]:
    """Fill the range with folios, neither zeroed nor prepared.  EINTR and ENOMEM keep what was
    done."""
    if offset + length > inode.size:
        raise KernelError(
            EINVAL, f"[{offset:#x}, {offset + length:#x}) leaves a file of {inode.size:#x}"
        )
    yield from inode.invalidate_lock.acquire_read()
    try:
        index, end = offset >> PAGE_SHIFT, offset + length >> PAGE_SHIFT
        while index < end:
            if proc.signal_pending():
                raise KernelError(EINTR, f"signal at index {index:#x}")
            npages = proc.pages_before_signal(end - index)
            run = yield from kvm_gmem_get_folio(inode, index, index + npages)
            inode.unlock_folios(run.lock)
            size = 1 << run.order  # Linux goes on behind the folio, and looks once for each
            folios = -(-(index % size + run.npages) // size)
            proc.looked(folios - 1)
            index = (index & -size) + folios * size
    finally:
        inode.invalidate_lock.release_read()


def kvm_gmem_punch_hole(inode: GmemInode, offset: int, length: int) -> Steps[None]:
    """Zap and free a range; it may end or lie beyond the file."""
    start = min(offset >> PAGE_SHIFT, inode.npages)
    end = min(offset + length >> PAGE_SHIFT, inode.npages)
    yield from inode.invalidate_lock.acquire_write()
    try:
        if start < end:
            yield from kvm_gmem_invalidate_start(inode, start, end)
            yield from truncate_inode_pages_range(inode, start, end)
            yield from kvm_gmem_invalidate_end(inode, start, end)
    finally:
        inode.invalidate_lock.release_write()


# What the rest of mm asks of these folios


def kvm_gmem_migrate_folio(inode: GmemInode, index: int) -> None:
    """Compaction or migration wants a folio moved: never, and Linux warns.  EINVAL."""
    inode.linux.counters.migration_refused += 1
    inode.linux.warn("kvm_gmem_migrate_folio", f"index {index:#x} of inode {inode.ino}")
    raise KernelError(EINVAL, "guest_memfd folios do not move")


def kvm_gmem_error_folio(inode: GmemInode, index: int) -> Steps[None]:
    """memory_failure(): zap the folio everywhere and leave it in place, poisoned
    (MF_DELAYED)."""
    folio = inode.folios[index]
    if folio is None:
        return
    start = index & ~((1 << folio.order) - 1)
    end = start + (1 << folio.order)
    yield from inode.invalidate_lock.acquire_read()
    inode.folios.update(start, end, lambda part: part and part._replace(hwpoison=True))
    yield from kvm_gmem_invalidate_start(inode, start, end)
    yield from kvm_gmem_invalidate_end(inode, start, end)
    inode.invalidate_lock.release_read()
