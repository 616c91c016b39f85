"""Caught processes and their threads: which process of the machine each one is.

Owns the pairing of a real process with a process of the model, the stand-ins for the model's files among its
descriptors, and what its signals are.  Numbers of emulated files are the same on both sides.
"""

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from softcvm.attach.filter import FD_BASE
from softcvm.attach.remote_memory import RemoteMemory
from softcvm.hw.cpu.cpuid import CpuidResult
from softcvm.kernel.fs.file import FilesStruct
from softcvm.kernel.mm.mmap import MmStruct
from softcvm.kernel.task import Process
from softcvm.machine import Machine
from softcvm.sim.steps import Task, Wait

__all__ = ("Caught", "Thread")

_QUICK = 0.005
"""Seconds in which nobody asks whether a signal came."""


class Thread(Task):
    """One thread of a caught process: a task of the model."""

    __slots__ = ("began", "process", "tid")

    def __init__(self, process: "Caught", tid: int) -> None:
        super().__init__(f"thread {tid}")
        self.process = process
        self.tid = tid
        self.began = 0.0
        """When its system call began, or was last asked about signals."""

    def signal_pending(self) -> bool:
        """Whether a signal that is neither blocked nor ignored waits for it, in a call that takes long."""
        now = monotonic()
        if now - self.began < _QUICK:
            return False
        if self._pending_signals():
            return True  # and it stays, until the call has ended
        self.began = now
        return False

    def _pending_signals(self) -> int:
        masks = {"SigPnd": 0, "ShdPnd": 0, "SigBlk": 0, "SigIgn": 0}
        try:
            with open(f"/proc/{self.process.pid}/task/{self.tid}/status", "rb") as file:
                for line in file:
                    name, _, value = line.decode().partition(":")
                    if name in masks:
                        masks[name] = int(value, 16)
        except OSError:
            return 1 << signal.SIGKILL - 1  # it is gone
        blocked = masks["SigBlk"] if self.sigmask is None else self.sigmask
        return (masks["SigPnd"] | masks["ShdPnd"]) & ~blocked & ~masks["SigIgn"]


class Caught:
    """One process of the program, and the process of the machine that it is."""

    def __init__(self, machine: Machine, pid: int, current: Callable[[], Task]) -> None:
        self.pid = pid
        self.machine = machine
        self._current = current
        self.proc: Process = machine.linux.create_process()
        self.proc.files = FilesStruct(FD_BASE)
        self._connect()
        self.threads: dict[int, Thread] = {}
        self.stand_ins: set[int] = set()
        """Numbers above FD_BASE that are in the real process too."""
        self.cpuid_sites: set[int] = set()
        """Where a CPUID instruction is patched in its memory."""
        self.real_cpuid: dict[tuple[int, int], CpuidResult] = {}
        """What the real processor said, by EAX and ECX."""

    def thread(self, tid: int) -> Thread:
        found = self.threads.get(tid)
        if found is None:
            found = self.threads[tid] = Thread(self, tid)
        return found

    def fork(self, pid: int, *, shares_memory: bool) -> "Caught":
        """A child with the same files; it has the parent's memory only until it executes a program."""
        child = Caught(self.machine, pid, self._current)
        child.proc.files = self.proc.files.fork()
        child.stand_ins = set(self.stand_ins)
        child.cpuid_sites = set(self.cpuid_sites)
        child.real_cpuid = self.real_cpuid
        child._connect()
        if shares_memory:
            child.proc.mm = self.proc.mm
        return child

    def new_memory(self) -> MmStruct:
        """execve(): the old address space, which its owner leaves."""
        self.cpuid_sites.clear()
        old = self.proc.mm
        self.proc.mm = MmStruct(self.machine.linux)
        self._connect()
        return old

    def read_limits(self) -> None:
        """RLIMIT_NOFILE may have changed since the last time; the others do not matter to what is caught."""
        soft, _ = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        if soft != self.proc.rlimits.nofile:
            limits = self.proc.rlimits
            self.proc.rlimits = replace(limits, nofile=soft)

    @property
    def memory(self) -> RemoteMemory:
        outside = self.proc.mm.outside
        assert isinstance(outside, RemoteMemory), "a caught process has its own memory"
        return outside

    def _connect(self) -> None:
        if self.proc.mm.outside is None:
            self.proc.mm.outside = RemoteMemory(self.pid, self._share)
        self.proc.files.foreign = self._has_descriptor
        self.proc.signalled = self._signalled

    def _share(self, first: int, last: int, write: bool) -> Wait:
        from softcvm.attach.sharing import Sharing

        return Sharing(self, first, last, write=write)

    def _has_descriptor(self, fd: int) -> bool:
        return os.path.lexists(f"/proc/{self.pid}/fd/{fd}")

    def _signalled(self) -> bool:
        task = self._current()
        return isinstance(task, Thread) and task.signal_pending()
