"""Memory that the model and a caught program both see: kvm_run and its neighbours, each vCPU's in a memfd."""

import fcntl
import mmap
import os
from typing import cast

__all__ = ("SharedPages", "keep_size", "mappable")


def keep_size(fd: int) -> None:
    """Seal a memfd that the program gets a descriptor of: whoever truncated it would take our mapping away."""
    fcntl.fcntl(
        fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    )


class SharedPages(mmap.mmap):
    """A mapping of a memfd that knows its descriptor."""

    fd: int

    @classmethod
    def behind(cls, buffer: bytearray) -> "SharedPages":
        """The pages that a buffer from mappable() lies in."""
        pages = cast(memoryview, buffer).obj
        assert isinstance(pages, SharedPages), "the supervisor gave the machine its mappable()"
        return pages

    def __del__(self) -> None:
        os.close(self.fd)


def mappable(length: int) -> bytearray:
    """Zeroed memory.  It is a memoryview, used like the bytearray that other machines have."""
    fd = os.memfd_create("kvm-vcpu", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, length)
    keep_size(fd)
    pages = SharedPages(fd, length)
    pages.fd = fd
    return cast(bytearray, memoryview(pages))
