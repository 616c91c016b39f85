"""Commands of the AMD-SP: ids, status codes, and the buffers of guest and page commands.

[ABI-56860 r1.58] for SNP, [SEV-API-55766 r3.24] for the few legacy commands that SNP needs.
Field names are those of struct sev_data_snp_* (include/linux/psp-sev.h, v7.2).  Bits that no
field names are reserved.  Platform commands are snp_platform.py, messages between a guest and
firmware snp_guest_msg.py.
"""

from enum import IntEnum

from softcvm.abi.layout import U8, U32, U64, Bits, Bytes, Layout

__all__ = (
    "Gstate",
    "SevCmd",
    "SnpActivate",
    "SnpAddr",
    "SnpCmd",
    "SnpDbg",
    "SnpGuestRequest",
    "SnpGuestStatus",
    "SnpGuestStatusBuffer",
    "SnpLaunchFinish",
    "SnpLaunchStart",
    "SnpLaunchUpdate",
    "SnpMdEntry",
    "SnpPageMdInit",
    "SnpPageMove",
    "SnpPageReclaim",
    "SnpPageSetState",
    "SnpPageSwapIn",
    "SnpPageSwapOut",
    "SnpPageUnsmash",
    "SnpStatus",
    "SwapPageType",
)


class SevCmd(IntEnum):
    """Legacy commands.  [SEV-API-55766 command identifiers]"""

    INIT = 0x001
    SHUTDOWN = 0x002
    FACTORY_RESET = 0x003
    PLATFORM_STATUS = 0x004
    PEK_GEN = 0x005
    PEK_CSR = 0x006
    PEK_CERT_IMPORT = 0x007
    PDH_CERT_EXPORT = 0x008
    PDH_GEN = 0x009
    DF_FLUSH = 0x00A
    DOWNLOAD_FIRMWARE = 0x00B
    GET_ID = 0x00C
    INIT_EX = 0x00D
    DECOMMISSION = 0x020
    ACTIVATE = 0x021
    DEACTIVATE = 0x022
    GUEST_STATUS = 0x023
    LAUNCH_START = 0x030
    LAUNCH_UPDATE_DATA = 0x031
    LAUNCH_UPDATE_VMSA = 0x032
    LAUNCH_MEASURE = 0x033
    LAUNCH_SECRET = 0x034
    LAUNCH_FINISH = 0x035
    ATTESTATION = 0x036
    SEND_START = 0x040
    SEND_UPDATE_DATA = 0x041
    SEND_UPDATE_VMSA = 0x042
    SEND_FINISH = 0x043
    SEND_CANCEL = 0x044
    RECEIVE_START = 0x050
    RECEIVE_UPDATE_DATA = 0x051
    RECEIVE_UPDATE_VMSA = 0x052
    RECEIVE_FINISH = 0x053
    DBG_DECRYPT = 0x060
    DBG_ENCRYPT = 0x061


class SnpCmd(IntEnum):
    """[ABI-56860 command identifiers]"""

    INIT = 0x081
    SHUTDOWN = 0x082
    PLATFORM_STATUS = 0x083
    DF_FLUSH = 0x084
    INIT_EX = 0x085
    SHUTDOWN_EX = 0x086
    DECOMMISSION = 0x090
    ACTIVATE = 0x091
    GUEST_STATUS = 0x092
    GCTX_CREATE = 0x093
    GUEST_REQUEST = 0x094
    ACTIVATE_EX = 0x095
    LAUNCH_START = 0x0A0
    LAUNCH_UPDATE = 0x0A1
    LAUNCH_FINISH = 0x0A2
    DBG_DECRYPT = 0x0B0
    DBG_ENCRYPT = 0x0B1
    PAGE_SWAP_OUT = 0x0C0
    PAGE_SWAP_IN = 0x0C1
    PAGE_MOVE = 0x0C2
    PAGE_MD_INIT = 0x0C3
    PAGE_SET_STATE = 0x0C6
    PAGE_RECLAIM = 0x0C7
    PAGE_UNSMASH = 0x0C8
    CONFIG = 0x0C9
    DOWNLOAD_FIRMWARE_EX = 0x0CA
    COMMIT = 0x0CB
    VLEK_LOAD = 0x0CD
    FEATURE_INFO = 0x0CE


class SnpStatus(IntEnum):
    """[ABI-56860 status codes]"""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LENGTH = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWERROR_PLATFORM = 0x13
    HWERROR_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    EXIT_RING_BUFFER = 0x1F
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27


class Gstate(IntEnum):
    """States of a guest.  [ABI-56860 GSTATE]"""

    INIT = 0
    LAUNCH = 1
    RUNNING = 2


class SnpAddr(Layout, size=8):
    """GCTX_CREATE and DECOMMISSION (the context page), PLATFORM_STATUS (where to write it)."""

    address = U64(0)


class SnpActivate(Layout, size=12):
    """[ABI-56860 SNP_ACTIVATE]"""

    gctx_paddr = U64(0)
    asid = U32(8)


class SnpGuestStatus(Layout, size=16):
    """[ABI-56860 SNP_GUEST_STATUS]"""

    gctx_paddr = U64(0)
    address = U64(8)


class SnpGuestStatusBuffer(Layout, size=32):
    """What GUEST_STATUS writes.  [ABI-56860 SNP_GUEST_STATUS]"""

    policy = U64(0)
    asid = U32(8)
    state = U8(12)
    vcek_dis = Bits(128)


class SnpLaunchStart(Layout, size=48):
    """[ABI-56860 SNP_LAUNCH_START]"""

    gctx_paddr = U64(0)
    policy = U64(8)
    ma_gctx_paddr = U64(16)
    ma_en = Bits(24 * 8)
    imi_en = Bits(24 * 8 + 1)
    desired_tsc_khz = U32(28)
    gosvw = Bytes(32, 16)


class SnpLaunchUpdate(Layout, size=32):
    """[ABI-56860 §8.17]"""

    gctx_paddr = U64(0)
    page_size = Bits(64)
    page_type = Bits(67, 65)  # abi.launch_digest.LaunchPageType
    imi_page = Bits(68)
    address = U64(16)
    vmpl1_perms = U8(25)
    vmpl2_perms = U8(26)
    vmpl3_perms = U8(27)


class SnpLaunchFinish(Layout, size=64):
    """[ABI-56860 SNP_LAUNCH_FINISH]"""

    gctx_paddr = U64(0)
    id_block_paddr = U64(8)
    id_auth_paddr = U64(16)
    id_block_en = Bits(24 * 8)
    auth_key_en = Bits(24 * 8 + 1)
    vcek_disabled = Bits(24 * 8 + 2)
    host_data = Bytes(32, 32)


class SnpDbg(Layout, size=24):
    """DBG_DECRYPT and DBG_ENCRYPT.  [ABI-56860 SNP_DBG_DECRYPT, SNP_DBG_ENCRYPT]"""

    gctx_paddr = U64(0)
    src_addr = U64(8)
    dst_addr = U64(16)


class SnpGuestRequest(Layout, size=24):
    """[ABI-56860 SNP_GUEST_REQUEST]"""

    gctx_paddr = U64(0)
    req_paddr = U64(8)
    res_paddr = U64(16)


class SnpPageReclaim(Layout, size=8):
    """One quadword: the page's address with its size in bit 0.  [ABI-56860 SNP_PAGE_RECLAIM]"""

    paddr = U64(0)
    page_size = Bits(0)


class SnpPageUnsmash(Layout, size=8):
    """[ABI-56860 SNP_PAGE_UNSMASH]"""

    paddr = U64(0)


class SnpPageMove(Layout, size=32):
    """[ABI-56860 SNP_PAGE_MOVE]"""

    gctx_paddr = U64(0)
    page_size = Bits(64)
    src_paddr = U64(16)
    dst_paddr = U64(24)


class SnpPageMdInit(Layout, size=16):
    """[ABI-56860 SNP_PAGE_MD_INIT]"""

    gctx_paddr = U64(0)
    page_paddr = U64(8)


class SnpPageSetState(Layout, size=16):
    """[ABI-56860 SNP_PAGE_SET_STATE]"""

    length = U32(0)
    list_paddr = U64(8)


class SwapPageType(IntEnum):
    """PAGE_TYPE of the swap commands.  [ABI-56860 SNP_PAGE_SWAP_OUT]"""

    DATA = 0
    METADATA = 1
    VMSA = 2


class SnpPageSwapOut(Layout, size=48):
    """[ABI-56860 SNP_PAGE_SWAP_OUT]"""

    gctx_paddr = U64(0)
    src_paddr = U64(8)
    dst_paddr = U64(16)
    mdata_paddr = U64(24)
    software_data = U64(32)
    page_size = Bits(320)
    page_type = Bits(322, 321)
    root_mdata_en = Bits(324)


class SnpPageSwapIn(Layout, size=48):
    """[ABI-56860 SNP_PAGE_SWAP_IN]"""

    gctx_paddr = U64(0)
    src_paddr = U64(8)
    dst_paddr = U64(16)
    mdata_paddr = U64(24)
    page_size = Bits(320)
    page_type = Bits(322, 321)
    swap_in_place = Bits(323)
    root_mdata_en = Bits(324)


class SnpMdEntry(Layout, size=64):
    """MDATA: what SWAP_IN needs to know of a page that SWAP_OUT took.  [ABI-56860 MDATA]"""

    software_data = U64(0)
    iv = U64(8)
    auth_tag = Bytes(16, 16)
    valid = Bits(256)
    page_validated = Bits(257)
    vmsa = Bits(258)
    metadata = Bits(259)
    page_size = Bits(260)
    gfn = Bits(319, 268)
    vmpl0 = U8(40)
    vmpl1 = U8(41)
    vmpl2 = U8(42)
    vmpl3 = U8(43)
