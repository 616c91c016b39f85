"""A process of the machine as user code sees it: softcvm.Sys on the software host.

Each call runs its steps straight through.  A host access that Linux answers with a signal
raises HostSignal; what system calls raise is uapi's.

The process has one thread.  Where it would sleep until somebody else acts (KVM_RUN of a vCPU that
waits to be started), nobody is left who could; as on a real machine only a signal ends that, and it
comes at once: InterruptedError (EINTR), which a VMM gets from its interval timer.
"""

import os
from typing import TYPE_CHECKING

from softcvm.abi.sys import HostSignal
from softcvm.kernel.mm.memory import BadAccess, load, store
from softcvm.kernel.task import Process
from softcvm.sim.state import State
from softcvm.sim.steps import run
from softcvm.uapi import dispatch

if TYPE_CHECKING:
    from softcvm.machine.machine import Machine

__all__ = ("MachineProcess",)


class MachineProcess(State):
    """Sys for one process, and what the interface has not: dup, passing a descriptor, exit."""

    saved = ("proc",)
    derived = {"machine": "the machine it runs on", "_lockdep": "the machine's"}

    def __init__(self, machine: "Machine", proc: Process) -> None:
        self.machine = machine
        self.proc = proc
        self._lockdep = proc.linux.lockdep

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return run(dispatch.sys_open(self.proc, path, flags), lockdep=self._lockdep)

    def close(self, fd: int) -> None:
        run(dispatch.sys_close(self.proc, fd), lockdep=self._lockdep)

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        return run(
            dispatch.sys_ioctl(self.proc, fd, request, arg),
            self.proc.send_signal,
            lockdep=self._lockdep,
        )

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        run(dispatch.sys_fallocate(self.proc, fd, mode, offset, length), lockdep=self._lockdep)

    def mmap(
        self, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0, addr: int = 0
    ) -> int:
        return run(
            dispatch.sys_mmap(self.proc, length, prot, flags, fd, offset, addr),
            lockdep=self._lockdep,
        )

    def munmap(self, addr: int, length: int) -> None:
        run(dispatch.sys_munmap(self.proc, addr, length), lockdep=self._lockdep)

    def madvise(self, addr: int, length: int, advice: int) -> None:
        run(dispatch.sys_madvise(self.proc, addr, length, advice), lockdep=self._lockdep)

    def load(self, addr: int, length: int) -> bytes:
        try:
            return run(load(self.proc.mm, addr, length), lockdep=self._lockdep)
        except BadAccess as bad:
            raise HostSignal(bad.signo, bad.addr) from bad

    def store(self, addr: int, data: bytes) -> None:
        try:
            run(store(self.proc.mm, addr, data), lockdep=self._lockdep)
        except BadAccess as bad:
            raise HostSignal(bad.signo, bad.addr) from bad

    def signal(self, after: int = 0) -> None:
        """Send the process a signal, which has a handler: pending when its next call looks, or
        when calls have looked `after` times.  A long call looks before each page; then it ends
        with EINTR, and what it did stays done."""
        self.proc.send_signal(after)

    def dup(self, fd: int) -> int:
        """dup(2)"""
        return run(dispatch.sys_dup(self.proc, fd), lockdep=self._lockdep)

    def give(self, fd: int, receiver: "MachineProcess") -> int:
        """Pass a descriptor to another process, as SCM_RIGHTS does; its number there."""
        return run(dispatch.sys_send_fd(self.proc, fd, receiver.proc), lockdep=self._lockdep)

    def exit(self) -> None:
        """The process ends: address space first, then descriptors, as do_exit() has it."""
        run(self.proc.exit(), lockdep=self._lockdep)
        self.machine.linux.processes.remove(self.proc)
