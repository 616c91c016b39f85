"""struct kvm_vcpu_arch: the registers of a vCPU as user space sets them (arch/x86/kvm/x86.c,
v7.2).

They are what the guest starts from.  Once guest_state_protected is set (SEV-ES and SNP after
the VMSA is encrypted) KVM can no longer see or change them; x86.py refuses or ignores what
Linux does.
"""

from collections.abc import Callable
from enum import IntFlag
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import (
    KvmCpuidEntry2,
    KvmDebugregs,
    KvmDtable,
    KvmFpu,
    KvmRegs,
    KvmSegment,
    KvmSregs,
    MpState,
)
from softcvm.sim.state import State
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.arch.x86.kvm.svm.svm import VcpuSvm
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "MSR_IA32_CR_PAT",
    "CompleteUserspaceIo",
    "KvmRequest",
    "MsrValue",
    "VcpuArch",
    "reset_sregs",
)

MsrValue = int | None
CompleteUserspaceIo = Callable[["KvmVcpu"], Steps[int]]
"""What finishes an exit when the VMM enters again; returns 1 to go on and 0 to leave again."""


class KvmRequest(IntFlag):
    """vcpu->requests: what the vCPU is to do before it enters the guest again (KVM_REQ_*)."""

    UPDATE_PROTECTED_GUEST_STATE = 1 << 0
    DIRTY_RING_SOFT_FULL = 1 << 1
    MSR_FILTER_CHANGED = 1 << 2


MSR_IA32_CR_PAT = 0x277
_PAT_RESET = 0x0007_0406_0007_0406


def _segment(selector: int, base: int, type_: int, *, s: int = 1) -> bytes:
    return bytes(
        KvmSegment(base=base, limit=0xFFFF, selector=selector, type=type_, present=1, s=s)
    )


def reset_sregs() -> KvmSregs:
    """System registers after INIT or power-up.  [APM2-24593 Table 14-1]"""
    data = _segment(0, 0, 3)
    sregs = KvmSregs(
        cs=_segment(0xF000, 0xFFFF_0000, 0xB),
        tr=_segment(0, 0, 0xB, s=0),
        ldt=_segment(0, 0, 2, s=0),
        cr0=0x6000_0010,
    )
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.gdt = sregs.idt = bytes(KvmDtable(limit=0xFFFF))
    return sregs


class VcpuArch(State):
    """Register state, exits in flight, and the vendor's part (`svm`)."""

    saved = (
        "regs",
        "sregs",
        "fpu",
        "xstate_bv",
        "xsave_extended",
        "xcr0",
        "debugregs",
        "guest_debug",
        "exception_injected",
        "msrs",
        "cpuid_entries",
        "pv_enforce",
        "mcg_cap",
        "mp_state",
        "virtual_tsc_khz",
        "tsc_offset",
        "guest_state_protected",
        "has_run",
        "completes",
        "pio_linear_rip",
        "requests",
        "apic_init",
        "apic_sipi",
        "apic_page",
        "svm",
    )
    derived = {
        "complete_userspace_io": "named by `completes`",
        "in_guest": "out of the guest at quiescent points",
    }

    svm: "VcpuSvm"

    def __init__(self, *, bsp: bool, irqchip: bool, tsc_khz: int) -> None:
        self.virtual_tsc_khz = tsc_khz
        self.tsc_offset = 0
        """KVM_VCPU_TSC_OFFSET, the VMCB has it too"""
        self.regs = KvmRegs(rdx=0x600, rip=0xFFF0, rflags=2)
        self.sregs = reset_sregs()
        self.sregs.apic_base = 0xFEE0_0800 | (0x100 if bsp else 0)
        self.fpu = KvmFpu(fcw=0x37F, mxcsr=0x1F80)
        self.xstate_bv = 3
        """Features that are not in their initial state, of x87, SSE and those in xsave_extended."""
        self.xsave_extended = bytes(4096 - 576)
        """The XSAVE area behind legacy area and header.  # stored, no effect"""
        self.xcr0 = 1
        self.debugregs = KvmDebugregs(dr6=0xFFFF_0FF0, dr7=0x400)
        self.guest_debug = 0
        self.exception_injected = False
        """The exception in vmcb.event_inj is one whose delivery user space saw begin; else it is pending."""
        self.msrs: dict[int, int] = {MSR_IA32_CR_PAT: _PAT_RESET}
        self.cpuid_entries: list[KvmCpuidEntry2] = []
        self.pv_enforce = False
        """KVM_CAP_ENFORCE_PV_FEATURE_CPUID: the guest has those of KVM's features that its CPUID names."""
        self.mcg_cap = 32
        """KVM_X86_SETUP_MCE: the low byte is the number of banks."""
        self.mp_state = MpState.UNINITIALIZED if irqchip and not bsp else MpState.RUNNABLE
        self.guest_state_protected = False
        self.has_run = False
        """It entered the guest at least once (last_vmentry_cpu)."""
        self.complete_userspace_io: CompleteUserspaceIo | None = None
        self.pio_linear_rip = 0
        """Where the port I/O under way stands; user space may have moved the vCPU meanwhile."""
        self.requests = KvmRequest(0)
        self.apic_init = self.apic_sipi = False
        """INIT and SIPI that the local APIC holds until the vCPU takes them (pending_events)."""
        self.apic_page: bytes | None = None
        """Registers of the local APIC (lapic_state.py); None: as after reset.  # stored, no effect"""
        self.in_guest = False
        """vcpu->mode is IN_GUEST_MODE: a kick must send an interrupt."""

    @property
    def completes(self) -> str | None:
        """Name of the pending completion."""
        return self.complete_userspace_io.__qualname__ if self.complete_userspace_io else None
