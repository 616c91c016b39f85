"""Scenes of memory that changes state: patterns kept, bounce buffers, a 2M page smashed and rejoined."""

from collections.abc import Iterable

from softcvm.abi.board import BOUNCE_PORT
from softcvm.abi.ghcb import PscOp
from softcvm.abi.insn import Load, Pvalidate, PvalidateOut, Store
from softcvm.abi.rmp import PvalidateStatus, RmpPageSize
from softcvm.guest.boot_info import Extent
from softcvm.guest.checks import Check, expect
from softcvm.guest.console import port_out
from softcvm.guest.ghcb import GuestSteps, PscRequest
from softcvm.guest.memory import PMD_SIZE
from softcvm.guest.programs.vcpu import Vcpu
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE

__all__ = (
    "bounce_buffers",
    "keeps",
    "pattern",
    "rejoin",
    "sample_pages",
    "smash",
    "write_patterns",
)

_BOUNCE_OFFSET = 16 * PAGE_SIZE
BOUNCE_PAGES = 16


def pattern(gpa: int) -> bytes:
    """64 bytes that no other page has."""
    return (gpa | 0x5A5).to_bytes(8, "little") * 8


def sample_pages(extents: Iterable[Extent], per_extent: int = 16) -> list[int]:
    """First, last, and evenly spread pages of each extent: how many does not depend on its size."""
    pages = []
    for extent in extents:
        last = extent.pages - 1
        steps = min(per_extent, last) or 1
        pages += sorted(
            {extent.start + last * i // steps * PAGE_SIZE for i in range(steps + 1)}
        )
    return pages


def write_patterns(pages: Iterable[int]) -> GuestSteps[None]:
    for gpa in pages:
        yield Store(gpa + 0x40, pattern(gpa))


def keeps(vcpu: Vcpu, pages: Iterable[int], check: Check) -> GuestSteps[None]:
    """Every page still has its pattern."""
    for gpa in pages:
        found = yield Load(gpa + 0x40, 64)
        yield from expect(vcpu.console, found == pattern(gpa), check, hex(gpa))


def bounce_buffers(vcpu: Vcpu, page: int) -> GuestSteps[int]:
    """Share a few 4K pages of a private 2M page, have a device work on them, take them back.

    The rest of the 2M page stays private and keeps its data.  Returns how many were shared.
    """
    first = page + _BOUNCE_OFFSET
    buffers = Extent(first, first + BOUNCE_PAGES * PAGE_SIZE)
    neighbours = (first - PAGE_SIZE, buffers.end, page, page + PMD_SIZE - PAGE_SIZE)
    yield from write_patterns(neighbours)
    yield from vcpu.memory.set_shared([buffers])
    for gpa in range(buffers.start, buffers.end, PAGE_SIZE):
        sent = pattern(gpa) * (PAGE_SIZE // 64)
        yield Store(gpa, sent, c=False)
        yield from port_out(vcpu.ghcb, BOUNCE_PORT, gpa >> PAGE_SHIFT, 4)
        received = yield Load(gpa, PAGE_SIZE, c=False)
        wanted = bytes(byte ^ 0xFF for byte in sent)
        yield from expect(vcpu.console, received == wanted, Check.BOUNCE, hex(gpa))
    yield from vcpu.memory.set_private([buffers])
    yield from write_patterns(range(buffers.start, buffers.end, PAGE_SIZE))
    yield from keeps(vcpu, neighbours, Check.NEIGHBOURS_KEEP_DATA)
    return BOUNCE_PAGES


def rejoin(vcpu: Vcpu, page: int) -> GuestSteps[bool]:
    """Return a whole smashed 2M page to shared and private again; True if it is one 2M page now."""
    whole = [Extent(page, page + PMD_SIZE)]
    yield from vcpu.memory.set_shared(whole)
    before = vcpu.memory.huge
    yield from vcpu.memory.set_private(whole)
    ends = (page, page + PMD_SIZE - PAGE_SIZE)
    yield from write_patterns(ends)
    yield from keeps(vcpu, ends, Check.REJOIN)
    return vcpu.memory.huge > before


def smash(vcpu: Vcpu, page: int) -> GuestSteps[tuple[bool, bool]]:
    """Ask for a 2M page to be smashed and unsmashed.

    A hypervisor may take both as hints (KVM does); whether the RMP still has 2M is found out by PVALIDATE
    after each, and the data must survive in any case.
    """
    ends = (page, page + PMD_SIZE - PAGE_SIZE)
    yield from write_patterns(ends)
    found = []
    for op in (PscOp.PSMASH, PscOp.UNSMASH):
        yield from vcpu.ghcb.page_state_change([PscRequest(page, op, huge=True)])
        out: PvalidateOut = yield Pvalidate(page, RmpPageSize.PG_2M, True)
        saw = out.code == PvalidateStatus.FAIL_SIZEMISMATCH or (not out.code and out.cf)
        yield from expect(vcpu.console, saw, Check.SMASH_KEEPS_DATA, out)
        yield from keeps(vcpu, ends, Check.SMASH_KEEPS_DATA)
        found.append(out.code == PvalidateStatus.SUCCESS)
    return found[0], found[1]
