"""The CPUID page: the CPUID results a guest may rely on, checked by firmware at launch.

[ABI-56860 r1.58 §8.17.2.6]; Linux: struct snp_cpuid_table (arch/x86/include/asm/sev.h, v7.2).
What firmware lets pass is hw/psp/cpuid_rules.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

from softcvm.abi.layout import U32, U64, Layout

__all__ = (
    "SNP_CPUID_COUNT_MAX",
    "CpuidEntry",
    "CpuidFunction",
    "CpuidPage",
    "read_page",
    "signature_fields",
    "write_page",
)

SNP_CPUID_COUNT_MAX = 64
"""Entries in a page."""


class CpuidFunction(Layout, size=48):
    """One result: the inputs, among them what the OS has enabled, then the registers."""

    eax_in = U32(0)
    ecx_in = U32(4)
    xcr0_in = U64(8)
    xss_in = U64(16)
    eax = U32(24)
    ebx = U32(28)
    ecx = U32(32)
    edx = U32(36)
    reserved = U64(40)


class CpuidPage(Layout, size=4096):
    """The header; CpuidFunction records follow from offset 16."""

    count = U32(0)
    reserved1 = U32(4)
    reserved2 = U64(8)


class CpuidEntry(NamedTuple):
    """A CpuidFunction as plain values."""

    eax_in: int
    ecx_in: int = 0
    xcr0_in: int = 0
    xss_in: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
    reserved: int = 0


_FIRST = 16


def read_page(page: bytes) -> list[CpuidEntry]:
    """The entries that a page's count announces; a count above 64 reads as 64."""
    count = min(CpuidPage(page).count, SNP_CPUID_COUNT_MAX)
    entries = []
    for i in range(count):
        start = _FIRST + i * CpuidFunction.SIZE
        function = CpuidFunction(page[start : start + CpuidFunction.SIZE])
        entries.append(CpuidEntry(*(getattr(function, name) for name in CpuidEntry._fields)))
    return entries


def write_page(entries: Iterable[CpuidEntry]) -> bytes:
    """A page that holds these entries.  Raises ValueError for more than 64."""
    entries = list(entries)
    if len(entries) > SNP_CPUID_COUNT_MAX:
        raise ValueError(f"{len(entries)} CPUID entries; a page holds {SNP_CPUID_COUNT_MAX}")
    page = CpuidPage(count=len(entries))
    for i, entry in enumerate(entries):
        start = _FIRST + i * CpuidFunction.SIZE
        page.data[start : start + CpuidFunction.SIZE] = bytes(CpuidFunction(**entry._asdict()))
    return bytes(page)


def signature_fields(eax: int) -> tuple[int, int, int]:
    """Family, model and stepping of a CPUID 1 EAX.  [APM3-24594 appendix E, Fn0000_0001_EAX]"""
    family = (eax >> 8 & 0xF) + (eax >> 20 & 0xFF)
    model = (eax >> 16 & 0xF) << 4 | (eax >> 4 & 0xF)
    return family, model, eax & 0xF
