"""Which MSRs KVM has on AMD, and what a write may set: one row each (arch/x86/kvm/x86.c, svm/svm.c; v6.12).

Rules that need more than a row are msrs.py.  The lists of KVM_GET_MSR_INDEX_LIST are here too: what a VMM
saves and restores.  A kernel without CONFIG_KVM_HYPERV, CONFIG_KVM_XEN and CONFIG_KVM_SMM, kvm.enable_pmu=N.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

__all__ = (
    "ADVERTISED",
    "FEATURES",
    "MSRS",
    "Feature",
    "Msr",
    "PvFeature",
    "Writer",
)

_U64, _U32 = (1 << 64) - 1, (1 << 32) - 1


class Writer(Enum):
    ANYBODY = 1
    HOST = 2
    """User space; the guest's write is refused."""
    HOST_ONLY_KEPT = 3
    """User space; the guest's write is dropped."""
    NOBODY = 4
    """Not an MSR that can be written."""
    DROPPED = 5
    """Every write is dropped."""


class Feature(Enum):
    """CPUID bits: leaf, register, bit."""

    X2APIC = (0x1, "ecx", 21)
    PDCM = (0x1, "ecx", 15)
    TSC_ADJUST = (0x7, "ebx", 1)
    ARCH_CAPABILITIES = (0x7, "edx", 29)
    XSAVES = (0xD, "eax", 3)
    XFD = (0xD, "eax", 4)
    OSVW = (0x8000_0001, "ecx", 9)
    RDTSCP = (0x8000_0001, "edx", 27)
    RDPID = (0x7, "ecx", 22)
    VIRT_SSBD = (0x8000_0008, "ebx", 25)
    TSCRATEMSR = (0x8000_000A, "edx", 4)


class PvFeature(Enum):
    """Bits of CPUID 4000_0001 EAX.  [asm/kvm_para.h]"""

    CLOCKSOURCE = 0
    CLOCKSOURCE2 = 3
    ASYNC_PF = 4
    STEAL_TIME = 5
    PV_EOI = 6
    POLL_CONTROL = 12
    ASYNC_PF_INT = 14


class Msr(NamedTuple):
    """`allowed` bits may be set, others refuse the write; of those, `kept` are kept.

    feature: without it in its CPUID the guest's access is refused.  pv: the same once a VMM enforces the
    guest's features, for user space too.
    """

    reset: int = 0
    allowed: int = _U64
    kept: int = _U64
    writer: Writer = Writer.ANYBODY
    readable: bool = True
    feature: tuple[Feature, ...] = ()
    pv: PvFeature | None = None


_ZERO = Msr(writer=Writer.NOBODY)
_DROPPED = Msr(kept=0, writer=Writer.DROPPED)
_WRITE_ONLY = Msr(kept=0, writer=Writer.DROPPED, readable=False)

_ARCH_CAPABILITIES = sum(1 << n for n in (0, 3, 5, 6, 26, 27, 62))
"""kvm_get_arch_capabilities(): RDCL, SKIP_VMENTRY_L1DFLUSH, MDS, PSCHANGE_MC, GDS, RFDS and ITS, which these
processors do not suffer from."""

_ROWS = {
    0x10: Msr(),  # TSC; # stored: no clock runs
    0x11: Msr(pv=PvFeature.CLOCKSOURCE),  # KVM_WALL_CLOCK
    0x12: Msr(pv=PvFeature.CLOCKSOURCE),  # KVM_SYSTEM_TIME
    0x17: _ZERO,  # PLATFORM_ID
    0x2A: _ZERO,  # EBL_CR_POWERON
    0x2C: Msr(reset=1 << 24, writer=Writer.NOBODY),  # EBC_FREQUENCY_ID
    0x34: Msr(writer=Writer.HOST),  # SMI_COUNT
    0x3B: Msr(),  # TSC_ADJUST
    0x48: Msr(allowed=0x87),  # SPEC_CTRL: IBRS, STIBP, SSBD, PSFD
    0x49: Msr(allowed=1, kept=0, readable=False),  # PRED_CMD: IBPB
    0x79: _WRITE_ONLY,  # UCODE_WRITE
    0x8B: Msr(reset=0x0100_0065, writer=Writer.HOST_ONLY_KEPT),  # UCODE_REV
    0xCD: Msr(reset=3, writer=Writer.NOBODY),  # front side bus
    0xCE: Msr(reset=1 << 31, writer=Writer.HOST),  # PLATFORM_INFO
    0x10A: Msr(
        reset=_ARCH_CAPABILITIES, writer=Writer.HOST, feature=(Feature.ARCH_CAPABILITIES,)
    ),
    0x11E: Msr(reset=0xBE70_2111, kept=0, writer=Writer.DROPPED),  # BBL_CR_CTL3
    0x140: Msr(allowed=1),  # MISC_FEATURES_ENABLES
    0x174: Msr(),  # SYSENTER_CS
    0x175: Msr(),
    0x176: Msr(),
    0x198: Msr(reset=4 << 40 | 1000, writer=Writer.NOBODY),  # PERF_STATUS
    0x199: _ZERO,  # PERF_CTL
    0x1A0: Msr(reset=0x1800),  # MISC_ENABLE: no PEBS, no BTS
    0x1D9: Msr(allowed=0x3F, kept=1),  # DEBUGCTL: LBR; BTF and bits 5:2 are dropped
    **dict.fromkeys(range(0x1DB, 0x1DF), _ZERO),  # LASTBRANCH, LASTINT
    0x1FC: Msr(),  # POWER_CTL
    0x277: Msr(reset=0x0007_0406_0007_0406),  # PAT
    0x345: Msr(allowed=0, writer=Writer.HOST, feature=(Feature.PDCM,)),  # PERF_CAPABILITIES
    **dict.fromkeys((0x606, 0x611, 0x619, 0x639, 0x641), _ZERO),  # RAPL
    0x6E0: Msr(kept=0),  # TSC_DEADLINE: the local APIC's timer is in no such mode
    0xDA0: Msr(allowed=0, feature=(Feature.XSAVES,)),  # XSS
    0x1C4: Msr(allowed=0, feature=(Feature.XFD,)),  # XFD
    0x1C5: Msr(allowed=0, feature=(Feature.XFD,)),  # XFD_ERR
    **dict.fromkeys((0xC1, 0xC2, 0x186, 0x187), _DROPPED),  # P6 counters
    **dict.fromkeys(range(0xC001_0000, 0xC001_0008), _DROPPED),  # K7 counters
    0x4B56_4D00: Msr(pv=PvFeature.CLOCKSOURCE2),
    0x4B56_4D01: Msr(pv=PvFeature.CLOCKSOURCE2),
    0x4B56_4D02: Msr(pv=PvFeature.ASYNC_PF),
    0x4B56_4D03: Msr(allowed=_U64 & ~0x3E, pv=PvFeature.STEAL_TIME),
    0x4B56_4D04: Msr(pv=PvFeature.PV_EOI),
    0x4B56_4D05: Msr(reset=1, allowed=1, pv=PvFeature.POLL_CONTROL),
    0x4B56_4D06: Msr(allowed=0xFF, pv=PvFeature.ASYNC_PF_INT),
    0x4B56_4D07: Msr(kept=0, pv=PvFeature.ASYNC_PF_INT),
    0xC000_0081: Msr(),  # STAR
    0xC000_0082: Msr(),
    0xC000_0083: Msr(),
    0xC000_0084: Msr(),  # SYSCALL_MASK
    0xC000_0102: Msr(),  # KERNEL_GS_BASE
    0xC000_0103: Msr(kept=_U32, feature=(Feature.RDTSCP, Feature.RDPID)),  # TSC_AUX
    0xC000_0104: Msr(reset=1 << 32, allowed=(1 << 40) - 1, feature=(Feature.TSCRATEMSR,)),
    0xC001_0010: _ZERO,  # SYSCFG
    0xC001_0015: Msr(allowed=1 << 24 | 1 << 18 | 0x148, kept=1 << 24 | 1 << 18),  # HWCR
    0xC001_001B: Msr(reset=0x2000_0000, kept=0, writer=Writer.DROPPED),  # K7_CLK_CTL
    0xC001_001F: _DROPPED,  # NB_CFG
    0xC001_0020: _WRITE_ONLY,  # PATCH_LOADER
    0xC001_0055: _ZERO,  # INT_PENDING_MSG
    0xC001_0058: Msr(allowed=0),  # MMIO_CONF_BASE
    0xC001_0112: _ZERO,  # TSEG_ADDR
    0xC001_0113: _ZERO,  # TSEG_MASK
    0xC001_0114: Msr(allowed=0x1F),  # VM_CR
    0xC001_0115: _WRITE_ONLY,  # VM_IGNNE
    0xC001_0117: Msr(kept=_U64 & ~0xFFF),  # VM_HSAVE_PA
    0xC001_011F: Msr(allowed=4, feature=(Feature.VIRT_SSBD,)),  # VIRT_SPEC_CTRL
    0xC001_0140: Msr(feature=(Feature.OSVW,)),
    0xC001_0141: Msr(feature=(Feature.OSVW,)),
    **dict.fromkeys((0xC001_1022, 0xC001_1023, 0xC001_102A, 0xC001_102C), _DROPPED),
    0xC001_1021: Msr(reset=0, writer=Writer.NOBODY),  # IC_CFG
    0xC001_1029: Msr(allowed=2),  # DE_CFG: LFENCE serializes
}
MSRS: Mapping[int, Msr] = MappingProxyType(_ROWS)

_SAVED = (
    *(0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0083, 0xC000_0102, 0xC000_0084, 0xC000_0082),
    *(0x10, 0x277, 0xC001_0117, 0xC000_0103, 0x48),
)
_EMULATED = (
    *(0x12, 0x11, 0x4B56_4D01, 0x4B56_4D00, 0x4B56_4D02, 0x4B56_4D03, 0x4B56_4D04, 0x4B56_4D06),
    *(0x4B56_4D07, 0x3B, 0x6E0, 0x10A, 0x345, 0x1A0, 0x17A, 0x17B, 0x34, 0xCE, 0x140),
    *(0xC001_011F, 0xC000_0104, 0x1FC, 0x8B, 0xC001_0015, 0x4B56_4D05),
)
ADVERTISED = _SAVED + _EMULATED
"""KVM_GET_MSR_INDEX_LIST, in Linux's order: what the processor has, then what KVM emulates."""
FEATURES = (0xC001_1029, 0x8B, 0x10A, 0x345)
"""KVM_GET_MSR_FEATURE_INDEX_LIST"""
