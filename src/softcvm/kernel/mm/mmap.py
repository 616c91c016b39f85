"""struct mm_struct: a process's mappings (mm/mmap.c, include/linux/mmu_notifier.h; v7.2).

Owns VMAs and page table entries of 4K; touching them is memory.py.  What the pages of a file
are is the file's business (`VmOps`).  Whoever mirrors these mappings (KVM) registers a notifier
and hears of every removal before and after it.

Lock: mmap_lock; faults take it for read, mmap() and munmap() for write.
"""

from bisect import bisect_right
from errno import EEXIST, EINVAL, ENODEV, ENOMEM, EOPNOTSUPP, EOVERFLOW, EPERM
from typing import TYPE_CHECKING, Protocol

from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.fs.file import File, FileKind, fput
from softcvm.kernel.locks import Rank
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PTRS_PER_PMD, Hva, Pfn
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State
from softcvm.sim.steps import RwSem, Steps, Wait, preempt

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = (
    "MADV_DONTNEED",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "PROT_EXEC",
    "PROT_READ",
    "PROT_WRITE",
    "MmStruct",
    "MmuNotifier",
    "UserMemory",
    "VmOps",
    "Vma",
)

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE = 1, 2, 3
MAP_TYPE, MAP_FIXED, MAP_ANONYMOUS = 0xF, 0x10, 0x20
MAP_FIXED_NOREPLACE = 0x100000
MAP_DROPPABLE = 8
_LEGACY_MAP_MASK = 0x7C07_F9F3
"""What MAP_SHARED_VALIDATE allows: every flag older than itself."""
_MAX_LFS_FILESIZE, _ULONG_MAX = (1 << 63) - 1, (1 << 64) - 1
MADV_DONTNEED = 4
_MADV_VALID = frozenset({*range(5), *range(8, 26), 100, 101})

_TASK_SIZE_PAGES = (1 << 47 - PAGE_SHIFT) - 1
_MMAP_BASE = 0x7FFF_F7FF_F000 >> PAGE_SHIFT
_MMAP_MIN = 0x1_0000 >> PAGE_SHIFT  # vm.mmap_min_addr


class UserMemory(Protocol):
    """Memory of a process whose address space is not the model's: a program that was caught."""

    def read(self, addr: int, length: int) -> bytes:
        """Each byte fetched once.  BadAccess."""
        ...

    def write(self, addr: int, data: bytes) -> None:
        """BadAccess, when the bytes before the bad one are written."""
        ...

    def share(self, mm: "MmStruct", first: int, last: int, *, write: bool) -> Wait:
        """Have pages [first, last) become DRAM of this machine; once that is over they are in mm.pages, if
        they can be."""
        ...


class VmOps(Protocol):
    """What a mapped file answers (struct vm_operations_struct)."""

    def may_map(self, pgoff: int, npages: int, prot: int, flags: int) -> None:
        """f_op->mmap: refuse with a KernelError, when what MAP_FIXED replaces is gone already.
        May be larger than the file."""
        ...

    def memory(self, pgoff: int) -> bytearray | None:
        """Kernel memory shown at a page, for files that are no page cache; None: ask
        fault()."""
        ...

    def fault(self, pgoff: int, npages: int) -> "Steps[list[tuple[Pfn, int]]]":
        """The frames of pages, allocated if need be, as runs in order: at least the first, up
        to the first bad one.  BadAccess with SIGBUS and the offset in the file."""
        ...

    def mapped(self, mm: "MmStruct", vma: "Vma") -> None:
        """The file has one mapping more."""
        ...

    def unmapped(self, mm: "MmStruct", vma: "Vma") -> None: ...


class MmuNotifier(Protocol):
    """Somebody with page tables of their own (struct mmu_notifier_ops)."""

    def invalidate_range_start(self, start: Hva, end: Hva) -> Steps[None]: ...

    def invalidate_range_end(self, start: Hva, end: Hva) -> Steps[None]: ...

    def mm_release(self) -> Steps[None]:
        """The address space goes away."""
        ...


class Vma(State):
    """A mapping of pages [start, end), by page number.  `ops` is None for anonymous memory."""

    saved = ("start", "end", "prot", "shared", "file", "pgoff")
    derived = {"ops": "follows from file"}

    def __init__(
        self,
        start: int,
        end: int,
        prot: int,
        *,
        shared: bool,
        file: File | None = None,
        ops: VmOps | None = None,
        pgoff: int = 0,
    ) -> None:
        self.start = start
        self.end = end
        self.prot = prot
        self.shared = shared
        self.file = file
        self.ops = ops
        self.pgoff = pgoff


class MmStruct(State):
    """An address space."""

    saved = ("vmas", "pages")
    derived = {
        "linux": "the host",
        "mmap_lock": "free at quiescent points",
        "notifiers": "each VM names its mm",
        "_zaps": "0 at quiescent points",
        "_starts": "first pages of vmas",
        "outside": "a caught program's memory is not the model's",
    }

    def __init__(self, linux: "Linux") -> None:
        self.linux = linux
        self.outside: UserMemory | None = None
        """Where system calls copy from and to instead of the mappings here."""
        self.mmap_lock = RwSem(linux.lockdep, "mmap_lock", Rank.MMAP_LOCK)
        self.vmas: list[Vma] = []
        self._starts: list[int] = []
        self.pages: RangeMap[int | None] = RangeMap(None)
        """Present entries: virtual page -> pfn - virtual page."""
        self.notifiers: list[MmuNotifier] = []
        self._zaps = 0
        """Invalidations between their start and end."""

    # System calls

    def mmap(
        self,
        length: int,
        prot: int,
        flags: int,
        file: File | None = None,
        ops: VmOps | None = None,
        offset: int = 0,
        addr: int = 0,
    ) -> Steps[Hva]:
        """mmap(2), do_mmap(): EINVAL, ENOMEM, EEXIST, what _check_file() refuses and what the
        file answers, in the kernel's order."""
        if length == 0:
            raise KernelError(EINVAL, "length is 0")
        npages = (length + PAGE_MASK) >> PAGE_SHIFT
        if npages > _TASK_SIZE_PAGES:
            raise KernelError(ENOMEM, "length exceeds the address space")
        dropped: list[File] = []
        yield from self.mmap_lock.acquire_write()
        try:
            start = self._unmapped_area(npages, flags, addr, anonymous=file is None)
            kind = flags & MAP_TYPE
            shared = kind in (MAP_SHARED, MAP_SHARED_VALIDATE)
            pgoff = (offset & _ULONG_MAX) >> PAGE_SHIFT
            if file is not None:
                self._check_file(file, ops, pgoff, npages, prot, flags)
            elif kind not in (MAP_SHARED, MAP_PRIVATE, MAP_DROPPABLE):
                raise KernelError(EINVAL, f"anonymous memory of type {kind}")
            if flags & MAP_FIXED:
                dropped = yield from self._unmap(start, start + npages)
            if ops is not None:
                ops.may_map(pgoff, npages, prot, flags)
            vma = Vma(
                start, start + npages, prot, shared=shared, file=file, ops=ops, pgoff=pgoff
            )
            if file is not None and ops is not None:
                file.get()
                ops.mapped(self, vma)
            self._insert(vma)
        finally:
            self.mmap_lock.release_write()
            for old in dropped:
                self.linux.task_work.fput(old)
        return Hva(start << PAGE_SHIFT)

    def _check_file(
        self, file: File, ops: VmOps | None, pgoff: int, npages: int, prot: int, flags: int
    ) -> None:
        """What do_mmap() asks of a file while the address space is still as it was.  EOVERFLOW,
        EOPNOTSUPP, EINVAL, EPERM, ENODEV."""
        regular = file.kind is FileKind.GUEST_MEMFD
        size_max = _MAX_LFS_FILESIZE if regular else _ULONG_MAX
        if pgoff > size_max - (npages << PAGE_SHIFT) >> PAGE_SHIFT:
            raise KernelError(EOVERFLOW, f"page {pgoff:#x} + {npages:#x} of a file")
        kind = flags & MAP_TYPE
        if kind == MAP_SHARED_VALIDATE and flags & ~_LEGACY_MAP_MASK:
            raise KernelError(EOPNOTSUPP, f"MAP_SHARED_VALIDATE with flags {flags:#x}")
        if kind not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE):
            raise KernelError(EINVAL, f"mapping of type {kind}")
        if prot & PROT_EXEC and self._noexec(file):
            raise KernelError(EPERM, f"a {file.kind.value} file is noexec")
        if ops is None:
            raise KernelError(ENODEV, f"a {file.kind.value} file cannot be mapped")

    def _noexec(self, file: File) -> bool:
        """path_noexec(); device nodes are on a file system that is not."""
        if file.kind is FileKind.GUEST_MEMFD:
            return self.linux.profile.gmem_mmap
        if file.kind in (FileKind.VM, FileKind.VCPU):
            return self.linux.profile.anon_inode_noexec
        return False

    def munmap(self, addr: Hva, length: int) -> Steps[None]:
        """munmap(2).  EINVAL."""
        if addr & PAGE_MASK or length == 0 or addr + length > _TASK_SIZE_PAGES << PAGE_SHIFT:
            raise KernelError(EINVAL, "address or length")
        yield from self.mmap_lock.acquire_write()
        dropped: list[File] = []
        try:
            end = (addr + length + PAGE_MASK) >> PAGE_SHIFT
            dropped = yield from self._unmap(addr >> PAGE_SHIFT, end)
        finally:
            self.mmap_lock.release_write()
        for file in dropped:
            yield from fput(file)

    def madvise(self, addr: int, length: int, advice: int) -> Steps[None]:
        """madvise(2): MADV_DONTNEED.  EINVAL; ENOMEM when part of the range is not mapped,
        after the rest."""
        if advice not in _MADV_VALID:
            raise KernelError(EINVAL, f"advice {advice}")
        if addr & PAGE_MASK or (addr + length > (1 << 64) - PAGE_SIZE and length):
            raise KernelError(EINVAL, f"range {addr:#x} + {length:#x}")
        if advice != MADV_DONTNEED:
            raise Unmodelled(f"madvise({advice})")
        first, end = addr >> PAGE_SHIFT, (addr + length + PAGE_MASK) >> PAGE_SHIFT
        yield from self.mmap_lock.acquire_read()
        try:
            covered = first
            hole = False
            for vma in self._overlapping(first, end) if first < end else []:
                lo, hi = max(vma.start, first), min(vma.end, end)
                hole |= lo > covered
                covered = hi
                # Shared anonymous memory is a file of its own: only the entries go, not the pages.
                if not (vma.ops is None and vma.shared):
                    yield from self._zap(lo, hi, owned=vma.ops is None)
            if hole or covered < end:
                raise KernelError(ENOMEM, f"part of {addr:#x} + {length:#x} is not mapped")
        finally:
            self.mmap_lock.release_read()

    def exit_mmap(self) -> Steps[None]:
        """The last thread is gone: tell the notifiers, then unmap everything."""
        for notifier in list(self.notifiers):
            yield from notifier.mm_release()
        if self.outside is not None:
            yield from self.forget(0, self.pages.limit)
        if self.vmas:
            first, last = self.vmas[0].start, self.vmas[-1].end
            yield from self.munmap(Hva(first << PAGE_SHIFT), (last - first) << PAGE_SHIFT)

    def forget(self, first: int, last: int) -> Steps[None]:
        """Pages of outside memory that the process takes away: notifiers hear of it, frames are freed."""
        yield from self.mmap_lock.acquire_write()
        try:
            if self.pages.held(first, last):
                yield from self._zap(first, last, owned=True)
        finally:
            self.mmap_lock.release_write()

    def zap_file_pages(self, vma: Vma, start: int, end: int) -> Steps[None]:
        """unmap_mapping_range(): drop the entries of file pages [start, end) in one mapping of
        the file."""
        lo = max(vma.start, vma.start + start - vma.pgoff)
        hi = min(vma.end, vma.start + end - vma.pgoff)
        if lo < hi and self.pages.held(lo, hi):
            yield from self._zap(lo, hi)

    def mmu_notifier_register(self, notifier: MmuNotifier) -> Steps[None]:
        """Tell it of every removal from now on; never between the start and end of one.

        Linux takes mmap_lock and every lock below it that a removal can hold
        (mm_take_all_locks(), mm/mmap.c), so it waits for truncations of mapped files too.
        """
        yield from self.mmap_lock.acquire_write()
        while self._zaps:
            yield from preempt("mm_take_all_locks")
        self.notifiers.append(notifier)
        self.mmap_lock.release_write()

    # Lookups

    def find_vma(self, page: int) -> Vma | None:
        """The mapping that holds a virtual page."""
        i = bisect_right(self._starts, page) - 1
        return self.vmas[i] if i >= 0 and page < self.vmas[i].end else None

    def _insert(self, vma: Vma) -> None:
        i = bisect_right(self._starts, vma.start)
        self._starts.insert(i, vma.start)
        self.vmas.insert(i, vma)

    def _remove(self, vma: Vma) -> None:
        i = self._starts.index(vma.start)
        del self._starts[i], self.vmas[i]

    def _overlapping(self, start: int, end: int) -> list[Vma]:
        i = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        while i < len(self.vmas) and self.vmas[i].start < end:
            if self.vmas[i].end > start:
                found.append(self.vmas[i])
            i += 1
        return found

    def _unmapped_area(self, npages: int, flags: int, addr: int, *, anonymous: bool) -> int:
        """get_unmapped_area(): top down from mmap_base; 2M and more of anonymous memory 2M
        aligned (v6.7)."""
        if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
            first = addr >> PAGE_SHIFT
            if addr > _TASK_SIZE_PAGES - npages << PAGE_SHIFT or first < _MMAP_MIN:
                raise KernelError(ENOMEM, "MAP_FIXED range is outside the address space")
            if addr & PAGE_MASK:
                raise KernelError(EINVAL, "MAP_FIXED address is not page aligned")
            if flags & MAP_FIXED_NOREPLACE and self._overlapping(first, first + npages):
                raise KernelError(EEXIST, "MAP_FIXED_NOREPLACE range is mapped")
            return first
        hint = (addr + PAGE_MASK) >> PAGE_SHIFT
        fits = _MMAP_MIN <= hint <= _TASK_SIZE_PAGES - npages
        if fits and not self._overlapping(hint, hint + npages):
            return hint
        align = PTRS_PER_PMD if anonymous and npages >= PTRS_PER_PMD else 1
        top = _MMAP_BASE
        for vma in reversed(self.vmas):
            if vma.start >= _MMAP_BASE:
                continue
            start = (top - npages) // align * align
            if start >= vma.end:
                return start
            top = min(top, vma.start)
        start = (top - npages) // align * align
        if start < _MMAP_MIN:
            raise KernelError(ENOMEM, "no room in the address space")
        return start

    # Removal

    def _unmap(self, start: int, end: int) -> Steps[list[File]]:
        """Remove every mapping in [start, end); the caller puts the files that lost one."""
        dropped: list[File] = []
        for vma in self._overlapping(start, end):
            lo, hi = max(vma.start, start), min(vma.end, end)
            yield from self._zap(lo, hi, owned=vma.ops is None)
            self._remove(vma)
            kept = [(vma.start, lo), (hi, vma.end)]
            for first, last in kept:
                if first < last:
                    self._keep(vma, first, last)
            if vma.ops is not None and vma.file is not None:
                vma.ops.unmapped(self, vma)
                dropped.append(vma.file)
        return dropped

    def _keep(self, vma: Vma, first: int, last: int) -> None:
        """What is left of a mapping that was cut."""
        part = Vma(
            first,
            last,
            vma.prot,
            shared=vma.shared,
            file=vma.file,
            ops=vma.ops,
            pgoff=vma.pgoff + first - vma.start,
        )
        if vma.file is not None and vma.ops is not None:
            vma.file.get()
            vma.ops.mapped(self, part)
        self._insert(part)

    def _zap(self, lo: int, hi: int, *, owned: bool = False) -> Steps[None]:
        """Remove entries between a notifier's start and end; anonymous pages are freed."""
        start, end = Hva(lo << PAGE_SHIFT), Hva(hi << PAGE_SHIFT)
        self._zaps += 1
        told = list(self.notifiers)
        for notifier in told:
            if notifier in self.notifiers:  # unregistered while another was told
                yield from notifier.invalidate_range_start(start, end)
        for first, last, delta in self.pages.held(lo, hi):
            if owned and delta is not None:
                self.linux.page_alloc.free_run(first + delta, last - first)
        self.pages.set(lo, hi, None)
        for notifier in told:
            if notifier in self.notifiers:
                yield from notifier.invalidate_range_end(start, end)
        self._zaps -= 1
