"""softcvm.Sys on the real operating system, as far as the comparison with a real /dev/kvm needs
it."""

import ctypes
import fcntl
import os

__all__ = ("HostSys",)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_MAP_FAILED = ctypes.c_void_p(-1).value


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class HostSys:
    """Memory is never touched here: a signal would end the test run."""

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return os.open(path, flags)

    def close(self, fd: int) -> None:
        os.close(fd)

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        return fcntl.ioctl(fd, request, arg)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        _check(_libc.fallocate(fd, mode, offset, length))

    def mmap(self, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        address: int | None = _libc.mmap(None, length, prot, flags, fd, offset)
        if address is None or address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return address

    def munmap(self, addr: int, length: int) -> None:
        _check(_libc.munmap(addr, length))

    def madvise(self, addr: int, length: int, advice: int) -> None:
        _check(_libc.madvise(addr, length, advice))

    def load(self, addr: int, length: int) -> bytes:
        return ctypes.string_at(addr, length)

    def store(self, addr: int, data: bytes) -> None:
        ctypes.memmove(addr, data, len(data))
