"""Delivery of an exception through the guest's IDT in 64-bit mode.  [APM2-24593 §8.9, §8.2.9]

Owns gate and stack, the frame, and what a fault on the way comes to (#DF, shutdown).  Nothing of the guest's
registers changes unless all of it succeeds.
"""

import struct
from typing import NamedTuple, Protocol

from softcvm.abi.svm import ExitCode, GuestException, Vector
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.paging import Access
from softcvm.hw.cpu.vmrun import VmExitRaised

__all__ = ("Event", "Memory", "deliver")

_DF = 8
_CONTRIBUTORY = frozenset({0, 10, 11, 12, 13})
_PAGE_FAULTS = frozenset({14, 29})
_PRESENT, _INTERRUPT_GATE, _TRAP_GATE = 0x80, 0xE, 0xF
_TF, _IF, _NT, _RF = 1 << 8, 1 << 9, 1 << 14, 1 << 16
_SYSTEM = Access(implicit=True)
_PUSH = Access(write=True, implicit=True)
_EXT = 1
_IDT = 2


class Event(NamedTuple):
    """An exception or INT n to deliver.  error_code is None where the vector has none.

    length: bytes of the INT n or INT3, which RIP has passed; 0 for an exception.
    """

    vector: int
    error_code: int | None = None
    cr2: int = 0
    length: int = 0

    def then(self, second: "Event") -> "Event":
        """What comes of a fault while this one is delivered.  [APM2-24593 Table 8-3]"""
        if self.vector == _DF:
            raise VmExitRaised(ExitCode.SHUTDOWN)
        first_is = self.vector in _CONTRIBUTORY or self.vector in _PAGE_FAULTS
        second_is = second.vector in _CONTRIBUTORY
        if self.vector in _PAGE_FAULTS:
            second_is |= second.vector in _PAGE_FAULTS
        return Event(_DF, 0) if first_is and second_is else second


class Memory(Protocol):
    def read_linear(self, address: int, length: int, access: Access) -> bytes: ...

    def write_linear(self, address: int, data: bytes, access: Access) -> None: ...


def deliver(memory: Memory, state: Vmsa, event: Event) -> None:
    """Push the frame and set `state` to the handler.

    Raises GuestException for a fault on the way, and what reaching memory raises.
    """
    gate = _gate(memory, state, event)
    offset = gate[0] | gate[4] << 16 | gate[5] << 32
    selector, ist, kind = gate[1], gate[2] & 7, gate[3]
    cs = _code_segment(memory, state, selector)
    cpl, dpl = state.cpl, cs.attrib >> 5 & 3
    old_cs, old_ss = Segment(state.cs), Segment(state.ss)
    stack = state.rsp
    if ist or dpl < cpl:
        stack = _task_stack(memory, state, 0x24 + 8 * (ist - 1) if ist else 4 + 8 * dpl)
    stack &= ~15
    frame = [state.rip, old_cs.selector, state.rflags, state.rsp, old_ss.selector]
    if event.error_code is not None:
        frame.insert(0, event.error_code)
    stack -= 8 * len(frame)
    if stack + (1 << 47) & (1 << 64) - 1 >= 1 << 48:
        raise GuestException(Vector.SS, 0)
    memory.write_linear(stack, struct.pack(f"<{len(frame)}Q", *frame), _PUSH)
    if event.vector == Vector.PF:
        state.cr2 = event.cr2
    state.rip, state.rsp = offset, stack
    state.rflags &= ~(_TF | _NT | _RF | (_IF if kind & 0xF == _INTERRUPT_GATE else 0))
    state.cpl = dpl
    ss = old_ss if dpl == cpl else Segment(selector=dpl)
    state.cs, state.ss = bytes(cs), bytes(ss)


def _gate(memory: Memory, state: Vmsa, event: Event) -> tuple[int, ...]:
    """Offset low, selector, IST, type, offset middle and high of a gate.  #GP, #NP.

    INT n must have the privilege that the gate asks for; an exception need not.
    """
    table = Segment(state.idtr)
    vector = event.vector
    error = vector << 3 | _IDT | (0 if event.length else _EXT)
    if 16 * vector + 15 > table.limit:
        raise GuestException(Vector.GP, error)
    gate = struct.unpack("<HHBBHI", memory.read_linear(table.base + 16 * vector, 12, _SYSTEM))
    if gate[3] & 0x1F not in (_INTERRUPT_GATE, _TRAP_GATE):
        raise GuestException(Vector.GP, error)
    if event.length and gate[3] >> 5 & 3 < state.cpl:
        raise GuestException(Vector.GP, error)
    if not gate[3] & _PRESENT:
        raise GuestException(Vector.NP, error)
    return gate


def _code_segment(memory: Memory, state: Vmsa, selector: int) -> Segment:
    """The 64-bit code segment that a gate names, flat.  #GP, #NP."""
    table = Segment(state.gdtr)
    at = selector & ~7
    if not at or at + 7 > table.limit:
        raise GuestException(Vector.GP, at)
    word = int.from_bytes(memory.read_linear(table.base + at, 8, _SYSTEM), "little")
    kind, dpl = word >> 40 & 0x1F, word >> 45 & 3
    if kind & 0x18 != 0x18 or not word >> 53 & 1 or dpl > state.cpl:
        raise GuestException(Vector.GP, at)
    if not word >> 47 & 1:
        raise GuestException(Vector.NP, at)
    if kind & 4:  # conforming: the privilege level stays
        dpl = state.cpl
    attrib = word >> 40 & 0x9F | dpl << 5 | (word >> 52 & 0xF) << 8
    return Segment(selector=at | dpl, attrib=attrib, limit=0xFFFF_FFFF)


def _task_stack(memory: Memory, state: Vmsa, offset: int) -> int:
    """A stack pointer out of the task state segment."""
    task = Segment(state.tr)
    if offset + 7 > task.limit:
        raise GuestException(Vector.TS, task.selector & ~7)
    data = memory.read_linear(task.base + offset, 8, _SYSTEM)
    return int.from_bytes(data, "little")
