"""Pages that Linux lends to SEV firmware (drivers/crypto/ccp/sev-dev.c, v7.2).

Once SNP is initialised firmware writes only to pages in the Firmware state, so a buffer is moved there by
RMPUPDATE and comes back by PAGE_RECLAIM and another RMPUPDATE.  What cannot come back is leaked: the host
may never touch it again.  Owns these transitions; issuing the commands is sev_dev.py.

`locked` says that the caller holds sev_cmd_mutex already.
"""

from errno import ENOMEM
from typing import TYPE_CHECKING

from softcvm.abi.snp_firmware import SnpCmd, SnpPageReclaim
from softcvm.kernel.arch.x86.virt.svm.sev import (
    RmpError,
    rmp_make_private,
    rmp_make_shared,
    snp_leak_pages,
)
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import Asid, Gpa, Pfn, PgLevel, pfn_to_spa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = (
    "rmp_mark_pages_firmware",
    "snp_alloc_firmware_pages",
    "snp_free_firmware_pages",
    "snp_reclaim_pages",
)


def rmp_mark_pages_firmware(
    linux: "Linux", pfn: Pfn, npages: int, *, locked: bool
) -> Steps[None]:
    """Give pages to firmware, each as a 4K entry; on failure those already given are taken back."""
    try:
        rmp_make_private(
            linux, pfn, Gpa(0), PgLevel.PG_4K, Asid(0), immutable=True, count=npages
        )
    except RmpError as error:
        if error.done:
            # Its own failure is not reported: what could not be taken back is leaked and counted.
            try:
                yield from snp_reclaim_pages(linux, pfn, error.done, locked=locked)
            except KernelError as failed:
                linux.warn("rmp_mark_pages_firmware", failed.why)
        raise


def snp_reclaim_pages(linux: "Linux", pfn: Pfn, npages: int, *, locked: bool) -> Steps[None]:
    """Take pages back from firmware; from the first failure on the rest is leaked and the error raised."""
    from softcvm.kernel.drivers.crypto.ccp.sev_dev import sev_do_cmd, sev_do_cmd_locked

    do_cmd = sev_do_cmd_locked if locked else sev_do_cmd
    for done in range(npages):
        page = Pfn(pfn + done)
        try:
            yield from do_cmd(
                linux, SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=pfn_to_spa(page))
            )
            rmp_make_shared(linux, page, PgLevel.PG_4K)
        except KernelError:
            snp_leak_pages(linux, page, npages - done)
            raise


def snp_alloc_firmware_pages(
    linux: "Linux", order: int = 0, *, zero: bool = False, locked: bool = False
) -> Steps[Pfn]:
    """Pages that firmware may write: in the Firmware state as soon as SNP is initialised.

    ENOMEM, where Linux gets NULL; pages that could not be made Firmware pages are lost with it, as there.
    """
    pfn = linux.page_alloc.alloc_pages(order)
    if zero:
        linux.page_alloc.clear_pages(pfn, 1 << order)
    if linux.sev_dev.snp_initialized:
        try:
            yield from rmp_mark_pages_firmware(linux, pfn, 1 << order, locked=locked)
        except KernelError as error:
            raise KernelError(ENOMEM, f"no firmware pages: {error.why}") from error
    return pfn


def snp_free_firmware_pages(
    linux: "Linux", pfn: Pfn, order: int = 0, *, locked: bool = False
) -> Steps[None]:
    """Free what snp_alloc_firmware_pages() gave; pages that firmware keeps are leaked instead."""
    if linux.sev_dev.snp_initialized:
        try:
            yield from snp_reclaim_pages(linux, pfn, 1 << order, locked=locked)
        except KernelError as error:
            linux.warn("snp_free_firmware_pages", error.why)
            return
    linux.page_alloc.free_run(pfn, 1 << order)
