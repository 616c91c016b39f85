"""A core that runs a scripted guest: a Python generator of operations (abi.insn) instead of code.

Owns where the script stands: the operation under way, how much of it is done, and everything the guest
has seen.  That record makes the core copyable: a copy feeds it to a fresh generator.

Where a processor stands is part of its VMSA.  A script therefore belongs to a VMSA page: given another page,
or the same one rewritten by the guest, the core starts a script anew; given a page back, it goes on there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from softcvm.abi.insn import (
    Fetch,
    GuestOp,
    Hlt,
    Load,
    Program,
    Pvalidate,
    Rmpadjust,
    Rmpquery,
    StartState,
    Store,
    Touch,
)
from softcvm.abi.svm import ExitCode, GuestException, Vector
from softcvm.abi.vmsa import Vmsa
from softcvm.hw.access import NptFault
from softcvm.hw.cpu.core import GuestCpu, record_exit
from softcvm.hw.cpu.intercepts import intercepted, outcome
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.hw.cpu.vmrun import VmExitRaised
from softcvm.hw.insn.pvalidate import pvalidate
from softcvm.hw.insn.rmpadjust import rmpadjust, rmpquery
from softcvm.hw.soc import Soc
from softcvm.sim.state import State
from softcvm.sim.steps import Point, Steps

__all__ = ("ScriptedCore",)

_INSTRUCTION = Point("guest instruction")
_RUNNING = object()
"""An operation is not finished; its result is not known."""


class _Stand(NamedTuple):
    """Where the script of another VMSA was left; `vmsa` is that page's contents."""

    vmsa: bytes
    seen: list[Any]
    op: GuestOp | None
    done: int
    loaded: bytearray
    waits: bool


class ScriptedCore(State):
    """Runs make_program() on one vCPU.  When the script returns, the vCPU executes HLT for ever."""

    saved = ("vmsa", "seen", "op", "done", "loaded", "waits", "others")
    derived = {
        "soc": "the machine it belongs to",
        "make_program": "the script, given from outside",
        "_program": "rebuilt from `seen`",
    }

    def __init__(self, soc: Soc, make_program: Callable[[], Program]) -> None:
        self.soc = soc
        self.make_program = make_program
        self.vmsa: tuple[int, bytes] | None = None
        """sPA and contents of the VMSA that the script under way belongs to."""
        self.others: dict[int, _Stand] = {}
        """Scripts of other VMSA pages, by sPA."""
        self.seen: list[Any] = []
        """Result of, or GuestException raised at, every finished operation."""
        self.op: GuestOp | None = None
        self.done = 0
        self.loaded = bytearray()
        self.waits = False
        """The operation left the guest and ends when the vCPU is entered again."""
        self._program: Program | None = None

    def vmrun(self, vmcb: Vmcb) -> Steps[None]:
        """Run the script until something leaves the guest."""
        try:
            cpu = GuestCpu(self.soc, vmcb)
        except VmExitRaised as refused:
            record_exit(self.soc, vmcb, refused.code, refused.info_1, refused.info_2)
            return
        if cpu.vmsa_pa is not None:
            self._choose_script(cpu.vmsa_pa, bytes(cpu.vmsa.data))
        if self.waits and self.op is not None:
            self._finish(outcome(cpu, vmcb, self.op))
        try:
            while True:
                if self.op is None:
                    self.op = self._next()
                yield _INSTRUCTION
                if vmcb.intr:
                    cpu.leave(vmcb, ExitCode.INTR)
                    return
                try:
                    result = self._execute(cpu, vmcb, self.op)
                except GuestException as exception:
                    result = exception
                if result is not _RUNNING:
                    self._finish(result)
        except NptFault as fault:
            cpu.leave(vmcb, ExitCode.NPF, fault.error_code, fault.gpa)
        except VmExitRaised as left:
            self.waits = True
            cpu.leave(vmcb, left.code, left.info_1, left.info_2)

    def interrupt(self) -> None:
        """A script comes to a point before each operation."""

    def _choose_script(self, spa: int, contents: bytes) -> None:
        """The script of this VMSA."""
        now = (spa, contents)
        if self.vmsa == now:
            return
        if self.vmsa is not None:
            stand = _Stand(self.vmsa[1], self.seen, self.op, self.done, self.loaded, self.waits)
            self.others[self.vmsa[0]] = stand
            known = self.others.pop(spa, None)
            if known is None or known.vmsa != contents:
                known = _Stand(contents, [], None, 0, bytearray(), False)
            _, self.seen, self.op, self.done, self.loaded, self.waits = known
            self._program = None
        self.vmsa = now

    def _next(self) -> GuestOp:
        """The script's next operation, after what it has seen so far."""
        try:
            if self._program is None:
                self._program = self.make_program()
                op = next(self._program)
                for outcome in self.seen:
                    op = self._feed(outcome)
                return op
            return self._feed(self.seen[-1])
        except StopIteration:
            return Hlt()
        except GuestException as unhandled:
            raise VmExitRaised(ExitCode.SHUTDOWN) from unhandled

    def _feed(self, outcome: Any) -> GuestOp:
        assert self._program is not None
        if isinstance(outcome, GuestException):
            return self._program.throw(outcome)
        return self._program.send(outcome)

    def _finish(self, outcome: Any) -> None:
        self.seen.append(outcome)
        self.op = None
        self.done = 0
        self.loaded = bytearray()
        self.waits = False

    def _execute(self, cpu: GuestCpu, vmcb: Vmcb, op: GuestOp) -> Any:
        match op:
            case Load():
                return cpu.load(op, self.loaded)
            case Store():
                self.done = cpu.store(op, self.done)
                return _RUNNING if self.done < len(op.data) else None
            case Touch():
                self.done = cpu.touch(op, self.done)
                return _RUNNING if self.done < op.count else None
            case Fetch():
                return cpu.fetch(op)
            case Pvalidate() | Rmpadjust() | Rmpquery() if not cpu.snp:
                raise GuestException(Vector.UD)
            case Pvalidate():
                return pvalidate(self.soc, cpu.npt, cpu.asid, cpu.vmpl, op)
            case Rmpadjust():
                return rmpadjust(self.soc, cpu.npt, cpu.asid, cpu.vmpl, op)
            case Rmpquery():
                return rmpquery(self.soc, cpu.npt, cpu.asid, cpu.vmpl, op)
            case StartState():
                return Vmsa(bytes(cpu.vmsa.data))
            case _:
                return intercepted(cpu, vmcb, op)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScriptedCore":
        from copy import deepcopy

        other = ScriptedCore(deepcopy(self.soc, memo), self.make_program)
        memo[id(self)] = other
        other.vmsa = self.vmsa
        other.others = deepcopy(self.others, memo)
        other.seen = list(self.seen)
        other.op, other.done, other.waits = self.op, self.done, self.waits
        other.loaded = bytearray(self.loaded)
        return other
