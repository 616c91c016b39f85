"""The nested page table: what the hypervisor lets a guest's addresses reach.  [APM2-24593 §15.25]

Owns its format (leaf mappings by level); KVM's MMU writes it, the processor walks it.  Mappings are runs
of one level with a constant pfn - gfn, so a contiguous GiB of 2M leaves is one run.
"""

from typing import NamedTuple

from softcvm.sim.addr import PgLevel, pages_per_level
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State

__all__ = ("Mapping", "Npt")

_LEVEL = 3
_WRITABLE = 4
_LEVELS = (PgLevel.PG_4K, PgLevel.PG_4K, PgLevel.PG_2M, PgLevel.PG_1G)
"""By number, because a call of PgLevel takes as long as the lookup."""

NptVal = tuple[int, int]
_NOT_PRESENT: NptVal = (0, 0)


class Mapping(NamedTuple):
    """A run of leaf mappings: gfn + i maps to pfn + i for i < npages."""

    gfn: int
    npages: int
    pfn: int
    level: PgLevel
    writable: bool


class Npt(State):
    saved = ("map",)
    derived = {"changes": "counts for whoever keeps translations"}

    def __init__(self) -> None:
        self.changes = 0
        """How often something was taken away: translations from before may not hold."""
        self.map: RangeMap[NptVal] = RangeMap(_NOT_PRESENT)

    def set(
        self, gfn: int, pfn: int, npages: int, level: PgLevel, *, writable: bool = True
    ) -> None:
        """Install leaf mappings of one level; gfn, pfn and npages are multiples of its size."""
        size = 1 << 9 * (level - 1)
        if (gfn | pfn | npages) % size:
            raise ValueError(
                f"level {level.name} mapping of gfn {gfn:#x} pfn {pfn:#x} x {npages:#x}"
            )
        self.map.set(gfn, gfn + npages, (level | (_WRITABLE if writable else 0), pfn - gfn))

    def lookup(self, gfn: int) -> Mapping | None:
        """The leaf mapping that holds a gfn, from its own first page; None when not present."""
        attrs, delta = self.map[gfn]
        if not attrs:
            return None
        level = _LEVELS[attrs & _LEVEL]
        size = pages_per_level(level)
        base = gfn - gfn % size
        return Mapping(base, size, base + delta, level, bool(attrs & _WRITABLE))

    def translate(self, gfn: int, npages: int) -> Mapping | None:
        """The contiguous translation that begins exactly at gfn, at most npages long."""
        _, end, (attrs, delta) = self.map.run(gfn)
        if not attrs:
            return None
        return Mapping(
            gfn,
            min(end - gfn, npages),
            gfn + delta,
            _LEVELS[attrs & _LEVEL],
            bool(attrs & _WRITABLE),
        )

    def zap(self, start: int, end: int) -> int:
        """Remove every leaf that touches [start, end), whole; the number of leaves removed."""
        leaves = 0
        for s, e, (attrs, _) in self.map.held(start, end):
            size = pages_per_level(_LEVELS[attrs & _LEVEL])
            first, last = s - s % size, -(-e // size) * size
            leaves += (last - first) // size
            self.map.set(first, last, _NOT_PRESENT)
            self.changes += 1
        return leaves

    def write_protect(self, start: int, end: int) -> bool:
        """Make every leaf that touches [start, end) read-only, whole; whether one was writable."""
        some = False
        for s, e, (attrs, delta) in self.map.held(start, end):
            if attrs & _WRITABLE:
                size = pages_per_level(_LEVELS[attrs & _LEVEL])
                self.map.set(s - s % size, -(-e // size) * size, (attrs & ~_WRITABLE, delta))
                some = True
                self.changes += 1
        return some

    def mappings(self, start: int = 0, end: int | None = None) -> list[Mapping]:
        """All translations in [start, end), clipped to it."""
        return [
            Mapping(s, e - s, s + delta, _LEVELS[attrs & _LEVEL], bool(attrs & _WRITABLE))
            for s, e, (attrs, delta) in self.map.held(start, end)
        ]
