"""User memory as a system call sees it (arch/x86/include/asm/uaccess.h, v7.2).

An ioctl argument is a UserPtr: an address in the caller's memory, or a buffer that the caller
passed in its place (Python's fcntl.ioctl with a bytearray).  Copying may fault pages in, takes
mmap_lock, and so is Steps.  copy_from_user() and copy_to_user() fail with EFAULT.
"""

from errno import EFAULT

from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.memory import BadAccess, load, store
from softcvm.kernel.mm.mmap import MmStruct
from softcvm.sim.addr import Hva
from softcvm.sim.steps import Steps

__all__ = ("TASK_SIZE_MAX", "UserPtr", "access_ok", "copy_from_user", "copy_to_user")

TASK_SIZE_MAX = (1 << 47) - 4096
"""End of user addresses with four-level page tables."""


def access_ok(addr: int, size: int) -> bool:
    """Whether [addr, addr + size) is a user range at all, mapped or not."""
    return (
        0 <= addr <= TASK_SIZE_MAX
        and 0 <= size <= TASK_SIZE_MAX
        and addr + size <= TASK_SIZE_MAX
    )


def copy_from_user(mm: MmStruct, addr: Hva, size: int) -> Steps[bytes]:
    """Read user memory, faulting it in.  EFAULT."""
    try:
        return (yield from load(mm, addr, size))
    except BadAccess as bad:
        raise KernelError(EFAULT, f"copy_from_user() at {bad}") from bad


def copy_to_user(mm: MmStruct, addr: Hva, data: bytes) -> Steps[None]:
    """Write user memory, faulting it in.  EFAULT."""
    try:
        yield from store(mm, addr, data)
    except BadAccess as bad:
        raise KernelError(EFAULT, f"copy_to_user() at {bad}") from bad


class UserPtr:
    """An ioctl's third argument, read as void __user *."""

    __slots__ = ("_buffer", "addr", "mm")

    def __init__(self, mm: MmStruct, arg: int | bytearray) -> None:
        self.mm = mm
        self._buffer = arg if isinstance(arg, bytearray) else None
        self.addr = Hva(0) if isinstance(arg, bytearray) else Hva(arg)

    @property
    def is_null(self) -> bool:
        return self._buffer is None and self.addr == 0

    def read(self, size: int, offset: int = 0) -> Steps[bytes]:
        """copy_from_user() of `size` bytes at `offset`.  EFAULT."""
        if self._buffer is None:
            return (yield from copy_from_user(self.mm, Hva(self.addr + offset), size))
        self._check(offset + size, self._buffer)
        return bytes(self._buffer[offset : offset + size])

    def write(self, data: bytes | bytearray, offset: int = 0) -> Steps[None]:
        """copy_to_user() at `offset`.  EFAULT."""
        if self._buffer is None:
            yield from copy_to_user(self.mm, Hva(self.addr + offset), bytes(data))
            return
        self._check(offset + len(data), self._buffer)
        self._buffer[offset : offset + len(data)] = data

    @staticmethod
    def _check(end: int, buffer: bytearray) -> None:
        if end > len(buffer):
            raise ValueError(f"the call accesses {end} bytes of a buffer of {len(buffer)}")
