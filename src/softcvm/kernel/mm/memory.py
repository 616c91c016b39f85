"""Touching user memory: faults, accesses, get_user_pages() (mm/memory.c, mm/gup.c; v7.2).

Anonymous memory is faulted in at the first write, whether by the process, by a copy in a system
call or by get_user_pages(); the pages of a file come from the file.  An access that the kernel
answers with a signal is a BadAccess; inside a system call it becomes EFAULT.

Simpler than Linux: get_user_pages() for reading allocates too (no zero page is mapped), there
are no huge pages, and every entry is writable where its mapping is.
"""

from collections.abc import Iterator
from errno import EFAULT, ENOMEM
from typing import NamedTuple

from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.mm.mmap import PROT_READ, PROT_WRITE, MmStruct, UserMemory, Vma, VmOps
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, Pfn
from softcvm.sim.steps import Point, Steps

__all__ = ("SIGBUS", "SIGSEGV", "BadAccess", "UserPageFault", "get_user_pages", "load", "store")

SIGBUS, SIGSEGV = 7, 11


class UserPageFault(NamedTuple):
    """The host kernel made pages of a process present."""

    addr: int
    npages: int


class BadAccess(Exception):
    """A host access that the kernel answers with a signal, or with EFAULT inside a system
    call."""

    def __init__(self, signo: int, addr: int, why: str) -> None:
        super().__init__(f"{addr:#x}: {why}")
        self.signo = signo
        self.addr = addr
        self.why = why


def load(mm: MmStruct, addr: int, length: int) -> Steps[bytes]:
    """What a process reads at an address.  BadAccess."""
    if mm.outside is not None:
        return mm.outside.read(addr, length)
    out: list[bytes] = []
    for vma, start, stop in _pieces(mm, addr, length, PROT_READ):
        page = _kernel_page(vma, start)
        if page is not None:
            out.append(bytes(page[start & PAGE_MASK : (start & PAGE_MASK) + stop - start]))
            continue
        first, last = start >> PAGE_SHIFT, (stop + PAGE_MASK) >> PAGE_SHIFT
        if vma.ops is not None:
            try:
                yield from _handle_fault(mm, vma, first, last)
            except BadAccess as bad:
                raise BadAccess(bad.signo, max(bad.addr, start), bad.why) from bad
        for lo, hi, delta in mm.pages.runs(first, last):
            at, end = max(lo << PAGE_SHIFT, start), min(hi << PAGE_SHIFT, stop)
            if delta is not None:
                out.append(mm.linux.soc.host_read(at + (delta << PAGE_SHIFT), end - at))
            elif vma.ops is None:
                out.append(bytes(end - at))  # the zero page
            else:
                raise BadAccess(SIGBUS, at, "the file's page went away")
    return b"".join(out)


def store(mm: MmStruct, addr: int, data: bytes) -> Steps[None]:
    """What a process writes at an address.  BadAccess, and the bytes before the bad page are
    written.

    HostRmpFault where the page behind the address is assigned: Linux has no answer to that
    either.
    """
    if mm.outside is not None:
        mm.outside.write(addr, data)
        return
    for vma, start, stop in _pieces(mm, addr, len(data), PROT_WRITE):
        page = _kernel_page(vma, start)
        if page is not None:
            offset = start & PAGE_MASK
            page[offset : offset + stop - start] = data[start - addr : stop - addr]
            continue
        first, last = start >> PAGE_SHIFT, (stop + PAGE_MASK) >> PAGE_SHIFT
        refused = None
        try:
            yield from _handle_fault(mm, vma, first, last)
        except BadAccess as bad:
            refused, last = bad, bad.addr >> PAGE_SHIFT
        for lo, hi, delta in mm.pages.runs(first, last):
            if delta is None:
                raise BadAccess(SIGBUS, lo << PAGE_SHIFT, "the page went away")
            at, end = max(lo << PAGE_SHIFT, start), min(hi << PAGE_SHIFT, stop)
            mm.linux.soc.host_write(at + (delta << PAGE_SHIFT), data[at - addr : end - addr])
        if refused is not None:
            raise BadAccess(refused.signo, max(refused.addr, start), refused.why)


def get_user_pages(
    mm: MmStruct, addr: int, npages: int, *, write: bool
) -> Steps[list[tuple[Pfn, int]]]:
    """Frames behind user pages as runs in order, faulted in; the caller takes references.
    EFAULT, ENOMEM.

    A mapping of kernel memory (kvm_run) has no frames to give and is EFAULT too.
    """
    if mm.outside is not None:
        return (yield from _outside_pages(mm, mm.outside, addr, npages, write=write))
    found: list[tuple[Pfn, int]] = []
    prot = PROT_WRITE if write else PROT_READ
    try:
        for vma, start, stop in _pieces(mm, addr & ~PAGE_MASK, npages << PAGE_SHIFT, prot):
            if _kernel_page(vma, start) is not None:
                raise BadAccess(SIGBUS, start, "no page frame behind this mapping")
            first, last = start >> PAGE_SHIFT, stop >> PAGE_SHIFT
            yield from _fault_in(mm, vma, first, last)
            for lo, hi, delta in mm.pages.runs(first, last):
                if delta is None:
                    raise BadAccess(SIGBUS, lo << PAGE_SHIFT, "the page went away")
                found.append((Pfn(lo + delta), hi - lo))
    except BadAccess as bad:
        raise KernelError(EFAULT, f"user memory at {bad}") from bad
    return found


def _outside_pages(
    mm: MmStruct, outside: UserMemory, addr: int, npages: int, *, write: bool
) -> Steps[list[tuple[Pfn, int]]]:
    """get_user_pages() of memory outside the model, which becomes the model's by that."""
    first = addr >> PAGE_SHIFT
    last = first + npages
    if any(delta is None for _, _, delta in mm.pages.runs(first, last)):
        waits = outside.share(mm, first, last, write=write)
        while waits.busy:
            yield Point(waits.name, waits)
    found: list[tuple[Pfn, int]] = []
    for lo, hi, delta in mm.pages.runs(first, last):
        if delta is None:
            raise KernelError(EFAULT, f"user memory at {lo << PAGE_SHIFT:#x}")
        found.append((Pfn(lo + delta), hi - lo))
    return found


def _pieces(mm: MmStruct, addr: int, length: int, prot: int) -> Iterator[tuple[Vma, int, int]]:
    """[addr, addr + length) by mapping, pages of kernel memory one by one; BadAccess where it
    may not."""
    end = addr + length
    while addr < end:
        vma = mm.find_vma(addr >> PAGE_SHIFT)
        if vma is None:
            raise BadAccess(SIGSEGV, addr, "nothing is mapped there")
        if not vma.prot & prot and not (prot == PROT_READ and vma.prot):
            raise BadAccess(
                SIGSEGV, addr, f"the mapping has prot {vma.prot}, the access needs {prot}"
            )
        stop = min(end, vma.end << PAGE_SHIFT)
        if _kernel_page(vma, addr) is not None:
            stop = min(stop, (addr | PAGE_MASK) + 1)
        yield vma, addr, stop
        addr = stop


def _kernel_page(vma: Vma, addr: int) -> bytearray | None:
    if vma.ops is None:
        return None
    return vma.ops.memory((addr >> PAGE_SHIFT) - vma.start + vma.pgoff)


def _handle_fault(mm: MmStruct, vma: Vma, first: int, last: int) -> Steps[None]:
    """The fault of an access: without memory for it Linux calls the OOM killer."""
    try:
        yield from _fault_in(mm, vma, first, last)
    except KernelError as error:
        if error.errno != ENOMEM:
            raise
        raise Unmodelled(f"the OOM killer, for a page at {first << PAGE_SHIFT:#x}") from error


def _fault_in(mm: MmStruct, vma: Vma, first: int, last: int) -> Steps[None]:
    """handle_mm_fault() for every page of [first, last) that is not present."""
    if all(delta is not None for _, _, delta in mm.pages.runs(first, last)):
        return
    yield from mm.mmap_lock.acquire_read()
    try:
        for lo, hi, delta in mm.pages.runs(first, last):
            while delta is None and lo < hi:
                found = _still_mapped(mm, vma, lo)
                stop = min(hi, found.end)
                yield from _fault_in_vma(mm, found, lo, stop)
                lo = stop
    finally:
        mm.mmap_lock.release_read()


def _still_mapped(mm: MmStruct, vma: Vma, page: int) -> Vma:
    """What is mapped at a page now that mmap_lock is held: it may have gone while that was waited for."""
    found = mm.find_vma(page)
    if found is None or found.prot != vma.prot:
        raise BadAccess(SIGSEGV, page << PAGE_SHIFT, "the mapping went away")
    return found


def _fault_in_vma(mm: MmStruct, vma: Vma, first: int, last: int) -> Steps[None]:
    if mm.linux.tp.emit:
        mm.linux.tp.emit(UserPageFault(first << PAGE_SHIFT, last - first))
    if vma.ops is not None:
        yield from _fault_in_file(mm, vma, vma.ops, first, last)
        return
    page = first
    for pfn, npages in mm.linux.page_alloc.alloc_run(last - first):
        mm.linux.page_alloc.clear_pages(pfn, npages)
        mm.pages.set(page, page + npages, pfn - page)
        page += npages


def _fault_in_file(mm: MmStruct, vma: Vma, ops: VmOps, first: int, last: int) -> Steps[None]:
    """The pages before a bad one are present when BadAccess names it, by its user address."""
    page = first
    while page < last:
        try:
            runs = yield from ops.fault(page - vma.start + vma.pgoff, last - page)
        except BadAccess as bad:
            at = bad.addr - (vma.pgoff - vma.start << PAGE_SHIFT)
            raise BadAccess(bad.signo, at, bad.why) from bad
        for pfn, npages in runs:
            mm.pages.set(page, page + npages, pfn - page)
            page += npages
