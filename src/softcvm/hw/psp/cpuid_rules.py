"""Which CPUID results firmware lets a guest believe.

[ABI-56860 r1.58 §8.17.2.6; PPR-19h-11h §2.1.5.3].  A page is checked entry by entry against
what the processor can do.  A leaf in the standard or extended range that is not in the table
must read as zero; leaves outside both (hypervisor leaves) are not looked at.  Each register of
a known leaf has one rule; values beyond it are corrected, and a page with a correction is
refused as a whole, so that the VMM can read what would have passed.

Genoa's limits are those of firmware 1.55.25 [ASPFW].  Milan's firmware is not published: MILAN
replaces what an EPYC 7763 reports differently (no AVX-512, no five-level paging, fewer extended
leaves).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from softcvm.abi.cpuid import (
    SNP_CPUID_COUNT_MAX,
    CpuidEntry,
    CpuidPage,
    read_page,
    signature_fields,
    write_page,
)
from softcvm.hw.profile import CpuProfile

__all__ = ("GENOA", "MILAN", "Leaf", "rules", "sanitize", "sanitize_page")

Rule = Callable[[int, CpuidEntry, CpuProfile], int]
"""From a register's value, the entry it is in and the processor to the value that may stay."""

_ALL: Final = 0xFFFF_FFFF


def allow(mask: int) -> Rule:
    """Only these bits may be set."""
    return lambda value, _, __: value & mask


def exact(wanted: int) -> Rule:
    return lambda _, __, ___: wanted


def at_most(limit: int) -> Rule:
    return lambda value, _, __: min(value, limit)


def fields(*parts: tuple[int, int, int], free: int = 0) -> Rule:
    """Bit fields (high, low, largest value); `free` bits may be anything, others are zero."""

    def rule(value: int, _: CpuidEntry, __: CpuProfile) -> int:
        kept = value & free
        for high, low, largest in parts:
            mask = (1 << (high - low + 1)) - 1
            kept |= min(value >> low & mask, largest) << low
        return kept

    return rule


def _signature(value: int, _: CpuidEntry, profile: CpuProfile) -> int:
    """Family, model and stepping may name this processor or an older one."""
    value &= 0x0FFF_0FFF
    if signature_fields(value) > signature_fields(profile.signature):
        return profile.signature
    return value


def _clflush_size(value: int, _: CpuidEntry, __: CpuProfile) -> int:
    return value & 0xFFFF_0000 | 8 << 8


def _required(mask: int, allowed: int) -> Rule:
    """Bits of `mask` must be set, others may be as far as `allowed`."""
    return lambda value, _, __: (value | mask) & allowed


_XSAVE_ENDS = (
    (1 << 9, 0x988),
    (1 << 7, 0x980),
    (1 << 6, 0x580),
    (1 << 5, 0x380),
    (1 << 2, 0x340),
)
_XSAVE_SIZES = ((1 << 9, 8), (1 << 7, 0x400), (1 << 6, 0x200), (1 << 5, 0x40), (1 << 2, 0x100))
_CET_SIZES = ((1 << 11, 0x10), (1 << 12, 0x18))
_XSAVE_LEGACY = 0x240


def _xsave_enabled(_: int, entry: CpuidEntry, __: CpuProfile) -> int:
    """Fn0D_x00 EBX: bytes that XSAVE needs, up to the highest component that XCR0 enables."""
    return next((end for bit, end in _XSAVE_ENDS if entry.xcr0_in & bit), _XSAVE_LEGACY)


def _xsave_compact(_: int, entry: CpuidEntry, __: CpuProfile) -> int:
    """Fn0D_x01 EBX: bytes that XSAVES needs, the enabled components packed."""
    size = _XSAVE_LEGACY
    size += sum(length for bit, length in _XSAVE_SIZES if entry.xcr0_in & bit)
    return size + sum(length for bit, length in _CET_SIZES if entry.xss_in & bit)


def _sev_ebx(value: int, _: CpuidEntry, profile: CpuProfile) -> int:
    """Fn8000_001F EBX: the C-bit's position exactly, bits lost as given, VMPLs at most ours."""
    vmpls = min(value >> 12 & 0xF, profile.vmpls)
    return profile.c_bit | value & 0xFC0 | vmpls << 12


@dataclass(frozen=True, slots=True)
class Leaf:
    eax: Rule
    ebx: Rule
    ecx: Rule
    edx: Rule


_ANY = allow(_ALL)
_ZERO = exact(0)
_FREE = Leaf(_ANY, _ANY, _ANY, _ANY)

GENOA: Final[Mapping[tuple[int, int], Leaf]] = {
    (0x0000_0000, 0): Leaf(at_most(0x10), _ANY, _ANY, _ANY),
    (0x0000_0001, 0): Leaf(_signature, _clflush_size, allow(0xFEFA_320B), allow(0x178B_FBFF)),
    (0x0000_0002, 0): _FREE,
    (0x0000_0004, 0): _FREE,
    (0x0000_0005, 0): Leaf(allow(0xFFFF), allow(0xFFFF), allow(0x3), allow(0xFF)),
    (0x0000_0006, 0): Leaf(allow(0x4), _ZERO, allow(0x1), _ZERO),
    (0x0000_0007, 0): Leaf(
        at_most(1), allow(0xF1BF_97A9), allow(0x0041_5FDE), allow(0x1000_0010)
    ),
    (0x0000_0007, 1): Leaf(allow(0x20), _ZERO, _ZERO, _ZERO),
    (0x0000_000B, 0): Leaf(allow(0x1F), allow(0xFFFF), allow(0xFFFF), _ANY),
    (0x0000_000B, 1): Leaf(allow(0x1F), allow(0xFFFF), allow(0xFFFF), _ANY),
    (0x0000_000B, 2): Leaf(allow(0x1F), allow(0xFFFF), allow(0xFFFF), _ANY),
    (0x0000_000D, 0): Leaf(_required(0x3, 0x2E7), _xsave_enabled, _ANY, _ZERO),
    (0x0000_000D, 1): Leaf(allow(0xF), _xsave_compact, allow(0x1800), _ZERO),
    (0x0000_000D, 2): Leaf(exact(0x100), exact(0x240), _ZERO, _ZERO),
    (0x0000_000D, 5): Leaf(exact(0x40), exact(0x340), allow(0x3), _ZERO),
    (0x0000_000D, 6): Leaf(exact(0x200), exact(0x380), allow(0x3), _ZERO),
    (0x0000_000D, 7): Leaf(exact(0x400), exact(0x580), allow(0x3), _ZERO),
    (0x0000_000D, 9): Leaf(exact(0x8), exact(0x980), _ZERO, _ZERO),
    (0x0000_000D, 11): Leaf(exact(0x10), _ZERO, exact(0x1), _ZERO),
    (0x0000_000D, 12): Leaf(exact(0x18), _ZERO, exact(0x1), _ZERO),
    (0x0000_000F, 0): Leaf(_ZERO, _ANY, _ZERO, allow(0x2)),
    (0x0000_000F, 1): Leaf(allow(0x1FF), _ANY, _ANY, allow(0x7)),
    (0x0000_0010, 0): Leaf(_ZERO, allow(0x6), _ZERO, _ZERO),
    (0x0000_0010, 1): Leaf(allow(0x1F), _ANY, allow(0x4), allow(0xFFFF)),
    (0x8000_0000, 0): Leaf(at_most(0x8000_0028), _ANY, _ANY, _ANY),
    (0x8000_0001, 0): Leaf(
        _signature, allow(0xF000_0000), allow(0x75C2_37FF), allow(0x2FD3_FBFF)
    ),
    (0x8000_0002, 0): _FREE,
    (0x8000_0003, 0): _FREE,
    (0x8000_0004, 0): _FREE,
    (0x8000_0005, 0): _FREE,
    (0x8000_0006, 0): Leaf(_ANY, _ANY, _ANY, allow(0xFFFC_FFFF)),
    (0x8000_0007, 0): Leaf(_ZERO, allow(0x3B), _ANY, allow(0x6799)),
    (0x8000_0008, 0): Leaf(
        fields((7, 0, 52), (15, 8, 57), free=0xFF_0000),
        allow(0x79BE_F35F),
        allow(0x0003_F0FF),
        fields((15, 0, 7), (23, 16, 1)),
    ),
    (0x8000_000A, 0): Leaf(allow(0xFF), _ANY, _ZERO, allow(0x1FBF_BCFF)),
    (0x8000_0019, 0): Leaf(_ANY, _ANY, _ZERO, _ZERO),
    (0x8000_001A, 0): Leaf(allow(0x7), _ZERO, _ZERO, _ZERO),
    (0x8000_001B, 0): Leaf(allow(0xBFF), _ZERO, _ZERO, _ZERO),
    (0x8000_001D, 0): Leaf(allow(0x03FF_C3FF), _ANY, _ANY, allow(0x3)),
    (0x8000_001D, 1): Leaf(allow(0x03FF_C3FF), _ANY, _ANY, allow(0x3)),
    (0x8000_001D, 2): Leaf(allow(0x03FF_C3FF), _ANY, _ANY, allow(0x3)),
    (0x8000_001D, 3): Leaf(allow(0x03FF_C3FF), _ANY, _ANY, allow(0x3)),
    (0x8000_001D, 4): Leaf(allow(0xF), _ZERO, _ANY, _ZERO),
    (0x8000_001E, 0): Leaf(_ANY, allow(0xFFFF), allow(0x7FF), _ZERO),
    (0x8000_001F, 0): Leaf(allow(0x030F_FFFF), _sev_ebx, _ANY, _ANY),
    (0x8000_0020, 0): Leaf(_ZERO, allow(0x1E), _ZERO, _ZERO),
    (0x8000_0020, 1): Leaf(_ANY, _ZERO, _ZERO, _ANY),
    (0x8000_0020, 2): Leaf(_ANY, _ZERO, _ZERO, _ANY),
    (0x8000_0020, 3): Leaf(_ZERO, _ANY, allow(0x7F), _ZERO),
    (0x8000_0021, 0): Leaf(allow(0x1806_2FCF), allow(0xFFF), _ZERO, _ZERO),
    (0x8000_0022, 0): Leaf(
        allow(0x7), fields((3, 0, 6), (9, 4, 16), free=0xFFFF_FC00), _ANY, _ZERO
    ),
    (0x8000_0023, 0): Leaf(allow(0x1), _ANY, _ZERO, _ZERO),
    (0x8000_0024, 0): Leaf(at_most(1), allow(0x1), allow(0x3), _ZERO),
    (0x8000_0024, 1): Leaf(allow(0x1FF), _ZERO, _ZERO, _ZERO),
    (0x8000_0026, 0): _FREE,
    (0x8000_0026, 1): _FREE,
    (0x8000_0026, 2): _FREE,
    (0x8000_0026, 3): _FREE,
}

_NOT_ON_MILAN = (
    (0x0000_0007, 1),
    (0x0000_000D, 5),
    (0x0000_000D, 6),
    (0x0000_000D, 7),
    (0x8000_0022, 0),
    (0x8000_0024, 0),
    (0x8000_0024, 1),
    (0x8000_0026, 0),
    (0x8000_0026, 1),
    (0x8000_0026, 2),
    (0x8000_0026, 3),
)

MILAN: Final[Mapping[tuple[int, int], Leaf]] = {
    **{leaf: rule for leaf, rule in GENOA.items() if leaf not in _NOT_ON_MILAN},
    (0x0000_0007, 0): Leaf(_ZERO, allow(0x219C_97A9), allow(0x0040_069C), allow(0x10)),
    (0x0000_000D, 0): Leaf(_required(0x3, 0x207), _xsave_enabled, _ANY, _ZERO),
    (0x8000_0000, 0): Leaf(at_most(0x8000_0023), _ANY, _ANY, _ANY),
    (0x8000_0008, 0): Leaf(
        fields((7, 0, 48), (15, 8, 48), free=0xFF_0000),
        allow(0x111E_F657),
        allow(0x0003_F0FF),
        fields((15, 0, 7), (23, 16, 1)),
    ),
    (0x8000_000A, 0): Leaf(allow(0xFF), _ANY, _ZERO, allow(0x119B_9CFF)),
    (0x8000_001B, 0): Leaf(allow(0x3FF), _ZERO, _ZERO, _ZERO),
    (0x8000_0021, 0): Leaf(allow(0x204D), _ZERO, _ZERO, _ZERO),
}

_BY_MODEL: Final = {(25, 1): MILAN, (25, 17): GENOA}
_STANDARD = range(0x1_0000)
_EXTENDED = range(0x8000_0000, 0x8001_0000)


def rules(profile: CpuProfile) -> Mapping[tuple[int, int], Leaf]:
    """The table of one processor: (EAX input, ECX input) -> rules."""
    return _BY_MODEL[profile.family, profile.model]


def sanitize(profile: CpuProfile, entry: CpuidEntry) -> CpuidEntry:
    """The entry as firmware would let it pass; the same one when nothing is wrong with it."""
    if entry.eax_in not in _STANDARD and entry.eax_in not in _EXTENDED:
        return entry
    leaf = rules(profile).get((entry.eax_in, entry.ecx_in))
    if leaf is None:
        return entry._replace(eax=0, ebx=0, ecx=0, edx=0, reserved=0)
    return entry._replace(
        eax=leaf.eax(entry.eax, entry, profile),
        ebx=leaf.ebx(entry.ebx, entry, profile),
        ecx=leaf.ecx(entry.ecx, entry, profile),
        edx=leaf.edx(entry.edx, entry, profile),
        reserved=0,
    )


def sanitize_page(profile: CpuProfile, page: bytes) -> bytes | None:
    """What firmware writes back over a refused page; None when the page passes.

    A bad header is refused as it is: there is nothing to correct in it.
    """
    header = CpuidPage(page)
    if header.reserved1 or header.reserved2 or header.count > SNP_CPUID_COUNT_MAX:
        return page
    given = read_page(page)
    corrected = [sanitize(profile, entry) for entry in given]
    if corrected == given:
        return None
    end = len(given) * 48 + 16
    return write_page(corrected)[:end] + page[end:]
