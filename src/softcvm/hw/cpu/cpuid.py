"""What the CPUID instruction answers on each processor.  [APM3-24594 appendix E; PPR-19h-01h, PPR-19h-11h]

Feature words are those of the processor models; what depends on the machine (signature, address widths,
C-bit, ASIDs, VMPLs) is the profile's.  Leaves about frequency, power and performance monitoring are left
out and read as zero, as any leaf that is not listed does.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from softcvm.hw.profile import GENOA, MILAN, CpuProfile

__all__ = ("CpuidResult", "cpuid", "leaves")


class CpuidResult(NamedTuple):
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


Leaves = Mapping[tuple[int, int], CpuidResult]

_VENDOR = CpuidResult(0, 0x6874_7541, 0x444D_4163, 0x6974_6E65)  # AuthenticAMD
_PHYS_BITS_ALL = {MILAN.name: 48, GENOA.name: 52}

_COMMON = {
    (0x5, 0): CpuidResult(0x40, 0x40, 0x3, 0x11),
    (0x6, 0): CpuidResult(0x4, 0, 0x1, 0),
    (0xD, 2): CpuidResult(0x100, 0x240),
    (0xD, 9): CpuidResult(0x8, 0x980),
    (0xD, 11): CpuidResult(0x10, 0, 0x1),
    (0xD, 12): CpuidResult(0x18, 0, 0x1),
    (0x8000_0005, 0): CpuidResult(0xFF40_FF40, 0xFF40_FF40, 0x2008_0140, 0x2008_0140),
    (0x8000_0007, 0): CpuidResult(0, 0x3B, 0, 0x6799),
    (0x8000_0019, 0): CpuidResult(0xF040_F040, 0xF040_0000),
    (0x8000_001A, 0): CpuidResult(0x6),
    (0x8000_001D, 0): CpuidResult(0x4121, 0x01C0_003F, 0x3F),
    (0x8000_001D, 1): CpuidResult(0x4122, 0x01C0_003F, 0x3F),
    (0x8000_001E, 0): CpuidResult(0, 0x100),
}

_MODELS = {
    MILAN.name: {
        (0x1, 0): CpuidResult(0, 0x0000_0800, 0x7EFA_320B, 0x178B_FBFF),
        (0x7, 0): CpuidResult(0, 0x219C_97A9, 0x0040_069C, 0x10),
        (0xD, 0): CpuidResult(0x207, 0x988, 0x988),
        (0xD, 1): CpuidResult(0xF, 0x348, 0x1800),
        (0x8000_0001, 0): CpuidResult(0, 0x4000_0000, 0x75C2_37FF, 0x2FD3_FBFF),
        (0x8000_0006, 0): CpuidResult(0x4800_2200, 0x6800_4200, 0x0200_6140, 0x0200_9140),
        (0x8000_000A, 0): CpuidResult(1, 0x8000, 0, 0x119B_9CFF),
        (0x8000_001B, 0): CpuidResult(0x3FF),
        (0x8000_001D, 2): CpuidResult(0x4143, 0x01C0_003F, 0x3FF, 0x2),
        (0x8000_001D, 3): CpuidResult(0x3_C163, 0x03C0_003F, 0x7FFF, 0x1),
        (0x8000_0021, 0): CpuidResult(0x4D),
    },
    GENOA.name: {
        (0x1, 0): CpuidResult(0, 0x0000_0800, 0x7EFA_320B, 0x178B_FBFF),
        (0x7, 0): CpuidResult(0x1, 0xF1BF_97A9, 0x0041_5FDE, 0x1000_0010),
        (0x7, 1): CpuidResult(0x20),
        (0xD, 0): CpuidResult(0x2E7, 0x988, 0x988),
        (0xD, 1): CpuidResult(0xF, 0x348, 0x1800),
        (0xD, 5): CpuidResult(0x40, 0x340),
        (0xD, 6): CpuidResult(0x200, 0x380),
        (0xD, 7): CpuidResult(0x400, 0x580),
        (0x8000_0001, 0): CpuidResult(0, 0x4000_0000, 0x75C2_37FF, 0x2FD3_FBFF),
        (0x8000_0006, 0): CpuidResult(0x5C00_2200, 0x6C00_4200, 0x0400_6140, 0x0800_9140),
        (0x8000_000A, 0): CpuidResult(1, 0x8000, 0, 0x1EBF_BCFF),
        (0x8000_001B, 0): CpuidResult(0xBFF),
        (0x8000_001D, 2): CpuidResult(0x4143, 0x01C0_003F, 0x7FF, 0x2),
        (0x8000_001D, 3): CpuidResult(0x3_C163, 0x03C0_003F, 0x7FFF, 0x1),
        (0x8000_0021, 0): CpuidResult(0x2FCF, 0x15C),
    },
}

_STANDARD_MAX = 0x10
_EXTENDED_MAX = {MILAN.name: 0x8000_0023, GENOA.name: 0x8000_0028}
_ADDRESS_EBX = {MILAN.name: 0x111E_F657, GENOA.name: 0x791E_F257}
_LINEAR_BITS = {MILAN.name: 48, GENOA.name: 57}

# Fn8000_001F EAX: SME, SEV, page flush MSR, ES, SNP, VMPL, ..., coherence, 64-bit host, ...
_SME, _SEV, _PAGE_FLUSH, _SEV_ES, _SNP, _VMPL = (1 << n for n in range(6))
_RMPQUERY, _COHERENT, _HOST_64BIT, _RESTRICTED, _ALTERNATE, _DEBUG_SWAP = (
    1 << n for n in (6, 10, 11, 12, 13, 14)
)
_RMPREAD = 1 << 21


def leaves(profile: CpuProfile) -> Leaves:
    """Every leaf that is not zero: (EAX input, ECX input) -> registers."""
    name = profile.name
    model = _MODELS[name]
    table = {**_COMMON, **model}
    table[0x0, 0] = _VENDOR._replace(eax=_STANDARD_MAX)
    table[0x8000_0000, 0] = _VENDOR._replace(eax=_EXTENDED_MAX[name])
    for leaf in ((0x1, 0), (0x8000_0001, 0)):
        table[leaf] = table[leaf]._replace(eax=profile.signature)
    features = table[0x1, 0]
    table[0x1, 0] = features._replace(ebx=features.ebx | profile.cpus << 16)
    table.update(_brand(profile))
    table[0x8000_0008, 0] = CpuidResult(
        _LINEAR_BITS[name] << 8 | _PHYS_BITS_ALL[name],
        _ADDRESS_EBX[name],
        (profile.cpus - 1).bit_length() << 12 | profile.cpus - 1,
        0x1_0007,
    )
    table[0x8000_001F, 0] = _memory_encryption(profile)
    return MappingProxyType(dict(sorted(table.items())))


def cpuid(profile: CpuProfile, function: int, index: int = 0) -> CpuidResult:
    """CPUID with EAX=function and ECX=index on this processor."""
    return leaves(profile).get((function, index), CpuidResult())


def _brand(profile: CpuProfile) -> dict[tuple[int, int], CpuidResult]:
    """Fn8000_0002 to 4: the processor's name in 48 bytes."""
    text = f"AMD EPYC {profile.name.capitalize()} (softcvm)".encode().ljust(48, b"\0")
    words = [int.from_bytes(text[i : i + 4], "little") for i in range(0, 48, 4)]
    return {(0x8000_0002 + i, 0): CpuidResult(*words[4 * i : 4 * i + 4]) for i in range(3)}


def _memory_encryption(profile: CpuProfile) -> CpuidResult:
    eax = _SME | _SEV | _PAGE_FLUSH | _SEV_ES | _SNP | _VMPL | _RMPQUERY | _HOST_64BIT
    eax |= _RESTRICTED | _ALTERNATE | _DEBUG_SWAP
    if profile.sme_coherent:
        eax |= _COHERENT
    if profile.has_rmpread:
        eax |= _RMPREAD
    ebx = profile.c_bit | profile.phys_bits_lost << 6 | profile.vmpls << 12
    if profile.coherency_sfw_no:
        ebx |= 1 << 31
    return CpuidResult(eax, ebx, profile.max_asid, profile.min_sev_asid)
