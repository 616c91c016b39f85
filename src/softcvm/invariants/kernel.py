"""What holds of Linux and KVM between system calls, while no vCPU is inside an exit.

Linux v7.2 by its own paths.  Looks at runs, never at single pages.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from softcvm.abi.rmp import PageState
from softcvm.hw.rmp import ASID_MASK, ASID_SHIFT, ASSIGNED, LINEAR, PAGESIZE, RmpVal
from softcvm.invariants.registry import Checking, Violation, always
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info, sev_snp_guest
from softcvm.kernel.mm.page_alloc import FREE, LEAKED
from softcvm.sim.addr import PTRS_PER_PMD, PgLevel

if TYPE_CHECKING:
    from softcvm.machine import Machine

__all__ = ()

_ORDINARY = "an RMPUPDATE that takes a page back never fails (Linux only warns when it does)"


def _assigned(m: "Machine") -> Iterator[tuple[int, int, RmpVal]]:
    for start, end, value in m.soc.rmp.map.held(0, m.soc.memory_pages):
        if value[0] & ASSIGNED:
            yield start, end, value


def _asid(value: RmpVal) -> int:
    return (value[0] & ASID_MASK) >> ASID_SHIFT


@always(
    "a page that the allocator calls free is the hypervisor's in the RMP",
    source="arch/x86/kvm/svm/sev.c sev_gmem_invalidate(), snp_reclaim_pages(), v7.2",
    needs=_ORDINARY,
    whole_machine=True,
)
def free_pages_are_the_hypervisors(m: "Machine") -> Checking:
    looked_at = 0
    frames = m.linux.page_alloc.frames
    for start, end, value in _assigned(m):
        looked_at += 1
        for lo, hi, owner in frames.runs(start, end):
            if owner == FREE:
                state = m.soc.rmp.decode(value).name
                yield Violation(lo, f"{hi - lo:#x} free pages are {state}")
    return looked_at


@always(
    "a page that is assigned to an ASID belongs to a VM that holds this ASID, or was leaked",
    source="virt/kvm/guest_memfd.c: a file pins its VM; arch/x86/kvm/svm/sev.c sev_vm_destroy(), v7.2",
    whole_machine=True,
)
def guest_pages_have_a_vm(m: "Machine") -> Checking:
    live = {int(sev_info(kvm).asid) for kvm in m.linux.vm_list if sev_snp_guest(kvm)}
    looked_at = 0
    for start, end, value in _assigned(m):
        asid = _asid(value)
        if not asid:
            continue
        looked_at += 1
        if asid in live:
            continue
        for lo, hi, owner in m.linux.page_alloc.frames.runs(start, end):
            if owner != LEAKED:
                yield Violation(lo, f"{hi - lo:#x} pages of ASID {asid}, which no VM holds")
    return looked_at


@always(
    "no page stays Pre-Guest or Pre-Swap after the call that made it so",
    source="arch/x86/kvm/svm/sev.c sev_gmem_post_populate(), snp_launch_update_vmsa(), v7.2",
    whole_machine=True,
)
def no_page_stays_pre_guest(m: "Machine") -> Checking:
    looked_at = 0
    for start, end, value in _assigned(m):
        looked_at += 1
        if m.soc.rmp.decode(value) in (PageState.PRE_GUEST, PageState.PRE_SWAP):
            for lo, hi, owner in m.linux.page_alloc.frames.runs(start, end):
                if owner != LEAKED:
                    yield Violation(
                        lo, f"{hi - lo:#x} pages are {m.soc.rmp.decode(value).name}"
                    )
    return looked_at


@always(
    "where an SNP guest's table leads to an assigned page, the page is its own and bound to that address",
    source="arch/x86/kvm/mmu/mmu.c kvm_mmu_faultin_pfn_gmem(), arch/x86/kvm/svm/sev.c sev_gmem_prepare(), v7.2",
    whole_machine=True,
)
def nested_mappings_lead_to_own_pages(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        if not sev_snp_guest(kvm):
            continue
        asid = int(sev_info(kvm).asid)
        for leaf in kvm.arch.npt.mappings():
            for start, end, value in m.soc.rmp.map.runs(leaf.pfn, leaf.pfn + leaf.npages):
                looked_at += 1
                if not value[0] & ASSIGNED:
                    continue
                gfn = leaf.gfn + start - leaf.pfn
                bound = value[1] + start if value[0] & LINEAR else value[1]
                if _asid(value) != asid:
                    yield Violation(
                        start, f"VM {kvm.id} maps {end - start:#x} pages of ASID {_asid(value)}"
                    )
                elif bound != gfn:
                    yield Violation(
                        start, f"VM {kvm.id} maps GFN {gfn:#x} to a page bound to {bound:#x}"
                    )
    return looked_at


@always(
    "KVM maps no 2M leaf over pages that the RMP holds as 4K",
    source="arch/x86/kvm/svm/sev.c sev_gmem_max_mapping_level(), v7.2",
    whole_machine=True,
)
def large_leaves_are_large_in_the_rmp(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        if not sev_snp_guest(kvm):
            continue
        for leaf in kvm.arch.npt.mappings():
            if leaf.level == PgLevel.PG_4K:
                continue
            for start, end, (attrs, _) in m.soc.rmp.map.runs(leaf.pfn, leaf.pfn + leaf.npages):
                looked_at += 1
                if attrs & ASSIGNED and not attrs & PAGESIZE:
                    yield Violation(
                        start, f"{end - start:#x} 4K entries under a {leaf.level.name} leaf"
                    )
    return looked_at


@always(
    "no VM maps a page that the allocator calls free",
    source="virt/kvm/guest_memfd.c kvm_gmem_invalidate_start(); mmu_notifier invalidation, v7.2",
    whole_machine=True,
)
def nested_mappings_lead_to_allocated_pages(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for leaf in kvm.arch.npt.mappings():
            looked_at += 1
            for lo, hi, owner in m.linux.page_alloc.frames.runs(
                leaf.pfn, leaf.pfn + leaf.npages
            ):
                if owner == FREE:
                    gfn = leaf.gfn + lo - leaf.pfn
                    yield Violation(
                        lo, f"VM {kvm.id} maps GFN {gfn:#x} to {hi - lo:#x} free pages"
                    )
    return looked_at


@always(
    "no mapping of the kernel direct map holds both a guest's page and a page the kernel may write",
    source="arch/x86/virt/svm/sev.c adjust_direct_map(), v7.2",
    whole_machine=True,
)
def direct_map_is_split(m: "Machine") -> Checking:
    levels = m.linux.snp.direct_map.levels
    regions: set[int] = set()
    for start, end, value in _assigned(m):
        if _asid(value):
            regions |= {start - start % PTRS_PER_PMD, end - 1 - (end - 1) % PTRS_PER_PMD}
    for first in sorted(regions):
        last = min(first + PTRS_PER_PMD, m.soc.memory_pages)
        runs = m.soc.rmp.map.runs(first, last)
        mixed = not all(attrs & ASSIGNED for _, _, (attrs, _) in runs)
        if mixed and any(level != PgLevel.PG_4K for _, _, level in levels.runs(first, last)):
            yield Violation(first, "a large direct mapping over pages of different owners")
    return len(regions)


@always(
    "no lock is held and no invalidation is under way",
    source="virt/kvm/kvm_main.c kvm_mmu_invalidate_begin(), kvm_mmu_invalidate_end(), v7.2",
    whole_machine=True,
)
def nothing_is_under_way(m: "Machine") -> Checking:
    for lock in m.linux.lockdep.current.held:
        yield Violation(-1, f"{lock.name} is held")
    for kvm in m.linux.vm_list:
        if kvm.mmu_invalidate_in_progress:
            yield Violation(
                -1, f"VM {kvm.id}: {kvm.mmu_invalidate_in_progress} invalidations under way"
            )
    return 1 + len(m.linux.vm_list)
