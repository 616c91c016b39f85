"""softcvm.Sys on the operating system that runs this program: the real /dev/kvm, real memory.

Owns how a system call is made (the C library by ctypes, every argument passed as it is, so that
a wrong one reaches the kernel) and how a failure is told: OSError with the kernel's errno.
Touching memory that may answer with a signal is host_memory.py.

No locks.  Calls release the interpreter; two threads may use one HostSys.
"""

import ctypes
import os

from softcvm.attach import host_memory

__all__ = ("HostSys",)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_MAP_FAILED = ctypes.c_void_p(-1).value


def _failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def _check(result: int) -> int:
    if result < 0:
        raise _failure()
    return result


class HostSys:
    """Sys for this process, and dup(2).

    A bytearray given to ioctl() is handed over by address and holds what the kernel wrote; it
    must be as large as the ioctl says.
    """

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return os.open(path, flags)

    def close(self, fd: int) -> None:
        os.close(fd)

    def dup(self, fd: int) -> int:
        """dup(2): not close-on-exec, unlike os.dup()."""
        return _check(_libc.dup(fd))

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        if isinstance(arg, bytearray):
            view = (ctypes.c_char * len(arg)).from_buffer(arg)
            return _check(_libc.ioctl(fd, request, ctypes.addressof(view)))
        return _check(_libc.ioctl(fd, request, arg))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        _check(_libc.fallocate(fd, mode, offset, length))

    def mmap(
        self, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0, addr: int = 0
    ) -> int:
        address: int | None = _libc.mmap(addr, length, prot, flags, fd, offset)
        if address == _MAP_FAILED:
            raise _failure()
        return address or 0

    def munmap(self, addr: int, length: int) -> None:
        _check(_libc.munmap(addr, length))

    def madvise(self, addr: int, length: int, advice: int) -> None:
        _check(_libc.madvise(addr, length, advice))

    def load(self, addr: int, length: int) -> bytes:
        return host_memory.load(addr, length)

    def store(self, addr: int, data: bytes) -> None:
        host_memory.store(addr, data)
