"""The driver of SEV firmware: bring it up, hand it commands, /dev/sev (drivers/crypto/ccp/sev-dev.c, v7.2).

Owns SevDevice, the state of the firmware as the driver believes it to be.  Guests' own commands are built
by kvm/svm; the pages that firmware writes are firmware_pages.py, those of legacy commands
legacy_buffers.py.

Lock: sev_cmd_mutex, a leaf for everybody: one command at a time.
"""

from errno import EFAULT, EINVAL, EIO, ENODEV, EOPNOTSUPP
from typing import TYPE_CHECKING

from softcvm.abi.layout import Layout
from softcvm.abi.sev import (
    SEV_FW_BLOB_MAX_SIZE,
    SEV_ISSUE_CMD,
    SEV_MAX,
    SevIssueCmd,
    SevUserCmd,
)
from softcvm.abi.snp_firmware import SevCmd, SnpAddr, SnpCmd, SnpStatus
from softcvm.abi.snp_platform import (
    RANGE_LIST_MAX,
    SNP_TMR_SIZE,
    PlatformState,
    SevInit,
    SevInitFlags,
    SevPlatformStatus,
    SnpInitEx,
    SnpPlatformStatusBuffer,
    SnpRange,
    SnpRangeListHeader,
)
from softcvm.kernel.drivers.crypto.ccp.firmware_pages import (
    rmp_mark_pages_firmware,
    snp_alloc_firmware_pages,
    snp_reclaim_pages,
)
from softcvm.kernel.drivers.crypto.ccp.legacy_buffers import (
    get_order,
    snp_map_cmd_bufs,
    snp_unmap_cmd_bufs,
    writable_cmd_buf,
)
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.locks import Rank
from softcvm.kernel.mm.uaccess import copy_from_user, copy_to_user
from softcvm.sim.addr import PAGE_SIZE, Hva, Pfn, pfn_to_spa
from softcvm.sim.state import State
from softcvm.sim.steps import Mutex, Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.mm.uaccess import UserPtr
    from softcvm.kernel.task import Process

__all__ = (
    "SevDevice",
    "SevFwError",
    "psp_copy_user_blob",
    "sev_do_cmd",
    "sev_do_cmd_locked",
    "sev_ioctl",
    "sev_platform_init",
)

_TMR_ORDER = (SNP_TMR_SIZE // PAGE_SIZE - 1).bit_length()
_RANGE_LIST_SINCE = (1, 52)
"""First firmware whose SNP_INIT_EX takes a list of HV-Fixed ranges."""
_SNP_MIN_API = (1, 51)


class SevFwError(KernelError):
    """EIO because firmware refused a command; `fw_error` is its status."""

    def __init__(self, cmd: SnpCmd | SevCmd, status: SnpStatus) -> None:
        super().__init__(
            EIO, f"firmware command {cmd.name} ({cmd:#x}): {status.name} ({status:#x})"
        )
        self.fw_error = status


class SevDevice(State):
    """struct sev_device.

    hv_fixed: runs (pfn, npages) that e820 reserves; firmware is told to leave them to the hypervisor.
    """

    saved = ("state", "snp_initialized", "cmd_buf", "sev_es_tmr", "hv_fixed")
    derived = {"linux": "the host", "sev_cmd_mutex": "free at quiescent points"}

    def __init__(self, linux: "Linux", hv_fixed: tuple[tuple[int, int], ...] = ()) -> None:
        self.linux = linux
        self.hv_fixed = hv_fixed
        self.state = PlatformState.UNINIT
        self.snp_initialized = False
        self.sev_cmd_mutex = Mutex(linux.lockdep, "sev_cmd_mutex", Rank.SEV_CMD_MUTEX)
        self.cmd_buf = linux.page_alloc.alloc_pages(1)
        """Command buffer page; the next one serves PAGE_RECLAIM while another command is prepared."""
        self.sev_es_tmr: Pfn | None = None

    @property
    def api(self) -> tuple[int, int]:
        profile = self.linux.soc.profile
        return profile.api_major, profile.api_minor


def sev_do_cmd(linux: "Linux", cmd: SnpCmd | SevCmd, data: Layout | None = None) -> Steps[None]:
    """Issue one firmware command; what firmware writes is in `data` afterwards.  SevFwError, EFAULT."""
    mutex = linux.sev_dev.sev_cmd_mutex
    yield from mutex.acquire()
    try:
        yield from sev_do_cmd_locked(linux, cmd, data)
    finally:
        mutex.release()


def sev_do_cmd_locked(
    linux: "Linux", cmd: SnpCmd | SevCmd, data: Layout | None = None
) -> Steps[None]:
    """__sev_do_cmd_locked().  The caller holds sev_cmd_mutex.

    Legacy commands get the memory that they write as Firmware pages (legacy_buffers.py).
    """
    dev = linux.sev_dev
    lent = yield from snp_map_cmd_bufs(linux, cmd, data)
    firmware_writes_buffer = writable_cmd_buf(linux, cmd)
    if firmware_writes_buffer:
        try:
            yield from rmp_mark_pages_firmware(linux, dev.cmd_buf, 1, locked=True)
        except KernelError as error:
            raise KernelError(
                EFAULT, f"preparing the buffer of {cmd.name}: {error.why}"
            ) from error
    paddr = pfn_to_spa(dev.cmd_buf) if firmware_writes_buffer else None
    status = linux.soc.psp.command(cmd, data, paddr=paddr)
    if firmware_writes_buffer:
        try:
            yield from snp_reclaim_pages(linux, dev.cmd_buf, 1, locked=True)
        except KernelError as error:
            raise KernelError(
                EFAULT, f"reclaiming the buffer of {cmd.name}: {error.why}"
            ) from error
    if lent is not None and data is not None:
        yield from snp_unmap_cmd_bufs(linux, data, lent)
    if status is not SnpStatus.SUCCESS:
        raise SevFwError(cmd, status)


def psp_copy_user_blob(proc: "Process", uaddr: int, length: int) -> Steps[tuple[Pfn, int]]:
    """A kernel copy of user bytes whose address firmware can be given: its first page and how many.

    EINVAL: no address, no length, more than 16K.  ENOMEM.  EFAULT.
    """
    if not uaddr or not length or length > SEV_FW_BLOB_MAX_SIZE:
        raise KernelError(EINVAL, f"blob of {length:#x} bytes at {uaddr:#x}")
    linux = proc.linux
    order = get_order(length)
    pfn = linux.page_alloc.alloc_pages(order)
    try:
        data = yield from copy_from_user(proc.mm, Hva(uaddr), length)
    except KernelError:
        linux.page_alloc.free_run(pfn, 1 << order)
        raise
    linux.soc.host_write(pfn_to_spa(pfn), data, linux.snp.direct_map.level(pfn))
    return pfn, 1 << order


def sev_platform_init(linux: "Linux", *, probe: bool = False) -> Steps[None]:
    """Initialise SNP, then SEV and SEV-ES, unless that has been done.

    ENODEV (no SNP on this host) is no failure; SevFwError and the rest are.
    """
    dev = linux.sev_dev
    yield from dev.sev_cmd_mutex.acquire()
    try:
        if dev.state is PlatformState.INIT:
            return
        try:
            yield from _sev_snp_init_locked(linux)
        except KernelError as error:
            if error.errno != ENODEV:
                raise
        yield from _sev_platform_init_locked(linux)
    finally:
        dev.sev_cmd_mutex.release()


def _sev_snp_init_locked(linux: "Linux") -> Steps[None]:
    """__sev_snp_init_locked(): HSAVE, WBINVD, SNP_INIT_EX, WBINVD, SNP_DF_FLUSH."""
    dev, soc = linux.sev_dev, linux.soc
    if not linux.snp.enabled:
        raise KernelError(ENODEV, "SNP is not enabled on this host")
    if dev.snp_initialized:
        return
    if dev.api < _SNP_MIN_API:
        raise KernelError(
            EOPNOTSUPP, f"SEV-SNP needs firmware 1.51 or later, this is {dev.api}"
        )
    soc.clear_hsave_pa()
    range_list: Pfn | None = None
    if dev.api >= _RANGE_LIST_SINCE:
        range_list = _snp_range_list(linux)
    soc.caches.wbinvd_on_all_cpus()
    if range_list is None:
        yield from sev_do_cmd_locked(linux, SnpCmd.INIT)
    else:
        try:
            yield from sev_do_cmd_locked(
                linux,
                SnpCmd.INIT_EX,
                SnpInitEx(init_rmp=1, list_paddr_en=1, list_paddr=pfn_to_spa(range_list)),
            )
        finally:
            linux.page_alloc.free_run(range_list, 1)
    soc.caches.wbinvd_on_all_cpus()
    yield from sev_do_cmd_locked(linux, SnpCmd.DF_FLUSH)
    dev.snp_initialized = True


def _snp_range_list(linux: "Linux") -> Pfn:
    """A page with the list of reserved regions that become HV-Fixed."""
    ranges = linux.sev_dev.hv_fixed
    if len(ranges) > RANGE_LIST_MAX:
        raise Unmodelled(f"{len(ranges)} reserved regions do not fit into a range list (E2BIG)")
    pfn = linux.page_alloc.alloc_pages()
    linux.page_alloc.clear_pages(pfn, 1)
    listed = bytes(SnpRangeListHeader(num_elements=len(ranges)))
    for start, npages in ranges:
        listed += bytes(SnpRange(base=pfn_to_spa(Pfn(start)), page_count=npages))
    linux.soc.host_write(pfn_to_spa(pfn), listed, linux.snp.direct_map.level(pfn))
    return pfn


def _sev_platform_init_locked(linux: "Linux") -> Steps[None]:
    """__sev_platform_init_locked(): the trusted memory region for SEV-ES, INIT, WBINVD, DF_FLUSH."""
    dev = linux.sev_dev
    if dev.sev_es_tmr is None:
        try:
            dev.sev_es_tmr = yield from snp_alloc_firmware_pages(linux, _TMR_ORDER, locked=True)
        except KernelError as error:
            linux.warn(
                "sev_platform_init", f"TMR allocation failed, SEV-ES unavailable: {error.why}"
            )
    init = SevInit()
    if dev.sev_es_tmr is not None:
        init.flags = SevInitFlags.ES
        init.tmr_address = pfn_to_spa(dev.sev_es_tmr)
        init.tmr_len = SNP_TMR_SIZE
    yield from sev_do_cmd_locked(linux, SevCmd.INIT, init)
    dev.state = PlatformState.INIT
    linux.soc.caches.wbinvd_on_all_cpus()
    yield from sev_do_cmd_locked(linux, SevCmd.DF_FLUSH)


def sev_ioctl(linux: "Linux", proc: "Process", request: int, argp: "UserPtr") -> Steps[int]:
    """ioctl(2) on /dev/sev: only SEV_ISSUE_CMD.

    EINVAL for another request or a command that does not exist, EFAULT, EIO when firmware refuses; the
    struct with firmware's status is copied back whenever the command was known.  Linux copies to user
    space with sev_cmd_mutex still held; here it is a leaf, and nobody can tell.
    """
    if request != SEV_ISSUE_CMD:
        raise KernelError(EINVAL, f"/dev/sev has no ioctl {request:#x}")
    input_ = SevIssueCmd((yield from argp.read(SevIssueCmd.SIZE)))
    if input_.cmd >= SEV_MAX:
        raise KernelError(EINVAL, f"SEV command {input_.cmd} does not exist")
    failed: KernelError | None = None
    try:
        match SevUserCmd(input_.cmd):
            case SevUserCmd.PLATFORM_STATUS:
                result = yield from _platform_status(linux)
            case SevUserCmd.SNP_PLATFORM_STATUS:
                if not input_.data_ptr:
                    raise KernelError(EINVAL, "SNP_PLATFORM_STATUS without a buffer")
                result = yield from _snp_platform_status(linux)
            case other:
                raise Unmodelled(f"/dev/sev {other.name}")
        yield from copy_to_user(proc.mm, Hva(input_.data_ptr), result)
    except SevFwError as error:
        input_.error = error.fw_error
        failed = error
    except KernelError as error:
        failed = error
    yield from argp.write(input_.data)
    if failed:
        raise failed
    return 0


def _platform_status(linux: "Linux") -> Steps[bytes]:
    status = SevPlatformStatus()
    yield from sev_do_cmd(linux, SevCmd.PLATFORM_STATUS, status)
    return bytes(status)


def _snp_platform_status(linux: "Linux") -> Steps[bytes]:
    """The status page is a Firmware page while firmware writes it, and is taken back either way."""
    page = linux.page_alloc.alloc_pages()
    firmware = linux.sev_dev.snp_initialized
    if firmware:
        try:
            yield from rmp_mark_pages_firmware(linux, page, 1, locked=False)
        except KernelError as error:
            linux.page_alloc.free_run(page, 1)
            raise KernelError(EFAULT, error.why) from error
    failed: KernelError | None = None
    try:
        yield from sev_do_cmd(linux, SnpCmd.PLATFORM_STATUS, SnpAddr(address=pfn_to_spa(page)))
    except KernelError as error:
        failed = error
    if firmware:
        try:
            yield from snp_reclaim_pages(linux, page, 1, locked=False)
        except KernelError as error:
            raise KernelError(EFAULT, error.why) from error  # the page is leaked
    status = linux.soc.host_read(pfn_to_spa(page), SnpPlatformStatusBuffer.SIZE)
    linux.page_alloc.free_run(page, 1)
    if failed:
        raise failed
    return status
