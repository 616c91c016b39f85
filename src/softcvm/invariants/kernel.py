"""What holds of Linux and KVM between system calls, while no vCPU is inside an exit.

Linux v7.2 by its own paths.  Looks at runs, never at single pages.  Here: page frames and the RMP against
what the kernel does with them; the books that KVM keeps are kvm.py.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from softcvm.abi.kvm.memory import KVM_MEMORY_ATTRIBUTE_PRIVATE
from softcvm.abi.rmp import PageState
from softcvm.abi.snp_platform import SNP_TMR_SIZE
from softcvm.hw.rmp import (
    ASID_MASK,
    ASID_SHIFT,
    ASSIGNED,
    IMMUTABLE,
    LINEAR,
    PAGESIZE,
    RmpVal,
)
from softcvm.invariants.owners import Owned, page_owners
from softcvm.invariants.registry import Checking, Violation, always
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info, sev_snp_guest
from softcvm.kernel.mm.page_alloc import ALLOCATED, FREE, LEAKED
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD, PgLevel

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
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


def _mapped(m: "Machine") -> Iterator[tuple["Kvm", int, int, int, RmpVal]]:
    """(VM, gfn, first frame, end, RMP value) of everything that SNP guests' tables lead to."""
    for kvm in m.linux.vm_list:
        if sev_snp_guest(kvm):
            for leaf in kvm.arch.npt.mappings():
                for start, end, value in m.soc.rmp.map.runs(leaf.pfn, leaf.pfn + leaf.npages):
                    yield kvm, leaf.gfn + start - leaf.pfn, start, end, value


@always(
    "where an SNP guest's table leads to an assigned page, the page is its own",
    source="arch/x86/kvm/mmu/mmu.c kvm_mmu_faultin_pfn_gmem(), arch/x86/kvm/svm/sev.c sev_gmem_prepare(), v7.2",
    whole_machine=True,
)
def nested_mappings_lead_to_own_pages(m: "Machine") -> Checking:
    looked_at = 0
    for kvm, _, start, end, value in _mapped(m):
        looked_at += 1
        if value[0] & ASSIGNED and _asid(value) != int(sev_info(kvm).asid):
            why = f"VM {kvm.id} maps {end - start:#x} pages of ASID {_asid(value)}"
            yield Violation(start, why)
    return looked_at


@always(
    "what an SNP guest has mapped private is assigned",
    source="arch/x86/kvm/svm/sev.c sev_gmem_prepare(); virt/kvm/guest_memfd.c kvm_gmem_get_pfn(), v7.2",
    whole_machine=True,
)
def private_leaves_are_assigned(m: "Machine") -> Checking:
    looked_at = 0
    for kvm, gfn, start, end, value in _mapped(m):
        for first, last, attributes in kvm.mem_attr.runs(gfn, gfn + end - start):
            if attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE:
                looked_at += 1
                if not value[0] & ASSIGNED:
                    why = f"VM {kvm.id}: {last - first:#x} pages at GFN {first:#x}"
                    yield Violation(start + first - gfn, why)
    return looked_at


@always(
    "where an SNP guest's table leads to an assigned page, the page is bound to that address",
    source="arch/x86/kvm/svm/sev.c sev_gmem_prepare(), which leaves an assigned page as it is, v7.2",
    needs="a VMM that never binds a page of a guest_memfd at a second address while the RMP has it",
    whole_machine=True,
)
def nested_mappings_lead_to_pages_bound_there(m: "Machine") -> Checking:
    looked_at = 0
    for kvm, gfn, start, _, value in _mapped(m):
        looked_at += 1
        bound = value[1] + start if value[0] & LINEAR else value[1]
        if value[0] & ASSIGNED and bound != gfn:
            why = f"VM {kvm.id} maps GFN {gfn:#x} to a page bound to {bound:#x}"
            yield Violation(start, why)
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
    "every page frame in use has one owner, a free one has none",
    source="mm/page_alloc.c; each owner's own free, v7.2",
    whole_machine=True,
)
def every_page_has_one_owner(m: "Machine") -> Checking:
    owners = page_owners(m)
    frames = m.linux.page_alloc.frames
    at = 0
    last: Owned | None = None
    for owned in owners:
        if last is not None and owned.start < last.end:
            yield Violation(owned.start, f"{last.owner} and {owned.owner} both have it")
        yield from _unowned(m, at, owned.start)
        for lo, hi, state in frames.runs(owned.start, owned.end):
            if state == FREE:
                yield Violation(lo, f"{hi - lo:#x} pages of {owned.owner} are free")
        at = max(at, owned.end)
        last = owned if last is None or owned.end >= last.end else last
    yield from _unowned(m, at, m.soc.memory_pages)
    return len(owners)


def _unowned(m: "Machine", start: int, end: int) -> Iterator[Violation]:
    if start < end:
        for lo, hi, state in m.linux.page_alloc.frames.runs(start, end):
            if state == ALLOCATED:
                yield Violation(lo, f"{hi - lo:#x} pages in use are nobody's")


@always(
    "an extra reference to a page frame is that of a mapped GHCB or of a registered region",
    source="arch/x86/kvm/svm/sev.c sev_es_unmap_ghcb(), sev_pin_memory(); mm/gup.c, v7.2",
    whole_machine=True,
)
def page_references_are_exact(m: "Machine") -> Checking:
    held = sorted(m.linux.page_alloc.refs)
    ghcbs = [
        vcpu.arch.svm.sev_es.ghcb
        for kvm in m.linux.vm_list
        for vcpu in kvm.vcpus
        if vcpu.arch.svm.sev_es.ghcb is not None
    ]
    wanted = [(int(ghcb.pfn), ghcb.pfn + 1) for ghcb in ghcbs]
    for kvm in m.linux.vm_list:
        runs = [run for region in sev_info(kvm).regions for run in region.runs]
        wanted += [(int(pfn), pfn + count) for pfn, count in runs]
        locked = sum(count for _, count in runs)
        if locked != sev_info(kvm).pages_locked:
            yield Violation(-1, f"VM {kvm.id} counts {locked} pinned pages wrongly")
    if held != sorted(wanted):
        yield Violation(-1, f"references {held}, GHCBs and regions {sorted(wanted)}")
    return len(held)


@always(
    "firmware's pages are those lent to it: contexts, response pages, the TMR, the RMP itself; the rest was leaked",
    source="drivers/crypto/ccp/sev-dev.c snp_alloc_firmware_pages(); arch/x86/kvm/svm/sev.c, v7.2",
    whole_machine=True,
)
def immutable_pages_were_lent(m: "Machine") -> Checking:
    lent = [(m.soc.rmp.base >> PAGE_SHIFT, (m.soc.rmp.end + 1) >> PAGE_SHIFT)]
    tmr = m.linux.sev_dev.sev_es_tmr
    if tmr is not None:
        lent.append((tmr, tmr + (SNP_TMR_SIZE >> PAGE_SHIFT)))
    for kvm in m.linux.vm_list:
        sev = sev_info(kvm)
        lent += [(p, p + 1) for p in (sev.snp_context, sev.guest_resp_buf) if p is not None]
    looked_at = 0
    for start, end, value in _assigned(m):
        if not value[0] & IMMUTABLE:
            continue
        looked_at += 1
        for lo, hi, owner in m.linux.page_alloc.frames.runs(start, end):
            inside = sum(max(0, min(hi, e) - max(lo, s)) for s, e in lent)
            if owner != LEAKED and inside != hi - lo:
                state = m.soc.rmp.decode(value).name
                yield Violation(lo, f"{hi - lo - inside:#x} pages are {state}")
    return looked_at


@always(
    "a guest's page is in a guest_memfd or holds a vCPU's registers, or was leaked",
    source="virt/kvm/guest_memfd.c; arch/x86/kvm/svm/sev.c sev_gmem_invalidate(), sev_free_vcpu(), v7.2",
    needs=_ORDINARY,
    whole_machine=True,
)
def guest_pages_are_where_they_belong(m: "Machine") -> Checking:
    theirs = [o for o in page_owners(m) if o.owner.startswith(("guest_memfd", "VMSA"))]
    looked_at = 0
    for start, end, value in _assigned(m):
        if not _asid(value):
            continue
        looked_at += 1
        for lo, hi, owner in m.linux.page_alloc.frames.runs(start, end):
            inside = sum(max(0, min(hi, o.end) - max(lo, o.start)) for o in theirs)
            if owner != LEAKED and inside != hi - lo:
                why = f"{hi - lo - inside:#x} pages of ASID {_asid(value)}"
                yield Violation(lo, why)
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
