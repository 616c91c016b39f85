"""Delivery through the guest's IDT, on tables written by hand from [APM2-24593 §4.8.3, §8.9]."""

import struct

import pytest

from softcvm.abi.svm import ExitCode, GuestException, Vector
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.idt import Event, deliver
from softcvm.hw.cpu.paging import Access
from softcvm.hw.cpu.vmrun import VmExitRaised
from tests.hw.cpu.flat import Flat

IDT, GDT, TSS, STACK, HANDLER = 0x1000, 0x2000, 0x3000, 0x8000, 0xFFFF_8000_1234_5678
KERNEL_CODE, USER_CODE, USER_DATA = 0x08, 0x1B, 0x23
INTERRUPT, TRAP = 0x8E, 0x8F


@pytest.fixture
def memory() -> Flat:
    memory = Flat()
    memory.write_linear(
        GDT + KERNEL_CODE, (0x00AF_9B00_0000_FFFF).to_bytes(8, "little"), Access()
    )
    memory.write_linear(TSS + 4, struct.pack("<Q", STACK), Access())
    return memory


@pytest.fixture
def user() -> Vmsa:
    """At privilege level 3, with RIP behind a two-byte instruction."""
    state = Vmsa()
    state.cs = bytes(Segment(selector=USER_CODE, attrib=0xAFB, limit=0xFFFF_FFFF))
    state.ss = bytes(Segment(selector=USER_DATA, attrib=0xCF3, limit=0xFFFF_FFFF))
    state.idtr = bytes(Segment(base=IDT, limit=0xFFF))
    state.gdtr = bytes(Segment(base=GDT, limit=0x27))
    state.tr = bytes(Segment(selector=0x30, base=TSS, limit=0x67))
    state.cpl, state.rip, state.rsp, state.rflags = 3, 0x4002, 0x7000, 0x202
    return state


def gate(memory: Flat, vector: int, kind: int, *, ist: int = 0) -> None:
    low, middle, high = HANDLER & 0xFFFF, HANDLER >> 16 & 0xFFFF, HANDLER >> 32
    entry = struct.pack("<HHBBHII", low, KERNEL_CODE, ist, kind, middle, high, 0)
    memory.write_linear(IDT + 16 * vector, entry, Access())


def frame(memory: Flat, state: Vmsa, count: int) -> list[int]:
    return list(struct.unpack_from(f"<{count}Q", memory.data, state.rsp))


def test_an_exception_in_user_mode_comes_on_the_stack_of_the_task_state_segment(
    memory: Flat, user: Vmsa
) -> None:
    gate(memory, Vector.GP, INTERRUPT)
    deliver(memory, user, Event(Vector.GP, 0x18))
    assert (user.rip, user.rsp, user.cpl) == (HANDLER, STACK - 48, 0)
    assert frame(memory, user, 6) == [0x18, 0x4002, USER_CODE, 0x202, 0x7000, USER_DATA]
    assert user.rflags == 2  # IF is clear behind an interrupt gate
    assert [Segment(state).selector for state in (user.cs, user.ss)] == [KERNEL_CODE, 0]


def test_a_trap_gate_leaves_interrupts_on(memory: Flat, user: Vmsa) -> None:
    gate(memory, Vector.UD, TRAP)
    deliver(memory, user, Event(Vector.UD))
    assert user.rflags == 0x202


def test_an_interrupt_instruction_needs_the_privilege_that_its_gate_asks_for(
    memory: Flat, user: Vmsa
) -> None:
    gate(memory, 0x80, INTERRUPT)
    before = bytes(user.data)
    with pytest.raises(GuestException) as refused:
        deliver(memory, user, Event(0x80, length=2))
    assert (refused.value.vector, refused.value.error_code) == (Vector.GP, 0x80 << 3 | 2)
    assert bytes(user.data) == before


def test_an_interrupt_instruction_passes_a_gate_for_users(memory: Flat, user: Vmsa) -> None:
    gate(memory, 0x80, INTERRUPT | 3 << 5)
    deliver(memory, user, Event(0x80, length=2))
    assert frame(memory, user, 2) == [0x4002, USER_CODE]


def test_an_exception_asks_for_no_privilege(memory: Flat, user: Vmsa) -> None:
    gate(memory, Vector.BP, INTERRUPT)
    deliver(memory, user, Event(Vector.BP))
    assert user.rip == HANDLER


@pytest.mark.parametrize(
    ("kind", "vector"), [(0x0E, Vector.NP), (0x8C, Vector.GP), (0x85, Vector.GP)]
)
def test_a_gate_that_is_absent_or_of_another_kind_is_named_in_the_error_code(
    memory: Flat, user: Vmsa, kind: int, vector: Vector
) -> None:
    gate(memory, Vector.UD, kind)
    with pytest.raises(GuestException) as refused:
        deliver(memory, user, Event(Vector.UD))
    assert (refused.value.vector, refused.value.error_code) == (vector, Vector.UD << 3 | 3)


def test_a_stack_outside_of_the_canonical_addresses_is_a_stack_fault(
    memory: Flat, user: Vmsa
) -> None:
    gate(memory, Vector.UD, INTERRUPT)
    memory.write_linear(TSS + 4, struct.pack("<Q", 1 << 62), Access())
    with pytest.raises(GuestException) as refused:
        deliver(memory, user, Event(Vector.UD))
    assert (refused.value.vector, refused.value.error_code) == (Vector.SS, 0)


@pytest.mark.parametrize(
    ("first", "second", "comes_to"),
    [
        (Vector.PF, Vector.PF, Vector.DF),
        (Vector.PF, Vector.GP, Vector.DF),
        (Vector.GP, Vector.NP, Vector.DF),
        (Vector.GP, Vector.PF, Vector.PF),
        (Vector.UD, Vector.GP, Vector.GP),
    ],
)
def test_two_exceptions_come_to_what_the_manuals_table_says(
    first: Vector, second: Vector, comes_to: Vector
) -> None:
    assert Event(first, 0).then(Event(second, 0)).vector == comes_to


def test_a_third_exception_is_a_shutdown() -> None:
    with pytest.raises(VmExitRaised) as left:
        Event(Vector.DF, 0).then(Event(Vector.GP, 0))
    assert left.value.code is ExitCode.SHUTDOWN
