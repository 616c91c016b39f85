"""Dirty rings as user space sets them up, on the model and on a real /dev/kvm: no guest runs."""

from collections.abc import Iterator
from functools import partial

import pytest

from softcvm import HostSys, Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmClearDirtyLog, KvmDirtyLog, VmType
from softcvm.abi.sys import HostSignal, Sys
from tests.conftest import Require
from tests.uapi.calls import MIB, PAGE, VmCalls, anon, errno_of
from tools.kvm_diff.real import why_not

RING = k.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
SHARED, PRIVATE = 1, 2
R, RW, RX = 1, 3, 5
GOOD, BUS = "readable", "SIGBUS"


@pytest.fixture(params=["model", "kvm"])
def sys(request: pytest.FixtureRequest, require: Require) -> Sys:
    if request.param == "kvm":
        require("kvm", not why_not(), why_not())
        return HostSys()
    return Machine(memory=256 * MIB).process()


@pytest.fixture
def calls(sys: Sys) -> Iterator[VmCalls]:
    vm = VmCalls(sys, VmType.DEFAULT)
    yield vm
    vm.close()


def test_the_capability_tells_the_largest_ring(calls: VmCalls) -> None:
    for cap in (k.KVM_CAP_DIRTY_LOG_RING, RING):
        for fd in (calls.kvm, calls.fd):
            assert calls.sys.ioctl(fd, k.KVM_CHECK_EXTENSION, cap) == 65536 * 16


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "EINVAL"),
        (16, "EINVAL"),
        (2048, "EINVAL"),
        (PAGE, "0"),
        (3 * PAGE, "EINVAL"),
        (MIB, "0"),
        (2 * MIB, "E2BIG"),
        (1 << 40, "EINVAL"),  # a u32 in the kernel
        (1 << 40 | PAGE, "0"),
    ],
)
def test_a_ring_is_a_power_of_two_of_a_page_or_more_and_set_once(
    calls: VmCalls, size: int, expected: str
) -> None:
    assert errno_of(partial(calls.enable_cap, RING, size)) == expected
    again = errno_of(partial(calls.enable_cap, k.KVM_CAP_DIRTY_LOG_RING, size))
    assert again == ("EINVAL" if expected == "0" else expected)


def test_flags_of_the_capability_are_ignored_and_vcpus_are_not(calls: VmCalls) -> None:
    calls.vcpu()
    assert errno_of(partial(calls.enable_cap, RING, PAGE, flags=7)) == "EINVAL"
    other = VmCalls(calls.sys, VmType.DEFAULT)
    assert errno_of(partial(other.enable_cap, RING, PAGE, flags=7)) == "0"
    other.close()


@pytest.mark.parametrize(
    ("pgoff", "npages", "prot", "flags", "expected"),
    [
        (64, 2, RW, SHARED, [GOOD, GOOD]),
        (64, 3, RW, SHARED, [GOOD, GOOD, BUS]),
        (63, 2, RW, SHARED, [BUS, GOOD]),
        (64, 2, RW, PRIVATE, "EINVAL"),
        (64, 2, R, PRIVATE, "EINVAL"),
        (63, 2, RW, PRIVATE, "EINVAL"),
        (64, 2, RX, SHARED, "EPERM"),
        (62, 2, RW, PRIVATE, [BUS, BUS]),
        (66, 1, RW, PRIVATE, [BUS]),
        (62, 7, RW, PRIVATE, [BUS, BUS, GOOD, GOOD, BUS, BUS, BUS]),  # both ends lie outside
    ],
)
def test_the_ring_is_mapped_from_the_vcpu(
    calls: VmCalls, pgoff: int, npages: int, prot: int, flags: int, expected: list[str] | str
) -> None:
    calls.enable_cap(RING, 2 * PAGE)
    vcpu = calls.vcpu()
    addr = 0

    def mapping() -> None:
        nonlocal addr
        addr = calls.sys.mmap(npages * PAGE, prot, flags, vcpu, pgoff * PAGE)

    failed = errno_of(mapping)
    if failed != "0":
        assert failed == expected
        return
    seen = []
    for page in range(npages):
        try:
            assert calls.sys.load(addr + page * PAGE, PAGE) == bytes(PAGE)
            seen.append(GOOD)
        except HostSignal as signal:
            seen.append({7: BUS}[signal.signo])
    assert seen == expected
    calls.sys.munmap(addr, npages * PAGE)


def test_a_vm_with_rings_has_no_bitmaps(calls: VmCalls) -> None:
    assert errno_of(lambda: calls.sys.ioctl(calls.fd, k.KVM_RESET_DIRTY_RINGS)) == "EINVAL"
    calls.enable_cap(RING, PAGE)
    calls.region(0, 0, PAGE, anon(calls.sys, PAGE), 1)
    bitmap = anon(calls.sys, PAGE)
    for slot in (0, 7, 32764, 9 << 16):
        fetch = KvmDirtyLog(slot=slot, dirty_bitmap=bitmap).data
        clear = KvmClearDirtyLog(slot=slot, num_pages=1, dirty_bitmap=bitmap).data
        unaligned = KvmClearDirtyLog(slot=slot, first_page=1).data
        for request, arg in (
            (k.KVM_GET_DIRTY_LOG, fetch),
            (k.KVM_CLEAR_DIRTY_LOG, clear),
            (k.KVM_CLEAR_DIRTY_LOG, unaligned),
        ):
            assert errno_of(partial(calls.sys.ioctl, calls.fd, request, arg)) == "ENXIO"
    assert calls.sys.ioctl(calls.fd, k.KVM_RESET_DIRTY_RINGS) == 0


def test_what_user_space_writes_into_a_ring_is_what_is_reset(calls: VmCalls) -> None:
    """RESET in entries that KVM never published: it believes them, in order, up to the first without."""
    calls.enable_cap(RING, PAGE)
    vcpu = calls.vcpu()
    ring = calls.sys.mmap(PAGE, RW, SHARED, vcpu, 64 * PAGE)
    for index in (0, 1, 3):
        calls.sys.store(ring + 16 * index, (2).to_bytes(4, "little") + b"\xff" * 12)
    assert calls.sys.ioctl(calls.fd, k.KVM_RESET_DIRTY_RINGS) == 2
    assert calls.sys.ioctl(calls.fd, k.KVM_RESET_DIRTY_RINGS) == 0
    assert calls.sys.load(ring, 4) == bytes(4)
    calls.sys.store(ring + 32, b"\3\0\0\0")
    assert calls.sys.ioctl(calls.fd, k.KVM_RESET_DIRTY_RINGS) == 2
    calls.sys.munmap(ring, PAGE)
