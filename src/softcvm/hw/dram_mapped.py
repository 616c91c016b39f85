"""DRAM whose bytes lie in one mapping, so that a guest's code and a caught program can use them as they are.

The same memory as Dram, kept otherwise: every frame's bytes at their own address in the mapping, and beside it the
key through which they read.  A frame that somebody outside reads and writes at will (`pin_raw`) always holds
what lies in the memory chips; others hold plaintext of whoever wrote last.
"""

from collections.abc import Iterable
from typing import Protocol

from softcvm.hw.counters import HwCounters
from softcvm.hw.dram import Dram, Frame
from softcvm.hw.memenc import Key
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.rangemap import RangeMap

__all__ = ("Backing", "MappedDram")


class Backing(Protocol):
    """Where the bytes lie: zeroes until they are written."""

    @property
    def view(self) -> memoryview:
        """All of it, writable."""
        ...

    def discard(self, start: int, length: int) -> None:
        """Zeroes again, in whole pages."""
        ...

    def populated(self) -> Iterable[tuple[int, int]]:
        """Pages [start, end) that may hold something, in order."""
        ...


class MappedDram(Dram):
    """Memory of pfn 0 .. pages-1 in a backing of that many pages."""

    saved = ("pages", "_keys", "_raw", "contents")
    derived = {
        "counters": "statistics",
        "_backing": "holds `contents`",
        "_memory": "the backing's view",
        "_frames": "unused: the backing holds them",
    }

    def __init__(self, pages: int, counters: HwCounters, backing: Backing) -> None:
        super().__init__(pages, counters)
        if len(backing.view) != pages << PAGE_SHIFT:
            raise ValueError(f"a backing of {len(backing.view):#x} bytes for {pages:#x} pages")
        self._backing = backing
        self._memory = backing.view
        self._keys: dict[int, Key] = {}
        """Key of the frames that hold plaintext of a guest or of firmware; the others are raw."""
        self._raw: RangeMap[bool] = RangeMap(False)

    @property
    def contents(self) -> list[tuple[int, Frame]]:
        return list(self.written())

    def turn(self, pfn: int, key: Key | None) -> None:
        """Have a frame hold what it reads through this key.  ValueError: it is pinned, and must stay raw."""
        if key is not None and self._raw[pfn]:
            raise ValueError(f"frame {pfn:#x} is used from outside as it is")
        if self._keys.get(pfn) == key:
            return
        self._store(pfn, self._view(pfn, pfn + 1, key), key)

    def pin_raw(self, pfn: int, npages: int) -> None:
        """The frames are used from outside from now on."""
        for page in [page for page in range(pfn, pfn + npages) if page in self._keys]:
            self.turn(page, None)
        self._raw.set(pfn, pfn + npages, True)

    def unpin_raw(self, pfn: int, npages: int) -> None:
        self._raw.set(pfn, pfn + npages, False)

    def pinned(self, pfn: int) -> bool:
        return self._raw[pfn]

    def write(
        self, spa: int, data: bytes, key: Key | None = None, *, counted: bool = True
    ) -> None:
        if not data:
            return
        if key is not None and counted:
            self.counters.bytes_encrypted += len(data)
        first, last = self._span(spa, len(data))
        at = 0
        for pfn in range(first, last + 1):
            offset = (spa + at) & (PAGE_SIZE - 1)
            piece = data[at : at + PAGE_SIZE - offset]
            if self._keys.get(pfn) == key:
                start = (pfn << PAGE_SHIFT) + offset
                self._memory[start : start + len(piece)] = piece
            else:
                page = bytearray(self._view(pfn, pfn + 1, key))
                page[offset : offset + len(piece)] = piece
                self._store(pfn, bytes(page), key)
            at += len(piece)

    def zero(self, pfn: int, npages: int = 1) -> None:
        self._span(pfn << PAGE_SHIFT, npages << PAGE_SHIFT)
        self._backing.discard(pfn << PAGE_SHIFT, npages << PAGE_SHIFT)
        if npages <= len(self._keys):
            for page in range(pfn, pfn + npages):
                self._keys.pop(page, None)
        else:
            for page in [page for page in self._keys if pfn <= page < pfn + npages]:
                del self._keys[page]

    def written(self) -> Iterable[tuple[int, Frame]]:
        for start, end in self._backing.populated():
            for pfn in range(start, end):
                frame = Frame(self._held(pfn, pfn + 1), self._keys.get(pfn))
                if frame.key is not None or any(frame.data):
                    yield pfn, frame

    def _store(self, pfn: int, data: bytes, key: Key | None) -> None:
        """A whole page as it reads through a key."""
        if key is not None and self._raw[pfn]:
            data, key = key.encrypt(pfn << PAGE_SHIFT, data), None
        self._memory[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT] = data
        if key is None:
            self._keys.pop(pfn, None)
        else:
            self._keys[pfn] = key

    def _held(self, first: int, end: int) -> bytes:
        return bytes(self._memory[first << PAGE_SHIFT : end << PAGE_SHIFT])

    def _view(self, first: int, end: int, key: Key | None) -> bytes:
        """Whole pages through a key; neighbours that are held under one key are turned together."""
        keys = self._keys
        out = []
        pfn = first
        while pfn < end:
            start, held = pfn, keys.get(pfn)
            while pfn < end and keys.get(pfn) == held:
                pfn += 1
            data = self._held(start, pfn)
            if held != key:
                spa = start << PAGE_SHIFT
                raw = data if held is None else held.encrypt(spa, data)
                data = raw if key is None else key.decrypt(spa, raw)
            out.append(data)
        return out[0] if len(out) == 1 else b"".join(out)
