"""The page allocator: which page frames are free (mm/page_alloc.c; include/linux/mm.h
get_page()).

Deterministic: the lowest free frames first.  Owns free, allocated and leaked; what an allocated
frame is used for is its owner's business.  A frame whose owner frees it while somebody else
holds a reference to it (a fault in flight, get_user_pages()) becomes free when that reference
is put.
"""

from errno import ENOMEM
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from softcvm.hw.access import check_host_write
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE, Pfn, PgLevel
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = (
    "ALLOCATED",
    "FREE",
    "LEAKED",
    "PageAllocator",
    "PagesAllocated",
    "PagesFreed",
    "PagesLeaked",
)

FREE, ALLOCATED, LEAKED = 0, 1, 2
_PMD_ORDER = 9


class PagesAllocated(NamedTuple):
    pfn: int
    npages: int


class PagesFreed(NamedTuple):
    pfn: int
    npages: int


class PagesLeaked(NamedTuple):
    pfn: int
    npages: int


class PageAllocator(State):
    """Frames 0 .. pages-1.  Frame 0 and what reserve() names are never handed out."""

    saved = ("frames", "refs", "waiting")
    derived = {
        "_linux": "the host",
        "reserved": "constant after boot",
        "_lowest": "search hint: no frame below it is free",
        "_lowest_huge": "search hint: no 2M run below it is free",
    }

    def __init__(self, linux: "Linux", pages: int) -> None:
        self._linux = linux
        self.frames: RangeMap[int] = RangeMap(FREE, pages)
        self.refs: list[tuple[int, int]] = []
        """Runs [start, end) held by get_pages(), in the order they were taken."""
        self.waiting: RangeMap[bool] = RangeMap(False, pages)
        """Frames whose owner is gone and that wait for the last reference."""
        self.reserved: list[tuple[int, int]] = []
        """Runs [start, end) that reserve() took out."""
        self._lowest = 1
        self._lowest_huge = 0
        self.reserve(0, 1)

    def reserve(self, pfn: int, npages: int) -> None:
        """Take frames out at boot (e820: firmware, the RMP).  They count as allocated."""
        for start, end, state in self.frames.runs(pfn, pfn + npages):
            if state == FREE:
                self.frames.set(start, end, ALLOCATED)
                self.reserved.append((start, end))

    @property
    def free_pages(self) -> int:
        return sum(end - start for start, end, state in self.frames.runs() if state == FREE)

    @property
    def leaked_pages(self) -> int:
        return sum(end - start for start, end, state in self.frames.held() if state == LEAKED)

    def alloc_pages(self, order: int = 0) -> Pfn:
        """2^order contiguous frames, naturally aligned; contents as they were left.  ENOMEM."""
        ((pfn, _),) = self.alloc_run(1 << order, order)
        return pfn

    def alloc_run(self, npages: int, order: int = 0) -> list[tuple[Pfn, int]]:
        """npages frames of the given order as runs, lowest first: what npages >> order single
        calls give.

        ENOMEM, and then nothing is allocated.
        """
        runs, found, page = self._find(npages, order)
        if found < npages:
            raise KernelError(ENOMEM, f"{npages} pages of order {order}: there are {found}")
        return self._allocate(runs, order, page)

    def alloc_some(self, npages: int, order: int = 0) -> list[tuple[Pfn, int]]:
        """As many of npages as single calls would get before the first that fails; ENOMEM if
        that is none."""
        runs, found, page = self._find(npages, order)
        if not found:
            raise KernelError(ENOMEM, f"no free page of order {order}")
        return self._allocate(runs, order, page)

    def _find(self, npages: int, order: int) -> tuple[list[tuple[Pfn, int]], int, int]:
        """Free runs, how many pages they have together, and where the search ended."""
        if self._linux.choices.choose("alloc_pages", 2):
            raise KernelError(ENOMEM, f"no free page of order {order} (injected)")
        page = self._lowest
        if not order:
            start, end, state = self.frames.run(page)
            if state == FREE and page + npages <= end:  # the first free run has them all
                return [(Pfn(page), npages)], npages, page + npages
        size = 1 << order
        runs: list[tuple[Pfn, int]] = []
        found = 0
        if order >= _PMD_ORDER:
            page = max(page, self._lowest_huge)
        limit = self.frames.limit
        while found < npages and page < limit:
            start, end, state = self.frames.run(page)
            if state == FREE:
                base = -(-max(start, page) // size) * size
                count = min(npages - found, max(0, end - base) // size * size)
                if count:
                    runs.append((Pfn(base), count))
                    found += count
                    page = base + count
                    continue
            page = end
        return runs, found, page

    def _allocate(
        self, runs: list[tuple[Pfn, int]], order: int, searched: int
    ) -> list[tuple[Pfn, int]]:
        for pfn, count in runs:
            self._take(pfn, count)
        if order == _PMD_ORDER:
            self._lowest_huge = searched
        elif order == 0:
            self._lowest = searched
        return runs

    def free_run(self, pfn: int, npages: int) -> None:
        """The owner's reference to each frame is put.  Leaked frames stay leaked.

        ValueError for frames that are free already.
        """
        end = pfn + npages
        runs = self.frames.runs(pfn, end)
        if len(runs) != 1 or runs[0][2] != ALLOCATED:
            if any(state == FREE for _, _, state in runs):
                raise ValueError(
                    f"free of pfn {pfn:#x} x {npages:#x}: part of it is free already"
                )
            for start, stop, state in runs:
                if state == ALLOCATED:
                    self.free_run(start, stop - start)
            return
        if not self.refs:
            self._give(pfn, npages)
            return
        for start, stop, held in self._held(pfn, end):
            if held:
                self.waiting.set(start, stop, True)
            else:
                self._give(start, stop - start)

    def get_pages(self, pfn: int, npages: int) -> None:
        """One more reference to each frame: it stays allocated until put_pages()."""
        self.refs.append((pfn, pfn + npages))

    def put_pages(self, pfn: int, npages: int) -> None:
        """Put what get_pages() of the same run took."""
        end = pfn + npages
        self.refs.remove((pfn, end))
        for start, stop, _ in self.waiting.held(pfn, end):
            for lo, hi, held in self._held(start, stop):
                if not held:
                    self.waiting.set(lo, hi, False)
                    self._give(lo, hi - lo)

    def leak(self, pfn: int, npages: int) -> None:
        """snp_leak_pages(): frames that are never given out again, because firmware may still
        own them."""
        self.frames.set(pfn, pfn + npages, LEAKED)
        self.waiting.set(pfn, pfn + npages, False)
        if self._linux.tp.emit:
            self._linux.tp.emit(PagesLeaked(pfn, npages))

    def clear_pages(self, pfn: int, npages: int) -> None:
        """clear_page() of each frame through the direct map; HostRmpFault where one is
        assigned."""
        linux = self._linux
        linux.counters.bytes_zeroed += npages * PAGE_SIZE
        for start, end, level in linux.snp.direct_map.levels.runs(pfn, pfn + npages):
            check_host_write(
                linux.soc,
                start << PAGE_SHIFT,
                (end - start) << PAGE_SHIFT,
                min(level, PgLevel.PG_2M),
            )
        linux.soc.dram.zero(pfn, npages)

    def _take(self, pfn: int, npages: int) -> None:
        self.frames.set(pfn, pfn + npages, ALLOCATED)
        self._linux.counters.pages_allocated += npages
        if self._linux.tp.emit:
            self._linux.tp.emit(PagesAllocated(pfn, npages))

    def _give(self, pfn: int, npages: int) -> None:
        self.frames.set(pfn, pfn + npages, FREE)
        self._lowest = min(self._lowest, pfn)
        self._lowest_huge = min(self._lowest_huge, pfn)
        self._linux.counters.pages_freed += npages
        if self._linux.tp.emit:
            self._linux.tp.emit(PagesFreed(pfn, npages))

    def _held(self, pfn: int, end: int) -> list[tuple[int, int, bool]]:
        """[pfn, end) cut where references begin or end."""
        if not self.refs:
            return [(pfn, end, False)]
        cuts = sorted({pfn, end, *(c for run in self.refs for c in run if pfn < c < end)})
        return [
            (lo, hi, any(s < hi and lo < e for s, e in self.refs)) for lo, hi in pairwise(cuts)
        ]
