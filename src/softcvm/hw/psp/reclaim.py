"""SNP_PAGE_RECLAIM, SNP_PAGE_UNSMASH, SNP_PAGE_SET_STATE.  [ABI-56860 r1.58; ASPFW]

Owns how a page leaves firmware's hands.  Contents are never scrubbed.  Giving the page back to
the hypervisor takes an RMPUPDATE afterwards.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import GPA_TAG_MASK, PageState
from softcvm.abi.snp_firmware import (
    SnpPageReclaim,
    SnpPageSetState,
    SnpPageUnsmash,
    SnpStatus,
)
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.psp.init import HV_FIXED, read_range_list
from softcvm.hw.psp.operands import (
    PAGE_SIZE_2M,
    check_range,
    lookup,
    reserved_bits_set,
)
from softcvm.hw.rmp import ASID_MASK, IMMUTABLE, LEFTOVER, LINEAR, LOCK, PAGESIZE, VMSA
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PTRS_PER_PMD

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("snp_page_reclaim", "snp_page_set_state", "snp_page_unsmash")

_RECLAIMABLE = (
    PageState.METADATA,
    PageState.FIRMWARE,
    PageState.PRE_GUEST,
    PageState.PRE_SWAP,
)


def snp_page_reclaim(psp: "Psp", cmd: SnpPageReclaim) -> SnpStatus:
    """Firmware and Metadata become Reclaim, Pre-Guest Guest-Invalid, Pre-Swap Guest-Valid."""
    size = PAGE_SIZE_2M if cmd.page_size else PAGE_SIZE
    # RESERVED
    if cmd.paddr & PAGE_MASK & ~1:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    spa = check_range(psp, cmd.paddr & ~PAGE_MASK, size)
    page = lookup(psp, spa)
    if page.pagesize != cmd.page_size:
        return SnpStatus.INVALID_PAGE_SIZE
    if page.pagesize and spa % PAGE_SIZE_2M:
        return SnpStatus.INVALID_ADDRESS
    attrs, gfn = page.value
    if not attrs & IMMUTABLE:
        return SnpStatus.SUCCESS
    if page.state not in _RECLAIMABLE:
        return SnpStatus.INVALID_PAGE_STATE
    # OUTPUT
    if page.state is PageState.METADATA:
        gfn &= ~GPA_TAG_MASK
    attrs &= ~(IMMUTABLE | LOCK)
    psp.soc.rmp.store("SNP_PAGE_RECLAIM", page.pfn, page.pfn + page.npages, (attrs, gfn))
    return SnpStatus.SUCCESS


def snp_page_unsmash(psp: "Psp", cmd: SnpPageUnsmash) -> SnpStatus:
    """512 4K entries become one 2M entry, still immutable; the inverse of PSMASH."""
    rmp = psp.soc.rmp
    # RESERVED
    if cmd.paddr & PAGE_MASK or cmd.paddr % PAGE_SIZE_2M:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    first = lookup(psp, cmd.paddr)
    if first.state is PageState.DEFAULT:
        return SnpStatus.INVALID_PAGE_STATE
    check_range(psp, cmd.paddr, PAGE_SIZE_2M)
    pfn, end = first.pfn, first.pfn + PTRS_PER_PMD
    if not rmp.covered(end - 1):
        return SnpStatus.INVALID_PAGE_STATE
    attrs = first.value[0]
    gfn = rmp.gfn(pfn)
    if attrs & (PAGESIZE | VMSA) or not attrs & IMMUTABLE or not attrs & ASID_MASK:
        return SnpStatus.INVALID_PAGE_STATE
    if gfn % PTRS_PER_PMD:
        return SnpStatus.INVALID_PAGE_STATE
    for start, stop, (other, _) in rmp.map.runs(pfn, end):
        if (other ^ attrs) & ~LINEAR or rmp.gfn(start) != gfn + start - pfn:
            return SnpStatus.INVALID_PAGE_STATE
        if not other & LINEAR and stop - start > 1:
            return SnpStatus.INVALID_PAGE_STATE
    # OUTPUT
    value = (attrs | PAGESIZE | LINEAR | LEFTOVER, gfn - pfn)
    rmp.store("SNP_PAGE_UNSMASH", pfn, end, value)
    return SnpStatus.SUCCESS


def snp_page_set_state(psp: "Psp", cmd: SnpPageSetState) -> SnpStatus:
    """Firmware pages of a list of 2M ranges become HV-Fixed."""
    rmp = psp.soc.rmp
    # PARAMETERS
    if cmd.length != cmd.SIZE:
        return SnpStatus.INVALID_LENGTH
    if reserved_bits_set(cmd) or cmd.list_paddr & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    ranges = read_range_list(psp, cmd.list_paddr, PAGE_SIZE_2M - 1)
    for start, end in ranges:
        check_range(psp, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
        if not rmp.covered(end - 1):
            return SnpStatus.INVALID_ADDRESS
        if any(rmp.decode(v) is not PageState.FIRMWARE for _, _, v in rmp.map.runs(start, end)):
            return SnpStatus.INVALID_PAGE_STATE
    # OUTPUT
    for start, end in ranges:
        rmp.store("SNP_PAGE_SET_STATE", start, end, HV_FIXED)
    return SnpStatus.SUCCESS
