"""A process as far as KVM sees it: address space, file descriptors, limits
(include/linux/sched.h, v7.2).

Threads are the drivers' business (sim.steps.Task); `signal_pending` is asked wherever the
kernel looks for a signal in a long call, and the answer is a choice.
"""

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
    """getrlimit(2), soft limits; the defaults are those of a Debian login shell run by root."""

    nofile: int = 1024
    memlock: int = 8 << 20
    cap_ipc_lock: bool = True


class Process(State):
    """struct task_struct and the files and mm it points to.  One per process of the machine."""

    saved = ("pid", "mm", "files")
    derived = {"linux": "the host, which holds this process", "rlimits": "constant"}

    def __init__(self, linux: "Linux", pid: int, rlimits: Rlimits | None = None) -> None:
        self.linux = linux
        self.pid = pid
        self.rlimits = rlimits or Rlimits()
        self.mm = MmStruct(linux)
        self.files = FilesStruct()

    def exit(self) -> Steps[None]:
        """do_exit(): the address space goes first, the descriptors after it."""
        yield from self.mm.exit_mmap()
        yield from self.files.close_all()

    def signal_pending(self) -> bool:
        """Whether a signal waits for this process right now; none does on an ordinary day."""
        return self.linux.choices.choose("signal_pending", 2) == 1
