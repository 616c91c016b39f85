"""HostSys against the operating system that runs the tests: no /dev/kvm needed."""

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from softcvm import HostSignal, HostSys

PAGE = 4096
READ, WRITE = 1, 2
SHARED, PRIVATE_ANON = 1, 0x22
SIGBUS, SIGSEGV = 7, 11
FIONREAD = 0x541B


@pytest.fixture
def sys() -> HostSys:
    return HostSys()


@pytest.fixture
def page(sys: HostSys, tmp_path: Path) -> Iterator[int]:
    """Two mapped pages of a file that has one."""
    path = tmp_path / "one page"
    path.write_bytes(b"a" * PAGE)
    fd = os.open(path, os.O_RDWR)
    address = sys.mmap(2 * PAGE, READ | WRITE, SHARED, fd)
    yield address
    sys.munmap(address, 2 * PAGE)
    os.close(fd)


def test_what_is_stored_is_loaded_across_pages(sys: HostSys) -> None:
    address = sys.mmap(3 * PAGE, READ | WRITE, PRIVATE_ANON)
    data = bytes(range(256)) * 24
    sys.store(address + 100, data)
    assert sys.load(address + 100, len(data)) == data
    assert sys.load(address, 0) == b""
    sys.munmap(address, 3 * PAGE)


def test_an_address_that_is_not_mapped_is_a_segmentation_fault(sys: HostSys) -> None:
    address = sys.mmap(2 * PAGE, READ | WRITE, PRIVATE_ANON)
    sys.munmap(address + PAGE, PAGE)
    with pytest.raises(HostSignal) as signalled:
        sys.load(address + PAGE - 4, 8)
    assert (signalled.value.signo, signalled.value.addr) == (SIGSEGV, address + PAGE)
    sys.munmap(address, PAGE)


def test_a_page_beyond_the_end_of_its_file_is_a_bus_error(sys: HostSys, page: int) -> None:
    with pytest.raises(HostSignal) as signalled:
        sys.load(page + PAGE + 12, 1)
    assert (signalled.value.signo, signalled.value.addr) == (SIGBUS, page + PAGE + 12)


def test_a_store_keeps_what_it_wrote_before_the_bad_page(sys: HostSys, page: int) -> None:
    with pytest.raises(HostSignal):
        sys.store(page + PAGE - 2, b"bcd")
    assert sys.load(page + PAGE - 3, 3) == b"abc"


def test_protection_is_what_the_processor_enforces(sys: HostSys) -> None:
    address = sys.mmap(3 * PAGE, READ, PRIVATE_ANON)
    with pytest.raises(HostSignal) as signalled:
        sys.store(address, b"x")
    assert signalled.value.signo == SIGSEGV
    writable = sys.mmap(PAGE, WRITE, PRIVATE_ANON)
    sys.store(writable, b"x86 reads what it may write")
    assert sys.load(writable, 3) == b"x86"
    sys.munmap(address, 3 * PAGE)
    sys.munmap(writable, PAGE)


def test_mmap_fixed_takes_the_address_it_is_given(sys: HostSys) -> None:
    address = sys.mmap(2 * PAGE, READ, PRIVATE_ANON)
    assert sys.mmap(PAGE, READ, PRIVATE_ANON | 0x10, -1, 0, address + PAGE) == address + PAGE
    sys.munmap(address, 2 * PAGE)


def test_an_ioctl_writes_into_the_buffer_or_at_the_address(sys: HostSys) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"12345")
    buffer = bytearray(4)
    assert sys.ioctl(reader, FIONREAD, buffer) == 0
    assert struct.unpack("i", buffer) == (5,)
    word = ctypes.c_int(0)
    sys.ioctl(reader, FIONREAD, ctypes.addressof(word))
    assert word.value == 5
    twin = sys.dup(reader)
    assert os.get_inheritable(twin)
    for fd in (reader, writer, twin):
        sys.close(fd)


@pytest.mark.parametrize(
    ("code", "call"),
    [
        (errno.EBADF, lambda s: s.ioctl(-1, FIONREAD, 0)),
        (errno.EBADF, lambda s: s.dup(-1)),
        (errno.EBADF, lambda s: s.close(1 << 20)),
        (errno.EBADF, lambda s: s.fallocate(-1, 0, 0, 1)),
        (errno.ENOENT, lambda s: s.open("/dev/no-such-device")),
        (errno.EINVAL, lambda s: s.mmap(0, READ, PRIVATE_ANON)),
        (errno.EINVAL, lambda s: s.munmap(1, PAGE)),
        (errno.EINVAL, lambda s: s.madvise(1, PAGE, 4)),
    ],
)
def test_failures_carry_the_errno(
    sys: HostSys, code: int, call: Callable[[HostSys], object]
) -> None:
    with pytest.raises(OSError, match=rf"Errno {code}\b"):
        call(sys)
