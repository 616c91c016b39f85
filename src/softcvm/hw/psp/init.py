"""SNP_INIT, SNP_INIT_EX, SNP_SHUTDOWN, SNP_SHUTDOWN_EX, SNP_DF_FLUSH.  [ABI-56860 r1.58; ASPFW]

Owns the platform's start and end and the RMP as firmware first writes it.  Preconditions in
registers are hw/sysregs.py; MTRRs and the IOMMU are taken to be as Linux leaves them
(docs/support.md).
"""

from typing import TYPE_CHECKING

from softcvm.abi.snp_firmware import SnpStatus
from softcvm.abi.snp_platform import (
    RANGE_LIST_MAX,
    PlatformState,
    SnpInitEx,
    SnpRange,
    SnpRangeListHeader,
    SnpShutdownEx,
)
from softcvm.hw.psp.operands import Refused, read, reserved_bits_set
from softcvm.hw.rmp import ASSIGNED, HYPERVISOR, IMMUTABLE, LOCK, RmpVal
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT
from softcvm.sim.rangemap import RangeMap

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = (
    "FIRMWARE",
    "HV_FIXED",
    "read_range_list",
    "snp_df_flush",
    "snp_init",
    "snp_init_ex",
    "snp_shutdown",
    "snp_shutdown_ex",
)

HV_FIXED: RmpVal = (IMMUTABLE, 0)
FIRMWARE: RmpVal = (ASSIGNED | IMMUTABLE | LOCK, 0)

_KNOWN_HV_FIXED = ((0xA_0000, 0xC_0000), (0xFD_0000_0000, 0xFE_0000_0000))
"""ASEG, and the addresses HyperTransport once used.  (The model has no TSEG.)"""
_RMP_ALIGN = 1 << 20


def snp_init(psp: "Psp", _: None) -> SnpStatus:
    """SNP_INIT: as SNP_INIT_EX with INIT_RMP and no list."""
    return _init(psp, SnpInitEx(init_rmp=1))


def snp_init_ex(psp: "Psp", cmd: SnpInitEx) -> SnpStatus:
    # RESERVED: firmware before 1.58 knows INIT_RMP and LIST_PADDR_EN only.
    if reserved_bits_set(cmd):
        return SnpStatus.INVALID_PARAM
    if cmd.rapl_dis or cmd.ciphertext_hiding_en or cmd.tio_en or cmd.max_snp_asid:
        return SnpStatus.INVALID_PARAM
    return _init(psp, cmd)


def _init(psp: "Psp", cmd: SnpInitEx) -> SnpStatus:
    rmp = psp.soc.rmp
    # STATE
    if psp.snp_state is not PlatformState.UNINIT or psp.sev_state is not PlatformState.UNINIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PARAMETERS
    if not cmd.init_rmp:
        if not psp.rmp_initialized or psp.rmp_tcb != psp.tcb:
            return SnpStatus.RMP_INIT_REQUIRED
        if cmd.list_paddr_en:
            return SnpStatus.INVALID_PARAM
    # CONFIGURATION
    if not psp.soc.sysregs.ready_for_snp_init(init_rmp=bool(cmd.init_rmp)) or not rmp.end:
        return SnpStatus.INVALID_CONFIG
    if (rmp.base | rmp.end + 1) % _RMP_ALIGN:
        return SnpStatus.INVALID_CONFIG
    if rmp.end >= psp.soc.memory_pages << PAGE_SHIFT:
        return SnpStatus.INVALID_CONFIG
    # RMP
    if cmd.init_rmp:
        fixed = read_range_list(psp, cmd.list_paddr) if cmd.list_paddr_en else []
        target = _initial_rmp(psp, fixed)
        first, last = rmp.base >> PAGE_SHIFT, rmp.end >> PAGE_SHIFT
        if last >= target.limit or any(
            v != HYPERVISOR for _, _, v in target.runs(first, last + 1)
        ):
            return SnpStatus.RMP_INITIALIZATION_FAILED
        target.set(first, last + 1, FIRMWARE)
        for start, end, value in target.runs():
            rmp.store("SNP_INIT", start, end, value)
        psp.rmp_initialized = True
        psp.rmp_tcb = psp.tcb
    # OUTPUT
    psp.asids.all_dirty()
    psp.guest_count = 0
    psp.snp_state = PlatformState.INIT
    return SnpStatus.SUCCESS


def _initial_rmp(psp: "Psp", fixed: list[tuple[int, int]]) -> RangeMap[RmpVal]:
    """The table before firmware takes its pages: DRAM is the hypervisor's, the rest fixed."""
    covered = psp.soc.rmp.covered_pages
    target: RangeMap[RmpVal] = RangeMap(HV_FIXED, covered)
    target.set(0, min(psp.soc.memory_pages, covered), HYPERVISOR)
    known = [(lo >> PAGE_SHIFT, hi >> PAGE_SHIFT) for lo, hi in _KNOWN_HV_FIXED]
    for start, end in [*fixed, *known]:
        if start < min(end, covered):
            target.set(start, min(end, covered), HV_FIXED)
    return target


def read_range_list(
    psp: "Psp", list_paddr: int, align: int = PAGE_MASK
) -> list[tuple[int, int]]:
    """Page ranges [start, end) of a RANGE_LIST, with the RMP's own pages left out.

    INVALID_PARAM for a list that leaves its page, a reserved field, or a base with bits of
    `align`.  (Firmware 1.55.25 drops that status in SNP_INIT_EX and initialises without the
    rest of the list.)
    """
    header = SnpRangeListHeader(read(psp, list_paddr, SnpRangeListHeader.SIZE))
    count = header.num_elements
    first = list_paddr + SnpRangeListHeader.SIZE
    room = PAGE_MASK + 1 - (first & PAGE_MASK)
    if reserved_bits_set(header) or count > RANGE_LIST_MAX or count * SnpRange.SIZE > room:
        raise Refused(SnpStatus.INVALID_PARAM)
    rmp = psp.soc.rmp
    own = (rmp.base >> PAGE_SHIFT, (rmp.end + 1) >> PAGE_SHIFT)
    ranges: list[tuple[int, int]] = []
    for i in range(count):
        record = SnpRange(read(psp, first + i * SnpRange.SIZE, SnpRange.SIZE))
        base = record.base & ~psp.c_bit
        if reserved_bits_set(record) or base & align:
            raise Refused(SnpStatus.INVALID_PARAM)
        start = base >> PAGE_SHIFT
        end = start + record.page_count
        pieces = ((start, min(end, own[0])), (max(start, own[1]), end))
        ranges.extend((first, last) for first, last in pieces if first < last)
    return ranges


def snp_shutdown(psp: "Psp", _: None) -> SnpStatus:
    return _shutdown(psp, None)


def snp_shutdown_ex(psp: "Psp", cmd: SnpShutdownEx) -> SnpStatus:
    return _shutdown(psp, cmd)


def _shutdown(psp: "Psp", cmd: SnpShutdownEx | None) -> SnpStatus:
    # STATE
    if psp.sev_state is not PlatformState.UNINIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    if psp.snp_state is PlatformState.UNINIT:
        return SnpStatus.SUCCESS
    if not psp.asids.clean():
        return SnpStatus.DFFLUSH_REQUIRED
    # PARAMETERS
    if cmd is not None:
        if cmd.len != cmd.SIZE or reserved_bits_set(cmd):
            return SnpStatus.INVALID_PARAM
        if cmd.x86_snp_shutdown and not cmd.iommu_snp_shutdown:
            return SnpStatus.INVALID_PARAM
    # OUTPUT
    psp.snp_state = PlatformState.UNINIT
    psp.guest_count = 0
    if cmd is not None and cmd.iommu_snp_shutdown:
        psp.rmp_initialized = False
        psp.soc.keys.clear()
        if cmd.x86_snp_shutdown:
            psp.soc.sysregs.clear_snp_enable()
    return SnpStatus.SUCCESS


def snp_df_flush(psp: "Psp", _: None) -> SnpStatus:
    """SNP_DF_FLUSH and the legacy DF_FLUSH are one."""
    psp.soc.counters.df_flush += 1
    return SnpStatus.SUCCESS if psp.asids.flush() else SnpStatus.WBINVD_REQUIRED
