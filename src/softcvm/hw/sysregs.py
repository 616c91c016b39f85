"""Model specific registers of every processor that decide whether SNP may be turned on.

[APM2-24593 §15.36.2]: SYSCFG.MFDM, SYSCFG.SNP_EN with VMPL_EN, HWCR.SMMLOCK, VM_HSAVE_PA.  Firmware looks at each
processor when it initialises SNP.  RMP_BASE and RMP_END are the table's own (rmp.py); MTRRs, IORRs, TOM
and TSEG are taken to agree everywhere.
"""

from softcvm.hw.rmp import Rmp
from softcvm.sim.addr import PAGE_MASK
from softcvm.sim.state import State

__all__ = ("SystemRegisters",)


class SystemRegisters(State):
    """One value per processor; BIOS leaves SMMLOCK set and everything else clear."""

    saved = ("mfdm", "snp_en", "smmlock", "hsave_pa")
    derived = {"rmp": "the table, which is live while every processor has SNP_EN"}

    def __init__(self, cpus: int, rmp: Rmp) -> None:
        self.rmp = rmp
        self.mfdm = [False] * cpus
        self.snp_en = [False] * cpus
        """SNP_EN and VMPL_EN, which Linux sets together."""
        self.smmlock = [True] * cpus
        self.hsave_pa = [0] * cpus

    def set_mfdm(self, cpu: int) -> None:
        self.mfdm[cpu] = True

    def set_snp_enable(self, cpu: int) -> None:
        """Set SNP_EN and VMPL_EN; from the last processor on, the RMP is checked."""
        self.snp_en[cpu] = True
        self.rmp.enabled = all(self.snp_en)

    def set_hsave_pa(self, cpu: int, spa: int) -> None:
        """Write VM_HSAVE_PA.  ValueError (#GP) for an unaligned address."""
        if spa & PAGE_MASK:
            raise ValueError(f"#GP: VM_HSAVE_PA {spa:#x}")
        self.hsave_pa[cpu] = spa

    def clear_snp_enable(self) -> None:
        """Firmware clears SNP_EN everywhere (SNP_SHUTDOWN_EX with X86_SNP_SHUTDOWN)."""
        self.snp_en = [False] * len(self.snp_en)
        self.rmp.enabled = False

    def ready_for_snp_init(self, *, init_rmp: bool) -> bool:
        """What SNP_INIT checks of every processor; a host save area matters if it rewrites the RMP."""
        if init_rmp and any(self.hsave_pa):
            return False
        return all(self.mfdm) and all(self.snp_en) and all(self.smmlock)
