"""The attestation report, version 2.  [ABI-56860 r1.58 ATTESTATION_REPORT]"""

from enum import IntEnum, IntFlag

from softcvm.abi.layout import U8, U32, U64, Bits, Bytes, Layout

__all__ = (
    "REPORT_SIGNED_BYTES",
    "REPORT_VERSION",
    "AttestationReport",
    "PlatformInfo",
    "SigningKey",
)

REPORT_VERSION = 2
REPORT_SIGNED_BYTES = 0x2A0
"""The signature covers everything before it."""


class PlatformInfo(IntFlag):
    """PLATFORM_INFO of a report."""

    SMT_EN = 1 << 0
    TSME_EN = 1 << 1
    ECC_EN = 1 << 2
    RAPL_DIS = 1 << 3
    CIPHERTEXT_HIDING_DRAM_EN = 1 << 4
    ALIAS_CHECK_COMPLETE = 1 << 5
    TIO_EN = 1 << 7


class SigningKey(IntEnum):
    VCEK = 0
    VLEK = 1
    NONE = 7


class AttestationReport(Layout, size=0x4A0):
    version = U32(0x000)
    guest_svn = U32(0x004)
    policy = U64(0x008)
    family_id = Bytes(0x010, 16)
    image_id = Bytes(0x020, 16)
    vmpl = U32(0x030)
    signature_algo = U32(0x034)
    current_tcb = Bytes(0x038, 8)
    platform_info = U64(0x040)
    author_key_en = Bits(0x48 * 8)
    mask_chip_key = Bits(0x48 * 8 + 1)
    signing_key = Bits(0x48 * 8 + 4, 0x48 * 8 + 2)
    report_data = Bytes(0x050, 64)
    measurement = Bytes(0x090, 48)
    host_data = Bytes(0x0C0, 32)
    id_key_digest = Bytes(0x0E0, 48)
    author_key_digest = Bytes(0x110, 48)
    report_id = Bytes(0x140, 32)
    report_id_ma = Bytes(0x160, 32)
    reported_tcb = Bytes(0x180, 8)
    chip_id = Bytes(0x1A0, 64)
    committed_tcb = Bytes(0x1E0, 8)
    current_build = U8(0x1E8)
    current_minor = U8(0x1E9)
    current_major = U8(0x1EA)
    committed_build = U8(0x1EC)
    committed_minor = U8(0x1ED)
    committed_major = U8(0x1EE)
    launch_tcb = Bytes(0x1F0, 8)
    signature = Bytes(0x2A0, 512)
