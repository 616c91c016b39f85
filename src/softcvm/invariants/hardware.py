"""What holds of the RMP, memory and firmware of any host, whatever guests and hypervisor try.

[APM2-24593 §15.36] and [ABI-56860] unless a sentence names another source.  Sentences about a state look at
runs of equal entries, never at single pages, so they cost what the table's fragmentation costs.
"""

from collections.abc import Iterator

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.access import check_hypervisor_owned
from softcvm.hw.events import GuestVc, HostRmpPf, NestedPageFault, RmpTransition
from softcvm.hw.psp.events import FirmwareCommand
from softcvm.hw.rmp import (
    ASID_MASK,
    ASID_SHIFT,
    ASSIGNED,
    IMMUTABLE,
    LINEAR,
    LOCK,
    PAGESIZE,
    VALIDATED,
    VMSA,
    RmpVal,
)
from softcvm.hw.soc import Soc
from softcvm.invariants.registry import Checking, Violation, always, always_on, sometimes
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD, PgLevel

__all__ = ("SOFTWARE_AGENTS",)

SOFTWARE_AGENTS = frozenset({"RMPUPDATE", "PSMASH", "PVALIDATE", "RMPADJUST"})
"""Instructions.  Every other agent of a transition is firmware, named by its command."""

# Raw quadwords of RmpTransition: gpa, ASID, assigned and page size, and the masks of VMPL1..3.
_BINDING = ASSIGNED | PAGESIZE | ASID_MASK | ((1 << 39) - 1) << PAGE_SHIFT
_LOWER_VMPLS = 0xFFFF_FF00


def _held(soc: Soc) -> list[tuple[int, int, RmpVal]]:
    """Runs that are not plain hypervisor pages."""
    return soc.rmp.map.held(0, max(soc.rmp.covered_pages, soc.memory_pages))


@always(
    "every page has exactly one owner: the hypervisor, one guest, or firmware",
    source="APM2-24593 §15.36.3: assigned and ASID say who",
)
def one_owner(soc: Soc) -> Checking:
    held = _held(soc)
    for start, end, (attrs, _) in held:
        if not attrs & ASSIGNED and attrs & (ASID_MASK | VALIDATED | VMSA):
            yield Violation(start, f"{end - start:#x} pages are the hypervisor's and a guest's")
        if end > soc.rmp.covered_pages:
            yield Violation(start, "an entry lies outside the table")
    return len(held)


@always(
    "a 2M entry covers one aligned 2M region, bound to an aligned guest physical range",
    source="APM2-24593 §15.36.3",
)
def two_megabyte_entries_are_aligned(soc: Soc) -> Checking:
    looked_at = 0
    for start, end, (attrs, gfn) in _held(soc):
        if not attrs & PAGESIZE:
            continue
        looked_at += 1
        if (start | end) % PTRS_PER_PMD:
            yield Violation(start, f"2M entry over [{start:#x}, {end:#x})")
        if attrs & LINEAR and gfn % PTRS_PER_PMD:
            yield Violation(start, f"2M entry bound to gfn {start + gfn:#x}")
        if not attrs & ASSIGNED:
            yield Violation(start, "2M entry that is not assigned")
    return looked_at


@always(
    "a validated page is assigned to a guest",
    source="APM2-24593 §15.36.3",
)
def validated_is_assigned(soc: Soc) -> Checking:
    looked_at = 0
    for start, _, (attrs, _) in _held(soc):
        if attrs & (VALIDATED | VMSA):
            looked_at += 1
            guest = attrs & ASSIGNED and attrs & ASID_MASK
            if attrs & VALIDATED and not guest:
                yield Violation(start, f"validated, raw {attrs:#x}, but no guest owns it")
            if attrs & VMSA and not guest and not attrs & IMMUTABLE:
                yield Violation(
                    start, "vmsa is set on a page of no guest that firmware does not hold"
                )
    return looked_at


@always(
    "at most one validated page answers to a guest physical address of a guest",
    source="APM2-24593 §15.36: a guest that validates an address twice can be replayed",
    needs="a guest that never validates an address it has validated before",
)
def one_validated_page_per_gpa(soc: Soc) -> Checking:
    bound: list[tuple[int, int, int, int]] = []
    for start, end, (attrs, gfn) in _held(soc):
        # VMSAs apart: KVM launches those of all vCPUs at one address, which no guest maps.
        if attrs & VALIDATED and not attrs & VMSA:
            asid = (attrs & ASID_MASK) >> ASID_SHIFT
            bound.append((asid, start + gfn, end + gfn, start))
    bound.sort()
    last = (0, 0, 0, 0)
    for run in bound:
        if run[0] == last[0] and run[1] < last[2]:
            why = f"gfn {run[1]:#x} of ASID {run[0]} is validated at pfn {last[3]:#x} too"
            yield Violation(run[3], why)
        last = max(last, run, key=lambda r: (r[0], r[2]))
    return len(bound)


@always(
    "a page that firmware locked is immutable",
    source="ASPFW: firmware writes lock and immutable together",
)
def locked_is_immutable(soc: Soc) -> Checking:
    looked_at = 0
    for start, _, (attrs, _) in _held(soc):
        if attrs & LOCK:
            looked_at += 1
            if not attrs & IMMUTABLE:
                yield Violation(start, "locked but not immutable")
    return looked_at


@always(
    "the counter of an ASID is the number of 4K pages assigned to it",
    source="ASPFW: SNP_ACTIVATE refuses an ASID whose counter is not zero",
)
def asid_counters_are_exact(soc: Soc) -> Checking:
    counted: dict[int, int] = {}
    for start, end, (attrs, _) in _held(soc):
        asid = (attrs & ASID_MASK) >> ASID_SHIFT
        if asid:
            counted[asid] = counted.get(asid, 0) + end - start
    for asid in sorted(counted.keys() | soc.rmp.asid_pages.keys()):
        have, want = soc.rmp.asid_pages.get(asid, 0), counted.get(asid, 0)
        if have != want:
            yield Violation(-1, f"ASID {asid} counts {have:#x} pages, {want:#x} are assigned")
    return len(counted)


@always(
    "the raw head of a region counts the assigned 4K pages among the 511 behind it",
    source="PPR-19h-11h; ASPFW",
)
def subpage_counts_are_exact(soc: Soc) -> Checking:
    rmp = soc.rmp
    assigned: dict[int, int] = {}
    heads: set[int] = set()
    for start, end, (attrs, _) in _held(soc):
        edges = {start - start % PTRS_PER_PMD, (end - 1) - (end - 1) % PTRS_PER_PMD}
        heads |= edges
        if attrs & ASSIGNED and not attrs & PAGESIZE:
            for head in edges:
                first, last = max(start, head + 1), min(end, head + PTRS_PER_PMD)
                assigned[head] = assigned.get(head, 0) + max(0, last - first)
    for head in sorted(heads):
        raw = int.from_bytes(rmp.raw(head), "little")
        have, want = raw >> 3 & 0x1FF, assigned.get(head, 0)
        if have != want:
            yield Violation(head, f"subpage_count {have}, assigned subpages {want}")
    return len(heads)


@always(
    "no host mapping of any size lets a write reach an assigned page",
    source="APM2-24593 §15.36.10 Table 15-39",
)
def host_cannot_write_assigned_pages(soc: Soc) -> Checking:
    looked_at = 0
    if not soc.rmp.enabled:
        return looked_at
    for start, end, (attrs, _) in _held(soc):
        for pfn in {start, end - 1}:
            looked_at += 1
            writable = check_hypervisor_owned(soc, pfn, 1, PgLevel.PG_4K) == 1
            if writable == bool(attrs & ASSIGNED):
                yield Violation(
                    pfn, f"host write {'goes through' if writable else 'is refused'}"
                )
            if attrs & ASSIGNED and check_hypervisor_owned(soc, pfn, 1, PgLevel.PG_2M):
                yield Violation(pfn, "host write through a 2M mapping goes through")
    return looked_at


@always(
    "the RMP's own pages belong to firmware while SNP is initialised",
    source="ASPFW; AMD-SB-3020 (CVE-2025-0033) shows what it takes to break this",
)
def rmp_protects_itself(soc: Soc) -> Checking:
    rmp = soc.rmp
    if soc.psp.snp_state is not PlatformState.INIT:
        return 0
    looked_at = 0
    for start, _, value in rmp.map.runs(rmp.base >> PAGE_SHIFT, (rmp.end >> PAGE_SHIFT) + 1):
        looked_at += 1
        if rmp.covered(start) and rmp.decode(value) is not PageState.FIRMWARE:
            yield Violation(start, f"a page of the RMP is {rmp.decode(value).name}")
    return looked_at


@always(
    "an ASID in use by a guest is not dirty in any cache, and its key is installed",
    source="ABI-56860 SNP_ACTIVATE, SNP_DF_FLUSH, SNP_DECOMMISSION",
)
def taken_asids_are_clean(soc: Soc) -> Checking:
    asids = soc.psp.asids
    taken = sorted(asids.allocated.keys() | asids.in_use.keys())
    for asid in taken:
        if asid in asids.dirty:
            yield Violation(-1, f"ASID {asid} is taken and dirty")
        if asid in asids.allocated and asid in asids.in_use:
            yield Violation(-1, f"ASID {asid} is both launching and running")
        if soc.key(asid) is None:
            yield Violation(-1, f"ASID {asid} is taken and has no key")
    return len(taken)


@always(
    "a page that a running vCPU holds as its VMSA stays a VMSA of its guest",
    source="APM2-24593 §15.36.12",
)
def held_vmsas_stay(soc: Soc) -> Checking:
    for pfn in sorted(soc.rmp.in_use):
        attrs = soc.rmp.map[pfn][0]
        if soc.rmp.decode(soc.rmp.map[pfn]) is not PageState.HYPERVISOR and not attrs & VMSA:
            yield Violation(pfn, f"in use, raw {attrs:#x}")
    return len(soc.rmp.in_use)


@always_on(
    RmpTransition,
    "an immutable entry changes by firmware only",
    source="APM2-24593 §15.36; APM3-24594 RMPUPDATE",
)
def immutable_changes_by_firmware_only(event: RmpTransition) -> Iterator[Violation]:
    changed = (event.old_lo, event.old_hi) != (event.new_lo, event.new_hi)
    if changed and event.old_lo & IMMUTABLE and event.agent in SOFTWARE_AGENTS:
        yield Violation(event.pfn, f"{event.agent} changed an immutable entry")


@always_on(
    RmpTransition,
    "an RMPUPDATE that changes owner, gpa, size or assigned leaves nothing validated, no VMSA and no VMPL masks",
    source="APM3-24594 RMPUPDATE; APM2-24593 §15.36",
)
def a_changed_page_starts_afresh(event: RmpTransition) -> Iterator[Violation]:
    if event.agent != "RMPUPDATE" or not (event.old_lo ^ event.new_lo) & _BINDING:
        return
    if event.new_lo & (VALIDATED | VMSA) or event.new_hi & _LOWER_VMPLS:
        yield Violation(event.pfn, f"kept {event.new_hi:#x}_{event.new_lo:016x}")


@always_on(
    RmpTransition,
    "nothing but PVALIDATE and firmware validates a page",
    source="APM2-24593 §15.36",
)
def the_hypervisor_validates_nothing(event: RmpTransition) -> Iterator[Violation]:
    if event.agent in ("RMPUPDATE", "RMPADJUST") and event.new_lo & ~event.old_lo & VALIDATED:
        yield Violation(event.pfn, f"{event.agent} set validated")


@always_on(
    RmpTransition,
    "PSMASH changes the page size, and nothing that the guest put there",
    source="APM3-24594 PSMASH; a 2M page is no VMSA, so neither are its pieces",
)
def psmash_changes_size_only(event: RmpTransition) -> Iterator[Violation]:
    if event.agent == "PSMASH":
        others = (event.old_lo ^ event.new_lo) & ~(PAGESIZE | VMSA)
        if others or event.old_hi != event.new_hi:
            yield Violation(event.pfn, f"bits {others:#x} changed")


@always_on(
    RmpTransition,
    "PVALIDATE changes validated and nothing else",
    source="APM3-24594 PVALIDATE",
)
def pvalidate_changes_validated_only(event: RmpTransition) -> Iterator[Violation]:
    if event.agent == "PVALIDATE":
        others = (event.old_lo ^ event.new_lo) & ~VALIDATED
        if others or event.old_hi != event.new_hi:
            yield Violation(event.pfn, f"bits {others:#x} changed")


@always_on(
    RmpTransition,
    "a refused operation changes nothing",
    source="APM3-24594; ABI-56860",
)
def refusals_change_nothing(event: RmpTransition) -> Iterator[Violation]:
    changed = (event.old_lo, event.old_hi) != (event.new_lo, event.new_hi)
    if changed and event.agent in SOFTWARE_AGENTS and event.status != "SUCCESS":
        yield Violation(event.pfn, f"{event.agent} answered {event.status}")


def _became(event: RmpTransition, bits: int) -> bool:
    return bool(event.new_lo & bits == bits and event.old_lo & bits != bits)


@sometimes(RmpTransition, "a page is given to a guest")
def a_page_becomes_a_guests(event: RmpTransition) -> bool:
    return (
        event.agent == "RMPUPDATE"
        and _became(event, ASSIGNED)
        and bool(event.new_lo & ASID_MASK)
    )


@sometimes(RmpTransition, "a validated page is taken away")
def a_validated_page_is_taken_away(event: RmpTransition) -> bool:
    return event.agent == "RMPUPDATE" and bool(
        event.old_lo & VALIDATED and not event.new_lo & VALIDATED
    )


@sometimes(RmpTransition, "a guest's page goes to another guest without coming home in between")
def a_page_changes_guests(event: RmpTransition) -> bool:
    old, new = event.old_lo & ASID_MASK, event.new_lo & ASID_MASK
    return event.agent == "RMPUPDATE" and bool(old and new) and old != new


@sometimes(RmpTransition, "a 2M page is smashed")
def a_2m_page_is_smashed(event: RmpTransition) -> bool:
    return event.agent == "PSMASH" and event.status == "SUCCESS"


@sometimes(RmpTransition, "a page goes through Pre-Guest")
def a_page_becomes_pre_guest(event: RmpTransition) -> bool:
    return _became(event, ASSIGNED | IMMUTABLE) and bool(event.new_lo & ASID_MASK)


@sometimes(RmpTransition, "a guest accepts a page")
def a_guest_accepts_a_page(event: RmpTransition) -> bool:
    return event.agent == "PVALIDATE" and _became(event, VALIDATED)


@sometimes(RmpTransition, "RMPUPDATE meets an immutable page")
def rmpupdate_meets_an_immutable_page(event: RmpTransition) -> bool:
    return event.agent == "RMPUPDATE" and event.status == "FAIL_PERMISSION"


@sometimes(RmpTransition, "RMPUPDATE meets the other page size")
def rmpupdate_meets_the_other_page_size(event: RmpTransition) -> bool:
    return event.agent == "RMPUPDATE" and event.status == "FAIL_OVERLAP"


@sometimes(RmpTransition, "RMPUPDATE meets a page in use")
def rmpupdate_meets_a_page_in_use(event: RmpTransition) -> bool:
    return event.agent == "RMPUPDATE" and event.status == "FAIL_INUSE"


@sometimes(HostRmpPf, "a host write meets an assigned page")
def a_host_write_is_refused(event: HostRmpPf) -> bool:
    return True


@sometimes(GuestVc, "a guest uses a page it never accepted")
def a_guest_meets_an_unvalidated_page(event: GuestVc) -> bool:
    return True


@sometimes(NestedPageFault, "a guest's access fails for its owner")
def an_access_fails_for_the_owner(event: NestedPageFault) -> bool:
    return event.check == "OWN"


@sometimes(NestedPageFault, "a guest's access fails for its guest physical address")
def an_access_fails_for_the_gpa(event: NestedPageFault) -> bool:
    return event.check == "GPAM"


@sometimes(NestedPageFault, "a guest's access fails for the page size")
def an_access_fails_for_the_size(event: NestedPageFault) -> bool:
    return event.check == "SZ"


@sometimes(NestedPageFault, "a guest's access fails for its VMPL")
def an_access_fails_for_the_vmpl(event: NestedPageFault) -> bool:
    return event.check == "VMPL"


@sometimes(FirmwareCommand, "a launch is finished")
def a_launch_is_finished(event: FirmwareCommand) -> bool:
    return event.command == "SNP_LAUNCH_FINISH" and event.status == "SUCCESS"


@sometimes(FirmwareCommand, "firmware refuses a page for its state")
def firmware_refuses_a_page_for_its_state(event: FirmwareCommand) -> bool:
    return event.status == "INVALID_PAGE_STATE"


@sometimes(FirmwareCommand, "an ASID is asked for again before it was flushed")
def an_asid_is_asked_for_unflushed(event: FirmwareCommand) -> bool:
    return event.command == "SNP_ACTIVATE" and event.status == "DFFLUSH_REQUIRED"
