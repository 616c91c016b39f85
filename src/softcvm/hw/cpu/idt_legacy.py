"""Delivery of an exception outside of long mode.  [APM2-24593 §8.6, §8.7]

Owns real mode's vectors and the first check of protected mode, that there is a gate; protected mode's gates,
task switches and stacks are not modelled.
"""

import struct

from softcvm.abi.control_registers import CR0_PE
from softcvm.abi.svm import GuestException, Vector
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.hw.cpu.idt import Event, Memory
from softcvm.hw.cpu.paging import Access
from softcvm.sim.errors import Unmodelled

__all__ = ("deliver_outside_long_mode",)

_TF, _IF, _RF, _AC = 1 << 8, 1 << 9, 1 << 16, 1 << 18
_IDT, _EXT = 2, 1
_U16, _U32 = 0xFFFF, 0xFFFF_FFFF


def deliver_outside_long_mode(memory: Memory, state: Vmsa, event: Event) -> None:
    """Push the frame and set `state` to the handler.  GuestException for a fault on the way."""
    table = Segment(state.idtr)
    size = 8 if state.cr0 & CR0_PE else 4
    if size * event.vector + size - 1 > table.limit:
        raise GuestException(
            Vector.GP, event.vector << 3 | _IDT | (0 if event.length else _EXT)
        )
    if size == 8:
        raise Unmodelled(f"exception {event.vector} in a guest in protected mode")
    address = table.base + 4 * event.vector & _U32
    ip, cs = struct.unpack("<HH", memory.read_linear(address, 4, Access(implicit=True)))
    code, stack = Segment(state.cs), Segment(state.ss)
    top = (state.rsp & _U16) - 6
    if top < 0:
        raise GuestException(Vector.SS, 0)
    frame = struct.pack("<3H", state.rip & _U16, code.selector, state.rflags & _U16)
    memory.write_linear(stack.base + top & _U32, frame, Access(write=True, implicit=True))
    code.selector, code.base = cs, cs << 4
    state.cs, state.rip = bytes(code), ip
    state.rsp = state.rsp & ~_U16 | top
    state.rflags &= ~(_TF | _IF | _RF | _AC)
