"""The machine's DRAM as one memfd: mapped here as a whole, and page by page into caught programs."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from errno import ENXIO

from softcvm.attach.kernel_abi import LIBC, call
from softcvm.attach.mappable import keep_size
from softcvm.sim.addr import PAGE_SHIFT

__all__ = ("DramMemory",)

_KEEP_SIZE_PUNCH_HOLE = 3
_SMALL = 1 << 16
"""Bytes up to which writing zeroes is faster than giving memory back."""
LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class DramMemory:
    """Sparse: a page takes room once it is written."""

    def __init__(self, length: int) -> None:
        self.fd = os.memfd_create("softcvm-dram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, length)
        keep_size(self.fd)
        self._pages = mmap.mmap(self.fd, length)
        self._view = memoryview(self._pages)

    @property
    def view(self) -> memoryview:
        return self._view

    @property
    def address(self) -> int:
        """Where it is mapped in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def discard(self, start: int, length: int) -> None:
        if length <= _SMALL:
            self._view[start : start + length] = bytes(length)
            return
        call(
            LIBC.fallocate(self.fd, _KEEP_SIZE_PUNCH_HOLE, start, length),
            "fallocate() of the memory behind DRAM",
        )

    def populated(self) -> Iterator[tuple[int, int]]:
        at = 0
        while True:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == ENXIO:
                    return
                raise
            at = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start >> PAGE_SHIFT, -(-at >> PAGE_SHIFT)
