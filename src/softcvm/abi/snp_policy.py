"""The guest policy: what an owner demands of the platform, fixed at LAUNCH_START.

[ABI-56860 r1.58 Guest Policy]; Linux: SNP_POLICY_MASK_* in include/linux/psp-sev.h, v7.2.
"""

from enum import IntFlag

__all__ = ("GuestPolicy", "min_abi")


class GuestPolicy(IntFlag):
    """Bits 63:16; bits 15:0 are the lowest ABI version that will do."""

    SMT = 1 << 16
    RSVD_MBO = 1 << 17
    MIGRATE_MA = 1 << 18
    DEBUG = 1 << 19
    SINGLE_SOCKET = 1 << 20
    CXL_ALLOW = 1 << 21
    MEM_AES_256_XTS = 1 << 22
    RAPL_DIS = 1 << 23
    CIPHERTEXT_HIDING_DRAM = 1 << 24
    PAGE_SWAP_DISABLE = 1 << 25


def min_abi(policy: int) -> tuple[int, int]:
    """ABI_MAJOR and ABI_MINOR of a policy."""
    return policy >> 8 & 0xFF, policy & 0xFF
