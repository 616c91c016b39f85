"""How a guest takes memory into use and gives it back: page state and PVALIDATE in the right order.

To shared:  PVALIDATE(0) every page, then the page-state change, then use it with C=0.
To private: page-state change, then PVALIDATE(1) every page, then touch it once (below), then use it.
[GHCB-56421 §4.1.6]; pvalidate_pages() and __set_pages_state() of arch/x86/coco/sev/core.c, Linux v7.2.

A PVALIDATE that finds nothing to change (CF=1) is fatal: it says that the page was validated before, so
somebody may be replaying an old mapping of it.

On processors without COHERENCY_SFW_NO a line that the host wrote before the page was assigned may still
lie in a cache and be written back over the guest's data; reading each page once evicts it
(CVE-2024-36331).
"""

from collections.abc import Iterable, Iterator

from softcvm.abi.ghcb import PSC_MAX_ENTRIES, PscOp
from softcvm.abi.insn import Pvalidate, PvalidateOut, Touch
from softcvm.abi.rmp import PvalidateStatus, RmpPageSize
from softcvm.guest.boot_info import Extent
from softcvm.guest.ghcb import GhcbClient, GuestSteps, LinuxTerm, PscRequest, TermSet, terminate
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE, PTRS_PER_PMD

__all__ = ("PMD_SIZE", "GuestMemory", "pieces")

PMD_SIZE = PTRS_PER_PMD << PAGE_SHIFT


class GuestMemory:
    """Page-state changes of one vCPU through its GHCB.

    sizemismatches counts PVALIDATEs that found 4K pages where 2M was asked for; huge those that found 2M.
    """

    def __init__(self, ghcb: GhcbClient, *, evict: bool) -> None:
        self.ghcb = ghcb
        self.evict = evict
        self.huge = 0
        self.sizemismatches = 0

    def set_private(self, extents: Iterable[Extent]) -> GuestSteps[None]:
        """Make extents private and validated.  One page-state-change buffer at a time, filled up."""
        for buffer in _buffers(extents, PscOp.PRIVATE):
            yield from self.ghcb.page_state_change(buffer)
            for start, end in _joined(buffer):
                yield from self.pvalidate(start, end, validate=True)
                if self.evict:
                    yield Touch(start, (end - start) >> PAGE_SHIFT)

    def set_shared(self, extents: Iterable[Extent]) -> GuestSteps[None]:
        """Give up validation and make extents shared.  Their contents are lost."""
        for buffer in _buffers(extents, PscOp.SHARED):
            for start, end in _joined(buffer):
                yield from self.pvalidate(start, end, validate=False)
            yield from self.ghcb.page_state_change(buffer)

    def pvalidate(self, start: int, end: int, *, validate: bool) -> GuestSteps[None]:
        """Validate or rescind [start, end), 2M where it is aligned and falling back to 4K."""
        for at, stop, huge in pieces(start, end):
            if not huge:
                yield from self._pvalidate_4k(at, stop, validate)
                continue
            while at < stop:
                count = (stop - at) // PMD_SIZE
                out: PvalidateOut = yield Pvalidate(at, RmpPageSize.PG_2M, validate, count)
                if out.code == PvalidateStatus.FAIL_SIZEMISMATCH:
                    self.sizemismatches += 1
                    yield from self._pvalidate_4k(at, at + PMD_SIZE, validate)
                    at += PMD_SIZE
                else:
                    yield from _check(out)
                    self.huge += out.done
                    at += out.done * PMD_SIZE

    def _pvalidate_4k(self, at: int, end: int, validate: bool) -> GuestSteps[None]:
        while at < end:
            count = (end - at) >> PAGE_SHIFT
            out: PvalidateOut = yield Pvalidate(at, RmpPageSize.PG_4K, validate, count)
            yield from _check(out)
            at += out.done * PAGE_SIZE


def pieces(start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Cut [start, end) into an unaligned head, whole 2M pages, and a tail: (start, end, is 2M)."""
    first = min(-(-start // PMD_SIZE) * PMD_SIZE, end)
    last = max(end // PMD_SIZE * PMD_SIZE, first)
    if start < first:
        yield start, first, False
    if first < last:
        yield first, last, True
    if last < end:
        yield last, end, False


def _check(out: PvalidateOut) -> GuestSteps[None]:
    if out.code or out.cf or not out.done:
        yield from terminate(TermSet.LINUX, LinuxTerm.PVALIDATE)


def _buffers(extents: Iterable[Extent], op: PscOp) -> Iterator[list[PscRequest]]:
    buffer: list[PscRequest] = []
    for extent in extents:
        for start, end, huge in pieces(extent.start, extent.end):
            for gpa in range(start, end, PMD_SIZE if huge else PAGE_SIZE):
                buffer.append(PscRequest(gpa, op, huge))
                if len(buffer) == PSC_MAX_ENTRIES:
                    yield buffer
                    buffer = []
    if buffer:
        yield buffer


def _joined(buffer: list[PscRequest]) -> list[tuple[int, int]]:
    """The ranges that a buffer covers, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for request in buffer:
        end = request.gpa + (PMD_SIZE if request.huge else PAGE_SIZE)
        if ranges and ranges[-1][1] == request.gpa:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((request.gpa, end))
    return ranges
