"""A process as far as KVM sees it: address space, file descriptors, limits
(include/linux/sched.h, v7.2).

Threads are the drivers' business (sim.steps.Task).  `signal_pending` is asked wherever the
kernel looks for a signal in a long call: one that was sent (send_signal()), or a choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softcvm.kernel.fs.file import FilesStruct
from softcvm.kernel.mm.mmap import MmStruct
from softcvm.sim.state import State
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = ("Process", "Rlimits")


@dataclass(frozen=True, slots=True)
class Rlimits:
    """getrlimit(2), soft limits; and capabilities; the defaults are those of a Debian login shell run by root."""

    nofile: int = 1024
    memlock: int = 8 << 20
    cap_ipc_lock: bool = True
    cap_sys_boot: bool = True


class Process(State):
    """struct task_struct and the files and mm it points to.  One per process of the machine."""

    saved = ("pid", "mm", "files", "signal_after")
    derived = {
        "linux": "the host, which holds this process",
        "rlimits": "constant",
        "signalled": "signals outside the model",
    }

    def __init__(self, linux: "Linux", pid: int, rlimits: Rlimits | None = None) -> None:
        self.linux = linux
        self.pid = pid
        self.rlimits = rlimits or Rlimits()
        self.mm = MmStruct(linux)
        self.files = FilesStruct()
        self.signal_after: int | None = None
        """Looks of the kernel until a signal is there; 0: it is pending.  None: none is on its
        way."""
        self.signalled: Callable[[], bool] | None = None
        """Asks outside whether a signal waits for the thread that runs: of a caught program."""

    def exit(self) -> Steps[None]:
        """do_exit(): the address space goes first, the descriptors after it."""
        yield from self.mm.exit_mmap()
        yield from self.files.close_all()

    def send_signal(self, after: int = 0) -> None:
        """A signal with a handler: pending now, or once the kernel has looked `after` times."""
        self.signal_after = after

    def signal_pending(self) -> bool:
        """Whether a signal waits for this process right now; none does on an ordinary day."""
        if self.signal_after is not None:
            if self.signal_after == 0:
                return True
            self.signal_after -= 1
        if self.signalled is not None and self.signalled():
            return True
        return self.linux.choices.choose("signal_pending", 2) == 1

    @property
    def signal_on_its_way(self) -> bool:
        """Whether a sleep will end by a signal, whenever that is looked for."""
        return self.signal_after is not None or (
            self.signalled is not None and self.signalled()
        )

    def pages_before_signal(self, npages: int, looks: int = 1) -> int:
        """How many of npages a loop does that looks `looks` times before each, the first time just
        now.

        At least 1.  Who does more than one at once accounts for the others with looked().
        """
        if self.signal_after is None:
            return npages
        return min(npages, max(1, 1 + (self.signal_after - looks + 1) // looks))

    def looked(self, times: int) -> None:
        """`times` more looks found nothing."""
        if self.signal_after is not None:
            self.signal_after = max(0, self.signal_after - times)

    def deliver_signals(self) -> None:
        """On the way back to user space the handler runs, and the signal is no longer
        pending."""
        if self.signal_after == 0:
            self.signal_after = None
