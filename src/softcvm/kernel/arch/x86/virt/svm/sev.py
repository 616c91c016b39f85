"""The host's hands on the RMP: look up, assign, reset, smash, leak (arch/x86/virt/svm/sev.c, v7.2).

Owns SnpHost, what Linux knows about SNP besides the table itself: whether it is on, the size of the kernel
direct map's mappings.  Whose page goes where is decided by the callers:
kvm/svm/sev.py for guests, drivers/crypto/ccp/sev_dev.py for firmware.

A function with `count` means exactly the loop over that many neighbouring pages of its level, ascending,
and stops where the loop would; RmpError says how far it got.  RMP operations take no lock: the
instructions answer with retry codes, and Linux retries FAIL_OVERLAP and FAIL_INUSE without bound.
"""

from errno import EEXIST, EFAULT, EINVAL, ENODEV, ENOSYS
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.rmp import PsmashStatus, RmpState, RmpupdateStatus
from softcvm.hw.insn.psmash import psmash as insn_psmash
from softcvm.hw.insn.rmpupdate import rmpupdate as insn_rmpupdate
from softcvm.hw.rmp import ASSIGNED, PAGESIZE
from softcvm.kernel.arch.x86.virt.svm.direct_map import DirectMap
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import (
    PTRS_PER_PMD,
    Asid,
    Gfn,
    Gpa,
    Pfn,
    PgLevel,
    gfn_to_gpa,
    gpa_to_gfn,
    pages_per_level,
    pfn_to_spa,
)
from softcvm.sim.state import State

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = (
    "RmpError",
    "RmpLookup",
    "RmpSpin",
    "SnpHost",
    "dump_rmpentry",
    "psmash",
    "rmp_make_private",
    "rmp_make_shared",
    "rmp_runs",
    "snp_leak_pages",
    "snp_lookup_rmpentry",
    "snp_rmptable_init",
    "snp_rmptable_psmash",
)


class RmpError(KernelError):
    """A transition failed; `done` pages of the requested level were changed before it."""

    def __init__(self, errno: int, why: str, done: int = 0) -> None:
        super().__init__(errno, why)
        self.done = done


class RmpSpin(Exception):
    """A CPU is caught in Linux's unbounded retry loop, and nothing in the machine can end it.

    A real host would report a soft lockup; it is a state to find, not an errno.
    """


class RmpLookup(NamedTuple):
    """What snp_lookup_rmpentry() tells about pages [start, end): the same for all of them."""

    start: Pfn
    end: Pfn
    assigned: bool
    level: PgLevel


class SnpHost(State):
    """SEV-SNP host state of one kernel; leaked pages are kept by the allocator that must not hand them out.

    reject_assigned: row 1.7, the check proposed when SNP support was reviewed in 2021: look a page up
    before it becomes private and refuse if it is assigned already.  No release has it.
    prepare_blindly: row 4.5, proposed with the gmem hooks in 2023: a page that guest_memfd has just allocated is
    nobody's, so prepare does not look it up; one that is assigned (which only reject_assigned notices) is a
    kernel bug.  Makes sense where prepare runs once per page, up to 6.19.  No release has it.
    """

    saved = ("enabled", "reject_assigned", "prepare_blindly", "direct_map")
    derived = {
        "linux": "the host, which holds this",
    }

    def __init__(self, linux: "Linux", *, reject_assigned: bool = False) -> None:
        self.linux = linux
        self.enabled = False
        """CC_ATTR_HOST_SEV_SNP"""
        self.reject_assigned = reject_assigned
        self.prepare_blindly = False
        self.direct_map = DirectMap(linux.soc.memory_pages, linux.counters)


def snp_rmptable_init(linux: "Linux") -> None:
    """Zero the table and turn SNP on in every CPU, in the order firmware will check.

    ENOSYS: the BIOS reserved no table, or one that does not cover all memory and itself.
    """
    soc = linux.soc
    rmp = soc.rmp
    if not rmp.end:
        raise KernelError(ENOSYS, "memory for the RMP table has not been reserved by BIOS")
    rmp_end_pfn = (rmp.end + 1) >> 12
    if max(soc.memory_pages, rmp_end_pfn) > rmp.covered_pages:
        raise KernelError(
            ENOSYS, f"RMP [{rmp.base:#x} - {rmp.end:#x}] does not cover full system RAM"
        )
    if not rmp.enabled:
        rmp.reset()
        soc.caches.wbinvd_on_all_cpus()
        soc.set_mfdm()
        soc.set_snp_enable()
    linux.snp.enabled = True


def snp_lookup_rmpentry(linux: "Linux", pfn: Pfn) -> RmpLookup:
    """Whether a page is assigned, and the level of the entry that decides for it.

    `assigned` is of the page's own entry, the level always that of the 2M-aligned one.
    ENODEV: the host does not run SNP.  EFAULT: the table does not reach this pfn.
    """
    _check_lookup(linux, pfn, 1)
    linux.counters.rmp_lookups += 1
    return _lookup(linux, pfn, pfn + 1)[0]


def rmp_runs(linux: "Linux", pfn: Pfn, npages: int) -> list[RmpLookup]:
    """snp_lookup_rmpentry() for every page of a range, told in runs.

    The caller adds to the counter rmp_lookups as many as Linux would make.
    """
    _check_lookup(linux, pfn, npages)
    return _lookup(linux, pfn, pfn + npages)


def _check_lookup(linux: "Linux", pfn: Pfn, npages: int) -> None:
    if not linux.snp.enabled:
        raise KernelError(ENODEV, "SNP is not enabled on this host")
    if pfn < 0 or pfn + npages > linux.soc.rmp.covered_pages:
        raise KernelError(EFAULT, f"PFN {pfn + npages - 1:#x} is outside the RMP table")


def _lookup(linux: "Linux", start: int, end: int) -> list[RmpLookup]:
    runs = linux.soc.rmp.map.runs(start, end)
    if len(runs) == 1:
        attrs = runs[0][2][0]
        level = PgLevel.PG_2M if attrs & PAGESIZE else PgLevel.PG_4K
        return [RmpLookup(Pfn(start), Pfn(end), bool(attrs & ASSIGNED), level)]
    found: list[RmpLookup] = []
    for s, e, (attrs, _) in runs:
        assigned = bool(attrs & ASSIGNED)
        level = PgLevel.PG_2M if attrs & PAGESIZE else PgLevel.PG_4K
        if found and found[-1][2:] == (assigned, level):
            found[-1] = found[-1]._replace(end=Pfn(e))
        else:
            found.append(RmpLookup(Pfn(s), Pfn(e), assigned, level))
    return found


def rmp_make_private(
    linux: "Linux",
    pfn: Pfn,
    gpa: Gpa,
    level: PgLevel,
    asid: Asid,
    *,
    immutable: bool,
    count: int = 1,
) -> None:
    """Give pages to a guest, or to firmware with ASID 0 and immutable.

    A guest's page i is bound to gpa plus i pages of this level.
    ENODEV, EFAULT: see _rmpupdate().  EEXIST: only with SnpHost.reject_assigned.
    """
    state = RmpState(
        assigned=1,
        pagesize=int(level == PgLevel.PG_2M),
        immutable=int(immutable),
        gpa=gpa,
        asid=asid,
    )
    if not linux.snp.reject_assigned:
        _rmpupdate(linux, pfn, state, level, count)
        return
    free = _count_unassigned(linux, pfn, count * pages_per_level(level)) // pages_per_level(
        level
    )
    if free:
        _rmpupdate(linux, pfn, state, level, free)
    if free < count:
        at = Pfn(pfn + free * pages_per_level(level))
        raise RmpError(EEXIST, f"already assigned: {dump_rmpentry(linux, at)}", free)


def rmp_make_shared(linux: "Linux", pfn: Pfn, level: PgLevel, count: int = 1) -> None:
    """Give pages back to the hypervisor: the one place in Linux that resets an RMP entry.

    ENODEV, EFAULT: see _rmpupdate().
    """
    _rmpupdate(linux, pfn, RmpState(pagesize=int(level == PgLevel.PG_2M)), level, count)


def _count_unassigned(linux: "Linux", pfn: Pfn, npages: int) -> int:
    """Row 1.7: how many pages from pfn on are unassigned; every entry read is counted."""
    _check_lookup(linux, pfn, npages)
    for run in _lookup(linux, pfn, pfn + npages):
        if run.assigned:
            linux.counters.rmp_sanity_lookups += run.start - pfn + 1
            return run.start - pfn
    linux.counters.rmp_sanity_lookups += npages
    return npages


def _rmpupdate(linux: "Linux", pfn: Pfn, state: RmpState, level: PgLevel, count: int) -> None:
    """rmpupdate(): split the direct map where a 4K page changes, then RMPUPDATE until it is not OVERLAP.

    ENODEV: no SNP on this host.  EFAULT: not memory, a 2M request off its boundary, or refused by the
    processor; the text carries the entry.
    """
    if not linux.snp.enabled:
        raise RmpError(ENODEV, "SNP is not enabled on this host")
    size = pages_per_level(level)
    valid = _valid_pages(linux, pfn, level, count)
    done = 0
    while done < valid:
        status, passed = insn_rmpupdate(
            linux.soc,
            pfn_to_spa(Pfn(pfn + done * size)),
            _advance(state, done * size),
            valid - done,
        )
        done += passed
        if status is RmpupdateStatus.SUCCESS:
            break
        at = Pfn(pfn + done * size)
        if status is RmpupdateStatus.FAIL_OVERLAP and not _overlaps(linux, at, level):
            linux.counters.rmp_retries += 1
            continue
        # The pages before were split on their way, and so was this one before the processor refused it.
        linux.snp.direct_map.adjust(pfn, level, done + 1)
        why = (
            f"RMPUPDATE failed for PFN {at:#x}, pg_level: {int(level)}, ret: {int(status)}; "
            f"{dump_rmpentry(linux, at)}"
        )
        if status is RmpupdateStatus.FAIL_OVERLAP:
            raise RmpSpin(why)
        raise RmpError(EFAULT, why, done)
    linux.snp.direct_map.adjust(pfn, level, valid)
    if valid < count:
        raise RmpError(
            EFAULT, f"PFN {pfn + valid * size:#x} cannot be a level {int(level)} page", valid
        )


def _advance(state: RmpState, npages: int) -> RmpState:
    """The request for the page npages further on: a guest's gpa grows, a reset stays a reset."""
    if not npages or not state.asid:
        return state
    return state._replace(gpa=gfn_to_gpa(Gfn(gpa_to_gfn(Gpa(state.gpa)) + npages)))


def _valid_pages(linux: "Linux", pfn: Pfn, level: PgLevel, count: int) -> int:
    """Pages of this level from pfn on that adjust_direct_map() accepts (pfn_valid(), 2M alignment)."""
    size = pages_per_level(level)
    if level > PgLevel.PG_2M or pfn < 0 or (size != 1 and pfn % size):
        return 0
    return max(0, min(count, (linux.soc.memory_pages - pfn) // size))


def _overlaps(linux: "Linux", pfn: Pfn, level: PgLevel) -> bool:
    """Whether FAIL_OVERLAP has a lasting cause: a 2M entry under a 4K request, 4K entries under a 2M one."""
    if level == PgLevel.PG_4K:
        return bool(linux.soc.rmp.map[pfn][0] & PAGESIZE)
    runs = linux.soc.rmp.map.runs(pfn, pfn + PTRS_PER_PMD)
    return any(attrs & ASSIGNED and not attrs & PAGESIZE for _, _, (attrs, _) in runs)


def psmash(linux: "Linux", pfn: Pfn) -> PsmashStatus:
    """PSMASH one 2M page; the instruction's own status.  ENODEV; EINVAL: not memory."""
    if not linux.snp.enabled:
        raise KernelError(ENODEV, "SNP is not enabled on this host")
    if not 0 <= pfn < linux.soc.memory_pages:
        raise KernelError(EINVAL, f"PFN {pfn:#x} is not memory")
    status, _ = insn_psmash(linux.soc, pfn_to_spa(pfn))
    return status


def snp_rmptable_psmash(linux: "Linux", pfn: Pfn) -> PsmashStatus:
    """PSMASH the 2M page around a pfn, again as long as another processor changes the entry."""
    pfn = Pfn(pfn - pfn % PTRS_PER_PMD)
    while True:
        status = psmash(linux, pfn)
        if status is not PsmashStatus.FAIL_INUSE:
            return status
        held = [p for p in linux.soc.rmp.in_use if pfn <= p < pfn + PTRS_PER_PMD]
        if held:
            raise RmpSpin(
                f"PSMASH of PFN {pfn:#x} waits for a vCPU that holds PFN {held[0]:#x}"
            )
        linux.counters.rmp_retries += 1


def snp_leak_pages(linux: "Linux", pfn: Pfn, npages: int) -> None:
    """Take pages out of use forever: neither the allocator nor any file will see them again."""
    linux.page_alloc.leak(pfn, npages)


def dump_rmpentry(linux: "Linux", pfn: Pfn) -> str:
    """The line(s) Linux prints about a page: its raw entry, or its 2M region's entries that are not zero."""
    rmp = linux.soc.rmp
    if not rmp.covered(pfn):
        return f"PFN {pfn:#x} has no RMP entry"
    if rmp.entry(pfn).assigned:
        return f"PFN {pfn:#x}, RMP entry: {_quadwords(linux, pfn)}"
    start = pfn - pfn % PTRS_PER_PMD
    text = f"PFN {pfn:#x} unassigned, non-zero entries in 2M PFN region [{start:#x} - {start + PTRS_PER_PMD:#x}]:"
    shown = [
        f" PFN {s:#x} (x{e - s}) {_quadwords(linux, Pfn(s))}"
        for s, e, (attrs, gfn) in rmp.map.runs(
            start, min(start + PTRS_PER_PMD, rmp.covered_pages)
        )
        if attrs or gfn
    ]
    return text + (",".join(shown) or " none")


def _quadwords(linux: "Linux", pfn: Pfn) -> str:
    raw = linux.soc.rmp.raw(pfn)
    lo, hi = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")
    return f"[{lo:#018x} - {hi:#018x}]"
