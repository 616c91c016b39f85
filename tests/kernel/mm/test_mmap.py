"""Address spaces: where mappings go, what touching them costs, what the notifier hears."""

from itertools import pairwise

import pytest

from softcvm import HostSignal, Machine
from softcvm.kernel.errors import Unmodelled
from softcvm.kernel.mm.mmap import MADV_DONTNEED
from softcvm.machine import MachineProcess
from softcvm.sim.choice import Scripted
from tests.uapi.calls import MIB, PAGE, PRIVATE_ANON, RW, VmCalls, errno_of

SIGSEGV = 11


@pytest.fixture
def sys() -> MachineProcess:
    return Machine(memory=256 * MIB).process()


def test_memory_is_zero_until_written_and_costs_nothing_until_then(sys: MachineProcess) -> None:
    free = sys.machine.linux.page_alloc.free_pages
    address = sys.mmap(64 * MIB, RW, PRIVATE_ANON)
    assert sys.load(address + 5, 3 * PAGE) == bytes(3 * PAGE)
    assert sys.machine.linux.page_alloc.free_pages == free
    sys.store(address + PAGE - 3, b"across")
    assert sys.load(address + PAGE - 4, 8) == b"\0across\0"
    assert free - sys.machine.linux.page_alloc.free_pages == 2
    sys.munmap(address, 64 * MIB)
    assert sys.machine.linux.page_alloc.free_pages == free


def test_large_anonymous_memory_is_aligned_to_2m(sys: MachineProcess) -> None:
    sys.mmap(PAGE, RW, PRIVATE_ANON)
    assert sys.mmap(4 * MIB, RW, PRIVATE_ANON) % (2 * MIB) == 0


def test_mappings_do_not_overlap_and_holes_are_used_again(sys: MachineProcess) -> None:
    spans = [(sys.mmap(size, RW, PRIVATE_ANON), size) for size in (PAGE, 3 * PAGE, 2 * PAGE)]
    ends = sorted((a, a + s) for a, s in spans)
    assert all(one[1] <= two[0] for one, two in pairwise(ends))
    hole, size = spans[1]
    sys.munmap(hole, size)
    assert sys.mmap(size, RW, PRIVATE_ANON) == hole


def test_unmapping_the_middle_leaves_both_ends(sys: MachineProcess) -> None:
    address = sys.mmap(3 * PAGE, RW, PRIVATE_ANON)
    sys.store(address, b"a" * 3 * PAGE)
    sys.munmap(address + PAGE, PAGE)
    assert sys.load(address, PAGE) == b"a" * PAGE
    assert sys.load(address + 2 * PAGE, PAGE) == b"a" * PAGE
    with pytest.raises(HostSignal) as touched:
        sys.store(address + PAGE - 1, b"xy")
    assert (touched.value.signo, touched.value.addr) == (SIGSEGV, address + PAGE)
    assert sys.load(address + PAGE - 1, 1) == b"x"  # what came before the fault is written


def test_protection(sys: MachineProcess) -> None:
    address = sys.mmap(PAGE, 1, PRIVATE_ANON)
    assert sys.load(address, 1) == b"\0"
    with pytest.raises(HostSignal):
        sys.store(address, b"x")


@pytest.mark.parametrize(
    ("length", "flags", "fd", "offset", "expected"),
    [
        (0, PRIVATE_ANON, -1, 0, "EINVAL"),
        (1 << 60, PRIVATE_ANON, -1, 0, "ENOMEM"),
        (PAGE, 0x20, -1, 0, "EINVAL"),
        (PAGE, 1, 99, 0, "EBADF"),
        (PAGE, 2, -1, 0, "EBADF"),
        (PAGE, PRIVATE_ANON, -1, 1, "EINVAL"),
    ],
)
def test_mmap_refuses(
    sys: MachineProcess, length: int, flags: int, fd: int, offset: int, expected: str
) -> None:
    assert errno_of(lambda: sys.mmap(length, RW, flags, fd, offset)) == expected


def test_a_device_node_cannot_be_mapped(sys: MachineProcess) -> None:
    kvm = sys.open("/dev/kvm")
    assert errno_of(lambda: sys.mmap(PAGE, RW, 1, kvm)) == "ENODEV"


def test_dontneed_frees_private_memory_and_keeps_shared(sys: MachineProcess) -> None:
    for flags, expected in ((PRIVATE_ANON, b"\0"), (0x21, b"x")):
        address = sys.mmap(2 * PAGE, RW, flags)
        sys.store(address, b"x")
        sys.madvise(address, PAGE, MADV_DONTNEED)
        assert sys.load(address, 1) == expected
    assert errno_of(lambda: sys.madvise(address, 64 * MIB, MADV_DONTNEED)) == "ENOMEM"
    assert errno_of(lambda: sys.madvise(address + 1, PAGE, MADV_DONTNEED)) == "EINVAL"
    assert errno_of(lambda: sys.madvise(address, PAGE, 7)) == "EINVAL"


def test_memory_that_goes_away_goes_away_for_the_guest_too(sys: MachineProcess) -> None:
    calls = VmCalls(sys)
    hva = sys.mmap(4 * MIB, RW, PRIVATE_ANON)
    calls.region(0, 0, 4 * MIB, hva)
    vcpu = calls.vcpu()
    assert calls.prefault(vcpu, 0, 4 * MIB) == ("0", 4 * MIB, 0)
    (kvm,) = sys.machine.linux.vm_list
    seq = kvm.mmu_invalidate_seq
    sys.madvise(hva + MIB, MIB, MADV_DONTNEED)
    assert kvm.mmu_invalidate_seq == seq + 1
    assert kvm.arch.npt.lookup(MIB // PAGE) is None
    assert kvm.arch.npt.lookup(0) is not None
    sys.munmap(hva, 4 * MIB)
    assert not kvm.arch.npt.mappings()
    assert calls.prefault(vcpu, 0, PAGE)[0] == "EFAULT"


def test_memory_elsewhere_does_not_disturb_the_guest(sys: MachineProcess) -> None:
    calls = VmCalls(sys)
    calls.region(0, 0, MIB, sys.mmap(MIB, RW, PRIVATE_ANON))
    (kvm,) = sys.machine.linux.vm_list
    other = sys.mmap(MIB, RW, PRIVATE_ANON)
    sys.store(other, b"x")
    sys.munmap(other, MIB)
    assert kvm.mmu_invalidate_seq == 0


def test_without_memory_kvm_says_efault_and_a_touch_is_not_modelled() -> None:
    choices = Scripted({})
    process = Machine(memory=256 * MIB, choices=choices).process()
    calls = VmCalls(process)
    hva = process.mmap(MIB, RW, PRIVATE_ANON)
    calls.region(0, 0, MIB, hva)
    vcpu = calls.vcpu()
    choices._picks["alloc_pages"] = [1, 1, 1]
    assert calls.prefault(vcpu, 0, PAGE)[0] == "EFAULT"
    with pytest.raises(Unmodelled, match="OOM killer"):
        process.store(hva, b"x")
