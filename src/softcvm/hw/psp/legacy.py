"""Legacy SEV's platform commands: INIT, INIT_EX, SHUTDOWN, PLATFORM_STATUS.

[SEV-API-55766 r3.24; ASPFW].  Owns the legacy platform state and the trusted memory region;
legacy guests are sev_guest.py.  Certificates and the platform's persistent data are not
modelled: a command that needs them is Unmodelled.
"""

from typing import TYPE_CHECKING

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import SnpStatus
from softcvm.abi.snp_platform import (
    SEV_TMR_SIZE,
    PlatformState,
    SevInit,
    SevInitEx,
    SevInitFlags,
    SevPlatformStatus,
)
from softcvm.hw.psp.operands import check_range, reserved_bits_set
from softcvm.hw.psp.sev_guest import sev_release_guests
from softcvm.sim.addr import PAGE_SHIFT
from softcvm.sim.errors import Unmodelled

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("sev_init", "sev_init_ex", "sev_platform_status", "sev_shutdown")

_NV_IN_SPI = (1 << 64) - 1
"""NV_PADDR of INIT_EX: keep persistent data in the flash chip, as INIT does."""
_CONFIG_ES = 1 << 8


def sev_init(psp: "Psp", cmd: SevInit) -> SnpStatus:
    return _init(psp, cmd)


def sev_init_ex(psp: "Psp", cmd: SevInitEx) -> SnpStatus:
    return _init(psp, cmd)


def _init(psp: "Psp", cmd: SevInit | SevInitEx) -> SnpStatus:
    # STATE
    if psp.sev_state is not PlatformState.UNINIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PARAMETERS
    es = bool(cmd.flags & SevInitFlags.ES)
    if reserved_bits_set(cmd) or cmd.flags & ~int(SevInitFlags.ES):
        return SnpStatus.INVALID_CONFIG
    start, length = cmd.tmr_address & ~psp.c_bit, cmd.tmr_len
    if es and (length < SEV_TMR_SIZE or (start | length) % SEV_TMR_SIZE):
        return SnpStatus.INVALID_CONFIG
    # CONFIGURATION
    if psp.soc.rmp.enabled and not psp.rmp_initialized:
        return SnpStatus.INVALID_PLATFORM_STATE
    if isinstance(cmd, SevInitEx):
        if cmd.length != cmd.SIZE:
            return SnpStatus.INVALID_LENGTH
        if cmd.nv_address != _NV_IN_SPI:
            raise Unmodelled("SEV INIT_EX with persistent data in memory")
    if es:
        check_range(psp, start, length)
        if not _firmware_owned(psp, start, length):
            return SnpStatus.INVALID_PAGE_STATE
    # OUTPUT
    psp.sev_es = es
    psp.tmr = (start, start + length) if es else None
    psp.sev_state = PlatformState.INIT
    return SnpStatus.SUCCESS


def sev_shutdown(psp: "Psp", _: None) -> SnpStatus:
    """Back to UNINIT from any state, without guests; the trusted region is the host's again."""
    sev_release_guests(psp)
    psp.sev_state = PlatformState.UNINIT
    psp.sev_es = False
    psp.tmr = None
    return SnpStatus.SUCCESS


def sev_platform_status(psp: "Psp", status: SevPlatformStatus) -> SnpStatus:
    profile = psp.soc.profile
    status.data[:] = bytes(status.SIZE)
    status.api_major = profile.api_major
    status.api_minor = profile.api_minor
    status.build = profile.build
    status.state = psp.sev_state
    status.flags = _CONFIG_ES if psp.sev_es else 0
    status.guest_count = len(psp.sev_guests)
    return SnpStatus.SUCCESS


def _firmware_owned(psp: "Psp", start: int, length: int) -> bool:
    """With SNP on, the trusted region must be made of Firmware pages."""
    rmp = psp.soc.rmp
    if psp.snp_state is not PlatformState.INIT:
        return True
    first, end = start >> PAGE_SHIFT, (start + length) >> PAGE_SHIFT
    return all(
        not rmp.covered(s) or rmp.decode(value) is PageState.FIRMWARE
        for s, _, value in rmp.map.runs(first, end)
    )
