"""KVM_SET_MEMORY_ATTRIBUTES: refusals in Linux's order, and what a change does and does not do.

Expected values: kvm_vm_ioctl_set_mem_attributes(), virt/kvm/kvm_main.c v6.12 and v7.2, read.
"""

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.kernel.virt.kvm.kvm_main import Kvm
from softcvm.sim.events import Event
from tests.uapi.calls import MIB, PAGE, PRIVATE, VmCalls, anon, errno_of

U64 = (1 << 64) - 1


def start(vm_type: int = VmType.SW_PROTECTED) -> tuple[Machine, VmCalls, Kvm]:
    machine = Machine(memory=256 * MIB)
    calls = VmCalls(machine.process(), vm_type)
    (kvm,) = machine.linux.vm_list
    return machine, calls, kvm


@pytest.mark.parametrize(
    ("why", "address", "size", "attributes", "flags", "expected"),
    [
        ("flags come first", 1, 0, 7, 1, "EINVAL"),
        ("read, write and execute are reserved", 0, PAGE, 1, 0, "EINVAL"),
        ("nothing to do", 0, 0, PRIVATE, 0, "EINVAL"),
        ("the range ends exactly at 2^64", U64 - PAGE + 1, PAGE, PRIVATE, 0, "EINVAL"),
        ("the range wraps", U64 - PAGE + 1, 2 * PAGE, PRIVATE, 0, "EINVAL"),
        ("unaligned address", 8, PAGE, PRIVATE, 0, "EINVAL"),
        ("unaligned size", 0, PAGE + 8, PRIVATE, 0, "EINVAL"),
        ("the last page but one, far beyond MAXPHYADDR", U64 - 2 * PAGE + 1, PAGE, 8, 0, "0"),
        ("no memslot is needed", 0, MIB, PRIVATE, 0, "0"),
        ("back to shared", 0, MIB, 0, 0, "0"),
    ],
)
def test_attributes_are_refused_for(
    why: str, address: int, size: int, attributes: int, flags: int, expected: str
) -> None:
    _, calls, _ = start()
    assert errno_of(lambda: calls.attributes(address, size, attributes, flags)) == expected, why


def test_a_default_vm_takes_shared_as_a_no_op_and_refuses_private() -> None:
    _, calls, _ = start(VmType.DEFAULT)
    assert errno_of(lambda: calls.attributes(0, MIB, 0)) == "0"
    assert errno_of(lambda: calls.attributes(0, MIB, PRIVATE)) == "EINVAL"
    assert calls.sys.ioctl(calls.fd, k.KVM_CHECK_EXTENSION, k.KVM_CAP_MEMORY_ATTRIBUTES) == 0
    assert calls.sys.ioctl(calls.kvm, k.KVM_CHECK_EXTENSION, k.KVM_CAP_MEMORY_ATTRIBUTES) == 8


def test_setting_what_is_set_already_does_nothing_at_all() -> None:
    machine, calls, kvm = start()
    calls.private_slot()
    vcpu = calls.vcpu()
    calls.prefault(vcpu, 0, MIB)
    seq, zaps = kvm.mmu_invalidate_seq, machine.counters["zaps"]
    calls.attributes(0, 4 * MIB, PRIVATE)
    assert (kvm.mmu_invalidate_seq, machine.counters["zaps"]) == (seq, zaps)


def test_without_a_memslot_the_sequence_count_stays() -> None:
    _, calls, kvm = start()
    calls.attributes(0, MIB, PRIVATE)
    assert kvm.mmu_invalidate_seq == 0
    assert kvm.mem_attr.held() == [(0, MIB // PAGE, PRIVATE)]


def test_a_change_zaps_exactly_its_range_and_leaves_pages_and_rmp_alone() -> None:
    machine, calls, kvm = start()
    calls.private_slot()
    vcpu = calls.vcpu()
    calls.prefault(vcpu, 0, 4 * MIB)
    free = machine.linux.page_alloc.free_pages
    zaps = machine.counters["zaps"]
    calls.attributes(MIB, MIB, 0)
    assert machine.counters["zaps"] - zaps == MIB // PAGE
    assert machine.linux.page_alloc.free_pages == free
    mapped = {m.gfn + i for m in kvm.arch.npt.mappings() for i in range(m.npages)}
    assert mapped == {*range(256), *range(512, 1024)}


def test_one_change_of_many_pages_equals_many_changes_of_one_page() -> None:
    states = []
    for step in (MIB, PAGE):
        _, calls, kvm = start()
        calls.private_slot()
        calls.prefault(calls.vcpu(), 0, 4 * MIB)
        for gpa in range(MIB, 2 * MIB, step):
            calls.attributes(gpa, step, 0)
        states.append((kvm.mem_attr.held(), kvm.arch.npt.mappings()))
    assert states[0] == states[1]


def test_a_huge_page_that_the_range_cuts_is_kept_out_while_attributes_change() -> None:
    """9129633d568e: the invalidation covers the 2M pages around head and tail."""
    machine, calls, kvm = start()
    size = 8 * MIB
    calls.region(0, 0, size, anon(calls.sys, size), 4, calls.gmem(size))
    calls.attributes(0, size, PRIVATE)
    seen: list[tuple[int | None, int | None]] = []

    def watch(event: Event) -> None:
        if type(event).__name__ == "SetMemoryAttributes":
            seen.append((kvm.mmu_invalidate_range_start, kvm.mmu_invalidate_range_end))

    machine.events.attach(watch)
    calls.attributes(3 * MIB, 2 * PAGE, 0)
    assert seen == [(512, 1024)]  # [2M, 4M)
    calls.attributes(7 * MIB, PAGE, 0)
    calls.attributes(7 * MIB + PAGE, PAGE, 0)
    assert seen[1] == (1536, 2048)
    assert seen[2] == (1793, 1794)  # that 2M page is mixed already
    calls.attributes(4 * MIB, 3 * MIB, 0)
    assert seen[3] == (1024, 1792)  # the head is whole, the tail mixed
