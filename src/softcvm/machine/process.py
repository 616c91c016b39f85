"""A process of the machine as user code sees it: softcvm.Sys on the software host.

Each call runs its steps straight through.  A host access that Linux answers with a signal
raises HostSignal; what system calls raise is uapi's.
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
    derived = {"machine": "the machine it runs on"}

    def __init__(self, machine: "Machine", proc: Process) -> None:
        self.machine = machine
        self.proc = proc

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return run(dispatch.sys_open(self.proc, path, flags))

    def close(self, fd: int) -> None:
        run(dispatch.sys_close(self.proc, fd))

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        return run(dispatch.sys_ioctl(self.proc, fd, request, arg))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        run(dispatch.sys_fallocate(self.proc, fd, mode, offset, length))

    def mmap(self, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        return run(dispatch.sys_mmap(self.proc, length, prot, flags, fd, offset))

    def munmap(self, addr: int, length: int) -> None:
        run(dispatch.sys_munmap(self.proc, addr, length))

    def madvise(self, addr: int, length: int, advice: int) -> None:
        run(dispatch.sys_madvise(self.proc, addr, length, advice))

    def load(self, addr: int, length: int) -> bytes:
        try:
            return run(load(self.proc.mm, addr, length))
        except BadAccess as bad:
            raise HostSignal(bad.signo, bad.addr) from bad

    def store(self, addr: int, data: bytes) -> None:
        try:
            run(store(self.proc.mm, addr, data))
        except BadAccess as bad:
            raise HostSignal(bad.signo, bad.addr) from bad

    def dup(self, fd: int) -> int:
        """dup(2)"""
        return run(dispatch.sys_dup(self.proc, fd))

    def give(self, fd: int, receiver: "MachineProcess") -> int:
        """Pass a descriptor to another process, as SCM_RIGHTS does; its number there."""
        return run(dispatch.sys_send_fd(self.proc, fd, receiver.proc))

    def exit(self) -> None:
        """The process ends: address space first, then descriptors, as do_exit() has it."""
        run(self.proc.exit())
        self.machine.linux.processes.remove(self.proc)
