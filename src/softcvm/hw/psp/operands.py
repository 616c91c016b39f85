"""What every command does with its operands: reserved bits, pages, reads and writes.

Owns the shared checks and their statuses; the order in which a command makes them is its own.
A shared check that fails raises Refused, which Psp.command() turns into the command's status.

Firmware looks at the RMP entry at a page's own place [ASPFW]: inside a 2M page that is a
covered entry, whose state is Reclaim.  Only the debug commands resolve through the head.
"""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.layout import Bits, Layout
from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import SnpStatus
from softcvm.hw.memenc import Key
from softcvm.hw.psp.gctx import Gctx
from softcvm.hw.rmp import (
    ASID_MASK,
    ASID_SHIFT,
    ASSIGNED,
    LEFTOVER,
    PAGESIZE,
    VALIDATED,
    RmpVal,
)
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PTRS_PER_PMD

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = (
    "FIRMWARE_WRITABLE",
    "PAGE_SIZE_2M",
    "Page",
    "Refused",
    "check_range",
    "guest_key",
    "lookup",
    "lookup_head",
    "read",
    "read_context",
    "reserved_bits_set",
    "write",
    "write_context",
)

PAGE_SIZE_2M = PTRS_PER_PMD << PAGE_SHIFT

FIRMWARE_WRITABLE = (PageState.FIRMWARE, PageState.DEFAULT)
"""States of a page that firmware may write a result to."""


class Refused(Exception):
    """A shared check failed."""

    def __init__(self, status: SnpStatus) -> None:
        super().__init__(status.name)
        self.status = status


class Page(NamedTuple):
    """An operand page as its RMP entry shows it; a Default page has none and reads as zero."""

    pfn: int
    state: PageState
    value: RmpVal

    @property
    def spa(self) -> int:
        return self.pfn << PAGE_SHIFT

    @property
    def pagesize(self) -> int:
        return 1 if self.value[0] & PAGESIZE else 0

    @property
    def npages(self) -> int:
        return PTRS_PER_PMD if self.value[0] & PAGESIZE else 1

    @property
    def asid(self) -> int:
        return (self.value[0] & ASID_MASK) >> ASID_SHIFT


@cache
def _reserved_mask(buffer: type[Layout]) -> int:
    named = 0
    for field in buffer.fields().values():
        if isinstance(field, Bits):
            named |= field.mask << field.lo
        else:
            named |= ((1 << 8 * field.length) - 1) << 8 * field.offset
    return ~named & ((1 << 8 * buffer.SIZE) - 1)


def reserved_bits_set(buffer: Layout) -> bool:
    """Whether a bit is set that no field of the buffer names."""
    mask = _reserved_mask(type(buffer))  # type: ignore[arg-type]  # a class is hashable
    return bool(int.from_bytes(buffer.data, "little") & mask)


def lookup(psp: "Psp", paddr: int) -> Page:
    """The page that holds an address, by its own RMP entry; INVALID_PARAM inside the RMP."""
    spa = paddr & ~psp.c_bit
    rmp = psp.soc.rmp
    if rmp.base <= spa <= rmp.end:
        raise Refused(SnpStatus.INVALID_PARAM)
    pfn = spa >> PAGE_SHIFT
    if not rmp.covered(pfn):
        return Page(pfn, PageState.DEFAULT, (0, 0))
    value = rmp.map[pfn]
    if value[0] & PAGESIZE and pfn % PTRS_PER_PMD:
        if value[0] & LEFTOVER:
            value = (value[0] & VALIDATED | ASSIGNED, rmp.gfn(pfn))
        else:
            value = (ASSIGNED, 0)
    return Page(pfn, rmp.decode(value), value)


def lookup_head(psp: "Psp", paddr: int) -> Page:
    """The page that holds an address, by the entry that decides for it."""
    own = lookup(psp, paddr)
    if own.state is PageState.DEFAULT:
        return own
    rmp = psp.soc.rmp
    return Page(own.pfn, rmp.state(own.pfn), rmp.map[own.pfn])


def check_range(psp: "Psp", paddr: int, length: int) -> int:
    """The address without its C-bit, if firmware may touch [paddr, paddr + length).

    INVALID_ADDRESS above the address limit, over the RMP or over a trusted region;
    INVALID_CONFIG where there is no DRAM.
    """
    soc = psp.soc
    spa = paddr & ~psp.c_bit
    end = spa + length
    if end > 1 << soc.profile.phys_bits:
        raise Refused(SnpStatus.INVALID_ADDRESS)
    regions = [(soc.rmp.base, soc.rmp.end + 1)] if soc.rmp.end else []
    if psp.tmr is not None:
        regions.append(psp.tmr)
    if any(spa < stop and start < end for start, stop in regions):
        raise Refused(SnpStatus.INVALID_ADDRESS)
    if end > soc.memory_pages << PAGE_SHIFT:
        raise Refused(SnpStatus.INVALID_CONFIG)
    return spa


def read(psp: "Psp", paddr: int, length: int, key: Key | None = None) -> bytes:
    return psp.soc.dram.read(check_range(psp, paddr, length), length, key)


def write(psp: "Psp", paddr: int, data: bytes, key: Key | None = None) -> None:
    psp.soc.dram.write(check_range(psp, paddr, len(data)), data, key)


def guest_key(psp: "Psp", gctx: Gctx) -> Key:
    """The key of an activated guest."""
    return psp.soc.keys[gctx.asid]


def read_context(psp: "Psp", gctx_paddr: int) -> Gctx:
    """The guest whose context page this is.  INVALID_GUEST when it is none."""
    if lookup(psp, gctx_paddr).state is not PageState.CONTEXT:
        raise Refused(SnpStatus.INVALID_GUEST)
    return Gctx(read(psp, gctx_paddr & ~PAGE_MASK, PAGE_SIZE, psp.firmware_key))


def write_context(psp: "Psp", gctx_paddr: int, gctx: Gctx) -> None:
    spa = check_range(psp, gctx_paddr, PAGE_SIZE)
    psp.soc.dram.write(spa, bytes(gctx), psp.firmware_key, counted=False)
