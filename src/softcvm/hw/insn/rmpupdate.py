"""RMPUPDATE: the hypervisor gives a page away, or takes it back.  [APM3-24594 RMPUPDATE]

Checks of request N against old entry O, first failure wins:
  FAIL_INPUT       sPA or gpa not aligned to N's size; a field out of its width; not assigned but
                   immutable or with an ASID; no RMP entry
  FAIL_PERMISSION  O immutable
  FAIL_OVERLAP     N 4K inside an assigned 2M page; N 2M over an assigned 4K entry; or another agent
                   holds the entry for a moment
  FAIL_INUSE       a running vCPU holds the page
AMD's pseudo-code leaves open: a 4K request on a covered entry (here OVERLAP, as for the head), a 2M
request over an immutable 4K entry (here PERMISSION), and where INUSE ranks (here last).
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import RmpState, RmpupdateStatus
from softcvm.hw.rmp import (
    ASID_MASK,
    ASID_SHIFT,
    ASSIGNED,
    HYPERVISOR,
    IMMUTABLE,
    LINEAR,
    PAGESIZE,
    PERMS_FRESH,
    PERMS_SHIFT,
    VALIDATED,
    VMSA,
    Rmp,
    RmpVal,
)
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PTRS_PER_PMD

if TYPE_CHECKING:
    from softcvm.hw.soc import Soc

__all__ = ("rmpupdate",)

Runs = list[tuple[int, int, RmpVal]]

_SUCCESS = RmpupdateStatus.SUCCESS
_MASK_2M = (PTRS_PER_PMD << PAGE_SHIFT) - 1
_KEPT = VALIDATED | VMSA | 0xFFFF_FFFF << PERMS_SHIFT
_BINDING = ASSIGNED | PAGESIZE | ASID_MASK | LINEAR


def rmpupdate(
    soc: "Soc", spa: int, new: RmpState, count: int = 1
) -> tuple[RmpupdateStatus, int]:
    """Issue RMPUPDATE for `count` neighbouring pages of new.pagesize, ascending from spa.

    A guest-owned request binds page i to new.gpa + i pages; any other repeats itself.  Stops at the first
    failure; returns its status and how many succeeded before it.
    """
    rmp = soc.rmp
    size = PTRS_PER_PMD if new.pagesize else 1
    pfn = spa >> PAGE_SHIFT
    end = pfn + count * size
    covered = rmp.covered_pages
    status = _check_input(spa, new)
    if status is not _SUCCESS:
        end = pfn
    elif end > covered:
        end = max(pfn, covered - (covered - pfn) % size)
        status = RmpupdateStatus.FAIL_INPUT
    if pfn < end:
        runs = rmp.map.runs(pfn, end)
        stop, refusal = _check_entries(soc, pfn, end, runs, size)
        if stop < end:
            end, status = stop, refusal
            runs = rmp.map.runs(pfn, end)
        _commit(rmp, pfn, end, runs, new)
    done = (end - pfn) // size
    soc.counters.rmpupdate += done
    soc.counters.rmp_broadcasts += done
    if status is not _SUCCESS:
        soc.counters.rmpupdate += 1
        rmp.refused("RMPUPDATE", end, size, status.name)
    return status, done


def _check_input(spa: int, new: RmpState) -> RmpupdateStatus:
    alignment = _MASK_2M if new.pagesize else PAGE_MASK
    if (spa | new.gpa) & alignment or spa < 0 or not 0 <= new.gpa < 1 << 51:
        return RmpupdateStatus.FAIL_INPUT
    if (new.assigned | new.pagesize | new.immutable) & ~1 or not 0 <= new.asid <= 0x3FF:
        return RmpupdateStatus.FAIL_INPUT
    if not new.assigned and (new.immutable or new.asid):
        return RmpupdateStatus.FAIL_INPUT
    return _SUCCESS


def _check_entries(
    soc: "Soc", pfn: int, end: int, runs: Runs, size: int
) -> tuple[int, RmpupdateStatus]:
    """The first page of [pfn, end) whose entry refuses the request, and why; end if none does."""
    stop, status = end, _SUCCESS
    for s, _, (attrs, _) in runs:
        if attrs & IMMUTABLE:
            stop, status = s, RmpupdateStatus.FAIL_PERMISSION
        elif attrs & PAGESIZE if size == 1 else attrs & ASSIGNED and not attrs & PAGESIZE:
            stop, status = s, RmpupdateStatus.FAIL_OVERLAP
        else:
            continue
        break
    if stop < end and size != 1:
        stop -= stop % size
        status = _why_2m(soc.rmp, stop)
    for held in soc.rmp.in_use:
        if pfn <= held < stop:
            stop, status = held - held % size, RmpupdateStatus.FAIL_INUSE
    if stop > pfn and soc.choices.choose("RMPUPDATE finds the entry locked", 2):
        stop, status = pfn, RmpupdateStatus.FAIL_OVERLAP
    return stop, status


def _why_2m(rmp: Rmp, head: int) -> RmpupdateStatus:
    """Why a 2M request over this region is refused: the head first, then the others."""
    if rmp.map[head][0] & IMMUTABLE:
        return RmpupdateStatus.FAIL_PERMISSION
    for _, _, (attrs, _) in rmp.map.runs(head, head + PTRS_PER_PMD):
        if attrs & ASSIGNED:
            return RmpupdateStatus.FAIL_OVERLAP
    return RmpupdateStatus.FAIL_PERMISSION


def _commit(rmp: Rmp, pfn: int, end: int, runs: Runs, new: RmpState) -> None:
    """Store the request; what was validated stays so only where nothing but `immutable` changes."""
    gfn = new.gpa >> PAGE_SHIFT
    attrs = 0
    if new.assigned:
        attrs = ASSIGNED | new.pagesize << 1 | new.immutable << 2 | PERMS_FRESH
    elif gfn and new.pagesize:
        # The head keeps the gpa it was given, the other entries are zero.
        for head in range(pfn, end, PTRS_PER_PMD):
            rmp.store("RMPUPDATE", head, head + 1, (attrs, gfn))
            rmp.store("RMPUPDATE", head + 1, head + PTRS_PER_PMD, HYPERVISOR)
        return
    start = pfn
    if new.asid:
        attrs |= new.asid << ASID_SHIFT | LINEAR
        gfn -= pfn
        for s, e, (old, bound) in runs:
            if bound == gfn and old & _BINDING == attrs & _BINDING:
                if start < s:
                    rmp.store("RMPUPDATE", start, s, (attrs, gfn))
                rmp.store("RMPUPDATE", s, e, (attrs & ~_KEPT | old & _KEPT, gfn))
                start = e
    if start < end:
        rmp.store("RMPUPDATE", start, end, (attrs, gfn))
