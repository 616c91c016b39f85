"""KVM_PRE_FAULT_MEMORY: refusals, how far it gets, and that a run is the loop over its pages.

Expected values: kvm_vcpu_pre_fault_memory(), virt/kvm/kvm_main.c, and kvm_tdp_map_page(),
arch/x86/kvm/mmu/mmu.c, v6.12 and v7.2, read.
"""

import pytest

from softcvm import Machine
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.run import KvmExit, KvmRun
from softcvm.sim.addr import PgLevel
from softcvm.sim.choice import Scripted
from tests.uapi.calls import (
    GUEST_MEMFD,
    KEEP_SIZE,
    MIB,
    PAGE,
    PRIVATE,
    PUNCH_HOLE,
    VmCalls,
    anon,
)

U64 = (1 << 64) - 1


def start(
    vm_type: int = VmType.SW_PROTECTED, **options: object
) -> tuple[Machine, VmCalls, int]:
    machine = Machine(memory=256 * MIB, **options)  # type: ignore[arg-type]
    calls = VmCalls(machine.process(), vm_type)
    return machine, calls, calls.vcpu()


def kvm_run(calls: VmCalls, vcpu: int) -> KvmRun:
    return KvmRun(calls.sys.load(calls.sys.mmap(PAGE, 1, 1, vcpu), PAGE))


@pytest.mark.parametrize(
    ("gpa", "size", "flags", "expected"),
    [
        (0, PAGE, 1, "EINVAL"),
        (1, PAGE, 0, "EINVAL"),
        (0, 1, 0, "EINVAL"),
        (0, 0, 0, "EINVAL"),
        (U64 - PAGE + 1, PAGE, 0, "EINVAL"),
        (0, PAGE, 0, "0"),
        (64 * MIB, PAGE, 0, "ENOENT"),
        (64 * MIB, PAGE, 9, "EINVAL"),
    ],
)
def test_prefault_answers(gpa: int, size: int, flags: int, expected: str) -> None:
    _, calls, vcpu = start()
    calls.private_slot()
    done = PAGE if expected == "0" else 0
    assert calls.prefault(vcpu, gpa, size, flags) == (expected, gpa + done, size - done)


def test_an_snp_vm_may_not_prefault_before_it_is_launched() -> None:
    _, calls, vcpu = start(VmType.SNP)
    calls.private_slot()
    assert calls.prefault(vcpu, 0, PAGE) == ("EOPNOTSUPP", 0, PAGE)


def test_r4_0_private_memory_without_backing_leaves_as_a_memory_fault() -> None:
    _, calls, vcpu = start()
    calls.region(0, 0, MIB, anon(calls.sys, MIB))
    calls.attributes(0, 2 * MIB, PRIVATE)
    for gpa in (0, MIB + PAGE):  # a slot without gmem, and no slot
        assert calls.prefault(vcpu, gpa, PAGE) == ("EFAULT", gpa, PAGE)
        run = kvm_run(calls, vcpu)
        assert run.exit_reason == KvmExit.MEMORY_FAULT
        assert (run.memory_fault_gpa, run.memory_fault_size) == (gpa, PAGE)
        assert run.memory_fault_flags == PRIVATE


def test_what_was_mapped_counts_even_if_the_rest_fails() -> None:
    _, calls, vcpu = start()
    calls.private_slot(size=MIB)
    assert calls.prefault(vcpu, MIB - 2 * PAGE, 4 * PAGE) == ("0", MIB, 2 * PAGE)
    assert calls.prefault(vcpu, MIB, 2 * PAGE) == ("ENOENT", MIB, 2 * PAGE)


def test_a_signal_ends_it_with_eintr_or_with_what_was_done() -> None:
    choices = Scripted({"signal_pending": [1]})
    _, calls, vcpu = start(choices=choices)
    calls.private_slot()
    assert calls.prefault(vcpu, 0, MIB) == ("EINTR", 0, MIB)


def test_memory_runs_out() -> None:
    _, calls, vcpu = start(choices=Scripted({}))
    calls.private_slot(size=4 * MIB)
    machine = calls.sys.machine  # type: ignore[attr-defined]
    machine.linux.choices._picks["alloc_pages"] = [1]
    assert calls.prefault(vcpu, 0, PAGE) == ("ENOMEM", 0, PAGE)
    assert kvm_run(calls, vcpu).exit_reason == KvmExit.MEMORY_FAULT
    assert calls.prefault(vcpu, 0, PAGE) == ("0", PAGE, 0)


@pytest.mark.parametrize("order", [0, 9])
def test_one_call_over_a_range_equals_a_call_for_each_page(order: int) -> None:
    """Private and shared memory in turns, slots that cut 2M pages, holes and old pages in the
    gmem."""
    states = []
    for step in (1, 0):
        machine, calls, vcpu = start(gmem_max_order=order)
        size = 8 * MIB
        hva, gmem = anon(calls.sys, size), calls.gmem(size + 2 * MIB)
        calls.region(0, 0, 5 * MIB, hva, GUEST_MEMFD, gmem, 0)
        calls.region(1, 5 * MIB, 3 * MIB, hva + 5 * MIB, GUEST_MEMFD, gmem, 5 * MIB)
        calls.attributes(0, size, PRIVATE)
        calls.sys.fallocate(gmem, KEEP_SIZE, MIB + PAGE, 5 * PAGE)
        calls.attributes(2 * MIB + 7 * PAGE, 3 * PAGE, 0)
        calls.sys.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, MIB + 2 * PAGE, PAGE)
        for gpa in range(0, size, PAGE if step else size):
            assert calls.prefault(vcpu, gpa, PAGE if step else size)[0] == "0"
        (kvm,) = machine.linux.vm_list
        inode = calls.sys.proc.files.lookup(gmem).private.inode  # type: ignore[attr-defined]
        states.append(
            (
                kvm.arch.npt.mappings(),
                [(s, e, f) for s, e, f in inode.folios.held()],
                machine.linux.page_alloc.frames.held(),
                machine.counters["bytes_zeroed"],
            )
        )
    assert states[0] == states[1]


def test_r4_0_the_order_of_the_backing_limits_the_level() -> None:
    levels = {}
    for order in (0, 9):
        machine, calls, vcpu = start(gmem_max_order=order)
        calls.private_slot(size=4 * MIB)
        calls.prefault(vcpu, 0, 4 * MIB)
        (kvm,) = machine.linux.vm_list
        levels[order] = {m.level for m in kvm.arch.npt.mappings()}
    assert levels == {0: {PgLevel.PG_4K}, 9: {PgLevel.PG_2M}}


def test_r4_3_one_shared_page_or_a_crooked_slot_makes_4k_mappings_of_a_2m_folio() -> None:
    machine, calls, vcpu = start(gmem_max_order=9)
    calls.private_slot(size=4 * MIB)
    calls.attributes(PAGE, PAGE, 0)
    assert calls.prefault(vcpu, 2 * PAGE, 4 * MIB - 2 * PAGE)[0] == "0"
    (kvm,) = machine.linux.vm_list
    assert [(m.gfn, m.npages, m.level) for m in kvm.arch.npt.mappings()] == [
        (2, 510, PgLevel.PG_4K),
        (512, 512, PgLevel.PG_2M),
    ]
    hva = anon(calls.sys, 4 * MIB)
    calls.region(1, 16 * MIB, 2 * MIB, hva + PAGE, GUEST_MEMFD, calls.gmem(2 * MIB))
    calls.attributes(16 * MIB, 2 * MIB, PRIVATE)
    assert calls.prefault(vcpu, 16 * MIB, 2 * MIB)[0] == "0"
    assert {m.level for m in kvm.arch.npt.mappings(16 * MIB // PAGE)} == {PgLevel.PG_4K}


def test_a_second_time_changes_nothing() -> None:
    machine, calls, vcpu = start()
    calls.private_slot()
    calls.prefault(vcpu, 0, 4 * MIB)
    before = machine.fingerprint()
    assert calls.prefault(vcpu, 0, 4 * MIB) == ("0", 4 * MIB, 0)
    assert machine.fingerprint() == before


def test_the_cost_of_a_range_is_the_cost_of_its_runs() -> None:
    """64 GiB of contiguous memory are a handful of runs everywhere."""
    machine = Machine(memory=1 << 37)
    calls = VmCalls(machine.process())
    size = 64 << 30
    calls.private_slot(size=size)
    vcpu = calls.vcpu()
    assert calls.prefault(vcpu, 0, size) == ("0", size, 0)
    (kvm,) = machine.linux.vm_list
    assert len(kvm.arch.npt.map) < 10
    assert len(machine.linux.page_alloc.frames) < 20
    assert machine.counters["bytes_zeroed"] >= size
