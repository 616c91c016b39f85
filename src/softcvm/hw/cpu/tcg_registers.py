"""Registers between a save area and the engine: which field is which, and which mean more than a number.

The engine keeps what the guest changes by itself, segments with their hidden parts and the mode included
(engine_state.py); load() gives it only what differs from what it was last given or gave.

Both sides are equal from load() until the engine has run: store() has nothing to do then.
"""

import struct
from typing import Any

from softcvm.abi.control_registers import CR0_PG, EFER_LMA, EFER_LME
from softcvm.abi.svm import Msr
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.engine import Engine
from softcvm.hw.cpu.engine_state import SEGMENTS, unpack
from softcvm.hw.cpu.tcg_batch import Batch

__all__ = ("Registers", "long_mode_active")

_GENERAL = (
    ("rflags", "rip"),
    ("rsp",),
    ("rax",),
    ("rcx", "rdx", "rbx"),
    ("rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))),
)
"""Registers that lie one behind the other in a save area."""
_CONTROL = ("cr4", "cr3", "cr0")
_MSRS = (
    ("star", 0xC000_0081),
    ("lstar", 0xC000_0082),
    ("cstar", 0xC000_0083),
    ("sfmask", 0xC000_0084),
    ("kernel_gs_base", 0xC000_0102),
)
_REST = struct.Struct("<I4xQ 2x6xQI4x 2x6xQI4x 256s I3H")
"""KERNEL_GS_BASE behind its number; GDTR and IDTR as the engine's structure; XMM; MXCSR; x87 control."""
_KERNEL_GS_BASE = 0xC000_0102
_NO_X87 = 0xFFFF
"""FPTAG: all registers are empty."""
_FIRST, _SECOND = slice(0, 0x170), slice(0x1E0, 0x308)
_X87 = slice(0x400, 0x470)
"""Parts of a save area that change seldom: segments and control registers; MSRs."""


class Registers:
    """What one engine holds, and the save area that it was last given or gave."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        x = engine.x
        general = [_number(x, name) for group in _GENERAL for name in group]
        control = [_number(x, name) for name in _CONTROL]
        self._general = Batch(engine.uc, [(n, 8) for n in (*general, x.UC_X86_REG_CR2)])
        self._often = Batch(engine.uc, [(n, 8) for n in (*general, *control)])
        self._xmm = [getattr(x, f"UC_X86_REG_XMM{n}") for n in range(16)]
        x87 = (x.UC_X86_REG_FPCW, x.UC_X86_REG_FPSW, x.UC_X86_REG_FPTAG)
        self._rest = Batch(
            engine.uc,
            [
                *((x.UC_X86_REG_MSR, 16), (x.UC_X86_REG_GDTR, 24), (x.UC_X86_REG_IDTR, 24)),
                *((register, 16) for register in self._xmm),
                (x.UC_X86_REG_MXCSR, 4),
                *((register, 2) for register in x87),
            ],
        )
        self._rest.put(_REST.pack(_KERNEL_GS_BASE, *[0] * 5, bytes(256), *[0] * 4))
        self._ahead = False
        """The engine has run, and its registers were not taken since."""
        self._seldom: tuple[bytes, bytes] | None = None
        self._segments = b""
        """As the engine keeps those that the save area has; b"" if that is not known."""
        self._fpu = b""
        self._x87_held = b""

    def load(self, state: Vmsa) -> None:
        """Give the engine what a save area says."""
        uc, x = self._engine.uc, self._engine.x
        seldom = bytes(state.data[_FIRST]), bytes(state.data[_SECOND])
        if seldom != self._seldom:
            self._load_system(state)
            self._seldom = seldom
        fpu = bytes(state.fpreg_xmm)
        if fpu != self._fpu:
            for n, register in enumerate(self._xmm):
                uc.reg_write(register, int.from_bytes(fpu[16 * n : 16 * n + 16], "little"))
            self._fpu = fpu
            uc.reg_write(x.UC_X86_REG_MXCSR, state.mxcsr)
        if self._x87_fields(state) != self._x87_held:
            self._load_x87(state)
        # The engine's own failed look-ups change its CR2: the guest's is given anew, and never taken from it.
        data = [state.data[place] for place, _ in _PLACES[:-1]]
        self._general.write(b"".join((*data, state.cr2.to_bytes(8, "little"))))
        self._ahead = False

    def will_run(self) -> None:
        """The engine is about to run: what it holds counts from now on."""
        self._ahead = True

    def store_general(self, state: Vmsa) -> None:
        """What instructions are decoded and addresses computed with."""
        if not self._ahead:
            return
        data = self._often.read()
        for place, source in _PLACES:
            state.data[place] = data[source]
        state.efer = long_mode_active(state)
        raw, state.cpl = self._engine.hidden.read()
        if raw != self._segments:
            self._segments = raw
            for name, (selector, base, limit, attrib) in zip(
                SEGMENTS, unpack(raw), strict=True
            ):
                given = Segment(selector=selector, base=base, limit=limit, attrib=attrib)
                setattr(state, name, bytes(given))

    def store(self, state: Vmsa) -> None:
        """Write what the engine holds into a save area."""
        if not self._ahead:
            return
        self.store_general(state)
        _, kernel_gs, gdt, gdt_limit, idt, idt_limit, xmm, state.mxcsr, *x87 = _REST.unpack(
            self._rest.read()
        )
        state.kernel_gs_base = kernel_gs
        for name, base, limit in (("gdtr", gdt, gdt_limit), ("idtr", idt, idt_limit)):
            setattr(state, name, bytes(Segment(base=base, limit=limit)))
        state.fpreg_xmm = self._fpu = xmm
        self._store_x87(state, *x87)
        self._seldom = bytes(state.data[_FIRST]), bytes(state.data[_SECOND])
        self._ahead = False

    @staticmethod
    def _x87_fields(state: Vmsa) -> bytes:
        return bytes(state.data[_X87])

    def _load_x87(self, state: Vmsa) -> None:
        """The save area has the registers by their place in the stack, the engine by their number."""
        uc, x = self._engine.uc, self._engine.x
        top = state.x87_fsw >> 11 & 7
        low, high = state.fpreg_x87[:64], state.fpreg_x87[64:]
        for n in range(8):
            mantissa = int.from_bytes(low[8 * n : 8 * n + 8], "little")
            exponent = int.from_bytes(high[2 * n : 2 * n + 2], "little")
            uc.reg_write(x.UC_X86_REG_FP0 + (top + n & 7), (mantissa, exponent))
        uc.reg_write(x.UC_X86_REG_FPCW, state.x87_fcw)
        uc.reg_write(x.UC_X86_REG_FPSW, state.x87_fsw)
        tags = sum(3 << 2 * n for n in range(8) if not state.x87_ftw >> n & 1)
        uc.reg_write(x.UC_X86_REG_FPTAG, tags)
        self._x87_held = self._x87_fields(state)

    def _store_x87(self, state: Vmsa, control: int, status: int, tags: int) -> None:
        uc, x = self._engine.uc, self._engine.x
        state.x87_fcw, state.x87_fsw = control, status
        top = status >> 11 & 7
        if state.x87_ftw == 0 and tags == _NO_X87:
            return  # all registers are empty, and were
        registers = uc.reg_read_batch([x.UC_X86_REG_FP0 + (top + n & 7) for n in range(8)])
        state.fpreg_x87 = b"".join(m.to_bytes(8, "little") for m, _ in registers) + b"".join(
            e.to_bytes(2, "little") for _, e in registers
        )
        state.x87_ftw = sum(1 << n for n in range(8) if tags >> 2 * n & 3 != 3)
        self._x87_held = self._x87_fields(state)

    @property
    def cpl(self) -> int:
        return self._engine.hidden.read()[1]

    def _load_system(self, state: Vmsa) -> None:
        uc, x = self._engine.uc, self._engine.x
        control = (state.cr0, state.cr3, state.cr4, state.efer)
        if control != self._control():
            uc.reg_write(x.UC_X86_REG_CR0, state.cr0 & ~CR0_PG)  # leaves long mode
            uc.reg_write(x.UC_X86_REG_CR4, state.cr4)
            uc.reg_write(x.UC_X86_REG_CR3, state.cr3)
            uc.reg_write(x.UC_X86_REG_MSR, (Msr.EFER, state.efer))
            uc.reg_write(x.UC_X86_REG_CR0, state.cr0)
            self._engine.flush()
        for name, register in (("gdtr", x.UC_X86_REG_GDTR), ("idtr", x.UC_X86_REG_IDTR)):
            table = Segment(getattr(state, name))
            uc.reg_write(register, (0, table.base, table.limit, 0))
        for name, index in _MSRS:
            uc.reg_write(x.UC_X86_REG_MSR, (index, getattr(state, name)))
        segments = [Segment(getattr(state, name)) for name in SEGMENTS]
        given = [(part.selector, part.base, part.limit, part.attrib) for part in segments]
        self._engine.hidden.write(given, state.cpl)
        self._segments = b""

    def _control(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER as the engine has them."""
        uc, x = self._engine.uc, self._engine.x
        cr0, cr3, cr4 = uc.reg_read_batch(
            [x.UC_X86_REG_CR0, x.UC_X86_REG_CR3, x.UC_X86_REG_CR4]
        )
        return cr0, cr3, cr4, uc.reg_read(x.UC_X86_REG_MSR, Msr.EFER)


def _places() -> list[tuple[slice, slice]]:
    """Where each group of registers lies in a save area, and in what the engine gives."""
    places = []
    at = 0
    for group in (*_GENERAL, _CONTROL):
        first, last = (getattr(Vmsa, name).offset for name in (group[0], group[-1]))
        length = 8 * len(group)
        if last + 8 - first != length:
            raise AssertionError(f"{group} do not lie one behind the other")
        places.append((slice(first, first + length), slice(at, at + length)))
        at += length
    return places


_PLACES = _places()


def _number(constants: Any, name: str) -> int:
    """The engine's number of a register."""
    name = {"rflags": "eflags"}.get(name, name)
    number: int = getattr(constants, f"UC_X86_REG_{name.upper()}")
    return number


def long_mode_active(state: Vmsa) -> int:
    """EFER with LMA as CR0.PG and LME make it."""
    active = state.efer & EFER_LME and state.cr0 & CR0_PG
    return state.efer & ~EFER_LMA | (EFER_LMA if active else 0)
