"""DBG_DECRYPT and DBG_ENCRYPT of legacy SEV: the host looks into a guest whose policy does not forbid it.

[SEV-API-55766 r3.24; ASPFW].  Any range of whole 16-byte blocks, wherever it lies: without an RMP entry that
says so, firmware cannot know whose page it turns.
"""

from typing import TYPE_CHECKING

from softcvm.abi.sev_firmware import SevDbg, SevGuestPolicy
from softcvm.abi.snp_firmware import SnpStatus
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.psp.operands import read, write
from softcvm.hw.psp.sev_launch import check_writable

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("sev_dbg_decrypt", "sev_dbg_encrypt")

_ALIGN = 15


def sev_dbg_decrypt(psp: "Psp", cmd: SevDbg) -> SnpStatus:
    """Guest memory -> memory in the clear."""
    return _crypt(psp, cmd, encrypt=False)


def sev_dbg_encrypt(psp: "Psp", cmd: SevDbg) -> SnpStatus:
    """Memory in the clear -> guest memory."""
    return _crypt(psp, cmd, encrypt=True)


def _crypt(psp: "Psp", cmd: SevDbg, *, encrypt: bool) -> SnpStatus:
    # STATE
    if psp.sev_state is not PlatformState.WORKING:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PARAMETERS
    if (cmd.src_addr | cmd.dst_addr) & _ALIGN:
        return SnpStatus.INVALID_ADDRESS
    if cmd.len & _ALIGN:
        return SnpStatus.INVALID_LENGTH
    # GUEST
    guest = psp.sev_guests.get(cmd.handle)
    if guest is None:
        return SnpStatus.INVALID_GUEST
    if guest.policy & SevGuestPolicy.NODBG:
        return SnpStatus.POLICY_FAILURE
    # PAGES
    if not check_writable(psp, cmd.dst_addr, cmd.len):
        return SnpStatus.INVALID_PAGE_STATE
    if not guest.asid:
        return SnpStatus.INACTIVE
    # OUTPUT
    if cmd.len:
        key = psp.soc.keys[guest.asid]
        data = read(psp, cmd.src_addr, cmd.len, None if encrypt else key)
        write(psp, cmd.dst_addr, data, key if encrypt else None)
    return SnpStatus.SUCCESS
