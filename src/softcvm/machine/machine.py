"""The board: silicon, a kernel booted on it, and the processes that use it.

Owns what firmware and boot loader of a real machine decide before Linux runs (where the RMP
lies, which memory is reserved), and the questions asked of the whole: counters, census,
fingerprint, snapshot.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial

from softcvm.abi.insn import Program
from softcvm.abi.rmp import RMPTABLE_CPU_BOOKKEEPING_SZ
from softcvm.hw.cpu.core import Core
from softcvm.hw.cpu.scripted import ScriptedCore
from softcvm.hw.cpu.tcg import TcgCore
from softcvm.hw.dram_mapped import Backing
from softcvm.hw.profile import PROFILES
from softcvm.hw.rmp import Rmp
from softcvm.hw.soc import Soc
from softcvm.kernel.arch.x86.kvm.svm.svm import SvmOps
from softcvm.kernel.arch.x86.virt.svm.sev import SnpHost, snp_rmptable_init
from softcvm.kernel.drivers.crypto.ccp.sev_dev import SevDevice, sev_platform_init
from softcvm.kernel.host import Linux
from softcvm.kernel.profile import kernel_profile
from softcvm.kernel.task import Rlimits
from softcvm.machine.process import MachineProcess
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD
from softcvm.sim.choice import Choices
from softcvm.sim.events import Tracepoints
from softcvm.sim.state import State, fingerprint
from softcvm.sim.steps import run

__all__ = ("Machine", "ProgramFactory")

ProgramFactory = Callable[[int], Program]
"""What a vCPU runs: given its id, a fresh script."""

_RMP_ALIGN = 1 << 20
_LOW_MEMORY = 1 << 20 >> PAGE_SHIFT
_HT_HOLE = (0xFD_0000_0000 >> PAGE_SHIFT, 0xFE_0000_0000 >> PAGE_SHIFT)
"""Addresses HyperTransport once used, reserved by the BIOS; firmware makes them HV-Fixed."""


class Machine(State):
    """A computer that is switched on: SNP initialised, kvm_amd loaded, nobody logged in.

    memory: bytes of DRAM.  seed: where all keys come from.  guest: what the vCPUs of the first
    VMs run, see vm_guest().  gmem_max_order, gmem_link, gmem_in_place: what was proposed for
    guest_memfd and is in no release (kernel/profile.py).  Raises ValueError for a processor, kernel or memory size that
    there is none of.  backing: where DRAM's bytes lie (hw/dram_mapped.py); such a machine has no snapshot.
    """

    saved = ("soc", "linux")
    derived = {"_kvm_amd": "linux.kvm_x86_ops"}

    def __init__(
        self,
        kernel: str = "7.3",
        cpu: str = "genoa",
        memory: int = 1 << 40,
        *,
        seed: int = 0,
        gmem_max_order: int = 0,
        gmem_link: bool = False,
        gmem_in_place: bool = False,
        guest: ProgramFactory | None = None,
        choices: Choices | None = None,
        collector: Callable[[tuple[object, ...]], None] | None = None,
        backing: Backing | None = None,
    ) -> None:
        if cpu not in PROFILES:
            raise ValueError(f"no processor {cpu!r}; there are {', '.join(PROFILES)}")
        profile = kernel_profile(
            kernel,
            gmem_max_order=gmem_max_order,
            gmem_link=gmem_link,
            gmem_in_place=gmem_in_place,
        )
        if memory <= 0 or memory % (PTRS_PER_PMD << PAGE_SHIFT):
            raise ValueError(f"memory of {memory:#x} bytes is not a multiple of 2M")
        self.soc = Soc(
            PROFILES[cpu], memory >> PAGE_SHIFT, seed, choices, Tracepoints(), backing
        )
        if collector is not None:
            self.soc.tp.attach(collector)
        self.linux = Linux(self.soc, profile)
        self._set_up_memory()
        self.linux.snp = SnpHost(self.linux)
        self.linux.sev_dev = SevDevice(self.linux, ((0, _LOW_MEMORY),))
        snp_rmptable_init(self.linux)
        run(sev_platform_init(self.linux))
        self._kvm_amd = SvmOps(self.linux)
        self.linux.kvm_x86_ops = self._kvm_amd
        if guest is not None:
            self.vm_guest(guest)

    def _set_up_memory(self) -> None:
        """What the BIOS does: the RMP at the top of memory, and the memory map."""
        pages = self.soc.memory_pages
        size = pages * 16 + RMPTABLE_CPU_BOOKKEEPING_SZ
        size = -(-size // _RMP_ALIGN) * _RMP_ALIGN
        rmp = self.soc.rmp
        end = pages << PAGE_SHIFT
        if size + (_LOW_MEMORY << PAGE_SHIFT) >= end:
            raise ValueError(f"{end:#x} bytes of memory leave nothing beside the RMP")
        rmp.base, rmp.end = end - size, end - 1
        reserve = self.linux.page_alloc.reserve
        reserve(0, _LOW_MEMORY)
        first = (rmp.base >> PAGE_SHIFT) & ~(PTRS_PER_PMD - 1)  # 88a921aa3c6b: whole 2M pages
        reserve(first, pages - first)
        hole, beyond = _HT_HOLE
        if pages > hole:
            reserve(hole, min(beyond, pages) - hole)

    def process(self, rlimits: Rlimits | None = None) -> MachineProcess:
        """A new process with an address space of its own."""
        return MachineProcess(self, self.linux.create_process(rlimits))

    def vm_guest(self, guest: ProgramFactory) -> None:
        """The scripted guest that the vCPUs of VMs created from now on run."""

        def new_core(soc: Soc, vcpu_id: int) -> Core:
            return ScriptedCore(soc, partial(guest, vcpu_id))

        self._kvm_amd.new_core = new_core

    def vm_machine_code(self) -> None:
        """The vCPUs of VMs created from now on execute what lies in their memory; DRAM needs a backing."""
        self._kvm_amd.new_core = lambda soc, _: TcgCore(soc)

    @property
    def rmp(self) -> Rmp:
        return self.soc.rmp

    @property
    def events(self) -> Tracepoints:
        """Attach a collector here to see what happens."""
        return self.soc.tp

    @property
    def counters(self) -> dict[str, int]:
        """Everything that hardware and kernel count, by name."""
        return {**asdict(self.soc.counters), **self.linux.counters.as_dict()}

    def census(self) -> dict[str, int]:
        """4K pages of DRAM by RMP page state, states without a page left out."""
        pages: dict[str, int] = {}
        for start, end, value in self.soc.rmp.map.runs(0, self.soc.memory_pages):
            name = Rmp.decode(value).name
            pages[name] = pages.get(name, 0) + end - start
        return pages

    def fingerprint(self) -> str:
        """A digest of the whole state; equal machines give equal digests."""
        return fingerprint(self)

    def snapshot(self) -> "Machine":
        """A second machine in the same state, without observers.  Nothing may be running."""
        return deepcopy(self)

    def teardown(self) -> None:
        """End every process, in the order they were created."""
        for proc in list(self.linux.processes):
            run(proc.exit())
            self.linux.processes.remove(proc)
