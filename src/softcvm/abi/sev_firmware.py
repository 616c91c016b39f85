"""Buffers of the legacy SEV guest commands, and what firmware and a guest's owner exchange through them.

[SEV-API-55766 r3.24].  Field names are those of struct sev_data_* (include/linux/psp-sev.h, v7.2);
positions are checked against a C compiler in tests/abi.  Ids and status codes are abi/snp_firmware.py: one
numbering serves both interfaces.
"""

from enum import IntEnum, IntFlag

from softcvm.abi.layout import U8, U32, U64, Bytes, Layout

__all__ = (
    "SEV_CERT_SIZE",
    "SevActivate",
    "SevDbg",
    "SevDeactivate",
    "SevDecommission",
    "SevGuestPolicy",
    "SevGuestState",
    "SevGuestStatus",
    "SevLaunchFinish",
    "SevLaunchMeasure",
    "SevLaunchSecret",
    "SevLaunchStart",
    "SevLaunchUpdateData",
    "SevLaunchUpdateVmsa",
    "SevMeasurement",
    "SevPacketHeader",
    "SevSession",
)


class SevGuestState(IntEnum):
    """GSTATE of a legacy guest.  [SEV-API-55766 guest states]"""

    UNINIT = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    RUPDATE = 5
    SENT = 6


class SevGuestPolicy(IntFlag):
    """Bits 15:0 of a guest's policy; API_MAJOR is bits 23:16, API_MINOR bits 31:24."""

    NODBG = 1 << 0
    NOKS = 1 << 1
    ES = 1 << 2
    NOSEND = 1 << 3
    DOMAIN = 1 << 4
    SEV = 1 << 5


SEV_CERT_SIZE = 0x824
"""An SEV certificate, such as the Diffie-Hellman one of LAUNCH_START.  [SEV-API-55766 appendix C]"""


class SevActivate(Layout, size=8):
    handle = U32(0)
    asid = U32(4)


class SevDeactivate(Layout, size=4):
    handle = U32(0)


class SevDecommission(Layout, size=4):
    handle = U32(0)


class SevGuestStatus(Layout, size=13):
    """Everything but handle comes back."""

    handle = U32(0)
    policy = U32(4)
    asid = U32(8)
    state = U8(12)


class SevLaunchStart(Layout, size=36):
    """handle: of a guest to share a key with, or 0; the new guest's comes back."""

    handle = U32(0)
    policy = U32(4)
    dh_cert_address = U64(8)
    dh_cert_len = U32(16)
    session_address = U64(24)
    session_len = U32(32)


class SevLaunchUpdateData(Layout, size=20):
    handle = U32(0)
    address = U64(8)
    len = U32(16)


class SevLaunchUpdateVmsa(Layout, size=20):
    handle = U32(0)
    address = U64(8)
    len = U32(16)


class SevLaunchMeasure(Layout, size=20):
    """len comes back as the length needed when it was too small."""

    handle = U32(0)
    address = U64(8)
    len = U32(16)


class SevLaunchSecret(Layout, size=52):
    handle = U32(0)
    hdr_address = U64(8)
    hdr_len = U32(16)
    guest_address = U64(24)
    guest_len = U32(32)
    trans_address = U64(40)
    trans_len = U32(48)


class SevLaunchFinish(Layout, size=4):
    handle = U32(0)


class SevDbg(Layout, size=28):
    """DBG_DECRYPT and DBG_ENCRYPT."""

    handle = U32(0)
    src_addr = U64(8)
    dst_addr = U64(16)
    len = U32(24)


class SevMeasurement(Layout, size=48):
    """What LAUNCH_MEASURE writes: HMAC-SHA-256 under the transport integrity key, and its nonce.

    The HMAC is over 0x04, API major, API minor, build, policy, launch digest, nonce.
    """

    measure = Bytes(0, 32)
    mnonce = Bytes(32, 16)


class SevSession(Layout, size=128):
    """The owner's transport keys, wrapped for the platform (LAUNCH_START)."""

    nonce = Bytes(0, 16)
    wrap_tk = Bytes(16, 32)
    wrap_iv = Bytes(48, 16)
    wrap_mac = Bytes(64, 32)
    policy_mac = Bytes(96, 32)


class SevPacketHeader(Layout, size=52):
    """Header of a secret (LAUNCH_SECRET).  Bit 0 of flags: compressed.

    mac is HMAC-SHA-256 under the transport integrity key over 0x01, flags, iv, guest_len, trans_len, the
    ciphertext and the measurement; the ciphertext is AES-128-CTR under the transport encryption key.
    """

    flags = U32(0)
    iv = Bytes(4, 16)
    mac = Bytes(20, 32)
