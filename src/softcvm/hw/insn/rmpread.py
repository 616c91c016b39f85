"""RMPREAD: the architectural view of an entry, for hosts that must not read raw ones.  [APM3-24594]

Shows assigned, pagesize, immutable, gpa and asid; never validated, vmsa, the VMPL masks or the lock.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import RmpReadOut, RmpreadStatus
from softcvm.hw.rmp import ASSIGNED
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PTRS_PER_PMD

if TYPE_CHECKING:
    from softcvm.hw.soc import Soc

__all__ = ("rmpread",)


def rmpread(soc: "Soc", spa: int) -> tuple[RmpreadStatus, RmpReadOut | None]:
    """The 16 bytes RMPREAD stores, or FAIL_INPUT and nothing for an address without an entry."""
    rmp = soc.rmp
    soc.counters.rmpread += 1
    pfn = spa >> PAGE_SHIFT
    if spa & PAGE_MASK or not rmp.covered(pfn):
        return RmpreadStatus.FAIL_INPUT, None
    entry = rmp.entry(pfn)
    out = RmpReadOut(
        gpa=entry.gpa,
        assigned=entry.assigned,
        rmpread_pagesize=entry.pagesize,
        immutable=entry.immutable,
        asid=entry.asid,
    )
    if pfn % PTRS_PER_PMD == 0:
        others = rmp.map.runs(pfn + 1, min(pfn + PTRS_PER_PMD, rmp.covered_pages))
        out.hpage_region_status = int(any(attrs & ASSIGNED for _, _, (attrs, _) in others))
    return RmpreadStatus.SUCCESS, out
