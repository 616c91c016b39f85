"""Linux on one machine: what there is once per running kernel.

Owns the allocator, the list of VMs, the processes and the events; `soc` below it is the
silicon.  The SEV parts are brought up by arch/x86/virt/svm and drivers/crypto/ccp, and kvm_amd
sets `kvm_x86_ops`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from softcvm.kernel.counters import KernelCounters
from softcvm.kernel.fs.file import TaskWork
from softcvm.kernel.mm.page_alloc import PageAllocator
from softcvm.kernel.profile import KernelProfile
from softcvm.kernel.task import Process, Rlimits
from softcvm.sim.state import State
from softcvm.sim.steps import Lockdep

if TYPE_CHECKING:
    from softcvm.hw.soc import Soc
    from softcvm.kernel.arch.x86.kvm.ops import X86Ops
    from softcvm.kernel.arch.x86.virt.svm.sev import SnpHost
    from softcvm.kernel.drivers.crypto.ccp.sev_dev import SevDevice
    from softcvm.kernel.virt.kvm.gmem_inode import GmemInode
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = ("KvmBug", "Linux", "Warn")


class Warn(NamedTuple):
    """WARN(): the kernel noticed something that should not be and went on."""

    where: str
    why: str


class KvmBug(NamedTuple):
    """KVM_BUG(): the VM is dead from here on."""

    vm: int
    why: str


class Linux(State):
    """One kernel.  `snp`, `sev_dev` and `kvm_x86_ops` are set once at boot by the code they
    belong to."""

    saved = (
        "page_alloc",
        "processes",
        "vm_list",
        "snp",
        "sev_dev",
        "kvm_x86_ops",
        "next_vm",
        "next_ino",
        "next_pid",
    )
    derived = {
        "soc": "fingerprinted beside the kernel",
        "profile": "constant",
        "tp": "observers",
        "choices": "the explorer's",
        "counters": "statistics, never read by the model",
        "task_work": "empty at quiescent points",
        "lockdep": "no lock is held at a quiescent point",
        "gmem_inodes": "each is held by a file",
        "mappable": "where memory comes from",
    }

    snp: "SnpHost"
    sev_dev: "SevDevice"
    kvm_x86_ops: "X86Ops"

    def __init__(self, soc: "Soc", profile: KernelProfile) -> None:
        self.soc = soc
        self.profile = profile
        self.tp = soc.tp
        self.choices = soc.choices
        self.counters = KernelCounters()
        self.lockdep = Lockdep()
        self.task_work = TaskWork(self.lockdep)
        self.page_alloc = PageAllocator(self, soc.memory_pages)
        self.processes: list[Process] = []
        self.vm_list: list[Kvm] = []
        self.gmem_inodes: list[GmemInode] = []
        """The inodes of guest_memfd's superblock (s_inodes)."""
        self.next_vm = 1
        self.next_ino = 1
        self.next_pid = 1
        self.mappable: Callable[[int], bytearray] = bytearray
        """Memory of so many bytes that user space may map (kvm_run)."""

    @property
    def leaked_pages(self) -> int:
        """Pages that snp_leak_pages() took out of use forever."""
        return self.page_alloc.leaked_pages

    def create_process(self, rlimits: Rlimits | None = None) -> Process:
        process = Process(self, self.next_pid, rlimits)
        self.next_pid += 1
        self.processes.append(process)
        return process

    def warn(self, where: str, why: str) -> None:
        """WARN(): counted and seen by observers, and execution goes on."""
        self.counters.warnings += 1
        if self.tp.emit:
            self.tp.emit(Warn(where, why))
