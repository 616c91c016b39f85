"""Registers between a save area and the engine: which field is which, and which mean more than a number.

The engine keeps what the guest changes by itself, segments with their hidden parts and the mode included
(engine_state.py); load() gives it only what differs from what it was last given or gave.
"""

from softcvm.abi.svm import Msr
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.engine import Engine
from softcvm.hw.cpu.engine_state import SEGMENTS
from softcvm.hw.cpu.vmrun import CR0_PG, EFER_LMA, EFER_LME

__all__ = ("Registers", "long_mode_active")

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
)
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
        *general, state.rflags, state.cr0, state.cr3, state.cr4 = uc.reg_read_batch(self._often)
        for name, value in zip(self._names, general, strict=True):
            setattr(state, name, value)
        state.efer = long_mode_active(state)
        segments, state.cpl = self._engine.hidden.read()
        for name, (selector, base, limit, attrib) in zip(SEGMENTS, segments, strict=True):
            given = Segment(selector=selector, base=base, limit=limit, attrib=attrib)
            setattr(state, name, bytes(given))

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

    def _control(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER as the engine has them."""
        uc, x = self._engine.uc, self._engine.x
        cr0, cr3, cr4 = uc.reg_read_batch(
            [x.UC_X86_REG_CR0, x.UC_X86_REG_CR3, x.UC_X86_REG_CR4]
        )
        return cr0, cr3, cr4, uc.reg_read(x.UC_X86_REG_MSR, Msr.EFER)


def long_mode_active(state: Vmsa) -> int:
    """EFER with LMA as CR0.PG and LME make it."""
    active = state.efer & EFER_LME and state.cr0 & CR0_PG
    return state.efer & ~EFER_LMA | (EFER_LMA if active else 0)
