"""What VMRUN refuses to enter, before the first instruction.  [APM2-24593 §15.5.1, §15.34.10, §15.36.12]

Owns the checks on the VMSA page and on the state that would be loaded; each failure is #VMEXIT(INVALID).
"""

from softcvm.abi.control_registers import (
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LME,
    EFER_MBZ,
    EFER_SVME,
)
from softcvm.abi.svm import ExitCode, NestedCtl, SevFeatures
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.access import check_hypervisor_owned
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.hw.rmp import ASID_MASK, ASID_SHIFT, ASSIGNED, IMMUTABLE, VMSA
from softcvm.hw.soc import Soc
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PgLevel

__all__ = ("VmExitRaised", "guest_state")

_CS_L, _CS_D = 1 << 9, 1 << 10  # in a segment's packed attributes


class VmExitRaised(Exception):
    """Ends the guest's run with this exit."""

    def __init__(self, code: ExitCode, info_1: int = 0, info_2: int = 0) -> None:
        super().__init__(f"#VMEXIT({code.name}) {info_1:#x} {info_2:#x}")
        self.code = code
        self.info_1 = info_1
        self.info_2 = info_2


def guest_state(soc: Soc, vmcb: Vmcb) -> Vmsa:
    """The registers that the guest is entered with, from the VMSA page or the save area."""
    if not vmcb.asid:
        raise VmExitRaised(ExitCode.INVALID)
    if vmcb.nested_ctl & NestedCtl.SEV_ES_ENABLE:
        state = _vmsa(soc, vmcb)
    else:
        assert vmcb.save is not None, "software gives the save area at entry"
        state = vmcb.save
    if not _consistent(state):
        raise VmExitRaised(ExitCode.INVALID)
    return state


def _vmsa(soc: Soc, vmcb: Vmcb) -> Vmsa:
    """The page as this guest's key reads it.  Whether it is SNP's to check stands in the page itself."""
    spa = vmcb.vmsa_pa
    key = soc.key(vmcb.asid)
    if spa is None or spa & PAGE_MASK or key is None:
        raise VmExitRaised(ExitCode.INVALID)
    pfn = spa >> PAGE_SHIFT
    if pfn in soc.rmp.in_use:
        raise VmExitRaised(ExitCode.INVALID)
    vmsa = Vmsa(soc.dram.read(spa, PAGE_SIZE, key))
    if not vmsa.sev_features & SevFeatures.SNP_ACTIVE:
        if not check_hypervisor_owned(soc, pfn, 1, PgLevel.PG_4K):
            raise VmExitRaised(ExitCode.INVALID)
        return vmsa
    attrs = soc.rmp.map[pfn][0]
    owned = attrs & ASSIGNED and (attrs & ASID_MASK) >> ASID_SHIFT == vmcb.asid
    if not soc.psp.asid_runnable(vmcb.asid) or not soc.rmp.covered(pfn):
        raise VmExitRaised(ExitCode.INVALID)
    if not owned or attrs & IMMUTABLE or not attrs & VMSA:
        raise VmExitRaised(ExitCode.INVALID)
    return vmsa


def _consistent(state: Vmsa) -> bool:
    """The combinations of control registers that a guest may be entered with.  [APM2-24593 §15.5.1]"""
    efer, cr0, cr4 = state.efer, state.cr0, state.cr4
    if not efer & EFER_SVME or efer & EFER_MBZ:
        return False
    if cr0 >> 32 or (cr0 & CR0_NW and not cr0 & CR0_CD):
        return False
    if state.dr6 >> 32 or state.dr7 >> 32:
        return False
    if efer & EFER_LME and cr0 & CR0_PG:
        if not cr4 & CR4_PAE or not cr0 & CR0_PE:
            return False
        attrib = Segment(state.cs).attrib
        if attrib & _CS_L and attrib & _CS_D:
            return False
    return True
