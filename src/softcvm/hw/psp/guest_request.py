"""SNP_GUEST_REQUEST: a guest talks to firmware, the host carries what it cannot read.

[ABI-56860 r1.58 SNP_GUEST_REQUEST; ASPFW].  Owns the envelope: header checks, AES-256-GCM,
sequence numbers.  The host's faults are the command's status; the guest's faults are a status
inside a response that only the guest can read.  Of the messages, reports and key derivation are
modelled (report.py).
"""

from typing import TYPE_CHECKING, Final

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import SnpCmd, SnpGuestRequest, SnpStatus
from softcvm.abi.snp_guest_msg import (
    AAD,
    AEAD_AES_256_GCM,
    HDR_VERSION,
    GuestMsgHdr,
    MsgKeyReq,
    MsgReportReq,
    MsgType,
)
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.psp.gctx import Gctx, next_state
from softcvm.hw.psp.operands import Refused, lookup, read, read_context, write, write_context
from softcvm.hw.psp.report import derived_key, report
from softcvm.hw.psp.status import crosses_page
from softcvm.sim.addr import PAGE_MASK
from softcvm.sim.errors import Unmodelled

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("snp_guest_request",)

_COUNT_LAST: Final = (1 << 64) - 2
_TAG_BYTES: Final = 16
_MSG_VERSION: Final = 1


def snp_guest_request(psp: "Psp", cmd: SnpGuestRequest) -> SnpStatus:
    # RESERVED
    if cmd.gctx_paddr & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    request_page = lookup(psp, cmd.req_paddr)
    response_page = lookup(psp, cmd.res_paddr)
    gctx = read_context(psp, cmd.gctx_paddr)
    if response_page.state is not PageState.FIRMWARE:
        return SnpStatus.INVALID_PAGE_STATE
    if request_page.pagesize or response_page.pagesize:
        return SnpStatus.INVALID_PAGE_SIZE
    # GUEST
    if next_state(gctx, SnpCmd.GUEST_REQUEST) is None:
        return SnpStatus.INVALID_GUEST_STATE
    # MESSAGE
    header, payload = _open(psp, gctx, cmd.req_paddr)
    if header.msg_version != _MSG_VERSION:
        return SnpStatus.INVALID_PARAM
    response_type, response = _answer(psp, gctx, header, payload)
    # OUTPUT
    if crosses_page(cmd.res_paddr, GuestMsgHdr.SIZE + len(response)):
        return SnpStatus.INVALID_PARAM
    write(psp, cmd.res_paddr, _seal(gctx, header, response_type, response))
    gctx.count_messages(header.msg_vmpck, gctx.msg_count(header.msg_vmpck) + 2)
    write_context(psp, cmd.gctx_paddr, gctx)
    return SnpStatus.SUCCESS


def _open(psp: "Psp", gctx: Gctx, paddr: int) -> tuple[GuestMsgHdr, bytes]:
    """The request's header and its payload in the clear."""
    from cryptography.exceptions import InvalidTag  # slow to import
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if crosses_page(paddr, GuestMsgHdr.SIZE):
        raise Refused(SnpStatus.INVALID_PARAM)
    header = GuestMsgHdr(read(psp, paddr, GuestMsgHdr.SIZE))
    size = header.msg_sz
    if (
        (header.hdr_version, header.hdr_sz) != (HDR_VERSION, GuestMsgHdr.SIZE)
        or header.algo != AEAD_AES_256_GCM
        or not size
        or size % 16
        or crosses_page(paddr, GuestMsgHdr.SIZE + size)
        or header.msg_vmpck > 3
    ):
        raise Refused(SnpStatus.INVALID_PARAM)
    sealed = read(psp, paddr + GuestMsgHdr.SIZE, size) + header.authtag[:_TAG_BYTES]
    key = gctx.vmpck(header.msg_vmpck)
    try:
        payload = AESGCM(key).decrypt(_iv(header.msg_seqno), sealed, bytes(header)[AAD])
    except InvalidTag:
        raise Refused(SnpStatus.BAD_MEASUREMENT) from None
    count = gctx.msg_count(header.msg_vmpck)
    if count == _COUNT_LAST or header.msg_seqno != count + 1:
        raise Refused(SnpStatus.AEAD_OFLOW)
    return header, payload


def _answer(
    psp: "Psp", gctx: Gctx, header: GuestMsgHdr, payload: bytes
) -> tuple[MsgType, bytes]:
    """The response to one request, whatever the guest asked for."""
    if header.msg_type not in frozenset(MsgType):
        raise Refused(SnpStatus.INVALID_PARAM)
    match MsgType(header.msg_type):
        case MsgType.REPORT_REQ:
            request = _message(payload, MsgReportReq.SIZE)
            return MsgType.REPORT_RSP, report(
                psp, gctx, header.msg_vmpck, MsgReportReq(request)
            )
        case MsgType.KEY_REQ:
            request = _message(payload, MsgKeyReq.SIZE)
            return MsgType.KEY_RSP, derived_key(psp, gctx, header.msg_vmpck, MsgKeyReq(request))
        case (
            MsgType.CPUID_REQ
            | MsgType.EXPORT_REQ
            | MsgType.IMPORT_REQ
            | MsgType.ABSORB_REQ
            | MsgType.VMRK_REQ
            | MsgType.ABSORB_NOMA_REQ
            | MsgType.TSC_INFO_REQ
        ) as request_type:
            raise Unmodelled(f"guest message {request_type.name}")
        case _:
            raise Refused(SnpStatus.INVALID_PARAM)


def _message(payload: bytes, size: int) -> bytes:
    """A message of its full size; INVALID_PARAM for one that is too short to be one."""
    if len(payload) < size:
        raise Refused(SnpStatus.INVALID_PARAM)
    return payload[:size]


def _seal(gctx: Gctx, request: GuestMsgHdr, msg_type: MsgType, payload: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # slow to import

    header = GuestMsgHdr(
        msg_seqno=request.msg_seqno + 1,
        algo=AEAD_AES_256_GCM,
        hdr_version=HDR_VERSION,
        hdr_sz=GuestMsgHdr.SIZE,
        msg_type=msg_type,
        msg_version=_MSG_VERSION,
        msg_sz=len(payload),
        msg_vmpck=request.msg_vmpck,
    )
    key = gctx.vmpck(request.msg_vmpck)
    sealed = AESGCM(key).encrypt(_iv(header.msg_seqno), payload, bytes(header)[AAD])
    header.authtag = sealed[-_TAG_BYTES:] + bytes(32 - _TAG_BYTES)
    return bytes(header) + sealed[:-_TAG_BYTES]


def _iv(seqno: int) -> bytes:
    return seqno.to_bytes(12, "little")
