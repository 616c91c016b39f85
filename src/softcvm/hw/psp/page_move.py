"""SNP_PAGE_MOVE: a guest's page, or a metadata page, changes its place in memory.

[ABI-56860 r1.58 SNP_PAGE_MOVE; ASPFW].  The source keeps its gpa, unvalidated: for a moment two
pages claim one GPA.  Its entry is written before the destination's.  Guest policies with
PAGE_SWAP_DISABLE (firmware 1.58) cannot exist under the profiles' firmware, which refuses the
bit at LAUNCH_START.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import GPA_TAG_MASK, GPA_TAG_METADATA, PageState
from softcvm.abi.snp_firmware import SnpCmd, SnpPageMove, SnpStatus
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.psp.gctx import Gctx, next_state
from softcvm.hw.psp.operands import (
    Page,
    guest_key,
    lookup,
    read,
    read_context,
    reserved_bits_set,
    write,
)
from softcvm.hw.rmp import (
    IMMUTABLE,
    LINEAR,
    LOCK,
    PERMS_SHIFT,
    VALIDATED,
    VMSA,
    RmpVal,
)
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("GUEST_STATES", "bound", "is_metadata_of", "metadata_value", "snp_page_move")

GUEST_STATES = (PageState.PRE_GUEST, PageState.PRE_SWAP)
_MOVES_ALONG = VMSA | 0xFFFF_FFFF << PERMS_SHIFT


def bound(attrs: int, gfn: int, pfn: int) -> RmpVal:
    """An RMP value that binds `pfn` to `gfn` and its successors to theirs."""
    return attrs | LINEAR, gfn - pfn


def metadata_value(value: RmpVal, gctx_paddr: int) -> RmpVal:
    """A Firmware page's value as Metadata of a guest: its gpa field names the context."""
    return value[0], gctx_paddr >> PAGE_SHIFT & ~GPA_TAG_MASK | GPA_TAG_METADATA


def is_metadata_of(page: Page, gctx_paddr: int) -> bool:
    return page.value[1] & ~GPA_TAG_MASK == gctx_paddr >> PAGE_SHIFT


def snp_page_move(psp: "Psp", cmd: SnpPageMove) -> SnpStatus:
    # RESERVED
    addresses = cmd.gctx_paddr | cmd.src_paddr | cmd.dst_paddr
    if reserved_bits_set(cmd) or addresses & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    source = lookup(psp, cmd.src_paddr)
    target = lookup(psp, cmd.dst_paddr)
    gctx = read_context(psp, cmd.gctx_paddr)
    if source.pagesize != cmd.page_size or target.pagesize != cmd.page_size:
        return SnpStatus.INVALID_PAGE_SIZE
    # GUEST
    if next_state(gctx, SnpCmd.PAGE_MOVE) is None:
        return SnpStatus.INVALID_GUEST_STATE
    if not gctx.asid:
        return SnpStatus.INACTIVE
    if source.state in GUEST_STATES and target.state is PageState.PRE_GUEST:
        return _move_guest_page(psp, gctx, source, target)
    if source.state is PageState.METADATA and target.state is PageState.FIRMWARE:
        return _move_metadata(psp, cmd.gctx_paddr & ~psp.c_bit, source, target)
    return SnpStatus.INVALID_PAGE_STATE


def _move_guest_page(psp: "Psp", gctx: Gctx, source: Page, target: Page) -> SnpStatus:
    rmp = psp.soc.rmp
    if source.asid != gctx.asid or target.asid != gctx.asid:
        return SnpStatus.INVALID_PAGE_OWNER
    # OUTPUT
    key = guest_key(psp, gctx)
    length = source.npages << PAGE_SHIFT
    write(psp, target.spa, read(psp, source.spa, length, key), key)
    gfn = rmp.gfn(source.pfn)
    src_attrs, src_gfn = source.value
    dst_attrs = target.value[0] & ~(IMMUTABLE | LOCK | _MOVES_ALONG) | src_attrs & _MOVES_ALONG
    if source.state is PageState.PRE_SWAP:
        dst_attrs |= VALIDATED
    src_attrs &= ~(VALIDATED | IMMUTABLE | LOCK)
    rmp.store("SNP_PAGE_MOVE", source.pfn, source.pfn + source.npages, (src_attrs, src_gfn))
    rmp.store(
        "SNP_PAGE_MOVE",
        target.pfn,
        target.pfn + target.npages,
        bound(dst_attrs, gfn, target.pfn),
    )
    return SnpStatus.SUCCESS


def _move_metadata(psp: "Psp", gctx_paddr: int, source: Page, target: Page) -> SnpStatus:
    rmp = psp.soc.rmp
    if not is_metadata_of(source, gctx_paddr):
        return SnpStatus.INVALID_PAGE_OWNER
    # OUTPUT
    write(psp, target.spa, read(psp, source.spa, source.npages << PAGE_SHIFT))
    firmware = (source.value[0] & ~VMSA, 0)
    rmp.store("SNP_PAGE_MOVE", source.pfn, source.pfn + source.npages, firmware)
    moved = metadata_value(target.value, gctx_paddr)
    rmp.store("SNP_PAGE_MOVE", target.pfn, target.pfn + target.npages, moved)
    return SnpStatus.SUCCESS
