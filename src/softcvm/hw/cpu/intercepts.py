"""Instructions that leave the guest, or that a guest with SEV-ES sees as #VC.  [APM2-24593 §15.9, §15.35.4]

Owns which MSRs the processor serves itself, what an exit says about the instruction, and what the guest
finds when it is entered again.  Intercepted are those that KVM intercepts in every guest: CPUID, port I/O,
MSRs that the VMSA does not hold, VMMCALL, HLT.
"""

from typing import Any

from softcvm.abi.control_registers import (
    CR0_PG,
    CR4_OSXSAVE,
    EFER_LMA,
    EFER_LME,
    EFER_MBZ,
    EFER_SVME,
)
from softcvm.abi.ghcb import IoioInfo
from softcvm.abi.insn import (
    Cpuid,
    GuestOp,
    Hlt,
    In,
    Out,
    Rdmsr,
    StringIo,
    Vmgexit,
    Vmmcall,
    Wrmsr,
    Xsetbv,
)
from softcvm.abi.svm import EventInj, ExitCode, GuestException, Msr, Vector
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.core import GuestCpu
from softcvm.hw.cpu.cpuid import cpuid
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.hw.cpu.vmrun import VmExitRaised
from softcvm.hw.cpu.xsave import xsetbv

__all__ = ("intercepted", "outcome")

_U32 = (1 << 32) - 1
_DIRECT = {
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0xC000_0081: "star",
    0xC000_0082: "lstar",
    0xC000_0083: "cstar",
    0xC000_0084: "sfmask",
    0xC000_0102: "kernel_gs_base",
}
_BASES = {0xC000_0100: "fs", 0xC000_0101: "gs"}
"""MSRs that lie in the save area and that KVM lets guests access (direct_access_msrs)."""


def intercepted(cpu: GuestCpu, vmcb: Vmcb, op: GuestOp, length: int = 0) -> Any:
    """Execute one of these instructions: its result, or VmExitRaised, or GuestException.

    length: of the instruction in bytes; 0 in a script, which has no addresses.
    """
    if vmcb.save is not None:
        vmcb.next_rip = vmcb.save.rip + length
    match op:
        case Rdmsr(msr) if msr == Msr.SEV_STATUS and cpu.sev:
            return cpu.sev_status
        case Rdmsr(msr) if msr in vmcb.rdmsr_exits:
            pass
        case Wrmsr(msr) if msr in vmcb.wrmsr_exits:
            pass
        case Rdmsr(msr) if msr in _DIRECT:
            return getattr(cpu.vmsa, _DIRECT[msr])
        case Wrmsr(msr, value) if msr in _DIRECT:
            setattr(cpu.vmsa, _DIRECT[msr], value)
            return None
        case Rdmsr(msr) if msr in _BASES:
            return Segment(getattr(cpu.vmsa, _BASES[msr])).base
        case Wrmsr(msr, value) if msr in _BASES:
            segment = Segment(getattr(cpu.vmsa, _BASES[msr]))
            segment.base = value
            setattr(cpu.vmsa, _BASES[msr], bytes(segment))
            return None
        case Rdmsr(msr) if msr == Msr.EFER and cpu.sev_es:
            return cpu.vmsa.efer
        case Wrmsr(msr, value) if msr == Msr.EFER and cpu.sev_es:
            _write_efer(cpu.vmsa, value)
            return None
        case Rdmsr(msr) if msr == Msr.SEV_ES_GHCB and cpu.sev_es:
            return vmcb.ghcb_gpa
        case Wrmsr(msr, value) if msr == Msr.SEV_ES_GHCB and cpu.sev_es:
            vmcb.ghcb_gpa = value
            return None
        case Vmgexit() if cpu.sev_es:
            raise VmExitRaised(ExitCode.VMGEXIT)
        case Hlt():
            # One comes with the host's next tick at the latest; the guest goes on behind its HLT then.
            raise VmExitRaised(ExitCode.HLT if vmcb.hlt_exits else ExitCode.INTR)
        case Xsetbv() if not cpu.vmsa.cr4 & CR4_OSXSAVE:
            raise GuestException(Vector.UD)
        case Xsetbv(register, value) if cpu.sev_es:
            supported = cpuid(cpu.soc.profile, 0xD)
            xsetbv(cpu.vmsa, register, value, supported.edx << 32 | supported.eax)
            return None
        case _:
            pass
    code, info_1, registers = _exit(op)
    if cpu.sev_es:
        raise GuestException(Vector.VC, code)
    assert vmcb.save is not None
    for name, value in registers.items():
        setattr(vmcb.save, name, value)
    raise VmExitRaised(code, info_1, vmcb.next_rip if code is ExitCode.IOIO else 0)


def _write_efer(state: Vmsa, value: int) -> None:
    """[APM2-24593 §3.1.7].  KVM lets SEV-ES guests do it themselves (sev_es_init_vmcb()); SVME stays set."""
    if value & EFER_MBZ or ((value ^ state.efer) & EFER_LME and state.cr0 & CR0_PG):
        raise GuestException(Vector.GP)
    kept = EFER_LMA | EFER_SVME
    state.efer = value & ~kept | state.efer & kept


def _exit(op: GuestOp) -> tuple[ExitCode, int, dict[str, int]]:
    """Exit code, EXITINFO1 and the registers that the instruction reads."""
    match op:
        case Cpuid():
            return ExitCode.CPUID, 0, {"rax": op.function, "rcx": op.index}
        case Rdmsr():
            return ExitCode.MSR, 0, {"rcx": op.msr}
        case Wrmsr():
            registers = {"rcx": op.msr, "rax": op.value & _U32, "rdx": op.value >> 32}
            return ExitCode.MSR, 1, registers
        case In():
            return ExitCode.IOIO, _ioio(op.port, op.size) | IoioInfo.IN, {}
        case Out():
            return ExitCode.IOIO, _ioio(op.port, op.size), {"rax": op.value}
        case StringIo():
            bits = IoioInfo.STRING | IoioInfo.IN * op.incoming | IoioInfo.REP * op.repeated
            return ExitCode.IOIO, _ioio(op.port, op.size) | bits, {}
        case Vmmcall():
            return (
                ExitCode.VMMCALL,
                0,
                dict(zip(("rax", "rbx", "rcx", "rdx", "rsi"), (op.nr, *op.args), strict=True)),
            )
        case Vmgexit():
            return ExitCode.VMMCALL, 0, {}
        case Xsetbv():
            halves = {"rax": op.value & _U32, "rdx": op.value >> 32}
            return ExitCode.XSETBV, 0, {"rcx": op.register, **halves}
        case _:
            raise TypeError(f"{op} does not leave the guest")


def _ioio(port: int, size: int) -> int:
    """EXITINFO1 of IN and OUT, with a 64-bit address size.  [APM2-24593 §15.10.2]"""
    return port << IoioInfo.PORT_SHIFT | size << IoioInfo.SIZE_SHIFT | 1 << 9


def outcome(cpu: GuestCpu, vmcb: Vmcb, op: GuestOp) -> Any:
    """What the guest gets from an instruction that left it, now that it is entered again."""
    if vmcb.event_inj & EventInj.VALID:
        event, vmcb.event_inj = vmcb.event_inj, 0
        return GuestException(Vector(event & 0xFF), event >> 32)
    if isinstance(op, Vmgexit) and cpu.sev_es:
        return vmcb.ghcb_gpa
    if vmcb.save is None:
        return None
    state = vmcb.save
    match op:
        case Cpuid():
            return tuple(value & _U32 for value in (state.rax, state.rbx, state.rcx, state.rdx))
        case Rdmsr():
            return (state.rdx & _U32) << 32 | state.rax & _U32
        case In():
            return state.rax & (1 << 8 * op.size) - 1
        case Vmmcall() | Vmgexit():
            return state.rax
        case _:
            return None
