"""Memory that the model and a caught program both see: kvm_run and its neighbours, each vCPU's in a memfd."""

import mmap
import os
from typing import cast

__all__ = ("SharedPages", "mappable")


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
    fd = os.memfd_create("kvm-vcpu", os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    pages = SharedPages(fd, length)
    pages.fd = fd
    return cast(bytearray, memoryview(pages))
