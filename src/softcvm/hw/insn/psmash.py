"""PSMASH: cut a 2M page into 512 pages of 4K that keep everything but VMSA.  [APM3-24594 PSMASH]

Checks in order: sPA 2M-aligned and covered (FAIL_INPUT), the entry an assigned 2M page (FAIL_BADADDR),
not immutable (FAIL_PERMISSION), not held by a running vCPU (FAIL_INUSE).  Which code an unaligned sPA and
a page that is not 2M get is unconfirmed.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import PsmashStatus
from softcvm.hw.rmp import ASSIGNED, IMMUTABLE, LEFTOVER, LINEAR, PAGESIZE, VMSA
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD

if TYPE_CHECKING:
    from softcvm.hw.soc import Soc

__all__ = ("psmash",)


def psmash(soc: "Soc", spa: int, count: int = 1) -> tuple[PsmashStatus, int]:
    """Smash `count` neighbouring 2M pages from spa; the first failure and how many came before it."""
    rmp = soc.rmp
    pfn = spa >> PAGE_SHIFT
    done = 0
    status = PsmashStatus.SUCCESS
    while done < count and status is PsmashStatus.SUCCESS:
        soc.counters.psmash += 1
        at = pfn + done * PTRS_PER_PMD
        status = _check(soc, spa, at)
        if status is not PsmashStatus.SUCCESS:
            rmp.refused("PSMASH", at, PTRS_PER_PMD, status.name)
            break
        attrs, gfn = rmp.map[at]
        if not attrs & LINEAR:  # assigned to no ASID: from here each page has its own gpa
            attrs, gfn = attrs | LINEAR, gfn - at
        rmp.store("PSMASH", at, at + PTRS_PER_PMD, (attrs & ~(PAGESIZE | LEFTOVER | VMSA), gfn))
        soc.counters.rmp_broadcasts += 1
        done += 1
    return status, done


def _check(soc: "Soc", spa: int, pfn: int) -> PsmashStatus:
    rmp = soc.rmp
    if (
        spa & ((PTRS_PER_PMD << PAGE_SHIFT) - 1)
        or not rmp.covered(pfn + PTRS_PER_PMD - 1)
        or spa < 0
    ):
        return PsmashStatus.FAIL_INPUT
    attrs = rmp.map[pfn][0]
    if not attrs & ASSIGNED or not attrs & PAGESIZE:
        return PsmashStatus.FAIL_BADADDR
    if attrs & IMMUTABLE:
        return PsmashStatus.FAIL_PERMISSION
    if any(pfn <= held < pfn + PTRS_PER_PMD for held in rmp.in_use):
        return PsmashStatus.FAIL_INUSE
    if soc.choices.choose("PSMASH finds the entry locked", 2):
        return PsmashStatus.FAIL_INUSE
    return PsmashStatus.SUCCESS
