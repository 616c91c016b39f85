"""Memory of a caught program that becomes DRAM of the machine: what a guest runs in is the program's own memory.

Owns which memory can be shared and how it is replaced: its contents are copied into frames of the machine,
which are mapped in its place, so that guest and program see each other's writes at once.  All of that
happens while no thread of the process executes anything.

Who stops and starts threads is the supervisor; what the frames are is the model's (kernel/mm).
"""

from errno import ENOMEM
from typing import NamedTuple

from softcvm.attach import ptrace
from softcvm.attach.filter import OURS
from softcvm.attach.process import Caught, Thread
from softcvm.attach.remote_memory import RemoteMemory
from softcvm.hw.dram_mapped import MappedDram
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.mm.memory import BadAccess, UserPageFault
from softcvm.kernel.mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.steps import Wait

__all__ = ("Region", "Sharing", "forget_frames", "private_again", "regions", "share")

_CHUNK = 1 << 25 >> PAGE_SHIFT
"""Pages that are replaced at once around the one that is asked for: 32M."""
_SYS_MMAP = 9
_ZEROES = bytes(PAGE_SIZE)
_PIECE = 1 << 20


class Region(NamedTuple):
    """A line of /proc/PID/maps, by pages."""

    start: int
    end: int
    prot: int
    shared: bool
    path: str


class Sharing(Wait):
    """A request for pages [first, last) of a process, which the supervisor's thread fulfils."""

    def __init__(self, process: Caught, first: int, last: int, *, write: bool) -> None:
        super().__init__("memory of the program", lambda: self.done)
        self.process = process
        self.first = first
        self.last = last
        self.write = write
        self.done = False


def regions(pid: int) -> list[Region]:
    """All mappings of a process, in order."""
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            addresses, perms, _, _, _, *path = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(address, 16) >> PAGE_SHIFT for address in addresses.split("-"))
            prot = sum(bit for bit, c in zip((1, 2, 4), perms, strict=False) if c in "rwx")
            found.append(Region(start, end, prot, perms[3] == "s", path[0] if path else ""))
    return found


class _Frames(NamedTuple):
    """Pages of the process and the frame that the first of them becomes."""

    page: int
    npages: int
    pfn: int


def share(request: Sharing, tid: int, dram_fd: int) -> None:
    """Replace the memory that is asked for.  Every thread of the process is stopped, `tid` behind a SYSCALL.

    dram_fd: the machine's DRAM among the process's descriptors.  What cannot be had is left as it is; the
    model finds no frames there (EFAULT).  Unmodelled: memory that others share already.
    """
    process, mm = request.process, request.process.proc.mm
    page = request.first
    while page < request.last:
        run = mm.pages.run(page)
        if run[2] is not None:
            page = run[1]
            continue
        region = next((r for r in regions(process.pid) if r.start <= page < r.end), None)
        if region is None or not region.prot & (2 if request.write else 3):
            return
        if region.shared:
            raise Unmodelled(
                f"memory of a guest in a shared mapping of the program ({region.path or 'anonymous'})"
            )
        first = max(page - page % _CHUNK, region.start, run[0])
        last = min(page - page % _CHUNK + _CHUNK, region.end, run[1])
        try:
            _replace(process, tid, dram_fd, region, first, last)
        except KernelError:
            return  # no room for it: what was replaced is, the rest is not there
        page = last


def _replace(
    process: Caught, tid: int, dram_fd: int, region: Region, first: int, last: int
) -> None:
    linux, mm = process.machine.linux, process.proc.mm
    if linux.tp.emit:
        linux.tp.emit(UserPageFault(first << PAGE_SHIFT, last - first))
    page = first
    for pfn, npages in linux.page_alloc.alloc_run(last - first):
        linux.page_alloc.clear_pages(pfn, npages)
        _copy(process, _Frames(page, npages, pfn))
        result = ptrace.inject(
            tid,
            _SYS_MMAP,
            page << PAGE_SHIFT,
            npages << PAGE_SHIFT,
            region.prot,
            MAP_SHARED | MAP_FIXED,
            OURS << 32 | dram_fd,
            pfn << PAGE_SHIFT,
        )
        if result < 0:
            linux.page_alloc.free_run(pfn, npages)
            raise KernelError(ENOMEM, f"mapping DRAM into the program: errno {-result}")
        mm.pages.set(page, page + npages, pfn - page)
        _dram(process).pin_raw(pfn, npages)
        page += npages


def _copy(process: Caught, frames: _Frames) -> None:
    """The contents of pages into their frames; pages of zeroes are there already."""
    memory, dram = process.memory, _dram(process)
    done = 0
    while done < frames.npages << PAGE_SHIFT:
        length = min(_PIECE, (frames.npages << PAGE_SHIFT) - done)
        try:
            piece = memory.read((frames.page << PAGE_SHIFT) + done, length)
        except BadAccess:
            piece = _readable(memory, (frames.page << PAGE_SHIFT) + done, length)
        if any(piece):
            for at in range(0, length, PAGE_SIZE):
                page = piece[at : at + PAGE_SIZE]
                if page != _ZEROES:
                    dram.write((frames.pfn << PAGE_SHIFT) + done + at, page)
        done += length


def _readable(memory: RemoteMemory, addr: int, length: int) -> bytes:
    """Page by page, zeroes where nothing can be read."""
    pages = []
    for at in range(addr, addr + length, PAGE_SIZE):
        try:
            pages.append(memory.read(at, PAGE_SIZE))
        except BadAccess:
            pages.append(_ZEROES)
    return b"".join(pages)


def forget_frames(process: Caught, first: int, last: int) -> None:
    """Frames behind pages that go away are no longer used from outside."""
    for lo, hi, delta in process.proc.mm.pages.held(first, last):
        if delta is not None:
            _dram(process).unpin_raw(lo + delta, hi - lo)


def private_again(thread: Thread, tid: int, first: int, last: int) -> None:
    """Fresh anonymous memory of the program's own in place of shared pages, as MADV_DONTNEED leaves it."""
    for region in regions(thread.process.pid):
        lo, hi = max(region.start, first), min(region.end, last)
        if lo < hi:
            ptrace.inject(
                tid,
                _SYS_MMAP,
                lo << PAGE_SHIFT,
                hi - lo << PAGE_SHIFT,
                region.prot,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                OURS << 32,
                0,
            )


def _dram(process: Caught) -> MappedDram:
    dram = process.machine.soc.dram
    assert isinstance(dram, MappedDram), "exec gives its machine a backing"
    return dram
