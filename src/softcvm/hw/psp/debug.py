"""SNP_DBG_DECRYPT and SNP_DBG_ENCRYPT: the host looks into a guest whose policy lets it.

[ABI-56860 r1.58; ASPFW].  Always 4K, also inside a 2M page, which is why these two commands
alone resolve a page through the entry that decides for it.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import SnpDbg, SnpStatus
from softcvm.abi.snp_platform import PlatformState
from softcvm.abi.snp_policy import GuestPolicy
from softcvm.hw.psp.gctx import Gctx
from softcvm.hw.psp.operands import Page, guest_key, lookup_head, read, read_context, write
from softcvm.hw.psp.vmsa import VMSA_REG_PROT, VmsaLaunch, apply_nonce
from softcvm.hw.rmp import VMSA
from softcvm.sim.addr import PAGE_MASK, PAGE_SIZE

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("snp_dbg_decrypt", "snp_dbg_encrypt")

_GUEST_STATES = (
    PageState.PRE_GUEST,
    PageState.PRE_SWAP,
    PageState.GUEST_INVALID,
    PageState.GUEST_VALID,
)
_LAUNCHABLE = (PageState.PRE_GUEST, PageState.PRE_SWAP)


def snp_dbg_decrypt(psp: "Psp", cmd: SnpDbg) -> SnpStatus:
    """Guest page -> Firmware page, in the clear."""
    # RESERVED
    if (cmd.gctx_paddr | cmd.src_addr | cmd.dst_addr) & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    source = lookup_head(psp, cmd.src_addr)
    target = lookup_head(psp, cmd.dst_addr)
    gctx = read_context(psp, cmd.gctx_paddr)
    if source.state not in _GUEST_STATES or target.state is not PageState.FIRMWARE:
        return SnpStatus.INVALID_PAGE_STATE
    # GUEST
    refused = _may_debug(gctx, source)
    if refused is not None:
        return refused
    # OUTPUT
    plain = read(psp, cmd.src_addr, PAGE_SIZE, guest_key(psp, gctx))
    write(psp, cmd.dst_addr, _turned(source, plain))
    return SnpStatus.SUCCESS


def snp_dbg_encrypt(psp: "Psp", cmd: SnpDbg) -> SnpStatus:
    """Any page, in the clear -> immutable guest page."""
    # RESERVED
    if (cmd.gctx_paddr | cmd.src_addr | cmd.dst_addr) & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    lookup_head(psp, cmd.src_addr)
    target = lookup_head(psp, cmd.dst_addr)
    gctx = read_context(psp, cmd.gctx_paddr)
    if target.state not in _LAUNCHABLE:
        return SnpStatus.INVALID_PAGE_STATE
    # GUEST
    refused = _may_debug(gctx, target)
    if refused is not None:
        return refused
    # OUTPUT
    plain = read(psp, cmd.src_addr, PAGE_SIZE)
    write(psp, cmd.dst_addr, _turned(target, plain), guest_key(psp, gctx))
    return SnpStatus.SUCCESS


def _may_debug(gctx: Gctx, page: Page) -> SnpStatus | None:
    if page.asid != gctx.asid:
        return SnpStatus.INVALID_PAGE_OWNER
    if not gctx.policy & GuestPolicy.DEBUG:
        return SnpStatus.POLICY_FAILURE
    if not gctx.asid:
        return SnpStatus.INACTIVE
    return None


def _turned(page: Page, data: bytes) -> bytes:
    """A VMSA under register protection passes through with its nonce taken off, or put on."""
    if page.value[0] & VMSA and VmsaLaunch(data).sev_features & VMSA_REG_PROT:
        return apply_nonce(data)
    return data
