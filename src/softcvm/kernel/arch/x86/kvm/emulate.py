"""The instruction emulator, as far as MMIO needs it (arch/x86/kvm/emulate.c, x86.c; v6.12).

Owns loads and stores of one operand by MOV, MOVZX and MOVSX to where the guest has no memory: KVM_EXIT_MMIO and
its completion.  The instruction's bytes are what the processor gave with the exit (decode assists).  What
cannot be fetched is KVM_EXIT_INTERNAL_ERROR, as in Linux; an instruction that Linux emulates and this does not is
Unmodelled.
"""

import struct
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.svm import EventInj, Vector
from softcvm.kernel.errors import Unmodelled
from softcvm.kernel.virt.kvm.coalesced_mmio import kvm_io_bus_write
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("handle_emulation_failure", "x86_emulate_mmio")

_INTERNAL_ERROR_EMULATION = 1
_FLAG_INSTRUCTION_BYTES = 1
_FETCHED = 15
_X87 = ("fnstcw", "fnstsw")
_U64 = (1 << 64) - 1


class _Move(NamedTuple):
    """A MOV between memory and a register or an immediate."""

    length: int
    size: int
    """Bytes of memory."""
    write: bool
    register: str
    """The register that is read or written; empty for an immediate."""
    immediate: int
    signed: bool
    """A read is sign-extended to the register."""


def x86_emulate_mmio(vcpu: "KvmVcpu", gpa: int, code: bytes) -> int:
    """A shared access to a GPA without memory: 0, user space is the device.

    code: the bytes at RIP, empty when the access was the fetch of the instruction itself.
    """
    if not code:
        return handle_emulation_failure(vcpu, code)
    move = _decode(code)
    if move is None:
        return handle_emulation_failure(vcpu, code)
    run, arch = vcpu.run, vcpu.arch
    if move.write:
        value = _read(vcpu, move.register) if move.register else move.immediate
        data = (value & _U64).to_bytes(8, "little")[: move.size]
        if kvm_io_bus_write(vcpu.kvm, gpa, data, pio=False):
            arch.regs.rip = arch.regs.rip + move.length & _U64
            return 1
    run.exit_reason = KvmExit.MMIO
    run.mmio_phys_addr = gpa
    run.mmio_len = move.size
    run.mmio_is_write = int(move.write)
    if move.write:
        run.mmio_data = data + run.mmio_data[move.size :]
        arch.regs.rip = arch.regs.rip + move.length & _U64
        arch.complete_userspace_io = _complete_write
    else:

        def complete_read(vcpu: "KvmVcpu") -> Steps[int]:
            yield from ()
            value = int.from_bytes(
                vcpu.run.mmio_data[: move.size], "little", signed=move.signed
            )
            _write(vcpu, move.register, value)
            vcpu.arch.regs.rip = vcpu.arch.regs.rip + move.length & _U64
            return 1

        arch.complete_userspace_io = complete_read
    return 0


def _complete_write(vcpu: "KvmVcpu") -> Steps[int]:
    yield from ()
    return 1


def handle_emulation_failure(vcpu: "KvmVcpu", code: bytes) -> int:
    """#UD for the guest; at privilege level 0 user space hears of it, with exit information and bytes."""
    vmcb = vcpu.arch.svm.vmcb
    if vcpu.kvm.arch.exit_on_emulation_error:
        return _prepare_emulation_failure_exit(vcpu, code)
    vmcb.event_inj = int(EventInj.VALID | EventInj.TYPE_EXCEPTION | Vector.UD)
    if vcpu.arch.sregs.segment("ss").dpl:
        return 1
    return _prepare_emulation_failure_exit(vcpu, code)


def _prepare_emulation_failure_exit(vcpu: "KvmVcpu", code: bytes) -> int:
    vmcb = vcpu.arch.svm.vmcb
    info = [vmcb.exit_code & (1 << 32) - 1, vmcb.exit_info_1, vmcb.exit_info_2, 0, 0]
    words = [_FLAG_INSTRUCTION_BYTES if code else 0]
    data = struct.pack("<Q", words[0])
    if code:
        data += bytes([len(code)]) + code.ljust(_FETCHED, b"\x90")
    data += struct.pack("<5Q", *info)
    run = vcpu.run
    run.exit_reason = KvmExit.INTERNAL_ERROR
    run.internal_suberror = _INTERNAL_ERROR_EMULATION
    run.internal_ndata = len(data) // 8
    run.internal_data = data + run.internal_data[len(data) :]
    return 0


def _decode(code: bytes) -> _Move | None:
    """None for what Linux's emulator does not know either: x87 but for its control and status words."""
    from capstone import x86 as cs

    insn = next(_decoder().disasm(code, 0, 1), None)
    if insn is None or insn.mnemonic not in ("mov", "movabs", "movzx", "movsx", "movsxd"):
        if insn is not None and insn.mnemonic.startswith("f") and insn.mnemonic not in _X87:
            return None
        shown = f"{insn.mnemonic} {insn.op_str}" if insn is not None else code.hex()
        raise Unmodelled(f"MMIO by the instruction {shown}")
    to, source = insn.operands
    if to.type == cs.X86_OP_MEM:
        immediate = source.type == cs.X86_OP_IMM
        register = "" if immediate else insn.reg_name(source.reg)
        return _Move(insn.size, to.size, True, register, source.imm if immediate else 0, False)
    signed = insn.mnemonic in ("movsx", "movsxd")
    return _Move(insn.size, source.size, False, insn.reg_name(to.reg), 0, signed)


@cache
def _decoder() -> Any:
    from capstone import CS_ARCH_X86, CS_MODE_64, Cs

    decoder = Cs(CS_ARCH_X86, CS_MODE_64)
    decoder.detail = True
    return decoder


def _place(name: str) -> tuple[str, int, int]:
    """The 64-bit register that a name is part of, the part's first byte and its size."""
    if name in ("ah", "bh", "ch", "dh"):
        return f"r{name[0]}x", 1, 1
    if name[0] == "r" and name[1:2].isdigit():
        number = name.rstrip("dwb")
        return number, 0, {"d": 4, "w": 2, "b": 1}.get(name[-1], 8)
    if name.startswith("r"):
        return name, 0, 8
    if name.startswith("e"):
        return f"r{name[1:]}", 0, 4
    if name.endswith("l"):
        return (f"r{name[0]}x" if len(name) == 2 else f"r{name[:2]}"), 0, 1
    return f"r{name}", 0, 2


def _read(vcpu: "KvmVcpu", name: str) -> int:
    register, at, size = _place(name)
    value: int = getattr(vcpu.arch.regs, register)
    return value >> 8 * at & (1 << 8 * size) - 1


def _write(vcpu: "KvmVcpu", name: str, value: int) -> None:
    """Four bytes clear the upper half; one and two leave the rest."""
    register, at, size = _place(name)
    mask = (1 << 8 * size) - 1
    if size >= 4:
        setattr(vcpu.arch.regs, register, value & mask)
        return
    held: int = getattr(vcpu.arch.regs, register)
    setattr(
        vcpu.arch.regs, register, held & ~(mask << 8 * at) & _U64 | (value & mask) << 8 * at
    )
