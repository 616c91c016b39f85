"""The AMD-SP as the host sees it: one command at a time, one status back.

Owns the platform's state and the table of commands.  Starting and stopping is init.py, status
and configuration status.py, the same of legacy SEV legacy.py, its guests sev_guest.py, SNP's the
other files.

A command's buffer comes as a Layout, not as memory: the model does not say where it lies unless
the caller does.  With `paddr`, the rule for buffers that firmware writes back to holds once SNP
is initialised: the page must be Firmware or Default, and a Firmware page becomes Reclaim.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from softcvm.abi.layout import Layout
from softcvm.abi.rmp import PageState
from softcvm.abi.sev_firmware import (
    SevActivate,
    SevDbg,
    SevDeactivate,
    SevDecommission,
    SevGuestStatus,
    SevLaunchFinish,
    SevLaunchMeasure,
    SevLaunchSecret,
    SevLaunchStart,
    SevLaunchUpdateData,
    SevLaunchUpdateVmsa,
)
from softcvm.abi.snp_firmware import (
    SevCmd,
    SnpActivate,
    SnpAddr,
    SnpCmd,
    SnpDbg,
    SnpGuestRequest,
    SnpGuestStatus,
    SnpLaunchFinish,
    SnpLaunchStart,
    SnpLaunchUpdate,
    SnpPageMdInit,
    SnpPageMove,
    SnpPageReclaim,
    SnpPageSetState,
    SnpPageSwapIn,
    SnpPageSwapOut,
    SnpPageUnsmash,
    SnpStatus,
)
from softcvm.abi.snp_platform import (
    PlatformState,
    SevInit,
    SevInitEx,
    SevPlatformStatus,
    SnpCommit,
    SnpConfig,
    SnpFeatureInfo,
    SnpInitEx,
    SnpShutdownEx,
    TcbVersion,
)
from softcvm.hw.memenc import Key
from softcvm.hw.psp import (
    debug,
    guest,
    guest_request,
    init,
    launch,
    launch_finish,
    legacy,
    page_move,
    reclaim,
    sev_debug,
    sev_guest,
    sev_launch,
    status,
    swap,
)
from softcvm.hw.psp.asid import AsidTable
from softcvm.hw.psp.events import FirmwareCommand
from softcvm.hw.psp.gctx import Gctx
from softcvm.hw.psp.keys import Chip, Trng
from softcvm.hw.psp.operands import (
    FIRMWARE_WRITABLE,
    Refused,
    check_range,
    lookup,
    read_context,
)
from softcvm.hw.rmp import IMMUTABLE, LOCK
from softcvm.sim.errors import Unmodelled
from softcvm.sim.state import State

if TYPE_CHECKING:
    from softcvm.hw.soc import Soc

__all__ = ("Psp",)

_Run = Callable[["Psp", Any], SnpStatus]

_COMMANDS: Final[dict[SnpCmd | SevCmd, tuple[type[Layout] | None, _Run]]] = {
    SevCmd.INIT: (SevInit, legacy.sev_init),
    SevCmd.INIT_EX: (SevInitEx, legacy.sev_init_ex),
    SevCmd.SHUTDOWN: (None, legacy.sev_shutdown),
    SevCmd.PLATFORM_STATUS: (SevPlatformStatus, legacy.sev_platform_status),
    SevCmd.DF_FLUSH: (None, init.snp_df_flush),
    SevCmd.ACTIVATE: (SevActivate, sev_guest.sev_activate),
    SevCmd.DEACTIVATE: (SevDeactivate, sev_guest.sev_deactivate),
    SevCmd.DECOMMISSION: (SevDecommission, sev_guest.sev_decommission),
    SevCmd.GUEST_STATUS: (SevGuestStatus, sev_guest.sev_guest_status),
    SevCmd.LAUNCH_START: (SevLaunchStart, sev_launch.sev_launch_start),
    SevCmd.LAUNCH_UPDATE_DATA: (SevLaunchUpdateData, sev_launch.sev_launch_update_data),
    SevCmd.LAUNCH_UPDATE_VMSA: (SevLaunchUpdateVmsa, sev_launch.sev_launch_update_vmsa),
    SevCmd.LAUNCH_MEASURE: (SevLaunchMeasure, sev_launch.sev_launch_measure),
    SevCmd.LAUNCH_SECRET: (SevLaunchSecret, sev_launch.sev_launch_secret),
    SevCmd.LAUNCH_FINISH: (SevLaunchFinish, sev_launch.sev_launch_finish),
    SevCmd.DBG_DECRYPT: (SevDbg, sev_debug.sev_dbg_decrypt),
    SevCmd.DBG_ENCRYPT: (SevDbg, sev_debug.sev_dbg_encrypt),
    SnpCmd.INIT: (None, init.snp_init),
    SnpCmd.INIT_EX: (SnpInitEx, init.snp_init_ex),
    SnpCmd.SHUTDOWN: (None, init.snp_shutdown),
    SnpCmd.SHUTDOWN_EX: (SnpShutdownEx, init.snp_shutdown_ex),
    SnpCmd.DF_FLUSH: (None, init.snp_df_flush),
    SnpCmd.PLATFORM_STATUS: (SnpAddr, status.snp_platform_status),
    SnpCmd.CONFIG: (SnpConfig, status.snp_config),
    SnpCmd.COMMIT: (SnpCommit, status.snp_commit),
    SnpCmd.FEATURE_INFO: (SnpFeatureInfo, status.snp_feature_info),
    SnpCmd.GCTX_CREATE: (SnpAddr, guest.snp_gctx_create),
    SnpCmd.ACTIVATE: (SnpActivate, guest.snp_activate),
    SnpCmd.DECOMMISSION: (SnpAddr, guest.snp_decommission),
    SnpCmd.GUEST_STATUS: (SnpGuestStatus, guest.snp_guest_status),
    SnpCmd.LAUNCH_START: (SnpLaunchStart, launch.snp_launch_start),
    SnpCmd.LAUNCH_UPDATE: (SnpLaunchUpdate, launch.snp_launch_update),
    SnpCmd.LAUNCH_FINISH: (SnpLaunchFinish, launch_finish.snp_launch_finish),
    SnpCmd.GUEST_REQUEST: (SnpGuestRequest, guest_request.snp_guest_request),
    SnpCmd.DBG_DECRYPT: (SnpDbg, debug.snp_dbg_decrypt),
    SnpCmd.DBG_ENCRYPT: (SnpDbg, debug.snp_dbg_encrypt),
    SnpCmd.PAGE_RECLAIM: (SnpPageReclaim, reclaim.snp_page_reclaim),
    SnpCmd.PAGE_UNSMASH: (SnpPageUnsmash, reclaim.snp_page_unsmash),
    SnpCmd.PAGE_SET_STATE: (SnpPageSetState, reclaim.snp_page_set_state),
    SnpCmd.PAGE_MOVE: (SnpPageMove, page_move.snp_page_move),
    SnpCmd.PAGE_MD_INIT: (SnpPageMdInit, swap.snp_page_md_init),
    SnpCmd.PAGE_SWAP_OUT: (SnpPageSwapOut, swap.snp_page_swap_out),
    SnpCmd.PAGE_SWAP_IN: (SnpPageSwapIn, swap.snp_page_swap_in),
}

_BY_ID: Final[dict[int, SnpCmd | SevCmd]] = {cmd: cmd for cmd in (*SevCmd, *SnpCmd)}

_WRITES_BACK: Final = frozenset(
    {
        SevCmd.PLATFORM_STATUS,
        SevCmd.GUEST_STATUS,
        SevCmd.LAUNCH_START,
        SevCmd.LAUNCH_MEASURE,
    }
)
"""Modelled commands whose result goes into the command buffer itself."""


class Psp(State):
    """The AMD-SP of one machine."""

    saved = (
        "chip",
        "trng",
        "sev_state",
        "sev_es",
        "sev_guests",
        "snp_state",
        "rmp_initialized",
        "rmp_tcb",
        "config_tcb",
        "mask_chip_id",
        "mask_chip_key",
        "guest_count",
        "tmr",
        "asids",
    )
    derived = {
        "soc": "the machine around it, saved there",
        "c_bit": "the processor's",
        "firmware_key": "a function of the chip",
    }

    def __init__(self, soc: "Soc") -> None:
        self.soc = soc
        self.c_bit = 1 << soc.profile.c_bit
        self.chip = Chip(soc.seed)
        self.firmware_key = Key(self.chip.firmware_key_material(soc.profile.xts_key_bytes))
        self.trng = Trng(self.chip.trng_seed())
        self.sev_state = PlatformState.UNINIT
        self.sev_es = False
        self.sev_guests: dict[int, sev_guest.SevGuest] = {}
        """Legacy guests by handle."""
        self.snp_state = PlatformState.UNINIT
        self.rmp_initialized = False
        self.rmp_tcb = b""
        """The TCB of the firmware that last wrote the RMP."""
        self.config_tcb = b""
        """REPORTED_TCB of SNP_CONFIG; empty while it follows the committed TCB."""
        self.mask_chip_id = False
        self.mask_chip_key = False
        self.guest_count = 0
        self.tmr: tuple[int, int] | None = None
        """Trusted memory [start, end) that the host handed over at SEV INIT."""
        self.asids = AsidTable(soc.profile, soc.caches)

    def command(
        self,
        cmd: SnpCmd | SevCmd | int,
        buffer: Layout | None = None,
        *,
        paddr: int | None = None,
    ) -> SnpStatus:
        """Run one command; what it returns through its buffer is in `buffer` afterwards.

        paddr: where the buffer lies, when the caller wants its page checked.
        """
        self.soc.counters.firmware_commands += 1
        known = _BY_ID.get(cmd)
        if known is None:
            return self._done(f"{cmd:#x}", buffer, SnpStatus.INVALID_COMMAND)
        if known not in _COMMANDS:
            raise Unmodelled(f"firmware command {type(known).__name__}.{known.name}")
        layout, run = _COMMANDS[known]
        if layout is not None and not isinstance(buffer, layout):
            raise TypeError(f"{known!r} takes {layout.__name__}, not {type(buffer).__name__}")
        try:
            if paddr is not None and known in _WRITES_BACK and buffer is not None:
                self._check_buffer(paddr, buffer.SIZE)
            result = self._run(run, buffer)
            if paddr is not None and known in _WRITES_BACK:
                self._reclaim_buffer(paddr)
        except Refused as refused:
            result = refused.status
        name = known.name if isinstance(known, SevCmd) else f"SNP_{known.name}"
        return self._done(name, buffer, result)

    def _run(self, run: _Run, buffer: Layout | None) -> SnpStatus:
        try:
            return run(self, buffer)
        except Refused as refused:
            return refused.status

    def gctx(self, paddr: int) -> Gctx:
        """A guest's context as it is now, for whoever looks at the machine from outside."""
        try:
            return read_context(self, paddr)
        except Refused as refused:
            raise ValueError(
                f"{paddr:#x} is not a context page: {refused.status.name}"
            ) from None

    def asid_runnable(self, asid: int) -> bool:
        """Whether VMRUN with this ASID is allowed: its guest finished launching."""
        return asid in self.asids.in_use

    @property
    def tcb(self) -> bytes:
        """The running TCB, which is also the committed one: the model has one firmware."""
        boot_loader, tee, snp, microcode = self.soc.profile.tcb
        return bytes(TcbVersion(boot_loader=boot_loader, tee=tee, snp=snp, microcode=microcode))

    @property
    def reported_tcb(self) -> bytes:
        return self.config_tcb or self.tcb

    def _check_buffer(self, paddr: int, length: int) -> None:
        if self.snp_state is not PlatformState.INIT:
            return
        check_range(self, paddr, length)
        for spa in {paddr, paddr + length - 1}:
            if lookup(self, spa).state not in FIRMWARE_WRITABLE:
                raise Refused(SnpStatus.INVALID_PAGE_STATE)

    def _reclaim_buffer(self, paddr: int) -> None:
        if not self.rmp_initialized:
            return
        page = lookup(self, paddr)
        if page.state is PageState.FIRMWARE:
            attrs, gfn = page.value
            self.soc.rmp.store(
                "SEV command buffer", page.pfn, page.pfn + 1, (attrs & ~(IMMUTABLE | LOCK), gfn)
            )

    def _done(self, name: str, buffer: Layout | None, result: SnpStatus) -> SnpStatus:
        tp = self.soc.tp
        if tp.emit:
            tp.emit(
                FirmwareCommand(name, bytes(buffer) if buffer is not None else b"", result.name)
            )
        return result
