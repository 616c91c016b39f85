"""Messages between a guest and firmware, carried by GUEST_REQUEST.

[ABI-56860 r1.58 guest messages]; Linux: struct snp_guest_msg_hdr (arch/x86/include/asm/sev.h),
include/uapi/linux/sev-guest.h, v7.2.
"""

from enum import IntEnum, IntFlag

from softcvm.abi.layout import U8, U16, U32, U64, Bits, Bytes, Layout
from softcvm.abi.snp_report import AttestationReport

__all__ = (
    "AAD",
    "AEAD_AES_256_GCM",
    "HDR_VERSION",
    "GuestField",
    "GuestMsgHdr",
    "KeySel",
    "MsgKeyReq",
    "MsgKeyRsp",
    "MsgReportReq",
    "MsgReportRsp",
    "MsgType",
    "RootKey",
)

AEAD_AES_256_GCM = 1
HDR_VERSION = 1
AAD = slice(0x30, 0x60)
"""Bytes of the header that the authentication tag covers besides the payload."""


class MsgType(IntEnum):
    """MSG_TYPE."""

    CPUID_REQ = 1
    CPUID_RSP = 2
    KEY_REQ = 3
    KEY_RSP = 4
    REPORT_REQ = 5
    REPORT_RSP = 6
    EXPORT_REQ = 7
    EXPORT_RSP = 8
    IMPORT_REQ = 9
    IMPORT_RSP = 10
    ABSORB_REQ = 11
    ABSORB_RSP = 12
    VMRK_REQ = 13
    VMRK_RSP = 14
    ABSORB_NOMA_REQ = 15
    ABSORB_NOMA_RSP = 16
    TSC_INFO_REQ = 17
    TSC_INFO_RSP = 18


class GuestMsgHdr(Layout, size=0x60):
    """The header in front of every message; bytes 0x00-0x2F are not authenticated."""

    authtag = Bytes(0x00, 32)
    msg_seqno = U64(0x20)
    algo = U8(0x30)
    hdr_version = U8(0x31)
    hdr_sz = U16(0x32)
    msg_type = U8(0x34)
    msg_version = U8(0x35)
    msg_sz = U16(0x36)
    msg_vmpck = U8(0x3C)


class KeySel(IntEnum):
    """Which endorsement key signs a report or roots a derived key."""

    VLEK_VCEK = 0  # VLEK if one is loaded, else VCEK
    VCEK = 1
    VLEK = 2
    RESERVED = 3


class RootKey(IntEnum):
    VCEK = 0
    VMRK = 1


class GuestField(IntFlag):
    """GUEST_FIELD_SELECT: what is mixed into a derived key."""

    GUEST_POLICY = 1 << 0
    IMAGE_ID = 1 << 1
    FAMILY_ID = 1 << 2
    MEASUREMENT = 1 << 3
    GUEST_SVN = 1 << 4
    TCB_VERSION = 1 << 5


class MsgKeyReq(Layout, size=32):
    """MSG_KEY_REQ: derive a key from a root and the guest's identity."""

    root_key_select = Bits(0)
    key_sel = Bits(2, 1)
    guest_field_select = U64(8)
    vmpl = U32(16)
    guest_svn = U32(20)
    tcb_version = Bytes(24, 8)


class MsgKeyRsp(Layout, size=64):
    """MSG_KEY_RSP."""

    status = U32(0)
    derived_key = Bytes(32, 32)


class MsgReportReq(Layout, size=96):
    """MSG_REPORT_REQ."""

    report_data = Bytes(0, 64)
    vmpl = U32(64)
    key_sel = Bits(545, 544)


class MsgReportRsp(Layout, size=32 + AttestationReport.SIZE):
    """MSG_REPORT_RSP."""

    status = U32(0)
    report_size = U32(4)
    report = Bytes(32, AttestationReport.SIZE)
