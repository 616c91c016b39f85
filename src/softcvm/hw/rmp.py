"""The Reverse Map Table: who owns each page of memory.  [APM2-24593 §15.36.3]

Owns the table: its raw bytes, its decoded entries, page states and the per-ASID counts.  Checks live with
the instructions (insn/), the access rules in access.py, firmware's rules in psp/.

Entries are kept as runs.  A value is (attrs, gfn):
  attrs  the raw quadwords (low in bits 63:0, high in 127:64) without gpa and subpage_count, and two marks
         above them that hardware does not have: LINEAR and LEFTOVER;
  gfn    with LINEAR (every guest's page), gfn - pfn, the same all along a contiguous run; else the gpa
         field itself.
A 2M page is a run of 512 aligned pages with `pagesize` set.  What the raw table shows for its 511 covered
entries follows from the head (sub_entry), so it is not stored.
"""

from typing import Final, NamedTuple

from softcvm.abi.rmp import (
    GPA_TAG_FW_IOMMU,
    GPA_TAG_MASK,
    GPA_TAG_METADATA,
    RMPTABLE_CPU_BOOKKEEPING_SZ,
    PageState,
    VmplPerm,
)
from softcvm.hw.counters import HwCounters
from softcvm.hw.events import RmpTransition
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD
from softcvm.sim.events import Tracepoints
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State

__all__ = (
    "ASID_MASK",
    "ASID_SHIFT",
    "ASSIGNED",
    "HYPERVISOR",
    "IMMUTABLE",
    "LEFTOVER",
    "LINEAR",
    "LOCK",
    "PAGESIZE",
    "PERMS_FRESH",
    "PERMS_SHIFT",
    "VALIDATED",
    "VMSA",
    "Rmp",
    "RmpEntry",
    "RmpVal",
    "pack",
)

RmpVal = tuple[int, int]

# abi.rmp.RmpEntryRaw, as masks for inline use.
ASSIGNED: Final = 1 << 0
PAGESIZE: Final = 1 << 1
IMMUTABLE: Final = 1 << 2
ASID_SHIFT: Final = 51
ASID_MASK: Final = 0x3FF << ASID_SHIFT
VMSA: Final = 1 << 61
VALIDATED: Final = 1 << 62
LOCK: Final = 1 << 63
PERMS_SHIFT: Final = 64
PERMS_FRESH: Final = int(VmplPerm.ALL) << PERMS_SHIFT
"""Masks of a page that changed hands: VMPL0 everything, the others nothing."""
LINEAR: Final = 1 << 128
LEFTOVER: Final = 1 << 129
"""A 2M page made by firmware's PAGE_UNSMASH: covered entries still show gpa and validated."""
_LO: Final = (1 << 64) - 1

HYPERVISOR: Final[RmpVal] = (0, 0)


class RmpEntry(NamedTuple):
    """One decoded entry.  gpa in bytes; pagesize an RmpPageSize; perms of VMPL0..3."""

    assigned: int = 0
    pagesize: int = 0
    immutable: int = 0
    gpa: int = 0
    asid: int = 0
    vmsa: int = 0
    validated: int = 0
    lock: int = 0
    perms: tuple[int, int, int, int] = (0, 0, 0, 0)


def pack(entry: RmpEntry, pfn: int, *, leftover: bool = False) -> RmpVal:
    """An entry as the value of a run that begins at pfn; a guest's gpa grows with the pages."""
    attrs = (
        entry.assigned
        | entry.pagesize << 1
        | entry.immutable << 2
        | entry.asid << ASID_SHIFT
        | entry.vmsa << 61
        | entry.validated << 62
        | entry.lock << 63
    )
    for vmpl, perms in enumerate(entry.perms):
        attrs |= perms << (PERMS_SHIFT + 8 * vmpl)
    gfn = entry.gpa >> PAGE_SHIFT
    if entry.asid:
        return attrs | LINEAR | (LEFTOVER if leftover else 0), gfn - pfn
    return attrs, gfn


def _unpack(value: RmpVal, pfn: int) -> RmpEntry:
    attrs, gfn = value
    if attrs & LINEAR:
        gfn += pfn
    hi = attrs >> PERMS_SHIFT
    return RmpEntry(
        attrs & 1,
        attrs >> 1 & 1,
        attrs >> 2 & 1,
        gfn << PAGE_SHIFT,
        (attrs & ASID_MASK) >> ASID_SHIFT,
        attrs >> 61 & 1,
        attrs >> 62 & 1,
        attrs >> 63 & 1,
        (hi & 0xFF, hi >> 8 & 0xFF, hi >> 16 & 0xFF, hi >> 24 & 0xFF),
    )


class Rmp(State):
    """The table of one machine.

    base, end: RMP_BASE and RMP_END (inclusive), bytes; 0, 0 while they are not set.
    enabled: SYSCFG.SNP_EN; until then nothing is checked and the instructions are #UD.
    """

    saved = ("memory_pages", "base", "end", "enabled", "map", "asid_pages", "in_use")
    derived = {"tp": "observers", "counters": "statistics"}

    def __init__(self, memory_pages: int, tp: Tracepoints, counters: HwCounters) -> None:
        self.memory_pages = memory_pages
        self.tp = tp
        self.counters = counters
        self.base = 0
        self.end = 0
        self.enabled = False
        self.map: RangeMap[RmpVal] = RangeMap(HYPERVISOR)
        self.asid_pages: dict[int, int] = {}
        """4K pages assigned to each ASID, as the first 16 KiB of the table count them."""
        self.in_use: set[int] = set()
        """Pages a running vCPU holds: VMSA, VMCB, AVIC backing page."""

    @property
    def covered_pages(self) -> int:
        """Pages below this number have an entry."""
        if not self.end:
            return 0
        return (self.end + 1 - self.base - RMPTABLE_CPU_BOOKKEEPING_SZ) // 16

    def covered(self, pfn: int) -> bool:
        return 0 <= pfn < self.covered_pages

    def entry(self, pfn: int) -> RmpEntry:
        """The entry at a page's own place in the table; inside a 2M page, the covered sub-entry."""
        value = self.map[pfn]
        if value[0] & PAGESIZE and pfn % PTRS_PER_PMD:
            return self._sub_entry(value, pfn)
        return _unpack(value, pfn)

    def head(self, pfn: int) -> RmpEntry:
        """The entry that decides for a page: inside a 2M page its head, with the head's own gpa."""
        value = self.map[pfn]
        if value[0] & PAGESIZE:
            pfn -= pfn % PTRS_PER_PMD
        return _unpack(value, pfn)

    def gfn(self, pfn: int) -> int:
        """The guest frame that the deciding entry binds this very page to."""
        attrs, gfn = self.map[pfn]
        return gfn + pfn if attrs & LINEAR else gfn

    def state(self, pfn: int) -> PageState:
        """The state firmware decodes for a page.  [ABI-56860 §5.3]"""
        if not self.covered(pfn):
            return PageState.DEFAULT
        return self.decode(self.map[pfn])

    @staticmethod
    def decode(value: RmpVal) -> PageState:
        """Page state of a run's value; the first match decides."""
        attrs, gfn = value
        if not attrs & ASSIGNED:
            if attrs & (VALIDATED | ASID_MASK):
                return PageState.INVALID
            return PageState.HV_FIXED if attrs & IMMUTABLE else PageState.HYPERVISOR
        if attrs & ASID_MASK:
            if attrs & IMMUTABLE:
                return PageState.PRE_SWAP if attrs & VALIDATED else PageState.PRE_GUEST
            return PageState.GUEST_VALID if attrs & VALIDATED else PageState.GUEST_INVALID
        if attrs & VALIDATED:
            return PageState.INVALID
        if not attrs & IMMUTABLE:
            return PageState.INVALID if attrs & LOCK else PageState.RECLAIM
        tag = gfn & GPA_TAG_MASK
        if tag == GPA_TAG_METADATA:
            return PageState.METADATA
        if tag == GPA_TAG_FW_IOMMU:
            return PageState.FIRMWARE_IOMMU
        if gfn:
            return PageState.INVALID
        return PageState.CONTEXT if attrs & VMSA else PageState.FIRMWARE

    def raw(self, pfn: int) -> bytes:
        """The 16 bytes in memory."""
        value = self.map[pfn]
        inside = pfn % PTRS_PER_PMD
        if value[0] & PAGESIZE and inside:
            entry = self._sub_entry(value, pfn)
            lo = entry.assigned | entry.validated << 62 | entry.gpa
            return lo.to_bytes(16, "little")
        lo, hi = self.quadwords(value, pfn)
        if not inside:
            lo |= self._subpage_count(value, pfn) << 3
        return (lo | hi << 64).to_bytes(16, "little")

    @staticmethod
    def quadwords(value: RmpVal, pfn: int) -> tuple[int, int]:
        """Raw low and high quadword of a run's entry at pfn, subpage_count left out."""
        attrs, gfn = value
        if attrs & LINEAR:
            gfn += pfn
        return attrs & _LO | gfn << PAGE_SHIFT, attrs >> PERMS_SHIFT & 0xFFFF_FFFF

    def read_memory(self, spa: int, length: int) -> bytes:
        """The table as bytes of memory: counters of the ASIDs, then entries."""
        if not self.base <= spa or spa + length > self.end + 1:
            raise ValueError(f"{length:#x} bytes at {spa:#x} are not inside the RMP")
        out = bytearray()
        offset = spa - self.base
        while len(out) < length:
            if offset < RMPTABLE_CPU_BOOKKEEPING_SZ:
                asid, skip = divmod(offset, 8)
                piece = self.asid_pages.get(asid, 0).to_bytes(8, "little")[skip:]
            else:
                pfn, skip = divmod(offset - RMPTABLE_CPU_BOOKKEEPING_SZ, 16)
                piece = self.raw(pfn)[skip:]
            out += piece
            offset += len(piece)
        return bytes(out[:length])

    def firmware_write(
        self,
        agent: str,
        pfn: int,
        npages: int,
        entry: RmpEntry,
        *,
        leftover: bool = False,
        status: str = "SUCCESS",
    ) -> None:
        """Store an entry in a run of pages without a check: firmware and microcode only.

        Page i of a guest's run gets entry.gpa + i pages, any other run entry.gpa throughout.  A 2M entry
        (pagesize 1) covers whole aligned 2M regions.
        """
        if entry.pagesize and (pfn | npages) % PTRS_PER_PMD:
            raise ValueError(f"2M entries at pfn {pfn:#x} for {npages:#x} pages")
        value = pack(entry, pfn, leftover=leftover)
        self.store(agent, pfn, pfn + npages, value, status)

    def store(
        self, agent: str, start: int, end: int, value: RmpVal, status: str = "SUCCESS"
    ) -> None:
        """Write one value over [start, end), keep the counts, tell the tracepoint run by run."""
        new = value[0] & ASID_MASK
        emit = self.tp.emit
        for s, e, old in self.map.runs(start, end):
            if old[0] & ASID_MASK != new:
                self._count((old[0] & ASID_MASK) >> ASID_SHIFT, s - e)
                self._count(new >> ASID_SHIFT, e - s)
            if emit:
                self._tell(agent, s, e, old, value, status)
        self.map.set(start, end, value)

    def refused(self, agent: str, pfn: int, npages: int, status: str) -> None:
        """Tell the tracepoint that nothing changed, and why."""
        if self.tp.emit:
            value = self.map[pfn]
            self._tell(agent, pfn, pfn + npages, value, value, status)

    def reset(self) -> None:
        """Zero the table, as the host does before SNP_INIT."""
        self.map.clear()
        self.asid_pages.clear()

    def _tell(
        self, agent: str, start: int, end: int, old: RmpVal, new: RmpVal, status: str
    ) -> None:
        old_lo, old_hi = self.quadwords(old, start)
        new_lo, new_hi = self.quadwords(new, start)
        assert self.tp.emit is not None
        self.tp.emit(
            RmpTransition(agent, start, end - start, old_lo, old_hi, new_lo, new_hi, status)
        )

    def _count(self, asid: int, pages: int) -> None:
        if asid:
            self.asid_pages[asid] = self.asid_pages.get(asid, 0) + pages
            if not self.asid_pages[asid]:
                del self.asid_pages[asid]

    def _sub_entry(self, head: RmpVal, pfn: int) -> RmpEntry:
        attrs = head[0]
        if attrs & LEFTOVER:
            gpa = self.gfn(pfn) << PAGE_SHIFT
            return RmpEntry(assigned=1, gpa=gpa, validated=attrs >> 62 & 1)
        return RmpEntry(assigned=1)

    def _subpage_count(self, head: RmpVal, pfn: int) -> int:
        """Assigned 4K entries among the 511 that follow a 2M-aligned page."""
        if head[0] & PAGESIZE:
            return 0
        runs = self.map.runs(pfn + 1, pfn + PTRS_PER_PMD)
        return sum(e - s for s, e, (attrs, _) in runs if attrs & ASSIGNED)
