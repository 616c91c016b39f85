"""Buffers of legacy SEV commands while SNP is initialised (drivers/crypto/ccp/sev-dev.c, v7.2).

Firmware then writes to Firmware pages only, so memory that a legacy command writes is made one for as long
as it runs: the guest's own pages in place, any other buffer through a bounce page, the command buffer itself
when firmware answers in it.  Owns which command writes where.

Pages are counted by a buffer's length alone: of a range that starts inside a page and ends in one more than
its length says, the last page is not handed over (and firmware does not look at it).  Bounce pages are not
cleared, and come back whole: behind what firmware wrote lies what the pages held before.

Everything here runs with sev_cmd_mutex held.
"""

from errno import EFAULT
from typing import TYPE_CHECKING, Final, NamedTuple

from softcvm.abi.layout import Bits, Layout
from softcvm.abi.snp_firmware import SevCmd, SnpCmd
from softcvm.kernel.drivers.crypto.ccp.firmware_pages import (
    rmp_mark_pages_firmware,
    snp_reclaim_pages,
)
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, Pfn, pfn_to_spa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = (
    "CmdBufDesc",
    "get_order",
    "snp_map_cmd_bufs",
    "snp_unmap_cmd_bufs",
    "writable_cmd_buf",
)

_CMD_BUF_WRITABLE: Final = frozenset(
    {
        SevCmd.PLATFORM_STATUS,
        SevCmd.GUEST_STATUS,
        SevCmd.LAUNCH_START,
        SevCmd.LAUNCH_MEASURE,
    }
)
"""sev_cmd_buf_writable(), of the commands that are modelled."""

_OUTPUT: Final[dict[SevCmd, tuple[str, str, bool]]] = {
    SevCmd.LAUNCH_UPDATE_DATA: ("address", "len", True),
    SevCmd.LAUNCH_UPDATE_VMSA: ("address", "len", True),
    SevCmd.LAUNCH_SECRET: ("guest_address", "guest_len", True),
    SevCmd.LAUNCH_MEASURE: ("address", "len", False),
    SevCmd.DBG_DECRYPT: ("dst_addr", "len", True),
    SevCmd.DBG_ENCRYPT: ("dst_addr", "len", True),
}
"""snp_populate_cmd_buf_desc_list(): fields with address and length, and whether the pages are the guest's."""


class CmdBufDesc(NamedTuple):
    """struct cmd_buf_desc: memory lent to firmware for one command.  `original`: what a bounce stands for."""

    field: str
    pfn: Pfn
    length: int
    original: int | None

    @property
    def npages(self) -> int:
        return (self.length + PAGE_MASK) >> PAGE_SHIFT


def get_order(size: int) -> int:
    """Order of the smallest allocation that holds `size` bytes."""
    return (((size + PAGE_MASK) >> PAGE_SHIFT) - 1).bit_length()


def writable_cmd_buf(linux: "Linux", cmd: SnpCmd | SevCmd) -> bool:
    """Whether the command buffer has to be a Firmware page for this command."""
    return linux.sev_dev.snp_initialized and cmd in _CMD_BUF_WRITABLE


def snp_map_cmd_bufs(
    linux: "Linux", cmd: SnpCmd | SevCmd, data: Layout | None
) -> Steps[CmdBufDesc | None]:
    """Hand the memory that a command writes over to firmware.  EFAULT, also where pages are missing."""
    if not linux.sev_dev.snp_initialized or not isinstance(cmd, SevCmd) or cmd not in _OUTPUT:
        return None
    field, length_field, guest_owned = _OUTPUT[cmd]
    assert data is not None
    address, length = _get(data, field), _get(data, length_field)
    if not length:
        return None
    try:
        desc = CmdBufDesc(field, Pfn(address >> PAGE_SHIFT), length, None)
        if not guest_owned:
            bounce = linux.page_alloc.alloc_pages(get_order(length))
            desc = CmdBufDesc(field, bounce, length, address)
            setattr(data, field, pfn_to_spa(bounce))
        yield from rmp_mark_pages_firmware(linux, desc.pfn, desc.npages, locked=True)
    except KernelError as error:
        raise KernelError(
            EFAULT, f"preparing the memory that {cmd.name} writes: {error.why}"
        ) from error
    return desc


def snp_unmap_cmd_bufs(linux: "Linux", data: Layout, desc: CmdBufDesc) -> Steps[None]:
    """Take it back, and copy what came through a bounce page.  EFAULT: pages did not come back."""
    try:
        yield from snp_reclaim_pages(linux, desc.pfn, desc.npages, locked=True)
    except KernelError as error:
        raise KernelError(EFAULT, f"reclaiming memory from firmware: {error.why}") from error
    if desc.original is None:
        return
    soc = linux.soc
    bounced = soc.host_read(pfn_to_spa(desc.pfn), desc.length)
    level = linux.snp.direct_map.level(Pfn(desc.original >> PAGE_SHIFT))
    soc.host_write(desc.original, bounced, level)
    linux.page_alloc.free_run(desc.pfn, 1 << get_order(desc.length))
    setattr(data, desc.field, desc.original)


def _get(data: Layout, name: str) -> int:
    place = data.fields()[name]
    assert isinstance(place, Bits)
    return place.__get__(data, type(data))
