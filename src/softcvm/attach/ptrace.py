"""ptrace on the threads of a caught program: stops, registers, and system calls made in its name.

Everything here runs in the one thread that seized the program, as ptrace wants it.  What a stop means is the
supervisor's.
"""

import ctypes
import os
import signal
from contextlib import suppress
from enum import IntEnum
from errno import ESRCH
from typing import NamedTuple

from softcvm.attach.kernel_abi import LIBC, Registers, call

__all__ = (
    "PtraceEvent",
    "Stop",
    "ThreadGone",
    "carry_on",
    "event_message",
    "get_registers",
    "inject",
    "interrupt",
    "listen",
    "seize",
    "send_signal",
    "set_registers",
    "step",
    "wait_any",
    "wait_for_all",
    "wait_thread",
)

_CONT, _SINGLESTEP, _GETREGS, _SETREGS = 7, 9, 12, 13
_GETEVENTMSG, _SEIZE, _INTERRUPT, _LISTEN = 0x4201, 0x4206, 0x4207, 0x4208
_TRACEFORK, _TRACEVFORK, _TRACECLONE, _TRACEEXEC = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_TRACEVFORKDONE, _TRACEEXIT = 1 << 5, 1 << 6
_EXITKILL = 1 << 20
_OPTIONS = _TRACEFORK | _TRACEVFORK | _TRACECLONE | _TRACEEXEC | _EXITKILL
_OPTIONS |= _TRACEVFORKDONE | _TRACEEXIT
_WALL = 0x4000_0000
_SYSCALL_INSN = 2  # bytes of SYSCALL
_NO_SYSCALL = (1 << 64) - 1
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class ThreadGone(Exception):
    """The thread ended meanwhile."""


class PtraceEvent(IntEnum):
    FORK = 1
    VFORK = 2
    CLONE = 3
    EXEC = 4
    VFORK_DONE = 5
    EXIT = 6
    STOP = 128


class Stop(NamedTuple):
    """What waitpid() says of a thread: it stopped (signo, and event when it is one), or it ended."""

    tid: int
    status: int

    @property
    def ended(self) -> bool:
        return not os.WIFSTOPPED(self.status)

    @property
    def signo(self) -> int:
        return os.WSTOPSIG(self.status)

    @property
    def event(self) -> int:
        return self.status >> 16


def _ptrace(request: int, tid: int, addr: int = 0, data: int = 0) -> None:
    """Raises ThreadGone, OSError."""
    if LIBC.ptrace(request, tid, addr, data) < 0:
        errno = ctypes.get_errno()
        if errno == ESRCH:
            raise ThreadGone(tid)
        call(-1, f"ptrace({request:#x}) of thread {tid}")


def seize(tid: int) -> None:
    """Trace a thread and all that it starts; they die with us.  OSError."""
    _ptrace(_SEIZE, tid, 0, _OPTIONS)


def interrupt(tid: int) -> None:
    """Have the thread stop before it executes another instruction."""
    _ptrace(_INTERRUPT, tid)


def carry_on(tid: int, signo: int = 0) -> None:
    """Let a stopped thread run, and deliver it this signal."""
    _ptrace(_CONT, tid, 0, signo)


def listen(tid: int) -> None:
    """Leave a thread in its group-stop."""
    _ptrace(_LISTEN, tid)


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG: the new thread's id."""
    value = ctypes.c_ulong()
    _ptrace(_GETEVENTMSG, tid, 0, ctypes.addressof(value))
    return value.value


def get_registers(tid: int) -> Registers:
    registers = Registers()
    _ptrace(_GETREGS, tid, 0, ctypes.addressof(registers))
    return registers


def set_registers(tid: int, registers: Registers) -> None:
    _ptrace(_SETREGS, tid, 0, ctypes.addressof(registers))


def wait_any() -> Stop | None:
    """The next stop or end of any thread; None when nothing has happened.  ChildProcessError: none is left."""
    tid, status = os.waitpid(-1, os.WNOHANG | _WALL)
    return Stop(tid, status) if tid else None


def wait_thread(tid: int) -> Stop:
    """The next stop or end of one thread.  ThreadGone."""
    try:
        return Stop(*os.waitpid(tid, _WALL))
    except ChildProcessError:
        raise ThreadGone(tid) from None


def wait_for_all() -> None:
    """Until every traced thread and child has ended; they have been killed."""
    while True:
        try:
            stop = Stop(*os.waitpid(-1, _WALL))
        except ChildProcessError:
            return
        if not stop.ended:
            with suppress(ThreadGone):
                carry_on(stop.tid)


def inject(tid: int, nr: int, *args: int) -> int:
    """Make a stopped thread execute a system call, and leave it stopped as it was; the result.

    It must be stopped behind a SYSCALL instruction, which is used again.
    """
    before = get_registers(tid)
    changed = Registers.from_buffer_copy(before)
    changed.rax, changed.orig_rax = nr, _NO_SYSCALL
    changed.rip = before.rip - _SYSCALL_INSN
    for name, value in zip(_ARGUMENTS, (*args, *[0] * (6 - len(args))), strict=True):
        setattr(changed, name, value)
    set_registers(tid, changed)
    step(tid)
    result = ctypes.c_int64(get_registers(tid).rax).value
    set_registers(tid, before)
    return result


def step(tid: int) -> None:
    """Have a stopped thread execute one instruction, a system call included, and stop again.

    Signals that come meanwhile are sent to it once more, afterwards.
    """
    late: list[int] = []
    _ptrace(_SINGLESTEP, tid)
    while True:
        stop = wait_thread(tid)
        if stop.ended:
            raise ThreadGone(tid)
        if stop.signo == signal.SIGTRAP and not stop.event:
            break
        if not stop.event:
            late.append(stop.signo)
        _ptrace(_SINGLESTEP, tid)
    for signo in late:
        send_signal(tid, signo)


def send_signal(tid: int, signo: int) -> None:
    """tkill(2)"""
    LIBC.syscall(_SYS_TKILL, tid, signo)


_SYS_TKILL = 200
