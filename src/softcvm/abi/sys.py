"""What a user-space process can do: the interface a VMM is written against.

softcvm's Machine.process() implements it on the software host; a VMM in vmm/ knows nothing else.
"""

import os
from typing import Protocol

__all__ = ("HostSignal", "Sys")


class HostSignal(Exception):
    """A host access was answered by a signal (SIGSEGV or SIGBUS) instead of data."""

    def __init__(self, signo: int, addr: int) -> None:
        super().__init__(f"signal {signo} at {addr:#x}")
        self.signo = signo
        self.addr = addr


class Sys(Protocol):
    """System calls and memory accesses of one process.  Failures are OSError(errno) or HostSignal."""

    def open(self, path: str, flags: int = os.O_RDWR) -> int: ...
    def close(self, fd: int) -> None: ...
    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int: ...
    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None: ...
    def mmap(
        self, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0
    ) -> int: ...
    def munmap(self, addr: int, length: int) -> None: ...
    def madvise(self, addr: int, length: int, advice: int) -> None: ...
    def load(self, addr: int, length: int) -> bytes: ...
    def store(self, addr: int, data: bytes) -> None: ...
