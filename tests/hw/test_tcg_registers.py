"""The engine's registers taken many at a time, against unicorn's own way of reading each."""

from typing import Any

import pytest

from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.engine import Engine
from softcvm.hw.cpu.tcg_registers import Registers


@pytest.fixture
def engine() -> Engine:
    import mmap

    def translate(address: int, kind: int) -> tuple[int, int]:
        raise AssertionError(f"nothing runs: {address:#x} {kind}")

    return Engine(memoryview(mmap.mmap(-1, 1 << 20)), translate)


def written(uc: Any, x: Any) -> None:
    """Every register differently, through unicorn's interface."""
    for n, name in enumerate(
        [
            "RAX",
            "RBX",
            "RCX",
            "RDX",
            "RSI",
            "RDI",
            "RBP",
            "RSP",
            "R8",
            "R9",
            "R15",
            "FS_BASE",
            "GS_BASE",
        ]
    ):
        uc.reg_write(getattr(x, f"UC_X86_REG_{name}"), 0x1122_3344_5566_7700 + n)
    for n in range(16):
        uc.reg_write(getattr(x, f"UC_X86_REG_XMM{n}"), (n << 120) + 0xABCD00 + n)
    uc.reg_write(x.UC_X86_REG_MSR, (0xC000_0102, 0xFFFF_8000_1234_5678))
    uc.reg_write(x.UC_X86_REG_GDTR, (0, 0xFFFF_8000_0000_1000, 0x1FF, 0))
    uc.reg_write(x.UC_X86_REG_IDTR, (0, 0xFFFF_8000_0000_2000, 0xFFF, 0))
    uc.reg_write(x.UC_X86_REG_MXCSR, 0x1FA0)
    uc.reg_write(x.UC_X86_REG_FPCW, 0x27F)


def test_a_save_area_gets_what_unicorn_says_that_it_holds(engine: Engine) -> None:
    uc, x = engine.uc, engine.x
    registers = Registers(engine)
    written(uc, x)
    registers.will_run()
    state = Vmsa()
    registers.store(state)
    assert (state.rax, state.r15) == (
        uc.reg_read(x.UC_X86_REG_RAX),
        uc.reg_read(x.UC_X86_REG_R15),
    )
    assert state.rsp == uc.reg_read(x.UC_X86_REG_RSP)
    assert state.rflags == uc.reg_read(x.UC_X86_REG_EFLAGS)
    assert state.kernel_gs_base == uc.reg_read(x.UC_X86_REG_MSR, 0xC000_0102)
    assert Segment(state.fs).base == uc.reg_read(x.UC_X86_REG_FS_BASE)
    for name, register in (("gdtr", x.UC_X86_REG_GDTR), ("idtr", x.UC_X86_REG_IDTR)):
        table = Segment(getattr(state, name))
        assert (table.base, table.limit) == uc.reg_read(register)[1:3]
    for n in range(16):
        held = uc.reg_read(getattr(x, f"UC_X86_REG_XMM{n}"))
        assert int.from_bytes(state.fpreg_xmm[16 * n : 16 * n + 16], "little") == held
    assert (state.mxcsr, state.x87_fcw) == (0x1FA0, 0x27F)


def test_an_engine_that_has_not_run_changes_no_save_area(engine: Engine) -> None:
    registers = Registers(engine)
    state = Vmsa()
    registers.will_run()
    registers.store(state)
    state.rax, state.rip = 0x1234, 0x5678
    before = bytes(state.data)
    registers.store(state)
    assert bytes(state.data) == before


def test_what_a_save_area_gave_comes_back_after_a_run(engine: Engine) -> None:
    registers = Registers(engine)
    state = Vmsa()
    registers.will_run()
    registers.store(state)
    for n, name in enumerate(("rax", "rcx", "rbp", "r8", "r14", "rip")):
        setattr(state, name, 0x7000_0000_0000 + n)
    state.fpreg_xmm = bytes(range(256))
    registers.load(state)
    registers.will_run()
    again = Vmsa(bytes(state.data))
    for name in ("rax", "rcx", "rbp", "r8", "r14", "rip"):
        setattr(again, name, 0)
    again.fpreg_xmm = bytes(256)
    registers.store(again)
    assert bytes(again.data) == bytes(state.data)
