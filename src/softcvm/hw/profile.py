"""What differs between the processors that the model can be: one frozen table each.

A rule that depends on the machine reads a field here; no rule asks for a name.
"""

from dataclasses import dataclass

__all__ = ("GENOA", "MILAN", "PROFILES", "CpuProfile")


@dataclass(frozen=True, slots=True)
class CpuProfile:
    """One processor generation with the SEV firmware that it runs."""

    name: str
    family: int
    model: int
    stepping: int
    cpus: int
    """Logical processors; every one must WBINVD before DF_FLUSH."""
    cpus_per_ccx: int
    c_bit: int
    """Position of the C-bit in a guest PTE.  CPUID 8000_001F EBX[5:0]"""
    phys_bits: int
    """Physical address width with memory encryption on: CPUID 8000_0008 EAX[7:0] less the bits lost."""
    phys_bits_lost: int
    """CPUID 8000_001F EBX[11:6]"""
    vmpls: int
    max_asid: int
    """CPUID 8000_001F ECX"""
    min_sev_asid: int
    """First ASID for plain SEV; below it ES and SNP.  CPUID 8000_001F EDX"""
    xts_key_bytes: int
    """32: AES-128, 64: AES-256, each with a second key for the tweak."""
    has_rmpread: bool
    """CPUID 8000_001F EAX[21]"""
    coherency_sfw_no: bool
    """CPUID 8000_001F EBX[31]: no cache-line eviction step needed after PVALIDATE (CVE-2024-36331)."""
    sme_coherent: bool
    """CPUID 8000_001F EAX[10]: caches are coherent across encryption domains."""
    debug_swap: bool
    """CPUID 8000_001F EAX[14], with NO_NESTED_DATA_BP, without which Linux does not use it."""
    api_major: int
    api_minor: int
    build: int
    policy_valid: int
    """Guest policy bits that this firmware knows; another bit is POLICY_FAILURE."""
    tcb: tuple[int, int, int, int]
    """Security versions of boot loader, TEE, SNP firmware and microcode.  [ABI-56860 TCB_VERSION]"""
    tsc_khz: int
    """Frequency of the TSC, the processor's base frequency."""
    smt: bool = True
    """Two threads per core are on; a guest policy may refuse that."""
    alias_check: bool = True
    """Firmware looks for DRAM aliases at init: from 1.55.22 on Milan, 1.55.38 on Genoa (CVE-2024-21944)."""

    @property
    def microcode(self) -> int:
        """Patch level, MSR 0x8B: family, model and stepping, then the number in the TCB."""
        return (
            (self.family - 15) << 24
            | (self.model >> 4) << 20
            | (self.model & 15) << 12
            | self.stepping << 8
            | self.tcb[3]
        )

    @property
    def signature(self) -> int:
        """CPUID 1 EAX.  [APM3-24594 appendix E]"""
        family = min(self.family, 15)
        return (
            (self.family - family) << 20
            | (self.model >> 4) << 16
            | family << 8
            | (self.model & 15) << 4
            | self.stepping
        )


MILAN = CpuProfile(
    name="milan",
    family=25,
    model=1,
    stepping=1,
    cpus=16,
    cpus_per_ccx=8,
    c_bit=51,
    phys_bits=43,
    phys_bits_lost=5,
    vmpls=4,
    max_asid=509,
    min_sev_asid=100,
    xts_key_bytes=32,
    has_rmpread=False,
    coherency_sfw_no=False,
    sme_coherent=True,
    debug_swap=False,
    api_major=1,
    api_minor=55,
    build=22,
    policy_valid=0x1F_FFFF,
    tcb=(4, 0, 22, 213),
    tsc_khz=2_450_000,
)

GENOA = CpuProfile(
    name="genoa",
    family=25,
    model=17,
    stepping=1,
    cpus=16,
    cpus_per_ccx=8,
    c_bit=51,
    phys_bits=46,
    phys_bits_lost=6,
    vmpls=4,
    max_asid=1006,
    min_sev_asid=100,
    xts_key_bytes=64,
    has_rmpread=False,
    coherency_sfw_no=False,
    sme_coherent=True,
    debug_swap=True,
    api_major=1,
    api_minor=55,
    build=38,
    policy_valid=0x1F_FFFF,
    tcb=(9, 0, 23, 72),
    tsc_khz=2_400_000,
)

PROFILES = {profile.name: profile for profile in (MILAN, GENOA)}
