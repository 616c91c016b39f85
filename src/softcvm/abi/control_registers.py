"""Bits of CR0, CR4 and EFER that a processor's own checks look at.  [APM2-24593 §3.1.1, §3.1.3, §3.1.7]"""

__all__ = (
    "CR0_CD",
    "CR0_NW",
    "CR0_PE",
    "CR0_PG",
    "CR0_WP",
    "CR4_OSXSAVE",
    "CR4_PAE",
    "CR4_SMAP",
    "CR4_SMEP",
    "CR4_TSD",
    "EFER_LMA",
    "EFER_LME",
    "EFER_MBZ",
    "EFER_NXE",
    "EFER_SVME",
)

CR0_PE = 1
CR0_WP = 1 << 16
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31
CR4_TSD = 1 << 2
CR4_PAE = 1 << 5
CR4_OSXSAVE = 1 << 18
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11
EFER_SVME = 1 << 12
EFER_MBZ = ~0x36_FD01
"""Bits without a name."""
