"""guest_memfd hands pages to a guest: get_pfn for faults, populate for launches (guest_memfd.c,
v7.2).

Owns when a page is zeroed and when the arch prepares it.  The page cache behind it is
gmem_inode.py; what preparing means is the vendor's gmem_prepare hook.

"uptodate" of a page says "prepared" up to 6.19 and "contents initialised" from 7.0, where the
arch prepares on every lookup and finds out for itself that there is nothing to do.

Locks: get_pfn runs inside srcu or slots_lock and takes folio locks only; populate needs
slots_lock and takes the invalidate lock, for the whole range up to 6.19 and page by page from
7.0.
"""

from collections.abc import Callable
from errno import EEXIST, EFAULT, EINTR, EINVAL, EIO
from typing import TYPE_CHECKING, NamedTuple

from softcvm.kernel.errors import EHWPOISON, KernelError, Unmodelled
from softcvm.kernel.fs.file import File
from softcvm.kernel.mm.memory import get_user_pages
from softcvm.kernel.mm.mmap import MmStruct
from softcvm.kernel.mm.uaccess import copy_from_user, copy_to_user
from softcvm.kernel.virt.kvm.gmem_inode import (
    FolioRun,
    GmemFile,
    GmemInode,
    kvm_gmem_get_file,
    kvm_gmem_get_folio,
)
from softcvm.kernel.virt.kvm.mem_attributes import kvm_mem_is_private, kvm_range_is_private
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Gfn, Hva, Pfn, Pgoff
from softcvm.sim.steps import Steps, lockdep_assert_held

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "GmemPfn",
    "PopulateSource",
    "PostPopulate",
    "kvm_gmem_get_pfn",
    "kvm_gmem_index",
    "kvm_gmem_populate",
)


class GmemPfn(NamedTuple):
    """Pages for a guest, with one reference that the caller puts (page_alloc.put_pages)."""

    pfn: Pfn
    npages: int
    max_order: int


class PopulateSource:
    """Where the contents of one page come from, and where a corrected CPUID page goes back to.

    From 7.0 the page is pinned before any lock is taken (`pinned`); before, it is user memory,
    copied with the invalidate lock held.
    """

    def __init__(self, mm: MmStruct, hva: Hva, pinned: Pfn | None) -> None:
        self._mm = mm
        self._hva = hva
        self._pinned = pinned

    def read(self) -> Steps[bytes]:
        """All 4096 bytes.  EFAULT."""
        if self._pinned is None:
            return (yield from copy_from_user(self._mm, self._hva, PAGE_SIZE))
        return self._mm.linux.soc.host_read(self._pinned << PAGE_SHIFT, PAGE_SIZE)

    def write(self, data: bytes) -> Steps[None]:
        """Replace its contents.  EFAULT."""
        if self._pinned is None:
            yield from copy_to_user(self._mm, self._hva, data)
        else:
            self._mm.linux.soc.host_write(self._pinned << PAGE_SHIFT, data)


PostPopulate = Callable[["Kvm", Gfn, Pfn, PopulateSource | None], Steps[None]]
"""kvm_gmem_populate_cb for one page: put it in place.  A KernelError leaves it not uptodate."""


def kvm_gmem_index(slot: "KvmMemorySlot", gfn: int) -> Pgoff:
    return Pgoff(gfn - slot.base_gfn + slot.gmem_pgoff)


def kvm_gmem_get_pfn(
    kvm: "Kvm", slot: "KvmMemorySlot", gfn: Gfn, npages: int = 1
) -> Steps[GmemPfn]:
    """The pages behind gfn, zeroed once and prepared for the guest.

    npages > 1 asks for a run inside the slot and may get less: what the loop over single pages
    gives first. EFAULT: no file.  EIO: something else is bound.  EHWPOISON, ENOMEM, and what
    the arch answers.
    """
    file = kvm_gmem_get_file(slot)
    if file is None:
        raise KernelError(EFAULT, f"the guest_memfd of slot {slot.key:#x} is closed")
    try:
        gmem, run = yield from _get_locked(kvm, slot, file, gfn, npages)
        try:
            max_order = _usable_order(gfn, run)
            _prepare_folios(kvm, gmem.inode, gfn, run, max_order)
            kvm.linux.page_alloc.get_pages(run.pfn, run.npages)
        finally:
            gmem.inode.unlock_folios(run.lock)
    finally:
        kvm.linux.task_work.fput(file)
    return GmemPfn(run.pfn, run.npages, max_order)


def _get_locked(
    kvm: "Kvm", slot: "KvmMemorySlot", file: File, gfn: int, npages: int
) -> Steps[tuple[GmemFile, FolioRun]]:
    """__kvm_gmem_get_pfn(): the folios, locked."""
    gmem = slot.gmem_file
    if gmem is None or gmem.file is not file:
        raise KernelError(EFAULT, f"slot {slot.key:#x} lost its guest_memfd")
    index = kvm_gmem_index(slot, gfn)
    if gmem.bindings[index] != slot.key:
        if gmem.bindings[index] is not None:
            kvm.linux.warn("kvm_gmem_get_pfn", f"index {index:#x} is bound to another slot")
        raise KernelError(EIO, f"index {index:#x} is not bound to slot {slot.key:#x}")
    inode = gmem.inode
    if index >= inode.npages:  # KernelProfile.gmem_bind_offset_signed
        raise Unmodelled(f"index {index:#x} of a guest_memfd of {inode.npages:#x} pages")
    run = yield from kvm_gmem_get_folio(inode, index, index + npages)
    if run.hwpoison:
        inode.unlock_folios(run.lock)
        raise KernelError(EHWPOISON, f"index {index:#x} of inode {inode.ino} is poisoned")
    return gmem, run


def _usable_order(gfn: int, run: FolioRun) -> int:
    """The folio's order, if its pages lie in guest memory as they lie in host memory."""
    return run.order if not (gfn ^ run.pfn) & ((1 << run.order) - 1) else 0


def _prepare_folios(
    kvm: "Kvm", inode: GmemInode, gfn: Gfn, run: FolioRun, max_order: int
) -> None:
    """kvm_gmem_prepare_folio() of each: zero what was never initialised, then let the arch
    prepare.

    With 2M folios "uptodate" is kept per page and means initialised, as in the series that
    proposes them.
    """
    profile = kvm.linux.profile
    end = run.pgoff + run.npages
    if profile.uptodate_means_initialised or profile.gmem_max_order:
        if not run.uptodate:
            _clear_folios(inode, run.pgoff, end, run.order)
        if profile.gmem_in_place and not kvm_mem_is_private(kvm, gfn):
            return  # a shared page of the guest_memfd stays the hypervisor's
        kvm.ops.gmem_prepare(kvm, run.pfn, gfn, run.npages, max_order)
        return
    if not run.uptodate:
        inode.linux.page_alloc.clear_pages(run.pfn, run.npages)
        kvm.ops.gmem_prepare(kvm, run.pfn, gfn, run.npages, max_order)
        inode.mark_uptodate(run.pgoff, end)


def _clear_folios(inode: GmemInode, index: int, end: int, order: int) -> None:
    """Zero the folios that [index, end) touches, except pages that are initialised, and mark
    them so."""
    size = 1 << order
    index, end = index & -size, -(-end // size) * size
    for lo, hi, folio in inode.folios.runs(index, end):
        if folio is None:
            raise ValueError(f"no folio at index {lo:#x} while it is locked")
        if not folio.uptodate:
            inode.linux.page_alloc.clear_pages(lo + folio.delta, hi - lo)
    inode.mark_uptodate(index, end)


def kvm_gmem_populate(
    kvm: "Kvm",
    proc: "Process",
    start_gfn: Gfn,
    src: Hva | None,
    npages: int,
    post_populate: PostPopulate,
    *,
    write_source: bool = False,
) -> Steps[int]:
    """Fill private pages with initial contents; how many were, or the error of the first.

    Stops at the end of the slot, at the first failure and at a signal.  write_source: the
    callback will write to its source, so that it is pinned for writing where the kernel does
    that (CPUID pages). EINVAL: no gmem slot, not private.  EEXIST: already prepared (up to
    6.19).  EFAULT, EINTR, and the callback's.
    """
    lockdep_assert_held(kvm.slots_lock)
    profile = kvm.linux.profile
    if npages < 0 or (npages == 0 and profile.populate_per_page):
        raise KernelError(EINVAL, f"{npages} pages to populate")
    slot = kvm.gfn_to_memslot(start_gfn)
    if slot is None or not slot.can_be_private:
        raise KernelError(EINVAL, f"GFN {start_gfn:#x} has no guest_memfd slot")
    file = kvm_gmem_get_file(slot)
    if file is None:
        raise KernelError(EFAULT, f"the guest_memfd of slot {slot.key:#x} is closed")
    gmem = slot.gmem_file
    if gmem is None:
        raise KernelError(EFAULT, f"slot {slot.key:#x} lost its guest_memfd")
    npages = min(npages, slot.end_gfn - start_gfn)
    done = 0
    per_page = profile.populate_per_page
    writable = write_source and profile.populate_writable_source
    try:
        if not per_page:
            yield from gmem.inode.invalidate_lock.acquire_write()
        try:
            while done < npages:
                if proc.signal_pending():
                    raise KernelError(EINTR, "signal while populating")
                gfn = Gfn(start_gfn + done)
                at = None if src is None else Hva(src + (done << PAGE_SHIFT))
                yield from _populate_page(
                    kvm, proc, slot, file, gfn, at, post_populate, writable
                )
                done += 1
        except KernelError:
            if not done:
                raise
        finally:
            if not per_page:
                gmem.inode.invalidate_lock.release_write()
    finally:
        kvm.linux.task_work.fput(file)
    return done


def _populate_page(
    kvm: "Kvm",
    proc: "Process",
    slot: "KvmMemorySlot",
    file: File,
    gfn: Gfn,
    src: Hva | None,
    post_populate: PostPopulate,
    writable: bool,
) -> Steps[None]:
    """One page; from 7.0 its source is pinned before the invalidate lock is taken."""
    if not kvm.linux.profile.populate_per_page:
        source = None if src is None else PopulateSource(proc.mm, src, None)
        yield from _populate_locked(kvm, slot, file, gfn, source, post_populate)
        return
    source = None
    pinned: Pfn | None = None
    pages = kvm.linux.page_alloc
    if src is not None:
        if src & PAGE_MASK:
            raise KernelError(EINVAL, f"source {src:#x} is not page aligned")
        ((pinned, _),) = yield from get_user_pages(proc.mm, src, 1, write=writable)
        pages.get_pages(pinned, 1)
        source = PopulateSource(proc.mm, src, pinned)
    try:
        inode = _inode_of(file)
        yield from inode.invalidate_lock.acquire_write()
        try:
            yield from _populate_locked(kvm, slot, file, gfn, source, post_populate)
        finally:
            inode.invalidate_lock.release_write()
    finally:
        if pinned is not None:
            pages.put_pages(pinned, 1)


def _populate_locked(
    kvm: "Kvm",
    slot: "KvmMemorySlot",
    file: File,
    gfn: Gfn,
    source: PopulateSource | None,
    post_populate: PostPopulate,
) -> Steps[None]:
    gmem, run = yield from _get_locked(kvm, slot, file, gfn, 1)
    inode = gmem.inode
    pages = kvm.linux.page_alloc
    pages.get_pages(run.pfn, 1)
    try:
        inode.unlock_folios(run.lock)
        if run.uptodate and not kvm.linux.profile.populate_per_page:
            raise KernelError(EEXIST, f"GFN {gfn:#x} is prepared already")
        if not kvm_range_is_private(kvm, gfn, gfn + 1):
            raise KernelError(EINVAL, f"GFN {gfn:#x} is not private")
        yield from post_populate(kvm, gfn, run.pfn, source)
        inode.mark_uptodate(run.pgoff, run.pgoff + 1)
    finally:
        pages.put_pages(run.pfn, 1)


def _inode_of(file: File) -> GmemInode:
    gmem = file.private
    if not isinstance(gmem, GmemFile):
        raise TypeError(f"a {file.kind.value} file has no gmem inode")
    return gmem.inode
