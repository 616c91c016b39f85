"""A hypervisor of a few lines for guest code alone: flat memory, and answers that a test chooses.

Knows nothing of the RMP.  `ended` is the value of the GHCB MSR when the guest asked for termination.
"""

from collections.abc import Callable, Generator
from typing import Any

from softcvm.abi.insn import (
    Hlt,
    Load,
    Pvalidate,
    PvalidateOut,
    Rdmsr,
    Store,
    Touch,
    Vmgexit,
    Wrmsr,
)

__all__ = ("Ended", "FakeHost")


class Ended(Exception):
    """The guest asked to be ended: reason set and code."""

    def __init__(self, reason_set: int, reason: int) -> None:
        super().__init__(f"set {reason_set}, code {reason}")
        self.reason_set = reason_set
        self.reason = reason


class FakeHost:
    """vmgexit(host) is called at each VMGEXIT and may change `msr` and memory."""

    def __init__(self, vmgexit: Callable[["FakeHost"], None]) -> None:
        self.vmgexit = vmgexit
        self.memory: dict[int, int] = {}
        self.msr = 0
        self.pvalidate: Callable[[Pvalidate], PvalidateOut] = lambda op: PvalidateOut(
            0, False, op.count
        )
        self.ops: list[Any] = []

    def read(self, gpa: int, length: int) -> bytes:
        return bytes(self.memory.get(gpa + i, 0) for i in range(length))

    def write(self, gpa: int, data: bytes) -> None:
        self.memory.update({gpa + i: byte for i, byte in enumerate(data)})

    def run(self, program: Generator[Any, Any, Any]) -> Any:
        """What the program returns; Ended when it terminates."""
        result: Any = None
        try:
            while True:
                op = program.send(result)
                self.ops.append(op)
                result = self._execute(op)
        except StopIteration as stop:
            return stop.value

    def _execute(self, op: Any) -> Any:
        match op:
            case Load(gpa, length, _):
                return self.read(gpa, length)
            case Store(gpa, data, _):
                self.write(gpa, data)
            case Wrmsr(_, value):
                self.msr = value
            case Rdmsr(_):
                return self.msr
            case Vmgexit():
                if self.msr & 0xFFF == 0x100:
                    raise Ended(self.msr >> 12 & 0xF, self.msr >> 16 & 0xFF)
                self.vmgexit(self)
                return self.msr
            case Pvalidate():
                return self.pvalidate(op)
            case Touch():
                return None
            case Hlt():
                raise AssertionError("the guest halted")
            case _:
                raise AssertionError(f"no answer to {op}")
        return None
