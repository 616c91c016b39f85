"""The VMCB's control area as far as an SNP guest needs it.  [APM2-24593 appendix B]

Guest registers are not here: under SEV-ES they live in the VMSA, out of the hypervisor's reach.
"""

from softcvm.hw.npt import Npt
from softcvm.sim.state import State

__all__ = ("Vmcb",)


class Vmcb(State):
    """asid: 0 is not runnable.  vmsa_pa: sPA of the VMSA, None while there is none.

    ghcb_gpa: the GHCB MSR (control area 0xA0): a GPA, or a request or response of the MSR protocol.
    intr: a physical interrupt is pending on the processor, so the guest leaves before its next instruction.
    """

    saved = (
        "asid",
        "npt",
        "vmsa_pa",
        "ghcb_gpa",
        "intr",
        "exit_code",
        "exit_info_1",
        "exit_info_2",
    )

    def __init__(self, asid: int, npt: Npt) -> None:
        self.asid = asid
        self.npt = npt
        self.vmsa_pa: int | None = None
        self.ghcb_gpa = 0
        self.intr = False
        self.exit_code = 0
        self.exit_info_1 = 0
        self.exit_info_2 = 0
