"""SNP_PLATFORM_STATUS, SNP_CONFIG, SNP_COMMIT, SNP_FEATURE_INFO.  [ABI-56860 r1.58; ASPFW]

None of them asks for a platform state; those that write memory ask for a Firmware or Default
page once SNP is initialised.
"""

from typing import TYPE_CHECKING

from softcvm.abi.snp_firmware import SnpAddr, SnpStatus
from softcvm.abi.snp_platform import (
    FeatureEbx,
    FeatureEcx,
    PlatformState,
    SnpCommit,
    SnpConfig,
    SnpFeatureInfo,
    SnpFeatureInfoBuffer,
    SnpPlatformStatusBuffer,
    TcbVersion,
)
from softcvm.hw.psp.operands import FIRMWARE_WRITABLE, lookup, reserved_bits_set, write
from softcvm.sim.addr import PAGE_MASK, PAGE_SIZE

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = (
    "crosses_page",
    "snp_commit",
    "snp_config",
    "snp_feature_info",
    "snp_platform_status",
    "tcb_newer",
)

_GUEST_MESSAGES = 0x1FF
"""Fn8000_0024_x01 EAX: the guest messages that firmware answers, one bit each."""


def crosses_page(paddr: int, length: int) -> bool:
    return (paddr & PAGE_MASK) + length > PAGE_SIZE


def tcb_newer(tcb: bytes, than: bytes) -> bool:
    """Whether any part of one TCB is newer than the same part of the other."""
    asked, have = TcbVersion(tcb), TcbVersion(than)
    return any(getattr(asked, part) > getattr(have, part) for part in TcbVersion.fields())


def snp_platform_status(psp: "Psp", cmd: SnpAddr) -> SnpStatus:
    # PARAMETERS
    if crosses_page(cmd.address, SnpPlatformStatusBuffer.SIZE):
        return SnpStatus.INVALID_PARAM
    # PAGES
    if not _writable(psp, cmd.address):
        return SnpStatus.INVALID_PAGE_STATE
    # OUTPUT
    profile = psp.soc.profile
    status = SnpPlatformStatusBuffer(
        api_major=profile.api_major,
        api_minor=profile.api_minor,
        state=psp.snp_state,
        is_rmp_initialized=psp.rmp_initialized,
        alias_check_complete=profile.alias_check,
        build_id=profile.build,
        mask_chip_id=psp.mask_chip_id,
        mask_chip_key=psp.mask_chip_key,
        feature_info=1,
        guest_count=psp.guest_count,
        current_tcb_version=psp.tcb,
        reported_tcb_version=psp.reported_tcb,
    )
    write(psp, cmd.address, bytes(status))
    return SnpStatus.SUCCESS


def snp_config(psp: "Psp", cmd: SnpConfig) -> SnpStatus:
    # RESERVED
    if reserved_bits_set(cmd):
        return SnpStatus.INVALID_PARAM
    # PARAMETERS
    if any(cmd.reported_tcb) and tcb_newer(cmd.reported_tcb, psp.tcb):
        return SnpStatus.INVALID_PARAM
    # OUTPUT
    psp.config_tcb = cmd.reported_tcb if any(cmd.reported_tcb) else b""
    psp.mask_chip_id = bool(cmd.mask_chip_id)
    psp.mask_chip_key = bool(cmd.mask_chip_key)
    return SnpStatus.SUCCESS


def snp_commit(psp: "Psp", cmd: SnpCommit) -> SnpStatus:
    """The running firmware becomes the oldest that may run; the model has one, committed."""
    return SnpStatus.SUCCESS if cmd.len == cmd.SIZE else SnpStatus.INVALID_PARAM


def snp_feature_info(psp: "Psp", cmd: SnpFeatureInfo) -> SnpStatus:
    # PARAMETERS
    if cmd.length != cmd.SIZE:
        return SnpStatus.INVALID_PARAM
    if cmd.feature_info_paddr & 3 or crosses_page(
        cmd.feature_info_paddr, SnpFeatureInfoBuffer.SIZE
    ):
        return SnpStatus.INVALID_ADDRESS
    # PAGES
    if not _writable(psp, cmd.feature_info_paddr):
        return SnpStatus.INVALID_PAGE_STATE
    # OUTPUT
    match cmd.ecx_in:
        case 0:
            info = SnpFeatureInfoBuffer(
                eax=1,
                ebx=FeatureEbx.SEV_LEGACY,
                ecx=FeatureEcx.VLEK | FeatureEcx.X86_SNP_SHUTDOWN,
            )
        case 1:
            info = SnpFeatureInfoBuffer(eax=_GUEST_MESSAGES)
        case _:
            return SnpStatus.INVALID_PARAM
    write(psp, cmd.feature_info_paddr, bytes(info))
    return SnpStatus.SUCCESS


def _writable(psp: "Psp", paddr: int) -> bool:
    """Whether firmware may write a result there: anywhere until SNP is initialised."""
    if psp.snp_state is PlatformState.UNINIT:
        return True
    return lookup(psp, paddr).state in FIRMWARE_WRITABLE
