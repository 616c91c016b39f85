"""Instructions that leave the guest, from their bytes and the registers they read, as operations (abi/insn.py).

Owns the encodings only; what executing one does is intercepts.py's and hw/insn's.
"""

from functools import cache
from typing import Any

from softcvm.abi.control_registers import EFER_LMA
from softcvm.abi.insn import (
    Cpuid,
    GuestOp,
    Hlt,
    In,
    Out,
    Pvalidate,
    Rdmsr,
    Rmpadjust,
    StringIo,
    Vmgexit,
    Vmmcall,
    Wrmsr,
    Xsetbv,
)
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.sim.errors import Unmodelled

__all__ = (
    "accessed",
    "decode",
    "leaves",
    "leaving",
    "linear_rip",
    "mode_of",
    "state_instruction",
)

_U32, _U16 = (1 << 32) - 1, (1 << 16) - 1
_NAMED = {
    b"\xf3\x0f\x01\xd9": "vmgexit",
    b"\xf2\x0f\x01\xd9": "vmgexit",
    b"\xf2\x0f\x01\xff": "pvalidate",
    b"\xf3\x0f\x01\xfe": "rmpadjust",
    b"\x0f\x01\xd9": "vmmcall",
    b"\x0f\x01\xc1": "vmcall",
}
"""Encodings that capstone does not know, or not all of."""
_STATE = frozenset({"xsave", "xsave64", "xrstor", "xrstor64", "xgetbv"})
_STRING_IO = {
    f"{name}{size}": bytes_
    for name in ("ins", "outs")
    for size, bytes_ in (("b", 1), ("w", 2), ("d", 4))
}
_ON_STACK = ("bp", "sp", "ebp", "esp")
_GENERAL = frozenset({"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"})
_SIZES = {"al": 1, "ax": 2, "eax": 4}
_LEAVES = frozenset(
    {
        *("in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd"),
        *("cpuid", "rdmsr", "wrmsr", "hlt", "vmmcall", "vmcall", "invd", "wbinvd", "rdpmc"),
        *("xsave", "xsave64", "xrstor", "xrstor64", "xgetbv", "xsavec", "xsaves", "xrstors"),
        *("xsetbv", "monitor", "mwait", "vmrun", "vmload", "vmsave", "clgi", "stgi", "skinit"),
    }
)
_CS_L, _CS_D = 1 << 9, 1 << 10
_ENDS = ("ret", "call", "iretq", "syscall")


def leaving(
    code: bytes, mode: int, also: frozenset[str] = frozenset()
) -> list[tuple[int, int]]:
    """Offsets and lengths of instructions that leave the guest, and of `also`, up to the end of the block.

    mode: 16, 32 or 64 bits.
    """
    found = []
    for address, size, mnemonic, _ in _decoder(mode).disasm_lite(code, 0):
        if mnemonic.split()[-1] in _LEAVES or mnemonic in also:
            found.append((address, size))
        if mnemonic.startswith("j") or mnemonic in _ENDS:
            break
    return found


def leaves(code: bytes, mode: int, also: frozenset[str] = frozenset()) -> bool:
    """Whether the first instruction is one that leaves the guest."""
    if any(code.startswith(encoding) for encoding in _NAMED):
        return True
    return any(offset == 0 for offset, _ in leaving(code, mode, also))


def mode_of(state: Vmsa) -> int:
    """In which a processor with these registers executes: 16, 32 or 64 bits."""
    attrib = Segment(state.cs).attrib
    if state.efer & EFER_LMA and attrib & _CS_L:
        return 64
    return 32 if attrib & _CS_D else 16


def linear_rip(state: Vmsa) -> int:
    """Where the next instruction lies."""
    if mode_of(state) == 64:
        return state.rip
    return Segment(state.cs).base + state.rip & _U32


def decode(code: bytes, state: Vmsa) -> tuple[GuestOp | None, int]:
    """The operation and its length; None for an instruction that is none of these, 0 for no whole one."""
    for encoding, name in _NAMED.items():
        if code.startswith(encoding):
            return _system(name, state), len(encoding)
    found = next(_decoder(mode_of(state)).disasm_lite(code, 0, 1), None)
    if found is None:
        return None, 0
    _, length, mnemonic, operands = found
    return _plain(mnemonic, operands, state), length


def state_instruction(code: bytes, state: Vmsa) -> tuple[str, int, int] | None:
    """XSAVE, XRSTOR or XGETBV by its plain name, the linear address of its operand, its length."""
    insn = next(_detailed(mode_of(state)).disasm(code, 0, 1), None)
    if insn is None or insn.mnemonic not in _STATE:
        return None
    if not insn.operands:
        return insn.mnemonic, 0, insn.size
    address = _effective(insn, insn.operands[0].mem, state)
    return insn.mnemonic.removesuffix("64"), address, insn.size


def accessed(code: bytes, state: Vmsa, page: int) -> int:
    """The linear address on this page that the instruction at RIP accesses, its first one there.

    The engine tells the page only; what the operands and the stack do not explain is the page's first byte.
    """
    from capstone import x86 as cs

    insn = next(_detailed(mode_of(state)).disasm(code, 0, 1), None)
    places = [state.rsp - 8, state.rsp]
    if insn is not None:
        memory = [op.mem for op in insn.operands if op.type == cs.X86_OP_MEM]
        places = [_effective(insn, mem, state) for mem in memory] + places
    page &= ~4095
    for place in places:
        if place & ~4095 == page:
            return place
    return page


def _effective(insn: Any, mem: Any, state: Vmsa) -> int:
    """The linear address of a memory operand."""
    address: int = mem.disp
    for register, scale in ((mem.base, 1), (mem.index, mem.scale)):
        if not register:
            continue
        name = insn.reg_name(register)
        if name in ("rip", "eip"):
            address += state.rip + insn.size
        elif name not in ("riz", "eiz"):
            address += _register(state, name) * scale
    segment = insn.reg_name(mem.segment) if mem.segment else ""
    if mode_of(state) == 64:
        base = Segment(getattr(state, segment)).base if segment in ("fs", "gs") else 0
        return address + base & (1 << 64) - 1
    if not segment:
        segment = "ss" if mem.base and insn.reg_name(mem.base) in _ON_STACK else "ds"
    address &= _U16 if insn.addr_size == 2 else _U32
    return address + Segment(getattr(state, segment)).base & _U32


def _register(state: Vmsa, name: str) -> int:
    """A register of 64, 32 or 16 bits."""
    if len(name) == 2 and f"r{name}" in _GENERAL:
        return int(getattr(state, f"r{name}")) & _U16
    half = name.startswith("e") or name.endswith("d")
    whole = f"r{name[1:]}" if name.startswith("e") else name.removesuffix("d")
    value: int = getattr(state, whole)
    return value & _U32 if half else value


def _system(name: str, state: Vmsa) -> GuestOp:
    match name:
        case "vmgexit":
            return Vmgexit()
        case "pvalidate":
            return Pvalidate(state.rax, state.rcx & _U32, bool(state.rdx & _U32))
        case "rmpadjust":
            target, perms = state.rdx & 0xFF, state.rdx >> 8 & 0xFF
            return Rmpadjust(
                state.rax, state.rcx & _U32, target, perms, bool(state.rdx >> 16 & 1)
            )
        case _:
            return Vmmcall(state.rax, (state.rbx, state.rcx, state.rdx, state.rsi))


def _plain(mnemonic: str, operands: str, state: Vmsa) -> GuestOp | None:
    match mnemonic:
        case "cpuid":
            return Cpuid(state.rax & _U32, state.rcx & _U32)
        case "hlt":
            return Hlt()
        case "rdmsr":
            return Rdmsr(state.rcx & _U32)
        case "wrmsr":
            return Wrmsr(state.rcx & _U32, (state.rdx & _U32) << 32 | state.rax & _U32)
        case "xsetbv":
            return Xsetbv(state.rcx & _U32, (state.rdx & _U32) << 32 | state.rax & _U32)
        case _ if (string := mnemonic.split()[-1]) in _STRING_IO:
            if "[e" in operands or ":" in operands.replace("es:", ""):
                raise Unmodelled(f"guest instruction {mnemonic} {operands}")
            repeated = mnemonic != string
            return StringIo(state.rdx & _U16, _STRING_IO[string], string[0] == "i", repeated)
        case "in":
            register, port = operands.split(", ")
            return In(_port(port, state), _SIZES[register])
        case "out":
            port, register = operands.split(", ")
            return Out(_port(port, state), state.rax, _SIZES[register])
        case "ud2" | "ud0" | "ud1":
            return None
        case "vmrun" | "vmload" | "vmsave" | "clgi" | "stgi" | "skinit" | "rdpmc":
            return None  # no SVM in a guest (nested=0), no performance counters
        case _:
            raise Unmodelled(f"guest instruction {mnemonic} {operands}")


def _port(text: str, state: Vmsa) -> int:
    return state.rdx & _U16 if text == "dx" else int(text, 0)


@cache
def _detailed(mode: int) -> Any:
    decoder = _new_decoder(mode)
    decoder.detail = True
    return decoder


@cache
def _decoder(mode: int) -> Any:
    return _new_decoder(mode)


def _new_decoder(mode: int) -> Any:
    import capstone

    return capstone.Cs(capstone.CS_ARCH_X86, getattr(capstone, f"CS_MODE_{mode}"))
