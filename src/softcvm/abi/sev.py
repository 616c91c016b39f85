"""What user space hands to KVM_MEMORY_ENCRYPT_OP and to /dev/sev.

arch/x86/include/uapi/asm/kvm.h and include/uapi/linux/psp-sev.h, v6.12; id 103 from v7.0.  Positions are
checked against a C compiler in tests/abi.  Firmware's own command buffers are abi/snp_firmware.py.
"""

from enum import IntEnum

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.layout import U8, U16, U32, U64, Bytes, Layout

__all__ = (
    "INITIAL_VMSA_GPA",
    "KVM_SEV_SNP_FINISH_DATA_SIZE",
    "KVM_SEV_SNP_ID_AUTH_SIZE",
    "KVM_SEV_SNP_ID_BLOCK_SIZE",
    "KVM_X86_GRP_SEV",
    "KVM_X86_SEV_VMSA_FEATURES",
    "SEV_FW_BLOB_MAX_SIZE",
    "SEV_ISSUE_CMD",
    "SEV_MAX",
    "SEV_RET_NO_FW_CALL",
    "SEV_USER_PAGE_TYPES",
    "KvmSevCmd",
    "KvmSevDbg",
    "KvmSevGuestStatus",
    "KvmSevInit",
    "KvmSevLaunchMeasure",
    "KvmSevLaunchSecret",
    "KvmSevLaunchStart",
    "KvmSevLaunchUpdateData",
    "KvmSevSnpLaunchFinish",
    "KvmSevSnpLaunchStart",
    "KvmSevSnpLaunchUpdate",
    "SevCmdId",
    "SevIssueCmd",
    "SevUserCmd",
)


class SevCmdId(IntEnum):
    """enum sev_cmd_id: the id of a KVM_MEMORY_ENCRYPT_OP."""

    INIT = 0
    ES_INIT = 1
    LAUNCH_START = 2
    LAUNCH_UPDATE_DATA = 3
    LAUNCH_UPDATE_VMSA = 4
    LAUNCH_SECRET = 5
    LAUNCH_MEASURE = 6
    LAUNCH_FINISH = 7
    SEND_START = 8
    SEND_UPDATE_DATA = 9
    SEND_UPDATE_VMSA = 10
    SEND_FINISH = 11
    RECEIVE_START = 12
    RECEIVE_UPDATE_DATA = 13
    RECEIVE_UPDATE_VMSA = 14
    RECEIVE_FINISH = 15
    GUEST_STATUS = 16
    DBG_DECRYPT = 17
    DBG_ENCRYPT = 18
    CERT_EXPORT = 19
    GET_ATTESTATION_REPORT = 20
    SEND_CANCEL = 21
    INIT2 = 22
    SNP_LAUNCH_START = 100
    SNP_LAUNCH_UPDATE = 101
    SNP_LAUNCH_FINISH = 102
    SNP_ENABLE_REQ_CERTS = 103


class KvmSevCmd(Layout, size=24):
    """struct kvm_sev_cmd.  `error` is firmware's status and means something only when firmware ran."""

    id = U32(0)
    pad0 = U32(4)
    data_ptr = U64(8)  # `data` in C
    error = U32(16)
    sev_fd = U32(20)


class KvmSevInit(Layout, size=48):
    """struct kvm_sev_init (INIT2).  The pads are not checked by the kernel."""

    vmsa_features = U64(0)
    flags = U32(8)
    ghcb_version = U16(12)
    pad1 = U16(14)
    pad2 = Bytes(16, 32)


class KvmSevLaunchStart(Layout, size=40):
    """struct kvm_sev_launch_start.  handle: of a guest to share a key with, or 0; comes back."""

    handle = U32(0)
    policy = U32(4)
    dh_uaddr = U64(8)
    dh_len = U32(16)
    pad0 = U32(20)
    session_uaddr = U64(24)
    session_len = U32(32)
    pad1 = U32(36)


class KvmSevLaunchUpdateData(Layout, size=16):
    """struct kvm_sev_launch_update_data."""

    uaddr = U64(0)
    len = U32(8)
    pad0 = U32(12)


class KvmSevLaunchSecret(Layout, size=48):
    """struct kvm_sev_launch_secret."""

    hdr_uaddr = U64(0)
    hdr_len = U32(8)
    pad0 = U32(12)
    guest_uaddr = U64(16)
    guest_len = U32(24)
    pad1 = U32(28)
    trans_uaddr = U64(32)
    trans_len = U32(40)
    pad2 = U32(44)


class KvmSevLaunchMeasure(Layout, size=16):
    """struct kvm_sev_launch_measure.  len 0 asks how long a measurement is."""

    uaddr = U64(0)
    len = U32(8)
    pad0 = U32(12)


class KvmSevGuestStatus(Layout, size=12):
    """struct kvm_sev_guest_status."""

    handle = U32(0)
    policy = U32(4)
    state = U32(8)


class KvmSevDbg(Layout, size=24):
    """struct kvm_sev_dbg."""

    src_uaddr = U64(0)
    dst_uaddr = U64(8)
    len = U32(16)
    pad0 = U32(20)


class KvmSevSnpLaunchStart(Layout, size=64):
    """struct kvm_sev_snp_launch_start."""

    policy = U64(0)
    gosvw = Bytes(8, 16)
    flags = U16(24)
    pad0 = Bytes(26, 6)
    pad1 = Bytes(32, 32)


class KvmSevSnpLaunchUpdate(Layout, size=64):
    """struct kvm_sev_snp_launch_update.  gfn_start counts pages, len bytes; both come back advanced."""

    gfn_start = U64(0)
    uaddr = U64(8)
    len = U64(16)
    type = U8(24)
    pad0 = U8(25)
    flags = U16(26)
    pad1 = U32(28)
    pad2 = Bytes(32, 32)


class KvmSevSnpLaunchFinish(Layout, size=88):
    """struct kvm_sev_snp_launch_finish."""

    id_block_uaddr = U64(0)
    id_auth_uaddr = U64(8)
    id_block_en = U8(16)
    auth_key_en = U8(17)
    vcek_disabled = U8(18)
    host_data = Bytes(19, 32)
    pad0 = Bytes(51, 3)
    flags = U16(54)
    pad1 = Bytes(56, 32)


KVM_SEV_SNP_ID_BLOCK_SIZE = 96
KVM_SEV_SNP_ID_AUTH_SIZE = 4096
KVM_SEV_SNP_FINISH_DATA_SIZE = 32

KVM_X86_GRP_SEV = 1
"""Device attribute group on /dev/kvm."""
KVM_X86_SEV_VMSA_FEATURES = 0

SEV_USER_PAGE_TYPES = frozenset(LaunchPageType) - {LaunchPageType.VMSA}
"""KVM_SEV_SNP_PAGE_TYPE_*: what user space may name; VMSA pages are KVM's own."""

INITIAL_VMSA_GPA = 0xFFFF_FFFF_F000
"""The GPA at which KVM has every vCPU's first VMSA measured (arch/x86/kvm/svm/sev.c)."""

SEV_FW_BLOB_MAX_SIZE = 0x4000


class SevUserCmd(IntEnum):
    """Commands of SEV_ISSUE_CMD on /dev/sev (include/uapi/linux/psp-sev.h)."""

    FACTORY_RESET = 0
    PLATFORM_STATUS = 1
    PEK_GEN = 2
    PEK_CSR = 3
    PDH_GEN = 4
    PDH_CERT_EXPORT = 5
    PEK_CERT_IMPORT = 6
    GET_ID = 7
    GET_ID2 = 8
    SNP_PLATFORM_STATUS = 9
    SNP_COMMIT = 10
    SNP_SET_CONFIG = 11
    SNP_VLEK_LOAD = 12


SEV_MAX = 13

SEV_RET_NO_FW_CALL = -1
"""Linux's own status: firmware was not called."""

SEV_ISSUE_CMD = 0xC010_5300
"""_IOWR('S', 0, struct sev_issue_cmd)"""


class SevIssueCmd(Layout, size=16):
    """struct sev_issue_cmd, packed."""

    cmd = U32(0)
    data_ptr = U64(4)  # `data` in C
    error = U32(12)
