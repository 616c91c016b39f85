"""Buffers of the AMD-SP's platform commands: start, stop, status, configuration.

[ABI-56860 r1.58], legacy ones [SEV-API-55766 r3.24].  Field names are those of
include/linux/psp-sev.h and include/uapi/linux/psp-sev.h, v7.2.
"""

from enum import IntEnum, IntFlag

from softcvm.abi.layout import U8, U16, U32, U64, Bits, Bytes, Layout

__all__ = (
    "RANGE_LIST_MAX",
    "SEV_TMR_SIZE",
    "SNP_TMR_SIZE",
    "FeatureEbx",
    "FeatureEcx",
    "PlatformState",
    "SevInit",
    "SevInitEx",
    "SevInitFlags",
    "SevPlatformStatus",
    "SnpCommit",
    "SnpConfig",
    "SnpFeatureInfo",
    "SnpFeatureInfoBuffer",
    "SnpInitEx",
    "SnpPlatformStatusBuffer",
    "SnpRange",
    "SnpRangeListHeader",
    "SnpShutdownEx",
    "TcbVersion",
)

SEV_TMR_SIZE = 1 << 20
"""Bytes of trusted memory that SEV-ES wants; also its alignment."""
SNP_TMR_SIZE = 2 << 20
"""With SNP the region is 2M, so that the RMP can hold it in one entry."""
RANGE_LIST_MAX = 255
"""Ranges that fit into the one page of a RANGE_LIST."""


class PlatformState(IntEnum):
    """SEV and SNP each have one; SNP knows only the first two.  [ABI-56860 PSTATE]"""

    UNINIT = 0
    INIT = 1
    WORKING = 2


class TcbVersion(Layout, size=8):
    """Security versions below the guest, as on Milan and Genoa.  [ABI-56860 TCB_VERSION]"""

    boot_loader = U8(0)
    tee = U8(1)
    snp = U8(6)
    microcode = U8(7)


class SnpInitEx(Layout, size=64):
    """[ABI-56860 SNP_INIT_EX]"""

    init_rmp = Bits(0)
    list_paddr_en = Bits(1)
    rapl_dis = Bits(2)
    ciphertext_hiding_en = Bits(3)
    tio_en = Bits(4)
    list_paddr = U64(8)
    max_snp_asid = U16(16)


class SnpRangeListHeader(Layout, size=8):
    """First bytes of a RANGE_LIST; SnpRange records follow.  [ABI-56860 RANGE_LIST]"""

    num_elements = U32(0)


class SnpRange(Layout, size=16):
    base = U64(0)
    page_count = U32(8)


class SnpShutdownEx(Layout, size=8):
    """[ABI-56860 SNP_SHUTDOWN_EX]"""

    len = U32(0)
    iommu_snp_shutdown = Bits(32)
    x86_snp_shutdown = Bits(33)


class SnpPlatformStatusBuffer(Layout, size=32):
    """What PLATFORM_STATUS writes (struct sev_user_data_snp_status)"""

    api_major = U8(0)
    api_minor = U8(1)
    state = U8(2)
    is_rmp_initialized = Bits(24)
    alias_check_complete = Bits(25)
    build_id = U32(4)
    mask_chip_id = Bits(64)
    mask_chip_key = Bits(65)
    vlek_en = Bits(66)
    feature_info = Bits(67)
    guest_count = U32(12)
    current_tcb_version = Bytes(16, 8)
    reported_tcb_version = Bytes(24, 8)


class SnpConfig(Layout, size=64):
    """[ABI-56860 SNP_CONFIG]"""

    reported_tcb = Bytes(0, 8)
    mask_chip_id = Bits(64)
    mask_chip_key = Bits(65)


class SnpCommit(Layout, size=4):
    """[ABI-56860 SNP_COMMIT]"""

    len = U32(0)


class SnpFeatureInfo(Layout, size=16):
    """[ABI-56860 SNP_FEATURE_INFO]"""

    length = U32(0)
    ecx_in = U32(4)
    feature_info_paddr = U64(8)


class SnpFeatureInfoBuffer(Layout, size=16):
    """CPUID Fn8000_0024 as FEATURE_INFO writes it"""

    eax = U32(0)
    ebx = U32(4)
    ecx = U32(8)
    edx = U32(12)


class FeatureEbx(IntFlag):
    """Fn8000_0024_x00 EBX."""

    SEV_LEGACY = 1 << 0


class FeatureEcx(IntFlag):
    """Fn8000_0024_x00 ECX."""

    VLEK = 1 << 0
    X86_SNP_SHUTDOWN = 1 << 1
    RAPL_DIS = 1 << 2
    CIPHERTEXT_HIDING = 1 << 3
    AES_256_XTS = 1 << 4
    CXL_ALLOW = 1 << 5


class SevInitFlags(IntFlag):
    ES = 1 << 0


class SevInit(Layout, size=20):
    """[SEV-API-55766 INIT]"""

    flags = U32(0)
    tmr_address = U64(8)
    tmr_len = U32(16)


class SevInitEx(Layout, size=36):
    """[SEV-API-55766 INIT_EX]"""

    length = U32(0)
    flags = U32(4)
    tmr_address = U64(8)
    tmr_len = U32(16)
    nv_address = U64(24)
    nv_len = U32(32)


class SevPlatformStatus(Layout, size=12):
    """struct sev_user_data_status; firmware fills the command buffer itself"""

    api_major = U8(0)
    api_minor = U8(1)
    state = U8(2)
    flags = U32(3)  # bit 0 owner, bit 8 SEV-ES initialised
    build = U8(7)
    guest_count = U32(8)
