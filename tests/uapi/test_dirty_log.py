"""KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG: what user space reads, on the model and on a real /dev/kvm.

Without guests a log is filled by KVM_DIRTY_LOG_INITIALLY_SET only; that much is asked of the real kernel too.
A set of page numbers, changed as api.rst §4.8 and §4.117 say, gives the expected value.
"""

import random
from collections.abc import Iterator

import pytest

from softcvm import HostSys, Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmClearDirtyLog, KvmDirtyLog, VmType
from tests.conftest import Require
from tests.uapi.calls import MIB, PAGE, VmCalls, anon, errno_of
from tools.kvm_diff.real import why_not

LOG_DIRTY, READONLY = 1, 2
MANUAL_PROTECT, INITIALLY_SET = 1, 2


@pytest.fixture(params=["model", "kvm"])
def calls(request: pytest.FixtureRequest, require: Require) -> Iterator[VmCalls]:
    if request.param == "kvm":
        require("kvm", not why_not(), why_not())
        real = VmCalls(HostSys(), VmType.DEFAULT)
        yield real
        real.close()
    else:
        yield VmCalls(Machine(memory=256 * MIB).process(), VmType.DEFAULT)


class Log:
    """One slot of `npages` with a log, and memory for its bitmap."""

    def __init__(self, calls: VmCalls, npages: int) -> None:
        self.calls = calls
        self.npages = npages
        self.hva = anon(calls.sys, npages * PAGE)
        self.bitmap = anon(calls.sys, PAGE)
        self.flags(LOG_DIRTY)

    def flags(self, flags: int) -> None:
        self.calls.region(0, MIB, self.npages * PAGE, self.hva, flags)

    @property
    def size(self) -> int:
        return -(-self.npages // 64) * 8

    def get(self) -> set[int]:
        self.calls.sys.store(self.bitmap, b"\xff" * (self.size + 8))
        args = KvmDirtyLog(slot=0, dirty_bitmap=self.bitmap)
        self.calls.sys.ioctl(self.calls.fd, k.KVM_GET_DIRTY_LOG, args.data)
        image = self.calls.sys.load(self.bitmap, self.size + 8)
        assert image[self.size :] == b"\xff" * 8  # whole words of the slot and not one more
        bits = int.from_bytes(image[: self.size], "little")
        return {page for page in range(bits.bit_length()) if bits >> page & 1}

    def clear(self, first: int, count: int, pages: set[int]) -> str:
        image = sum(1 << page - first for page in pages)
        size = -(-count // 64) * 8
        self.calls.sys.store(self.bitmap, image.to_bytes(size, "little") or b"\0")
        args = KvmClearDirtyLog(
            slot=0, num_pages=count, first_page=first, dirty_bitmap=self.bitmap
        )
        return errno_of(
            lambda: self.calls.sys.ioctl(self.calls.fd, k.KVM_CLEAR_DIRTY_LOG, args.data)
        )


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 200, 512])
def test_cleared_pages_leave_a_log_that_starts_full(calls: VmCalls, npages: int) -> None:
    rng = random.Random(npages)
    calls.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT | INITIALLY_SET)
    log = Log(calls, npages)
    expected = set(range(npages))
    for _ in range(20):
        assert log.get() == log.get() == expected
        first = rng.randrange(0, npages, 64)
        count = rng.choice([npages - first, (npages - first) & -64])
        pages = {first + page for page in range(count) if rng.random() < 0.2}
        assert log.clear(first, count, pages) == "0"
        expected -= pages
    assert log.clear(0, npages, set(range(npages))) == "0"
    assert log.get() == set()


def test_without_manual_protect_fetching_the_log_empties_it(calls: VmCalls) -> None:
    calls.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT | INITIALLY_SET)
    log = Log(calls, 70)
    calls.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0)
    assert log.get() == set(range(70))
    assert log.get() == set()


def test_a_log_is_kept_as_long_as_the_flag_stays(calls: VmCalls) -> None:
    calls.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT | INITIALLY_SET)
    log = Log(calls, 128)
    log.clear(64, 64, set(range(64, 100)))
    left = set(range(64)) | set(range(100, 128))
    calls.region(0, 2 * MIB, 128 * PAGE, log.hva, LOG_DIRTY)  # moved
    assert log.get() == left
    calls.region(0, 2 * MIB, 128 * PAGE, log.hva, 0)
    args = KvmDirtyLog(slot=0, dirty_bitmap=log.bitmap)
    fetch = lambda: calls.sys.ioctl(calls.fd, k.KVM_GET_DIRTY_LOG, args.data)  # noqa: E731
    assert errno_of(fetch) == "ENOENT"
    calls.region(0, 2 * MIB, 128 * PAGE, log.hva, LOG_DIRTY)
    assert log.get() == set(range(128))


def test_a_bitmap_that_cannot_be_written_is_lost(calls: VmCalls) -> None:
    calls.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT | INITIALLY_SET)
    log = Log(calls, 64)
    calls.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0)
    args = KvmDirtyLog(slot=0, dirty_bitmap=0)
    fetch = lambda: calls.sys.ioctl(calls.fd, k.KVM_GET_DIRTY_LOG, args.data)  # noqa: E731
    assert errno_of(fetch) == "EFAULT"
    assert log.get() == set()


def test_a_bitmap_that_cannot_be_read_clears_nothing(calls: VmCalls) -> None:
    calls.enable_cap(k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT | INITIALLY_SET)
    log = Log(calls, 64)
    log.bitmap, readable = 0, log.bitmap
    args = KvmClearDirtyLog(slot=0, num_pages=64, dirty_bitmap=0)
    clear = lambda: calls.sys.ioctl(calls.fd, k.KVM_CLEAR_DIRTY_LOG, args.data)  # noqa: E731
    assert errno_of(clear) == "EFAULT"
    log.bitmap = readable
    assert log.get() == set(range(64))


@pytest.mark.parametrize(
    ("options", "flags", "expected"),
    [
        (0, 0, "0"),
        (1, 0, "0"),
        (3, 0, "0"),
        (2, 0, "EINVAL"),
        (4, 0, "EINVAL"),
        (1, 1, "EINVAL"),
    ],
)
def test_initially_set_needs_manual_protect(
    calls: VmCalls, options: int, flags: int, expected: str
) -> None:
    cap = k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    assert errno_of(lambda: calls.enable_cap(cap, options, flags=flags)) == expected
