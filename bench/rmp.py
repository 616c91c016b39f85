"""The Reverse Map Table: cost of one change as the table fragments, of 1 GiB, and memory of the whole."""

import ctypes
import tracemalloc
from random import Random

from bench.sides import Bench, Side, timed
from softcvm.abi.insn import Pvalidate
from softcvm.abi.rmp import RMPTABLE_CPU_BOOKKEEPING_SZ, RmpState, RmpupdateStatus
from softcvm.hw.insn.psmash import psmash
from softcvm.hw.insn.pvalidate import pvalidate
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.hw.npt import Npt
from softcvm.hw.profile import GENOA
from softcvm.hw.soc import Soc
from softcvm.sim.addr import PgLevel

__all__ = ("BENCHES",)

_PAGE = 4096
_HOST_PAGES = (1 << 40) // _PAGE
_GIB_PAGES = (1 << 30) // _PAGE
_ENTRY = 16


def _host() -> Soc:
    """1 TiB with the RMP on, every page the hypervisor's."""
    soc = Soc(GENOA, _HOST_PAGES)
    rmp = soc.rmp
    size = RMPTABLE_CPU_BOOKKEEPING_SZ + _ENTRY * _HOST_PAGES
    rmp.base = (_HOST_PAGES * _PAGE - size) & ~((1 << 20) - 1)
    rmp.end = rmp.base + size - 1
    rmp.enabled = True
    return soc


def _update(soc: Soc, pfn: int, new: RmpState, count: int = 1) -> None:
    status, _ = rmpupdate(soc, pfn * _PAGE, new, count)
    if status is not RmpupdateStatus.SUCCESS:
        raise RuntimeError(f"RMPUPDATE of pfn {pfn:#x}: {status.name}")


def _random_pages(soc: Soc, pages: int) -> Side:
    chance = Random(1)
    pfns = [chance.randrange(1, pages) for _ in range(4000)]

    def pairs() -> None:
        for pfn in pfns:
            if pfn & 0xFF:  # the multiples are what fragments the table
                _update(soc, pfn, RmpState(assigned=1, gpa=pfn * _PAGE, asid=2))
                _update(soc, pfn, RmpState())

    return timed(pairs)


def _fragmented() -> tuple[Side, Side]:
    fragmented, plain = _host(), _host()
    pages = 500_000 * 256
    for pfn in range(256, pages, 256):
        _update(fragmented, pfn, RmpState(assigned=1, gpa=pfn * _PAGE, asid=1))
    extents = len(fragmented.rmp.map)
    if extents < 999_000:
        raise RuntimeError(f"only {extents} extents")
    return _random_pages(fragmented, pages), _random_pages(plain, pages)


def _gib(size: int) -> tuple[Side, Side]:
    soc = _host()
    count = _GIB_PAGES // (512 if size else 1)
    raw = ctypes.create_string_buffer(_GIB_PAGES * _ENTRY)

    def there_and_back() -> None:
        _update(soc, 0, RmpState(assigned=1, pagesize=size, gpa=0, asid=1), count)
        _update(soc, 0, RmpState(pagesize=size), count)

    def memset_twice() -> None:
        ctypes.memset(raw, 1, len(raw))
        ctypes.memset(raw, 0, len(raw))

    return timed(there_and_back, repeat=20), timed(memset_twice, repeat=20)


def _ownership() -> tuple[Side, Side]:
    """Amounts, not times: bytes that the table of a host holds, and 1/64 of the 4 GiB of a real one."""

    def held() -> float:
        chance = Random(2)
        tracemalloc.start()
        soc = _host()
        guest = 16 * _GIB_PAGES
        _update(soc, 0, RmpState(assigned=1, pagesize=1, gpa=0, asid=1), guest // 512)
        npt = Npt()
        npt.set(0, 0, guest, PgLevel.PG_2M)
        pvalidate(soc, npt, 1, 0, Pvalidate(0, 1, True, guest // 512))
        shared: set[int] = set()
        for _ in range(100_000):
            pfn = chance.randrange(guest)
            if pfn in shared:
                shared.remove(pfn)
                _update(soc, pfn, RmpState(assigned=1, gpa=pfn * _PAGE, asid=1))
                continue
            if soc.rmp.head(pfn).pagesize:
                psmash(soc, (pfn - pfn % 512) * _PAGE)
            shared.add(pfn)
            _update(soc, pfn, RmpState())
        del shared, npt
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return float(current)

    return held, lambda: float(64 << 20)


BENCHES = (
    Bench(
        "fragmented",
        "random single-page RMPUPDATE at 1,000,000 extents",
        "the same at one extent",
        3.0,
        _fragmented,
    ),
    Bench(
        "gib-2m",
        "1 GiB given and taken back by RMPUPDATE, as 2M pages",
        "memset of the 16 bytes per page it stands for",
        0.5,
        lambda: _gib(1),
    ),
    Bench(
        "gib-4k",
        "1 GiB given and taken back by RMPUPDATE, as 4K pages",
        "memset of the 16 bytes per page it stands for",
        0.5,
        lambda: _gib(0),
    ),
    Bench(
        "ownership",
        "memory of the RMP: 1 TiB host, 16 GiB guest in 2M, 100,000 random 4K conversions",
        "64 MiB, 1/64 of the real table",
        1.0,
        _ownership,
        rounds=1,
    ),
)
