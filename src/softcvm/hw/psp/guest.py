"""SNP_GCTX_CREATE, SNP_ACTIVATE, SNP_DECOMMISSION, SNP_GUEST_STATUS.  [ABI-56860 r1.58; ASPFW]

Owns a guest's beginning and end and its hold on an ASID.  Launching is launch.py.

DECOMMISSION leaves the guest's key in the memory controllers: only the next ACTIVATE of the
same ASID overwrites it.  The guest's pages stay assigned; taking them back is the host's work.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import (
    Gstate,
    SnpActivate,
    SnpAddr,
    SnpCmd,
    SnpGuestStatus,
    SnpGuestStatusBuffer,
    SnpStatus,
)
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.memenc import Key
from softcvm.hw.psp.gctx import Gctx, next_state
from softcvm.hw.psp.keys import memory_key_material
from softcvm.hw.psp.operands import (
    FIRMWARE_WRITABLE,
    check_range,
    lookup,
    read_context,
    write,
    write_context,
)
from softcvm.hw.psp.status import crosses_page
from softcvm.hw.rmp import VMSA
from softcvm.sim.addr import PAGE_MASK, PAGE_SIZE

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("snp_activate", "snp_decommission", "snp_gctx_create", "snp_guest_status")

_ASID_COUNTERS = 2048
"""Counters at the start of the RMP, one for each ASID there could be."""


def snp_gctx_create(psp: "Psp", cmd: SnpAddr) -> SnpStatus:
    # RESERVED
    if cmd.address & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    page = lookup(psp, cmd.address)
    if page.state is not PageState.FIRMWARE:
        return SnpStatus.INVALID_PAGE_STATE
    if page.pagesize:
        return SnpStatus.INVALID_PAGE_SIZE
    check_range(psp, cmd.address, PAGE_SIZE)
    # OUTPUT
    attrs, gfn = page.value
    psp.soc.rmp.store("SNP_GCTX_CREATE", page.pfn, page.pfn + 1, (attrs | VMSA, gfn))
    gctx = Gctx(state=Gstate.INIT, vek_seed=psp.trng.draw(32), launch_tcb=psp.tcb)
    write_context(psp, cmd.address, gctx)
    return SnpStatus.SUCCESS


def snp_activate(psp: "Psp", cmd: SnpActivate) -> SnpStatus:
    soc = psp.soc
    asids = psp.asids
    # RESERVED
    if cmd.gctx_paddr & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    gctx = read_context(psp, cmd.gctx_paddr)
    # GUEST
    state = next_state(gctx, SnpCmd.ACTIVATE)
    if state is None:
        return SnpStatus.INVALID_GUEST_STATE
    # ASID
    if cmd.asid >= _ASID_COUNTERS:
        return SnpStatus.INVALID_ASID
    if soc.rmp.asid_pages.get(cmd.asid):
        return SnpStatus.INVALID_CONFIG
    if not 0 < cmd.asid <= soc.profile.max_asid:
        return SnpStatus.INVALID_ASID
    if asids.taken(cmd.asid):
        return SnpStatus.ASID_OWNED
    if gctx.asid:
        return SnpStatus.ACTIVE
    if cmd.asid in asids.dirty:
        return SnpStatus.DFFLUSH_REQUIRED
    if cmd.asid >= soc.profile.min_sev_asid:
        return SnpStatus.INVALID_ASID
    # OUTPUT
    soc.keys[cmd.asid] = Key(memory_key_material(gctx.vek_seed, soc.profile.xts_key_bytes))
    asids.allocate(cmd.asid)
    if state is Gstate.RUNNING:
        asids.use(cmd.asid)
    gctx.asid = cmd.asid
    write_context(psp, cmd.gctx_paddr, gctx)
    return SnpStatus.SUCCESS


def snp_decommission(psp: "Psp", cmd: SnpAddr) -> SnpStatus:
    # RESERVED
    if cmd.address & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    gctx = read_context(psp, cmd.address)
    # OUTPUT
    if gctx.asid:
        psp.asids.release(gctx.asid)
    if gctx.state != Gstate.INIT:
        psp.guest_count -= 1
    write_context(psp, cmd.address, Gctx())
    page = lookup(psp, cmd.address)
    attrs, gfn = page.value
    psp.soc.rmp.store("SNP_DECOMMISSION", page.pfn, page.pfn + 1, (attrs & ~VMSA, gfn))
    return SnpStatus.SUCCESS


def snp_guest_status(psp: "Psp", cmd: SnpGuestStatus) -> SnpStatus:
    # RESERVED
    if cmd.gctx_paddr & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    if crosses_page(cmd.address, SnpGuestStatusBuffer.SIZE):
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    gctx = read_context(psp, cmd.gctx_paddr)
    if lookup(psp, cmd.address).state not in FIRMWARE_WRITABLE:
        return SnpStatus.INVALID_PAGE_STATE
    # OUTPUT
    status = SnpGuestStatusBuffer(
        policy=gctx.policy, asid=gctx.asid, state=gctx.state, vcek_dis=gctx.vcek_dis
    )
    write(psp, cmd.address, bytes(status))
    return SnpStatus.SUCCESS
