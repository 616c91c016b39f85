"""SNP_PAGE_MD_INIT, SNP_PAGE_SWAP_OUT, SNP_PAGE_SWAP_IN: a page leaves memory and comes back.

[ABI-56860 r1.58; ASPFW].  A page goes out under the guest's Offline Encryption Key
(AES-256-GCM).  What firmware must know to take it back is an MDATA entry in a Metadata page of
that guest, and Metadata pages themselves swap out, up to one root entry in the context.
SWAP_IN clears an entry's VALID, so a page comes back once.

Metadata pages are kept in the clear: only firmware can write them.  The IV is the guest's
counter, 8 bytes.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import (
    SnpCmd,
    SnpMdEntry,
    SnpPageMdInit,
    SnpPageSwapIn,
    SnpPageSwapOut,
    SnpStatus,
    SwapPageType,
)
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.memenc import Key
from softcvm.hw.psp.gctx import Gctx, next_state
from softcvm.hw.psp.operands import (
    FIRMWARE_WRITABLE,
    PAGE_SIZE_2M,
    Page,
    Refused,
    guest_key,
    lookup,
    read,
    read_context,
    reserved_bits_set,
    write,
    write_context,
)
from softcvm.hw.psp.page_move import GUEST_STATES, bound, is_metadata_of, metadata_value
from softcvm.hw.psp.vmsa import SECURE_TSC, VmsaLaunch
from softcvm.hw.rmp import PERMS_SHIFT, VALIDATED, VMSA
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.errors import Unmodelled

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("snp_page_md_init", "snp_page_swap_in", "snp_page_swap_out")

_ALL_PERMS = 0xFFFF_FFFF << PERMS_SHIFT
_NO_GFN = (1 << 52) - 1
_IV_LAST = (1 << 64) - 2


def snp_page_md_init(psp: "Psp", cmd: SnpPageMdInit) -> SnpStatus:
    # RESERVED
    if (cmd.gctx_paddr | cmd.page_paddr) & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    page = lookup(psp, cmd.page_paddr)
    gctx = read_context(psp, cmd.gctx_paddr)
    if page.state is not PageState.FIRMWARE:
        return SnpStatus.INVALID_PAGE_STATE
    # GUEST
    if next_state(gctx, SnpCmd.PAGE_MD_INIT) is None:
        return SnpStatus.INVALID_GUEST_STATE
    # OUTPUT
    write(psp, page.spa, bytes(page.npages << PAGE_SHIFT))
    value = metadata_value(page.value, cmd.gctx_paddr & ~psp.c_bit)
    psp.soc.rmp.store("SNP_PAGE_MD_INIT", page.pfn, page.pfn + page.npages, value)
    return SnpStatus.SUCCESS


def snp_page_swap_out(psp: "Psp", cmd: SnpPageSwapOut) -> SnpStatus:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # slow to import

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
    _check_mdata(psp, cmd)
    if source.pagesize != cmd.page_size:
        return SnpStatus.INVALID_PAGE_SIZE
    if target.state is not PageState.DEFAULT and target.pagesize != cmd.page_size:
        return SnpStatus.INVALID_PAGE_SIZE
    # GUEST
    if next_state(gctx, SnpCmd.PAGE_SWAP_OUT) is None:
        return SnpStatus.INVALID_GUEST_STATE
    if not gctx.asid:
        return SnpStatus.INACTIVE
    if target.state not in FIRMWARE_WRITABLE:
        return SnpStatus.INVALID_PAGE_STATE
    entry, key = _describe(psp, cmd, gctx, source)
    if gctx.oek_iv_count == _IV_LAST:
        return SnpStatus.AEAD_OFLOW
    # ENCRYPT
    entry.iv = gctx.oek_iv_count
    gctx.oek_iv_count += 1
    plain = read(psp, source.spa, source.npages << PAGE_SHIFT, key)
    sealed = AESGCM(gctx.oek).encrypt(entry.iv.to_bytes(8, "little"), plain, None)
    write(psp, target.spa, sealed[:-16])
    entry.auth_tag = sealed[-16:]
    # OUTPUT
    attrs, gfn = source.value
    value = (attrs & ~VMSA, 0) if entry.metadata else (attrs & ~VALIDATED, gfn)
    psp.soc.rmp.store("SNP_PAGE_SWAP_OUT", source.pfn, source.pfn + source.npages, value)
    _store_entry(psp, cmd, gctx, entry)
    return SnpStatus.SUCCESS


def _describe(
    psp: "Psp", cmd: SnpPageSwapOut, gctx: Gctx, source: Page
) -> tuple[SnpMdEntry, Key | None]:
    """The entry for a page that goes out, and the key it is read through."""
    if cmd.page_type == SwapPageType.METADATA:
        if source.state is not PageState.METADATA:
            raise Refused(SnpStatus.INVALID_PAGE_STATE)
        if not is_metadata_of(source, cmd.gctx_paddr & ~psp.c_bit):
            raise Refused(SnpStatus.INVALID_PAGE_OWNER)
        entry = SnpMdEntry(
            software_data=cmd.software_data,
            valid=1,
            metadata=1,
            page_size=source.pagesize,
            gfn=_NO_GFN,
        )
        return entry, None
    if cmd.page_type not in (SwapPageType.DATA, SwapPageType.VMSA):
        raise Refused(SnpStatus.INVALID_PAGE_STATE)
    if source.state not in GUEST_STATES:
        raise Refused(SnpStatus.INVALID_PAGE_STATE)
    if source.asid != gctx.asid:
        raise Refused(SnpStatus.INVALID_PAGE_OWNER)
    perms = source.value[0] >> PERMS_SHIFT
    entry = SnpMdEntry(
        software_data=cmd.software_data,
        valid=1,
        page_validated=bool(source.value[0] & VALIDATED),
        vmsa=cmd.page_type == SwapPageType.VMSA,
        page_size=source.pagesize,
        gfn=psp.soc.rmp.gfn(source.pfn),
        vmpl0=perms & 0xFF,
        vmpl1=perms >> 8 & 0xFF,
        vmpl2=perms >> 16 & 0xFF,
        vmpl3=perms >> 24 & 0xFF,
    )
    return entry, guest_key(psp, gctx)


def snp_page_swap_in(psp: "Psp", cmd: SnpPageSwapIn) -> SnpStatus:
    from cryptography.exceptions import InvalidTag  # slow to import
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

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
    _check_mdata(psp, cmd)
    # GUEST
    if next_state(gctx, SnpCmd.PAGE_SWAP_IN) is None:
        return SnpStatus.INVALID_GUEST_STATE
    if not gctx.asid:
        return SnpStatus.INACTIVE
    # METADATA
    entry = _load_entry(psp, cmd, gctx)
    if (entry.metadata and entry.vmsa) or not entry.valid:
        return SnpStatus.INVALID_MDATA_ENTRY
    if cmd.page_type != _type_of(entry):
        return SnpStatus.INVALID_MDATA_ENTRY
    if source.state is not PageState.DEFAULT and source.pagesize != cmd.page_size:
        return SnpStatus.INVALID_PAGE_SIZE
    if target.pagesize != cmd.page_size or entry.page_size != cmd.page_size:
        return SnpStatus.INVALID_PAGE_SIZE
    _check_target(cmd, gctx, source, target)
    # DECRYPT
    sealed = read(psp, cmd.src_paddr, target.npages << PAGE_SHIFT) + entry.auth_tag
    try:
        plain = AESGCM(gctx.oek).decrypt(entry.iv.to_bytes(8, "little"), sealed, None)
    except InvalidTag:
        return SnpStatus.BAD_MEASUREMENT
    if entry.vmsa and VmsaLaunch(plain).sev_features & SECURE_TSC:
        raise Unmodelled(
            "SWAP_IN of a VMSA with SecureTSC: the TSC scale that firmware computes"
        )
    write(psp, cmd.dst_paddr, plain, None if entry.metadata else guest_key(psp, gctx))
    # OUTPUT
    value = metadata_value(target.value, cmd.gctx_paddr & ~psp.c_bit)
    if not entry.metadata:
        perms = entry.vmpl0 | entry.vmpl1 << 8 | entry.vmpl2 << 16 | entry.vmpl3 << 24
        attrs = target.value[0] & ~(_ALL_PERMS | VMSA) | perms << PERMS_SHIFT
        attrs |= (VMSA if entry.vmsa else 0) | (VALIDATED if entry.page_validated else 0)
        value = bound(attrs, entry.gfn, target.pfn)
    psp.soc.rmp.store("SNP_PAGE_SWAP_IN", target.pfn, target.pfn + target.npages, value)
    entry.valid = 0
    _store_entry(psp, cmd, gctx, entry)
    return SnpStatus.SUCCESS


def _type_of(entry: SnpMdEntry) -> SwapPageType:
    if entry.metadata:
        return SwapPageType.METADATA
    return SwapPageType.VMSA if entry.vmsa else SwapPageType.DATA


def _check_target(cmd: SnpPageSwapIn, gctx: Gctx, source: Page, target: Page) -> None:
    """Where each type of page may land."""
    if cmd.page_type != SwapPageType.DATA and cmd.swap_in_place:
        raise Refused(SnpStatus.INVALID_PARAM)
    if cmd.page_type == SwapPageType.METADATA:
        if target.state is not PageState.FIRMWARE:
            raise Refused(SnpStatus.INVALID_PAGE_STATE)
        return
    if cmd.page_type == SwapPageType.VMSA and cmd.page_size:
        raise Refused(SnpStatus.INVALID_PAGE_SIZE)
    if cmd.swap_in_place and source.pfn != target.pfn:
        raise Refused(SnpStatus.INVALID_ADDRESS)
    if target.state is not PageState.PRE_GUEST:
        raise Refused(SnpStatus.INVALID_PAGE_STATE)
    if target.asid != gctx.asid:
        raise Refused(SnpStatus.INVALID_PAGE_OWNER)


def _check_mdata(psp: "Psp", cmd: SnpPageSwapOut | SnpPageSwapIn) -> None:
    """The page that holds the metadata entry, unless the entry is the guest's root."""
    if cmd.root_mdata_en:
        return
    page = lookup(psp, cmd.mdata_paddr)
    if cmd.mdata_paddr % SnpMdEntry.SIZE:
        raise Refused(SnpStatus.INVALID_PARAM)
    size = PAGE_SIZE_2M if cmd.page_size else PAGE_SIZE
    for start in (cmd.src_paddr, cmd.dst_paddr):
        if start < cmd.mdata_paddr + SnpMdEntry.SIZE and cmd.mdata_paddr < start + size:
            raise Refused(SnpStatus.INVALID_PARAM)
    if page.state is not PageState.METADATA:
        raise Refused(SnpStatus.INVALID_PAGE_STATE)
    if not is_metadata_of(page, cmd.gctx_paddr & ~psp.c_bit):
        raise Refused(SnpStatus.INVALID_PAGE_OWNER)


def _load_entry(psp: "Psp", cmd: SnpPageSwapIn, gctx: Gctx) -> SnpMdEntry:
    if cmd.root_mdata_en:
        return SnpMdEntry(gctx.root_md_entry)
    return SnpMdEntry(read(psp, cmd.mdata_paddr, SnpMdEntry.SIZE))


def _store_entry(
    psp: "Psp", cmd: SnpPageSwapOut | SnpPageSwapIn, gctx: Gctx, entry: SnpMdEntry
) -> None:
    if cmd.root_mdata_en:
        gctx.root_md_entry = bytes(entry)
    else:
        write(psp, cmd.mdata_paddr, bytes(entry))
    write_context(psp, cmd.gctx_paddr, gctx)
