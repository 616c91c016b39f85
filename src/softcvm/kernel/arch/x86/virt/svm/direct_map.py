"""The kernel direct map: at what size Linux maps each page of memory for itself.

A host write through a mapping that contains an assigned page is an RMP #PF even when the written page is
not the assigned one, so Linux splits a large mapping before one of its 4K pages is given away
(adjust_direct_map() in arch/x86/virt/svm/sev.c, v7.2) and never joins it again.  Owns that bookkeeping;
nothing else in the model unmaps or remaps the direct map.
"""

from softcvm.kernel.counters import KernelCounters
from softcvm.sim.addr import Pfn, PgLevel, pages_per_level
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State

__all__ = ("DirectMap",)

_2M = pages_per_level(PgLevel.PG_2M)
_1G = pages_per_level(PgLevel.PG_1G)


class DirectMap(State):
    """Level of the mapping of each page: the largest that fits at boot, smaller after splits."""

    saved = ("levels",)
    derived = {"counters": "statistics"}

    def __init__(self, memory_pages: int, counters: KernelCounters) -> None:
        self.counters = counters
        self.levels: RangeMap[PgLevel] = RangeMap(PgLevel.PG_4K, memory_pages)
        if memory_pages >= _2M:
            self.levels.set(0, memory_pages - memory_pages % _2M, PgLevel.PG_2M)
        if memory_pages >= _1G:
            self.levels.set(0, memory_pages - memory_pages % _1G, PgLevel.PG_1G)

    def level(self, pfn: Pfn) -> PgLevel:
        """The size of the mapping through which the kernel reaches a page."""
        return self.levels[pfn]

    def adjust(self, pfn: Pfn, level: PgLevel, count: int) -> None:
        """Split what maps `count` pages of this level that are about to change hands.

        A whole 2M page needs no split: the processor checks a 1G mapping by its 2M pieces.
        """
        if level != PgLevel.PG_4K or count <= 0:
            return
        before = self.levels.runs(pfn, pfn + count)
        if len(before) == 1 and before[0][2] == PgLevel.PG_4K:
            return
        for start, end, held in before:
            if held == PgLevel.PG_1G:
                self._split_1g(start - start % _1G, -(-end // _1G) * _1G)
        for start, end, held in self.levels.runs(pfn, pfn + count):
            if held == PgLevel.PG_2M:
                first, last = start - start % _2M, -(-end // _2M) * _2M
                self.counters.direct_map_splits += (last - first) // _2M
                self.levels.set(first, last, PgLevel.PG_4K)

    def _split_1g(self, first: int, last: int) -> None:
        for start, end, held in self.levels.runs(first, last):
            if held == PgLevel.PG_1G:
                self.levels.set(start, end, PgLevel.PG_2M)
