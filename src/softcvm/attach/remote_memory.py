"""Memory of a caught process, read and written from outside by process_vm_readv() and process_vm_writev().

The answer to kernel.mm.mmap.UserMemory: what copy_from_user() and copy_to_user() of the model's kernel reach.
"""

import ctypes
from collections.abc import Callable
from errno import EFAULT, ESRCH

from softcvm.attach.kernel_abi import LIBC, Iovec
from softcvm.kernel.mm.memory import SIGSEGV, BadAccess
from softcvm.kernel.mm.mmap import MmStruct
from softcvm.sim.addr import PAGE_MASK, PAGE_SIZE
from softcvm.sim.steps import Wait

__all__ = ("RemoteMemory",)


class RemoteMemory:
    """The address space of one process, by a thread's id."""

    def __init__(self, pid: int, sharing: Callable[[int, int, bool], Wait]) -> None:
        self.pid = pid
        self._sharing = sharing
        self._buffer = ctypes.create_string_buffer(PAGE_SIZE)
        self._ours, self._theirs = Iovec(), Iovec()
        self._ours.base = ctypes.addressof(self._buffer)

    def read(self, addr: int, length: int) -> bytes:
        """Bytes, each fetched once.  BadAccess at the first that is not there."""
        done = self._transfer(LIBC.process_vm_readv, addr, length)
        if done < length:
            raise BadAccess(SIGSEGV, addr + done, "not readable in the program")
        return self._buffer.raw[:length]

    def write(self, addr: int, data: bytes) -> None:
        """BadAccess at the first byte that cannot be written; those before it are."""
        self._room(len(data))
        ctypes.memmove(self._buffer, data, len(data))
        done = self._transfer(LIBC.process_vm_writev, addr, len(data))
        if done < len(data):
            raise BadAccess(SIGSEGV, addr + done, "not writable in the program")

    def string(self, addr: int, limit: int = 4096) -> bytes:
        """A path: bytes up to the first zero.  BadAccess; what has no zero in `limit` bytes comes whole."""
        found = b""
        while len(found) < limit:
            at = addr + len(found)
            piece = self.read(at, min(limit - len(found), PAGE_SIZE - (at & PAGE_MASK)))
            end = piece.find(b"\0")
            if end >= 0:
                return found + piece[:end]
            found += piece
        return found

    def share(self, mm: MmStruct, first: int, last: int, *, write: bool) -> Wait:
        """Asked of whoever can stop the process."""
        return self._sharing(first, last, write)

    def _room(self, length: int) -> None:
        if length > len(self._buffer):
            self._buffer = ctypes.create_string_buffer(length)
            self._ours.base = ctypes.addressof(self._buffer)

    def _transfer(self, function: "ctypes._NamedFuncPointer", addr: int, length: int) -> int:
        """Bytes moved: the kernel stops at the first page that it cannot reach."""
        if not length:
            return 0
        self._room(length)
        done = 0
        while done < length:
            self._ours.base = ctypes.addressof(self._buffer) + done
            self._ours.length = self._theirs.length = length - done
            self._theirs.base = addr + done
            moved: int = function(
                self.pid, ctypes.byref(self._ours), 1, ctypes.byref(self._theirs), 1, 0
            )
            if moved < 0:
                errno = ctypes.get_errno()
                if errno in (EFAULT, ESRCH):
                    break
                raise OSError(errno, f"memory of process {self.pid} at {addr:#x}")
            if moved == 0:
                break
            done += moved
        self._ours.base = ctypes.addressof(self._buffer)
        return done
