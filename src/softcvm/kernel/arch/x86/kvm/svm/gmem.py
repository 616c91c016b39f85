"""What guest_memfd asks of SNP: make pages private, take them back, how large they may be mapped.

sev_gmem_prepare(), sev_gmem_invalidate(), sev_gmem_max_mapping_level() and sev_handle_rmp_fault() of
arch/x86/kvm/svm/sev.c, v7.2.  RMP state follows the physical page: it is set when guest_memfd hands a page
out and reset when guest_memfd frees it, whatever maps it meanwhile, so the free hook knows no VM.

Functions over runs do what Linux's loops over pages do, in the same order of pages, and count the same.
"""

from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.rmp import PsmashStatus
from softcvm.kernel.arch.x86.kvm.mmu.mmu import kvm_zap_gfn_range
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_snp_guest
from softcvm.kernel.arch.x86.virt.svm.sev import (
    RmpError,
    RmpLookup,
    rmp_make_private,
    rmp_make_shared,
    rmp_runs,
    snp_lookup_rmpentry,
    snp_rmptable_psmash,
)
from softcvm.kernel.errors import KernelError
from softcvm.kernel.virt.kvm.gmem_pfn import kvm_gmem_get_pfn
from softcvm.kernel.virt.kvm.mem_attributes import kvm_mem_is_private
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD, Gfn, Gpa, Pfn, PgLevel, gfn_to_gpa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = (
    "RmpFault",
    "sev_gmem_invalidate",
    "sev_gmem_mapping_run",
    "sev_gmem_max_mapping_level",
    "sev_gmem_prepare",
    "sev_handle_rmp_fault",
)

_PMD_ORDER = 9


class RmpFault(NamedTuple):
    """KVM looked at a nested page fault with the RMP bit (trace_kvm_rmp_fault)."""

    gpa: int
    pfn: int
    error_code: int
    rmp_level: int
    psmash: str


def sev_gmem_prepare(kvm: "Kvm", pfn: Pfn, gfn: Gfn, npages: int, max_order: int) -> None:
    """Assign pages to the guest, not immutable, by a 2M entry where the folio and its region allow it.

    A page that is assigned already is left as it is, without a look at whose it is or at which GPA.
    ENOENT: no RMP entry.  EINVAL: RMPUPDATE refused.
    """
    if not sev_snp_guest(kvm):
        return
    if kvm.linux.snp.prepare_blindly:
        _prepare_blindly(kvm, pfn, gfn, npages)
        return
    if max_order < _PMD_ORDER:
        for run in _lookup(kvm.linux, pfn, npages):
            if not run.assigned:
                at = Gfn(gfn + run.start - pfn)
                _make_private(kvm, run.start, at, PgLevel.PG_4K, run.end - run.start)
        return
    end = pfn + npages
    while pfn < end:
        whole = _whole_unassigned(kvm.linux, pfn, end) if gfn % PTRS_PER_PMD == 0 else 0
        if whole:
            # Each region as below: a lookup of every page, and of the region for the first of them.
            kvm.linux.counters.rmp_lookups += 2 * whole * PTRS_PER_PMD
            _make_private(kvm, pfn, gfn, PgLevel.PG_2M, whole)
            stop = Pfn(pfn + whole * PTRS_PER_PMD)
        else:
            stop = Pfn(min(end, pfn - pfn % PTRS_PER_PMD + PTRS_PER_PMD))
            _prepare_in_2m(kvm, pfn, gfn, stop - pfn)
        gfn = Gfn(gfn + stop - pfn)
        pfn = stop


def _prepare_blindly(kvm: "Kvm", pfn: Pfn, gfn: Gfn, npages: int) -> None:
    """SnpHost.prepare_blindly: no lookup.  EIO, with the VM dead, for a page that turns out to be assigned."""
    sev = kvm.arch.sev
    assert sev is not None
    try:
        rmp_make_private(
            kvm.linux,
            pfn,
            gfn_to_gpa(gfn),
            PgLevel.PG_4K,
            sev.asid,
            immutable=False,
            count=npages,
        )
    except KernelError as error:
        raise kvm.bug(f"prepare of GFN {gfn:#x} PFN {pfn:#x}: {error.why}") from error


def _whole_unassigned(linux: "Linux", pfn: Pfn, end: int) -> int:
    """How many whole 2M regions from pfn on, up to `end`, have no assigned page."""
    if pfn % PTRS_PER_PMD or end - pfn < PTRS_PER_PMD:
        return 0
    try:
        first = rmp_runs(linux, pfn, end - pfn)[0]
    except KernelError:
        return 0  # region by region, up to the one that the table does not cover
    return 0 if first.assigned else (first.end - pfn) // PTRS_PER_PMD


def _prepare_in_2m(kvm: "Kvm", pfn: Pfn, gfn: Gfn, npages: int) -> None:
    """Pages of one folio inside one 2M region: one 2M entry if the whole region is unassigned.

    Linux makes that test again for every page that it finds unassigned, and stops it at the first
    assigned one; the lookups are counted so.
    """
    counters = kvm.linux.counters
    head = Pfn(pfn - pfn % PTRS_PER_PMD)
    for run in _lookup(kvm.linux, pfn, npages):
        if run.assigned:
            continue
        at = Gfn(gfn + run.start - pfn)
        taken = _first_assigned(kvm.linux, head)
        if taken is None:
            counters.rmp_lookups += PTRS_PER_PMD
            _make_private(kvm, head, Gfn(at - at % PTRS_PER_PMD), PgLevel.PG_2M, 1)
            return  # every page that follows finds itself assigned
        count = run.end - run.start
        counters.rmp_lookups += (
            taken - head + 1 + (count - 1) * (min(taken, run.start) - head + 1)
        )
        _make_private(kvm, run.start, at, PgLevel.PG_4K, count)


def _lookup(linux: "Linux", pfn: Pfn, npages: int) -> list[RmpLookup]:
    """snp_lookup_rmpentry() of every page, in runs."""
    try:
        runs = rmp_runs(linux, pfn, npages)
    except KernelError as error:
        raise KernelError(ENOENT, f"RMP entry of PFN {pfn:#x}: {error.why}") from error
    linux.counters.rmp_lookups += npages
    return runs


def _first_assigned(linux: "Linux", head: Pfn) -> Pfn | None:
    """is_pfn_range_shared(): the first page of a 2M region that is assigned, None if none is."""
    runs = rmp_runs(linux, head, PTRS_PER_PMD)
    return next((run.start for run in runs if run.assigned), None)


def _make_private(kvm: "Kvm", pfn: Pfn, gfn: Gfn, level: PgLevel, count: int) -> None:
    sev = kvm.arch.sev
    assert sev is not None
    try:
        rmp_make_private(
            kvm.linux, pfn, gfn_to_gpa(gfn), level, sev.asid, immutable=False, count=count
        )
    except KernelError as error:
        raise KernelError(
            EINVAL, f"RMP update of GFN {gfn:#x} PFN {pfn:#x} level {int(level)}: {error.why}"
        ) from error


def sev_gmem_invalidate(linux: "Linux", start: Pfn, end: Pfn) -> None:
    """Pages leave guest_memfd: whoever owns them in the RMP, they become the hypervisor's, and are flushed.

    A failure is a WARN and nothing more: the page goes back to the allocator although the host cannot
    use it.
    """
    if not linux.snp.enabled:
        return
    try:
        runs = rmp_runs(linux, start, end - start)
    except KernelError:
        linux.counters.rmp_lookups += end - start
        return  # outside the table: never assigned
    for run in runs:
        if run.assigned and run.level == PgLevel.PG_2M:
            _invalidate_2m(linux, run)
        else:
            linux.counters.rmp_lookups += run.end - run.start
            if run.assigned:
                _make_shared(linux, run.start, PgLevel.PG_4K, run.end - run.start)


def _invalidate_2m(linux: "Linux", run: RmpLookup) -> None:
    """A run of 2M entries: whole ones at once, a part of one smashed first."""
    pfn = run.start
    while pfn < run.end:
        whole = (run.end - pfn) // PTRS_PER_PMD if pfn % PTRS_PER_PMD == 0 else 0
        if whole:
            linux.counters.rmp_lookups += whole  # Linux looks up the first page of each
            _make_shared(linux, pfn, PgLevel.PG_2M, whole)
            pfn = Pfn(pfn + whole * PTRS_PER_PMD)
            continue
        stop = Pfn(min(run.end, pfn - pfn % PTRS_PER_PMD + PTRS_PER_PMD))
        linux.counters.rmp_lookups += stop - pfn
        status = snp_rmptable_psmash(linux, pfn)
        if status is not PsmashStatus.SUCCESS:
            linux.warn("sev_gmem_invalidate", f"PSMASH of PFN {pfn:#x}: {status.name}")
        _make_shared(linux, pfn, PgLevel.PG_4K, stop - pfn)
        pfn = stop


def _make_shared(linux: "Linux", pfn: Pfn, level: PgLevel, count: int) -> None:
    """rmp_make_shared() and CLFLUSH of each page; one that fails is skipped with a WARN."""
    size = PTRS_PER_PMD if level == PgLevel.PG_2M else 1
    done = 0
    while done < count:
        try:
            rmp_make_shared(linux, Pfn(pfn + done * size), level, count - done)
            passed, failed = count - done, 0
        except RmpError as error:
            linux.warn("sev_gmem_invalidate", error.why)
            passed, failed = error.done, 1
        linux.soc.caches.clflush(passed * size)
        done += passed + failed


def sev_gmem_max_mapping_level(kvm: "Kvm", pfn: Pfn, is_private: bool) -> int:
    """The level of the page's RMP entry, 4K for a page without one; 0, no opinion, where SNP has none."""
    if not is_private or not sev_snp_guest(kvm):
        return 0
    try:
        found = snp_lookup_rmpentry(kvm.linux, pfn)
    except KernelError:
        return PgLevel.PG_4K
    return found.level if found.assigned else PgLevel.PG_4K


def sev_gmem_mapping_run(kvm: "Kvm", pfn: Pfn, npages: int, is_private: bool) -> int:
    """How many pages from pfn on get the answer that pfn gets; each is looked up, as its own fault would."""
    if not is_private or not sev_snp_guest(kvm):
        return npages
    try:
        runs = rmp_runs(kvm.linux, pfn, npages)
    except KernelError:
        return 1
    end = next((run.start for run in runs if _level(run) != _level(runs[0])), pfn + npages)
    kvm.linux.counters.rmp_lookups += end - pfn
    return end - pfn


def _level(run: RmpLookup) -> PgLevel:
    return run.level if run.assigned else PgLevel.PG_4K


def sev_handle_rmp_fault(vcpu: "KvmVcpu", gpa: Gpa, error_code: int) -> Steps[None]:
    """An access of the guest met a 2M entry at 4K: smash it and have the mapping built anew.

    Anything else is not for KVM to mend: it warns, and the guest faults again.
    """
    kvm = vcpu.kvm
    gfn = Gfn(gpa >> PAGE_SHIFT)
    if not kvm_mem_is_private(kvm, gfn):
        kvm.linux.warn("sev_handle_rmp_fault", f"RMP fault for non-private GPA {gpa:#x}")
        return
    slot = kvm.gfn_to_memslot(gfn)
    if slot is None or not slot.can_be_private:
        kvm.linux.warn("sev_handle_rmp_fault", f"RMP fault, non-private slot for GPA {gpa:#x}")
        return
    try:
        pfn, _, _ = yield from kvm_gmem_get_pfn(kvm, slot, gfn)
    except KernelError as error:
        kvm.linux.warn(
            "sev_handle_rmp_fault", f"no page behind private GPA {gpa:#x}: {error.why}"
        )
        return
    try:
        yield from _resolve_rmp_fault(kvm, gpa, pfn, error_code)
    finally:
        kvm.linux.page_alloc.put_pages(pfn, 1)


def _resolve_rmp_fault(kvm: "Kvm", gpa: Gpa, pfn: Pfn, error_code: int) -> Steps[None]:
    linux = kvm.linux
    gfn = gpa >> PAGE_SHIFT
    try:
        found = snp_lookup_rmpentry(linux, pfn)
    except KernelError as error:
        linux.warn("sev_handle_rmp_fault", f"GPA {gpa:#x} PFN {pfn:#x}: {error.why}")
        return
    if not found.assigned:
        linux.warn("sev_handle_rmp_fault", f"GPA {gpa:#x} PFN {pfn:#x} is not assigned")
        return
    status: PsmashStatus | None = None
    if found.level > PgLevel.PG_4K:  # at 4K already, another vCPU was faster
        status = snp_rmptable_psmash(linux, pfn)
        smashed = status is PsmashStatus.SUCCESS
        if not smashed:
            found = snp_lookup_rmpentry(linux, pfn)
            smashed = found.assigned and found.level == PgLevel.PG_4K
            if not smashed:
                linux.warn(
                    "sev_handle_rmp_fault",
                    f"cannot split GPA {gpa:#x} PFN {pfn:#x}: {status.name}",
                )
        if status is PsmashStatus.SUCCESS or not smashed:
            yield from kvm_zap_gfn_range(kvm, gfn, gfn + PTRS_PER_PMD)
    if linux.tp.emit:
        linux.tp.emit(
            RmpFault(gpa, pfn, error_code, found.level, status.name if status else "")
        )
