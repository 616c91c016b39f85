"""Registers between a save area and the engine: which field is which, and which mean more than a number.

The engine keeps its own hidden parts of CS and SS; it takes them from a descriptor only, so that setting them
is an IRETQ from a private page with a private descriptor table.
"""

import struct

from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.engine import SCRATCH, Engine

__all__ = ("Registers",)

_GPRS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{n}" for n in range(8, 16)),
)
_MSRS = (
    ("star", 0xC000_0081),
    ("lstar", 0xC000_0082),
    ("cstar", 0xC000_0083),
    ("sfmask", 0xC000_0084),
    ("kernel_gs_base", 0xC000_0102),
    ("efer", 0xC000_0080),
)
_CODE_64, _DATA_32 = 0xA9B, 0xC93
"""Packed attributes of flat segments at privilege level 0."""
_NULL_CS = 0x1FF0
"""Selector that stands for a null one in CS, which the engine does not take."""
_FIRST, _SECOND = slice(0, 0x170), slice(0x1E0, 0x308)
_X87 = slice(0x400, 0x470)
"""Parts of a save area that change seldom: segments and control registers; MSRs."""


class Registers:
    """What one engine holds, and the save area that it was last given or gave."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        x = engine.x
        names = [*_GPRS, "rip"]
        self._general = [getattr(x, f"UC_X86_REG_{name.upper()}") for name in names]
        self._names = names
        self._often = [
            *self._general,
            x.UC_X86_REG_EFLAGS,
            *(x.UC_X86_REG_CR0, x.UC_X86_REG_CR3, x.UC_X86_REG_CR4),
            *(x.UC_X86_REG_FS_BASE, x.UC_X86_REG_GS_BASE),
        ]
        self._xmm = [getattr(x, f"UC_X86_REG_XMM{n}") for n in range(16)]
        self._seldom: tuple[bytes, bytes] | None = None
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
        values = [getattr(state, name) for name in self._names]
        general = list(zip(self._general, values, strict=True))
        # The engine's own failed look-ups change its CR2: the guest's is given anew, and never taken from it.
        uc.reg_write_batch([*general, (x.UC_X86_REG_CR2, state.cr2)])
        uc.reg_write(x.UC_X86_REG_EFLAGS, state.rflags)

    def store_general(self, state: Vmsa) -> None:
        """What instructions are decoded and addresses computed with."""
        uc = self._engine.uc
        *general, state.rflags, state.cr0, state.cr3, state.cr4, fs, gs = uc.reg_read_batch(
            self._often
        )
        for name, value in zip(self._names, general, strict=True):
            setattr(state, name, value)
        for name, base in (("fs", fs), ("gs", gs)):
            segment = Segment(getattr(state, name))
            if segment.base != base:
                segment.base = base
                setattr(state, name, bytes(segment))
        self._store_code_and_stack(state)

    def store(self, state: Vmsa) -> None:
        """Write what the engine holds into a save area."""
        uc, x = self._engine.uc, self._engine.x
        self.store_general(state)
        state.kernel_gs_base = uc.reg_read(x.UC_X86_REG_MSR, 0xC000_0102)
        for name, register in (("gdtr", x.UC_X86_REG_GDTR), ("idtr", x.UC_X86_REG_IDTR)):
            _, base, limit, _ = uc.reg_read(register)
            setattr(state, name, bytes(Segment(base=base, limit=limit)))
        *xmm, state.mxcsr = uc.reg_read_batch([*self._xmm, x.UC_X86_REG_MXCSR])
        state.fpreg_xmm = self._fpu = b"".join(value.to_bytes(16, "little") for value in xmm)
        self._store_x87(state)
        self._seldom = bytes(state.data[_FIRST]), bytes(state.data[_SECOND])

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

    def _store_x87(self, state: Vmsa) -> None:
        uc, x = self._engine.uc, self._engine.x
        control = uc.reg_read_batch([x.UC_X86_REG_FPCW, x.UC_X86_REG_FPSW, x.UC_X86_REG_FPTAG])
        state.x87_fcw, state.x87_fsw, tags = control
        top = state.x87_fsw >> 11 & 7
        if state.x87_ftw == 0 and tags == 0xFFFF:
            return  # all registers are empty, and were
        registers = uc.reg_read_batch([x.UC_X86_REG_FP0 + (top + n & 7) for n in range(8)])
        state.fpreg_x87 = b"".join(m.to_bytes(8, "little") for m, _ in registers) + b"".join(
            e.to_bytes(2, "little") for _, e in registers
        )
        state.x87_ftw = sum(1 << n for n in range(8) if tags >> 2 * n & 3 != 3)
        self._x87_held = self._x87_fields(state)

    def _store_code_and_stack(self, state: Vmsa) -> None:
        """Selectors that the guest has loaded since; in 64-bit mode their hidden parts are flat."""
        uc, x = self._engine.uc, self._engine.x
        cpl = self.cpl
        state.cpl = cpl
        for name, register, attrib in (
            ("cs", x.UC_X86_REG_CS, _CODE_64),
            ("ss", x.UC_X86_REG_SS, _DATA_32),
        ):
            selector = uc.reg_read(register)
            if selector & ~3 == _NULL_CS:
                selector &= 3
            segment = Segment(getattr(state, name))
            if segment.selector != selector:
                usable = attrib | cpl << 5 if selector & ~3 else 0
                flat = Segment(selector=selector, attrib=usable, limit=0xFFFF_FFFF)
                setattr(state, name, bytes(flat))

    @property
    def cpl(self) -> int:
        level: int = self._engine.uc.reg_read(self._engine.x.UC_X86_REG_CS) & 3
        return level

    def set_code_and_stack(self, cs: Segment, ss: Segment) -> None:
        """CS and SS with their hidden parts, by IRETQ out of the scratch pages."""
        uc, x = self._engine.uc, self._engine.x
        gdt, stack, code = SCRATCH, SCRATCH + 0x2000, SCRATCH + 0x3000
        table = bytearray(0x2000)
        selector = cs.selector if cs.selector & ~3 else _NULL_CS | cs.selector
        _put(table, selector >> 3, _descriptor_high(cs.attrib))
        if ss.selector & ~3:
            _put(table, ss.selector >> 3, _descriptor_high(ss.attrib))
        here = [*uc.reg_read_batch([x.UC_X86_REG_RSP, x.UC_X86_REG_RIP])]
        flags = uc.reg_read(x.UC_X86_REG_EFLAGS)
        frame = struct.pack("<5Q", code + 16, selector, 2, here[0], ss.selector)
        uc.reg_write(x.UC_X86_REG_GDTR, (0, gdt, 0x1FFF, 0))
        uc.reg_write(x.UC_X86_REG_RSP, stack)
        pages = (
            bytes(table) + frame.ljust(0x1000, b"\0") + b"\x48\xcf".ljust(16, b"\x90") + b"\xf4"
        )
        self._engine.privately(code, pages, code + 16)
        gdtr = uc.reg_read(x.UC_X86_REG_GDTR)
        if (uc.reg_read(x.UC_X86_REG_CS), gdtr[1]) != (selector, gdt):
            raise RuntimeError(f"CS {cs.selector:#x} cannot be loaded into the engine")
        uc.reg_write(x.UC_X86_REG_RSP, here[0])
        uc.reg_write(x.UC_X86_REG_RIP, here[1])
        uc.reg_write(x.UC_X86_REG_EFLAGS, flags)

    def _load_system(self, state: Vmsa) -> None:
        uc, x = self._engine.uc, self._engine.x
        cs, ss = Segment(state.cs), Segment(state.ss)
        uc.reg_write(x.UC_X86_REG_CR0, state.cr0)
        uc.reg_write(x.UC_X86_REG_CR4, state.cr4)
        uc.reg_write(x.UC_X86_REG_CR3, state.cr3)
        if (
            uc.reg_read(x.UC_X86_REG_CS) != cs.selector
            or uc.reg_read(x.UC_X86_REG_SS) != ss.selector
        ):
            self.set_code_and_stack(cs, ss)
        gdtr, idtr, tr = Segment(state.gdtr), Segment(state.idtr), Segment(state.tr)
        uc.reg_write(x.UC_X86_REG_GDTR, (0, gdtr.base, gdtr.limit, 0))
        uc.reg_write(x.UC_X86_REG_IDTR, (0, idtr.base, idtr.limit, 0))
        uc.reg_write(x.UC_X86_REG_TR, (tr.selector, tr.base, tr.limit, 0x8B00))
        for name, index in _MSRS:
            uc.reg_write(x.UC_X86_REG_MSR, (index, getattr(state, name)))
        uc.reg_write(x.UC_X86_REG_FS_BASE, Segment(state.fs).base)
        uc.reg_write(x.UC_X86_REG_GS_BASE, Segment(state.gs).base)
        self._engine.flush()


def _put(table: bytearray, index: int, high: int) -> None:
    """A descriptor with base 0 and the greatest limit; `high` is its upper half, limit aside."""
    table[8 * index : 8 * index + 8] = (high << 32 | 0xF << 48 | 0xFFFF).to_bytes(8, "little")


def _descriptor_high(attrib: int) -> int:
    """Bits 47:40 and 55:52 of a descriptor from the packed attributes of a save area."""
    return (attrib & 0xFF | 1) << 8 | (attrib >> 8 & 0xF) << 20
