"""The Reverse Map Table as it lies in memory, and what the instructions on it take and return.

[APM2-24593 §15.36] and [APM3-24594 RMPUPDATE, PSMASH, RMPREAD, PVALIDATE, RMPADJUST, RMPQUERY]; the raw
entry is not architectural [PPR-19h-11h].  Linux names: arch/x86/virt/svm/sev.c, v7.2.
"""

from enum import IntEnum, IntFlag
from typing import NamedTuple

from softcvm.abi.layout import U8, U32, U64, Bits, Layout

__all__ = (
    "GPA_TAG_FW_IOMMU",
    "GPA_TAG_MASK",
    "GPA_TAG_METADATA",
    "PVALIDATE_FAIL_NOUPDATE",
    "RMPTABLE_CPU_BOOKKEEPING_SZ",
    "PageState",
    "PsmashStatus",
    "PvalidateStatus",
    "RmpEntryRaw",
    "RmpPageSize",
    "RmpReadOut",
    "RmpState",
    "RmpStateLayout",
    "RmpadjustStatus",
    "RmpqueryStatus",
    "RmpreadStatus",
    "RmpupdateStatus",
    "VmplPerm",
)

RMPTABLE_CPU_BOOKKEEPING_SZ = 0x4000
"""Bytes at the start of the RMP that hold per-ASID page counts, not entries."""


class RmpPageSize(IntEnum):
    PG_4K = 0
    PG_2M = 1


class RmpEntryRaw(Layout, size=16):
    """RMP entry as it lies in memory; not architectural.  [PPR-19h-11h]"""

    assigned = Bits(0)
    pagesize = Bits(1)  # 0: 4K, 1: 2M
    immutable = Bits(2)
    subpage_count = Bits(
        11, 3
    )  # in a 2M-aligned entry: assigned 4K entries among the other 511
    gpa = Bits(50, 12)  # gfn, not gpa: the low 12 bits are not stored
    asid = Bits(60, 51)
    vmsa = Bits(61)
    validated = Bits(62)
    lock = Bits(63)
    vmpl0 = Bits(71, 64)
    vmpl1 = Bits(79, 72)
    vmpl2 = Bits(87, 80)
    vmpl3 = Bits(95, 88)


class RmpStateLayout(Layout, size=16):
    """What RMPUPDATE reads and RMPREAD writes (Linux struct rmp_state).  [APM3-24594 RMPUPDATE]"""

    gpa = U64(0)
    assigned = U8(8)
    pagesize = U8(9)
    immutable = U8(10)
    asid = U32(12)


class RmpReadOut(RmpStateLayout, size=16):
    """RMPREAD adds one bit.  [APM3-24594 RMPREAD]"""

    rmpread_pagesize = Bits(72)
    hpage_region_status = Bits(73)  # 2M-aligned and another 4K page of the region is assigned


class RmpState(NamedTuple):
    """One RMPUPDATE request, decoded.  gpa is in bytes; pagesize is an RmpPageSize."""

    assigned: int = 0
    pagesize: int = 0
    immutable: int = 0
    gpa: int = 0
    asid: int = 0


class RmpupdateStatus(IntEnum):
    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4


class PsmashStatus(IntEnum):
    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_BADADDR = 4


class PvalidateStatus(IntEnum):
    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_SIZEMISMATCH = 6


PVALIDATE_FAIL_NOUPDATE = 255
"""What Linux calls success with CF=1; the processor never returns it."""


class RmpadjustStatus(IntEnum):
    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_SIZEMISMATCH = 6


class RmpqueryStatus(IntEnum):
    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_SIZEMISMATCH = 6


class RmpreadStatus(IntEnum):
    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2


class VmplPerm(IntFlag):
    """A VMPL permission mask.  [APM2-24593 Table 15-38]"""

    READ = 1
    WRITE = 2
    EXECUTE_USER = 4
    EXECUTE_SUPERVISOR = 8
    SUPERVISOR_SHADOW_STACK = 16
    ALL = 31


class PageState(IntEnum):
    """Page states and their numbers in firmware.  [ABI-56860 §5.3 Table 3]"""

    INVALID = 0
    DEFAULT = 1
    HYPERVISOR = 2
    HV_FIXED = 3
    FIRMWARE = 4
    FIRMWARE_IOMMU = 5
    RECLAIM = 6
    CONTEXT = 7
    METADATA = 8
    PRE_GUEST = 9
    PRE_SWAP = 10
    GUEST_INVALID = 11
    GUEST_VALID = 12


# Firmware marks its own immutable pages in bits 38:36 of the gpa field (a frame number).
GPA_TAG_MASK = 7 << 36
GPA_TAG_METADATA = 1 << 36
GPA_TAG_FW_IOMMU = 2 << 36
