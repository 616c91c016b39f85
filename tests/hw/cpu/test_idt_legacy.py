"""Delivery outside of long mode, on tables written by hand from [APM2-24593 §8.6]."""

import struct

import pytest

from softcvm.abi.svm import GuestException, Vector
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.idt import Event
from softcvm.hw.cpu.idt_legacy import deliver_outside_long_mode
from softcvm.hw.cpu.paging import Access
from softcvm.sim.errors import Unmodelled
from tests.hw.cpu.flat import Flat


@pytest.fixture
def real() -> Vmsa:
    """In real mode, as reset leaves it but for a stack."""
    state = Vmsa()
    state.cs = bytes(Segment(selector=0xF000, attrib=0x9B, limit=0xFFFF, base=0x3000))
    state.ss = bytes(Segment(selector=0x100, attrib=0x93, limit=0xFFFF, base=0x1000))
    state.idtr = bytes(Segment(limit=0x3FF))
    state.cr0, state.rip, state.rsp, state.rflags = 0x10, 0x123, 0x100, 0x0301 | 2
    return state


def test_real_mode_goes_through_the_table_of_vectors(real: Vmsa) -> None:
    memory = Flat()
    memory.write_linear(4 * Vector.UD, struct.pack("<HH", 0x44, 0x0200), Access())
    deliver_outside_long_mode(memory, real, Event(Vector.UD))
    assert struct.unpack_from("<3H", memory.data, 0x10FA) == (0x123, 0xF000, 0x303)
    assert (real.rip, real.rsp, Segment(real.cs).base) == (0x44, 0xFA, 0x2000)
    assert real.rflags == 3  # neither IF nor TF


def test_real_mode_pushes_no_error_code(real: Vmsa) -> None:
    memory = Flat()
    deliver_outside_long_mode(memory, real, Event(Vector.GP, 0x18))
    assert real.rsp == 0x100 - 6


def test_a_stack_without_room_is_a_stack_fault(real: Vmsa) -> None:
    real.rsp = 4
    with pytest.raises(GuestException) as refused:
        deliver_outside_long_mode(Flat(), real, Event(Vector.UD))
    assert refused.value.vector == Vector.SS


@pytest.mark.parametrize("cr0", [0x10, 0x11])
def test_a_vector_beyond_the_table_is_general_protection(real: Vmsa, cr0: int) -> None:
    real.cr0, real.idtr = cr0, bytes(Segment(limit=3))
    with pytest.raises(GuestException) as refused:
        deliver_outside_long_mode(Flat(), real, Event(Vector.UD))
    assert (refused.value.vector, refused.value.error_code) == (Vector.GP, Vector.UD << 3 | 3)


def test_gates_of_protected_mode_are_not_modelled(real: Vmsa) -> None:
    real.cr0 = 0x11
    with pytest.raises(Unmodelled, match="exception 6 in a guest in protected mode"):
        deliver_outside_long_mode(Flat(), real, Event(Vector.UD))
