"""Every sentence can be broken, and the check that carries it says so; none is broken by a whole boot."""

from collections.abc import Callable

import pytest

from softcvm.abi.kvm.memory import MemFlag
from softcvm.hw.events import RmpTransition
from softcvm.hw.rmp import (
    ASID_SHIFT,
    ASSIGNED,
    IMMUTABLE,
    LINEAR,
    LOCK,
    PAGESIZE,
    VALIDATED,
    VMSA,
)
from softcvm.hw.soc import Soc
from softcvm.invariants import check_all, registered, watch
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info
from softcvm.kernel.arch.x86.kvm.svm.svm import SvmOps
from softcvm.kernel.host import KvmBug, Warn
from softcvm.kernel.mm.page_alloc import FREE
from softcvm.kernel.virt.kvm.kvm_main import Kvm
from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot
from softcvm.machine import Machine
from softcvm.sim.addr import Gfn, PgLevel
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.steps import Mutex, run
from softcvm.vmm.vmm import Vmm
from tests.hw.machines import BareGuest, snp_machine
from tests.vmm.guests import booted, config, machine

PFN = 2560  # nobody's
GUEST = ASSIGNED | 5 << ASID_SHIFT | LINEAR


def put(soc: Soc, pfn: int, attrs: int, gfn: int = 0, npages: int = 1) -> None:
    """Write into the table behind everybody's back, the count of the ASID kept right."""
    soc.rmp.store("test", pfn, pfn + npages, (attrs, gfn - pfn if attrs & LINEAR else gfn))


def twice_validated(soc: Soc) -> None:
    put(soc, PFN, GUEST | VALIDATED, 0x40)
    put(soc, PFN + 7, GUEST | VALIDATED, 0x40)


def held_by_no_vmsa(soc: Soc) -> None:
    put(soc, PFN, GUEST, 0x40)
    soc.rmp.in_use.add(PFN)


def taken_and_dirty(soc: Soc) -> None:
    soc.psp.asids.dirty[1] = 1


HARDWARE: dict[str, Callable[[Soc], object]] = {
    "one_owner": lambda soc: put(soc, PFN, VALIDATED),
    "two_megabyte_entries_are_aligned": lambda soc: put(soc, PFN, GUEST | PAGESIZE, 0x201, 512),
    "validated_is_assigned": lambda soc: put(soc, PFN, ASSIGNED | VALIDATED),
    "one_validated_page_per_gpa": twice_validated,
    "locked_is_immutable": lambda soc: put(soc, PFN, ASSIGNED | LOCK),
    "asid_counters_are_exact": lambda soc: soc.rmp.asid_pages.update({5: 1}),
    "rmp_protects_itself": lambda soc: put(soc, soc.rmp.base >> 12, 0),
    "taken_asids_are_clean": taken_and_dirty,
    "held_vmsas_stay": held_by_no_vmsa,
}
# These look at what the processor does with the table; only a wrong processor breaks them.
NEED_A_WRONG_PROCESSOR = {"subpage_counts_are_exact", "host_cannot_write_assigned_pages"}


def bare() -> Soc:
    soc = snp_machine()
    BareGuest(soc, 1, 1, 512).launch([b"\x11" * 4096])
    return soc


def broken(subject: Soc | Machine) -> set[str]:
    return {result.name for result in check_all(subject) if not result.held}


@pytest.mark.parametrize("name", HARDWARE)
def test_a_broken_table_is_seen_by_the_sentence_about_it(name: str) -> None:
    soc = bare()
    assert broken(soc) == set()
    HARDWARE[name](soc)
    assert name in broken(soc)


def test_a_processor_that_forgets_the_checks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    soc = bare()
    monkeypatch.setattr(
        "softcvm.invariants.hardware.check_hypervisor_owned",
        lambda soc, pfn, npages, level: npages,
    )
    assert broken(soc) == {"host_cannot_write_assigned_pages"}


def test_a_table_that_miscounts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    soc = bare()
    monkeypatch.setattr(type(soc.rmp), "raw", lambda rmp, pfn: (8 * 300).to_bytes(16, "little"))
    assert broken(soc) == {"subpage_counts_are_exact"}


RAW = ASSIGNED | 5 << ASID_SHIFT | 0x40 << 12
EVENTS = {
    "immutable_changes_by_firmware_only": RmpTransition(
        "RMPUPDATE", PFN, 1, RAW | IMMUTABLE, 0, RAW, 0, "SUCCESS"
    ),
    "a_changed_page_starts_afresh": RmpTransition(
        "RMPUPDATE", PFN, 1, RAW | VALIDATED, 0, RAW + 0x1000 | VALIDATED, 0, "SUCCESS"
    ),
    "the_hypervisor_validates_nothing": RmpTransition(
        "RMPUPDATE", PFN, 1, RAW, 0, RAW | VALIDATED, 0, "SUCCESS"
    ),
    "psmash_changes_size_only": RmpTransition(
        "PSMASH", PFN, 512, RAW | PAGESIZE | VALIDATED, 0, RAW, 0, "SUCCESS"
    ),
    "pvalidate_changes_validated_only": RmpTransition(
        "PVALIDATE", PFN, 1, RAW, 0, RAW | VALIDATED | VMSA, 0, "SUCCESS"
    ),
    "refusals_change_nothing": RmpTransition("RMPUPDATE", PFN, 1, RAW, 0, 0, 0, "FAIL_INUSE"),
    "no_warning_about_own_books": Warn("kvm_mmu_invalidate_end", "no range"),
    "no_bug_in_the_invalidation_count": KvmBug(1, "mmu_invalidate_end() without begin()"),
}


@pytest.mark.parametrize("name", EVENTS)
def test_a_wrong_event_is_seen_by_the_sentence_about_it(name: str) -> None:
    soc = bare()
    watched = watch(soc)
    assert soc.tp.emit is not None
    soc.tp.emit(EVENTS[name])
    assert name in {result.name for result in watched.results() if not result.held}
    watched.detach()
    assert soc.tp.emit is None


def owned(host: Machine) -> tuple[int, int, int]:
    """(pfn, npages, asid) of a run of the guest's pages."""
    for start, end, (attrs, _) in host.rmp.map.held(0, host.soc.memory_pages):
        if attrs & VALIDATED and not attrs & VMSA:
            return start, end - start, attrs >> ASID_SHIFT & 0x3FF
    raise AssertionError("no guest page")


def a_page_nobody_has(host: Machine) -> int:
    frames = host.linux.page_alloc.frames
    return next(s for s, _, state in reversed(frames.runs()) if state == FREE)


def free_while_assigned(host: Machine) -> None:
    pfn, npages, _ = owned(host)
    host.linux.page_alloc.frames.set(pfn, pfn + npages, FREE)


def orphaned(host: Machine) -> None:
    sev_info(host.linux.vm_list[0]).asid += 50  # type: ignore[assignment]


def left_pre_guest(host: Machine) -> None:
    pfn, _, asid = owned(host)
    put(host.soc, pfn, ASSIGNED | IMMUTABLE | LINEAR | asid << ASID_SHIFT, 0x40)


def mapped_elsewhere(host: Machine) -> None:
    pfn, _, _ = owned(host)
    host.linux.vm_list[0].arch.npt.set(0x7777, pfn, 1, PgLevel.PG_4K)


def mapped_large_over_small(host: Machine) -> None:
    pfn = owned(host)[0]
    head = pfn - pfn % 512
    host.linux.vm_list[0].arch.npt.set(1 << 20, head, 512, PgLevel.PG_2M)


def mapped_free(host: Machine) -> None:
    npt = host.linux.vm_list[0].arch.npt
    npt.set(0x7777, a_page_nobody_has(host), 1, PgLevel.PG_4K)


def large_direct_mapping(host: Machine) -> None:
    pfn = owned(host)[0]
    head = pfn - pfn % 512
    host.linux.snp.direct_map.levels.set(head, head + 512, PgLevel.PG_2M)


def lock_left_held(host: Machine) -> None:
    run(Mutex(host.linux.lockdep, "kvm->slots_lock", 30).acquire())


def vm_of(host: Machine) -> Kvm:
    return host.linux.vm_list[0]


def a_private_page(host: Machine) -> tuple[int, int]:
    """(gfn, pfn) of a measured page, mapped where it belongs."""
    pfn = owned(host)[0]
    gfn = pfn + host.rmp.map[pfn][1]
    vm_of(host).arch.npt.set(gfn, pfn, 1, PgLevel.PG_4K)
    return gfn, pfn


def slot_of(host: Machine, gfn: int) -> KvmMemorySlot:
    slot = vm_of(host).gfn_to_memslot(Gfn(gfn))
    assert slot is not None
    return slot


def mapped_page_of_another(host: Machine) -> None:
    gfn, pfn = a_private_page(host)
    put(host.soc, pfn, GUEST + (70 << ASID_SHIFT), gfn)


def mapped_to_a_wrong_page(host: Machine) -> None:
    gfn, _ = a_private_page(host)
    vm_of(host).arch.npt.set(gfn, a_page_nobody_has(host), 1, PgLevel.PG_4K)


def shared_behind_its_back(host: Machine) -> None:
    gfn, _ = a_private_page(host)
    vm_of(host).mem_attr.set(gfn, gfn + 1, 0)


def without_a_file(host: Machine) -> None:
    gfn, _ = a_private_page(host)
    slot_of(host, gfn).gmem_file = None


def half_of_a_huge_page_shared(host: Machine) -> None:
    gfn, pfn = a_private_page(host)
    head = gfn - gfn % 512
    vm_of(host).arch.npt.set(head, pfn - pfn % 512, 512, PgLevel.PG_2M)
    vm_of(host).mem_attr.set(head, head + 1, 0)
    vm_of(host).mem_attr.set(head + 1, head + 512, 8)


def readonly_slot(host: Machine) -> None:
    gfn, _ = a_private_page(host)
    slot_of(host, gfn).flags |= MemFlag.READONLY


def clean_but_writable(host: Machine) -> None:
    gfn, _ = a_private_page(host)
    slot = slot_of(host, gfn)
    slot.dirty_bitmap = RangeMap(False, slot.npages)


def still_launching(host: Machine) -> None:
    a_private_page(host)
    vm_of(host).arch.pre_fault_allowed = False


def bound_to_nobody(host: Machine) -> None:
    gfn, _ = a_private_page(host)
    gmem = slot_of(host, gfn).gmem_file
    assert gmem is not None
    gmem.bindings.set(0, 1, None)


def miscounted_slots(host: Machine) -> None:
    vm_of(host).nr_memslot_pages += 1


def one_reference_too_many(host: Machine) -> None:
    vm_of(host).get()


def a_file_held_by_nobody(host: Machine) -> None:
    next(iter(host.linux.processes[0].files.fds.values())).get()  # type: ignore[union-attr]


def asid_in_nobodys_use(host: Machine) -> None:
    ops = host.linux.kvm_x86_ops
    assert isinstance(ops, SvmOps)
    ops.asids.used.add(77)


def dirty_and_free(host: Machine) -> None:
    host.soc.psp.asids.dirty[77] = 1


def mirror_nobody_knows(host: Machine) -> None:
    sev_info(vm_of(host)).enc_context_owner = vm_of(host)


KERNEL: dict[str, Callable[[Machine], object]] = {
    "mirrors_agree": mirror_nobody_knows,
    "leaves_lie_in_memslots": mapped_elsewhere,
    "leaf_kinds_follow_attributes": shared_behind_its_back,
    "private_leaves_have_a_guest_memfd": without_a_file,
    "gmem_leaves_lead_to_their_folio": mapped_to_a_wrong_page,
    "shared_leaves_lead_to_the_users_page": shared_behind_its_back,
    "huge_leaves_are_of_one_kind": half_of_a_huge_page_shared,
    "readonly_slots_have_readonly_leaves": readonly_slot,
    "writable_leaves_are_logged": clean_but_writable,
    "nothing_is_prepared_before_the_launch_is_over": still_launching,
    "bindings_agree": bound_to_nobody,
    "memslots_do_not_overlap": miscounted_slots,
    "vm_references_are_exact": one_reference_too_many,
    "file_references_are_exact": a_file_held_by_nobody,
    "asids_have_one_holder": asid_in_nobodys_use,
    "dirty_asids_wait_for_a_flush": dirty_and_free,
    "every_page_has_one_owner": lambda host: host.linux.page_alloc.alloc_pages(),
    "page_references_are_exact": lambda host: host.linux.page_alloc.get_pages(5, 1),
    "immutable_pages_were_lent": left_pre_guest,
    "guest_pages_are_where_they_belong": lambda host: put(
        host.soc, a_page_nobody_has(host), GUEST, 0x40
    ),
    "private_leaves_are_assigned": mapped_to_a_wrong_page,
    "nested_mappings_lead_to_pages_bound_there": mapped_elsewhere,
    "free_pages_are_the_hypervisors": free_while_assigned,
    "guest_pages_have_a_vm": orphaned,
    "no_page_stays_pre_guest": left_pre_guest,
    "nested_mappings_lead_to_own_pages": mapped_page_of_another,
    "large_leaves_are_large_in_the_rmp": mapped_large_over_small,
    "nested_mappings_lead_to_allocated_pages": mapped_free,
    "direct_map_is_split": large_direct_mapping,
    "nothing_is_under_way": lock_left_held,
}


@pytest.mark.parametrize("name", KERNEL)
def test_a_broken_kernel_is_seen_by_the_sentence_about_it(name: str) -> None:
    host = machine()
    vmm = Vmm(host.process(), config())
    vmm.launch()
    assert broken(host) == set()
    KERNEL[name](host)
    assert name in broken(host)


# It asks the kernel; only a wrong kernel breaks it.
NEED_A_WRONG_KERNEL = {"strangers_and_the_dead_get_eio"}


def test_a_kernel_that_serves_strangers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    host = machine()
    host.process()
    vmm = Vmm(host.process(), config())
    vmm.launch()
    monkeypatch.setattr("softcvm.uapi.vm.check_usable", lambda kvm, proc: None)
    assert broken(host) == {"strangers_and_the_dead_get_eio"}


def test_every_sentence_has_a_test_that_breaks_it() -> None:
    always, on_event, _ = registered()
    tested = HARDWARE.keys() | NEED_A_WRONG_PROCESSOR | EVENTS.keys() | KERNEL.keys()
    tested |= NEED_A_WRONG_KERNEL
    assert {rule.name for rule in always} | {rule.name for rule in on_event} == tested


def test_sentences_about_the_kernel_need_a_machine() -> None:
    host = machine()
    on_soc = {result.name for result in check_all(host.soc)}
    ours = KERNEL.keys() | NEED_A_WRONG_KERNEL
    assert {result.name for result in check_all(host)} - on_soc == ours


def test_a_hostile_check_leaves_out_what_needs_good_will() -> None:
    soc = bare()
    left_out = {r.name for r in check_all(soc)} - {r.name for r in check_all(soc, hostile=True)}
    assert left_out == {"one_validated_page_per_gpa"}


@pytest.mark.parametrize("order", [0, 9])
def test_a_whole_boot_breaks_none_and_meets_what_matters(order: int) -> None:
    host = machine(order=order)
    watched = watch(host)
    result, _ = booted(config(), host)
    assert result.good, [claim for claim in result.claims if not claim.held]
    assert [r.name for r in check_all(host, watched) if not r.held] == []
    assert {
        "a_page_becomes_a_guests",
        "a_page_becomes_pre_guest",
        "a_guest_accepts_a_page",
        "a_guest_meets_an_unvalidated_page",
        "a_validated_page_is_taken_away",
        "a_launch_is_finished",
    } <= watched.reached
    assert ("a_2m_page_is_smashed" in watched.reached) == (order == 9)
