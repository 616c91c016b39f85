"""DRAM whose bytes lie in one mapping, so that a guest's code and a caught program can use them as they are.

The same memory as Dram, kept otherwise: every frame's bytes at their own address in the mapping, and beside it the
key through which they read.  A frame that somebody outside reads and writes at will (`pin_raw`) always holds
what lies in the memory chips; others hold plaintext of whoever wrote last.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from softcvm.hw.counters import HwCounters
from softcvm.hw.dram import Dram, Frame
from softcvm.hw.memenc import Key
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.errors import Unmodelled
from softcvm.sim.rangemap import RangeMap

__all__ = ("Backing", "MappedDram")


class Backing(Protocol):
    """Where the bytes lie: zeroes until they are written."""

    @property
    def view(self) -> memoryview:
        """All of it, writable; pages behind DRAM's end serve as shadows."""
        ...

    def discard(self, start: int, length: int) -> None:
        """Zeroes again, in whole pages."""
        ...

    def populated(self) -> Iterable[tuple[int, int]]:
        """Pages [start, end) that may hold something, in order."""
        ...


class _Shadow(NamedTuple):
    """The page that shows a frame through a key, and both contents when they last agreed."""

    page: int
    key: Key
    plain: bytes
    raw: bytes


class MappedDram(Dram):
    """Memory of pfn 0 .. pages-1 in a backing of that many pages."""

    saved = ("pages", "_keys", "_raw", "contents")
    derived = {
        "counters": "statistics",
        "_backing": "holds `contents`",
        "_memory": "the backing's view",
        "_frames": "unused: the backing holds them",
        "_shadows": "show what the frames hold",
        "_free_shadows": "as _shadows",
    }

    def __init__(self, pages: int, counters: HwCounters, backing: Backing) -> None:
        super().__init__(pages, counters)
        if len(backing.view) < pages << PAGE_SHIFT:
            raise ValueError(f"a backing of {len(backing.view):#x} bytes for {pages:#x} pages")
        self._backing = backing
        self._memory = backing.view
        self._keys: dict[int, Key] = {}
        """Key of the frames that hold plaintext of a guest or of firmware; the others are raw."""
        self._raw: RangeMap[bool] = RangeMap(False)
        self._shadows: dict[int, _Shadow] = {}
        """Of pinned frames that a guest uses encrypted, by frame."""
        self._free_shadows = list(range(pages, len(backing.view) >> PAGE_SHIFT))

    @property
    def memory(self) -> memoryview:
        """All of it, as it lies there."""
        return self._memory

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
        for page in [page for page in self._shadows if pfn <= page < pfn + npages]:
            self._free_shadows.append(self._shadows.pop(page).page)

    def shadow(self, pfn: int, key: Key) -> int:
        """A page behind DRAM that shows a pinned frame through a guest's key, while that guest runs.

        sync_in() and sync_out() carry what changed on one side to the other.
        """
        found = self._shadows.get(pfn)
        if found is not None and found.key == key:
            return found.page
        if found is None and not self._free_shadows:
            raise Unmodelled("so many pages of a SEV guest that the program maps too")
        page = found.page if found is not None else self._free_shadows.pop()
        raw = self._held(pfn, pfn + 1)
        plain = key.decrypt(pfn << PAGE_SHIFT, raw)
        self._memory[page << PAGE_SHIFT : (page + 1) << PAGE_SHIFT] = plain
        self._shadows[pfn] = _Shadow(page, key, plain, raw)
        return page

    def sync_in(self, first: int = 0, last: int | None = None) -> None:
        """Before a guest runs: what was written to the frames from outside shows in their shadows."""
        for pfn, (page, key, _, raw) in self._shadowed(first, last):
            now = self._held(pfn, pfn + 1)
            if now != raw:
                plain = key.decrypt(pfn << PAGE_SHIFT, now)
                self._memory[page << PAGE_SHIFT : (page + 1) << PAGE_SHIFT] = plain
                self._shadows[pfn] = _Shadow(page, key, plain, now)

    def sync_out(self, first: int = 0, last: int | None = None) -> None:
        """After a guest ran: what it wrote is encrypted into the frames."""
        for pfn, (page, key, plain, _) in self._shadowed(first, last):
            now = self._held(page, page + 1)
            if now != plain:
                raw = key.encrypt(pfn << PAGE_SHIFT, now)
                self._memory[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT] = raw
                self._shadows[pfn] = _Shadow(page, key, now, raw)

    def _shadowed(self, first: int, last: int | None) -> "list[tuple[int, _Shadow]]":
        if last is not None and last - first < len(self._shadows):
            found = ((pfn, self._shadows.get(pfn)) for pfn in range(first, last))
            return [(pfn, shadow) for pfn, shadow in found if shadow is not None]
        end = self.pages if last is None else last
        return [item for item in self._shadows.items() if first <= item[0] < end]

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
        if self._shadows:
            self.sync_out(first, last + 1)
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
        if self._shadows:
            self.sync_in(first, last + 1)

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
            for pfn in range(start, min(end, self.pages)):
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
        if self._shadows:
            self.sync_out(first, end)
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
