"""The VMCB as far as the model's guests need it.  [APM2-24593 appendix B]

Registers of a guest without SEV-ES are in `save` while it is entered; under SEV-ES they live in the VMSA,
out of the hypervisor's reach.
"""

from softcvm.abi.svm import NestedCtl
from softcvm.abi.vmsa import Vmsa
from softcvm.hw.npt import Npt
from softcvm.sim.state import State

__all__ = ("Vmcb",)


class Vmcb(State):
    """asid: 0 is not runnable.  vmsa_pa: sPA of the VMSA, None while there is none.

    nested_ctl: whether the guest has SEV, and SEV-ES.
    save: the save area, laid out as a VMSA.  Software gives it at entry and takes it at #VMEXIT; the
    registers that VMRUN leaves to software (RCX to R15, FPU) travel in it too.
    insn_bytes: what lies at RIP when a data access left the guest (decode assists), else nothing.
    next_rip: where the instruction that was intercepted ends.
    event_inj: an exception that VMRUN delivers before the first instruction (EventInj), 0 for none.
    hlt_exits: HLT leaves the guest (intercept); otherwise it waits for the next physical interrupt.
    rdmsr_exits, wrmsr_exits: of the MSRs in the save area, those that leave the guest (MSR permission map).
    tsc_offset: what the guest's RDTSC adds to the processor's.
    ghcb_gpa: the GHCB MSR (control area 0xA0): a GPA, or a request or response of the MSR protocol.
    intr: a physical interrupt is pending on the processor, so the guest leaves before its next instruction.
    """

    saved = (
        "asid",
        "npt",
        "nested_ctl",
        "vmsa_pa",
        "insn_bytes",
        "next_rip",
        "event_inj",
        "hlt_exits",
        "tsc_offset",
        "rdmsr_exits",
        "wrmsr_exits",
        "ghcb_gpa",
        "intr",
        "exit_code",
        "exit_info_1",
        "exit_info_2",
    )
    derived = {"save": "out of the guest at quiescent points: the registers are the kernel's"}

    def __init__(self, asid: int, npt: Npt) -> None:
        self.asid = asid
        self.npt = npt
        self.nested_ctl = NestedCtl.NP_ENABLE
        self.vmsa_pa: int | None = None
        self.save: Vmsa | None = None
        self.insn_bytes = b""
        self.next_rip = 0
        self.event_inj = 0
        self.hlt_exits = True
        self.tsc_offset = 0
        self.rdmsr_exits: frozenset[int] = frozenset()
        self.wrmsr_exits: frozenset[int] = frozenset()
        self.ghcb_gpa = 0
        self.intr = False
        self.exit_code = 0
        self.exit_info_1 = 0
        self.exit_info_2 = 0
