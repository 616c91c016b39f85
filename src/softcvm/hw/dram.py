"""DRAM: sparse page frames that remember the key they were last written under.

A frame holds plaintext and its key; ciphertext is computed when somebody looks through another key, and
never otherwise.  Key None is the plain view (C-bit clear): the raw bytes of DRAM.  A page that nobody
wrote is raw zeroes.  Who may look or write is the RMP's business (access.py), not ours.
"""

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from softcvm.hw.counters import HwCounters
from softcvm.hw.memenc import Key
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.state import State

__all__ = ("Dram", "Frame")

_ZEROES = bytes(PAGE_SIZE)


class Frame(NamedTuple):
    """4 KiB as they read through `key`."""

    data: bytes
    key: Key | None


class Dram(State):
    """Memory of pfn 0 .. pages-1.  Addresses in bytes; an access outside raises ValueError."""

    saved: ClassVar[tuple[str, ...]] = ("pages", "_frames")
    derived = {"counters": "statistics"}

    def __init__(self, pages: int, counters: HwCounters) -> None:
        self.pages = pages
        self.counters = counters
        self._frames: dict[int, Frame] = {}

    def read(self, spa: int, length: int, key: Key | None = None) -> bytes:
        """What `length` bytes at spa read as through this key."""
        first, last = self._span(spa, length)
        view = self._view(first, last + 1, key)
        offset = spa - (first << PAGE_SHIFT)
        return view[offset : offset + length] if len(view) != length else view

    def write(
        self, spa: int, data: bytes, key: Key | None = None, *, counted: bool = True
    ) -> None:
        """Write bytes through a key; `counted` unless the key is no guest's.

        Bytes of the page outside `data` keep their raw value in whole 16-byte blocks, as a cache line
        that is read, changed and written back through this key does.
        """
        if not data:
            return
        if key is not None and counted:
            self.counters.bytes_encrypted += len(data)
        first, last = self._span(spa, len(data))
        frames = self._frames
        at = 0
        for pfn in range(first, last + 1):
            offset = (spa + at) & (PAGE_SIZE - 1)
            piece = data[at : at + PAGE_SIZE - offset]
            if len(piece) == PAGE_SIZE:
                frames[pfn] = Frame(bytes(piece), key)
            else:
                page = self._view(pfn, pfn + 1, key)
                frames[pfn] = Frame(
                    page[:offset] + bytes(piece) + page[offset + len(piece) :], key
                )
            at += len(piece)

    def zero(self, pfn: int, npages: int = 1) -> None:
        """Raw zeroes in whole pages, as the host's clear_page() leaves them."""
        self._span(pfn << PAGE_SHIFT, npages << PAGE_SHIFT)
        frames = self._frames
        if npages <= len(frames):
            for page in range(pfn, pfn + npages):
                frames.pop(page, None)
        else:
            for page in [page for page in frames if pfn <= page < pfn + npages]:
                del frames[page]

    def raw(self, pfn: int) -> bytes:
        """The 4 KiB that lie in the memory chips."""
        return self._view(pfn, pfn + 1, None)

    def written(self) -> Iterable[tuple[int, Frame]]:
        """Every page that holds something, in order."""
        return sorted(self._frames.items())

    def _span(self, spa: int, length: int) -> tuple[int, int]:
        first, last = spa >> PAGE_SHIFT, (spa + length - 1) >> PAGE_SHIFT
        if spa < 0 or length <= 0 or last >= self.pages:
            raise ValueError(
                f"{length:#x} bytes at {spa:#x} are not in DRAM of {self.pages:#x} pages"
            )
        return first, last

    def _view(self, first: int, end: int, key: Key | None) -> bytes:
        """Whole pages through a key; neighbours last written under one key are turned together."""
        out = []
        pfn = first
        while pfn < end:
            frame = self._frames.get(pfn)
            held = frame.key if frame else None
            pages = [frame.data if frame else _ZEROES]
            start = pfn
            pfn += 1
            while pfn < end:
                frame = self._frames.get(pfn)
                if (frame.key if frame else None) != held:
                    break
                pages.append(frame.data if frame else _ZEROES)
                pfn += 1
            data = pages[0] if len(pages) == 1 else b"".join(pages)
            if held != key:
                spa = start << PAGE_SHIFT
                raw = data if held is None else held.encrypt(spa, data)
                data = raw if key is None else key.decrypt(spa, raw)
            out.append(data)
        return out[0] if len(out) == 1 else b"".join(out)
