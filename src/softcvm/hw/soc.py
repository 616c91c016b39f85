"""Everything silicon of one host: memory and its keys, RMP, caches, AMD-SP, and the host's own accesses.

Owns which key sits in which ASID's slot of the memory controllers.  Guests' accesses are cpu/ and
access.py; what software does with any of it is Linux's side.
"""

from softcvm.hw.access import check_host_write
from softcvm.hw.caches import Caches
from softcvm.hw.counters import HwCounters
from softcvm.hw.dram import Dram
from softcvm.hw.dram_mapped import Backing, MappedDram
from softcvm.hw.memenc import Key
from softcvm.hw.profile import CpuProfile
from softcvm.hw.psp.platform import Psp
from softcvm.hw.rmp import Rmp
from softcvm.hw.sysregs import SystemRegisters
from softcvm.sim.addr import PAGE_SHIFT, PgLevel
from softcvm.sim.choice import Choices, Ordinary
from softcvm.sim.errors import Unmodelled
from softcvm.sim.events import Tracepoints
from softcvm.sim.state import State

__all__ = ("Soc",)


class Soc(State):
    """One socket with its DRAM.

    memory_pages: DRAM is pfn 0 .. memory_pages-1.  seed: where all key material comes from; two machines
    with one seed are equal, and nothing else is random.  backing: where DRAM's bytes lie, if they are to be
    used by others than this model (dram_mapped.py).
    """

    saved = (
        "profile_name",
        "memory_pages",
        "seed",
        "dram",
        "keys",
        "rmp",
        "caches",
        "sysregs",
        "psp",
    )
    derived = {
        "profile": "named by profile_name",
        "tp": "observers",
        "choices": "the environment's, not the machine's",
        "counters": "statistics",
    }

    def __init__(
        self,
        profile: CpuProfile,
        memory_pages: int,
        seed: int = 0,
        choices: Choices | None = None,
        tp: Tracepoints | None = None,
        backing: Backing | None = None,
    ) -> None:
        if not 0 < memory_pages <= 1 << (profile.phys_bits - PAGE_SHIFT):
            raise ValueError(
                f"{profile.name} addresses {1 << (profile.phys_bits - PAGE_SHIFT):#x} pages, "
                f"not {memory_pages:#x}"
            )
        self.profile = profile
        self.profile_name = profile.name
        self.memory_pages = memory_pages
        self.seed = seed
        self.choices: Choices = choices if choices is not None else Ordinary()
        self.tp = tp if tp is not None else Tracepoints()
        self.counters = HwCounters()
        self.dram = (
            Dram(memory_pages, self.counters)
            if backing is None
            else MappedDram(memory_pages, self.counters, backing)
        )
        self.keys: dict[int, Key] = {}
        self.caches = Caches(profile.cpus, self.counters)
        self.rmp = Rmp(memory_pages, self.tp, self.counters)
        self.sysregs = SystemRegisters(profile.cpus, self.rmp)
        self.psp = Psp(self)

    def key(self, asid: int) -> Key | None:
        """The key that accesses with the C-bit set use under this ASID; None for the hypervisor."""
        return self.keys.get(asid)

    def host_read(self, spa: int, length: int) -> bytes:
        """What the host reads with its C-bit clear: the raw bytes of DRAM.  Never faults."""
        rmp = self.rmp
        if rmp.end and spa + length > rmp.base and spa <= rmp.end:
            return self._read_over_rmp(spa, length)
        return self.dram.read(spa, length)

    def host_write(self, spa: int, data: bytes, level: PgLevel = PgLevel.PG_4K) -> None:
        """A host store with the C-bit clear, through a host mapping of this level.

        Raises HostRmpFault, with nothing written, when a page under the mapping is assigned.
        """
        if not data:
            return
        check_host_write(self, spa, len(data), level)
        rmp = self.rmp
        if rmp.end and spa + len(data) > rmp.base and spa <= rmp.end:
            raise Unmodelled(f"a host store into RMP memory at {spa:#x} before SNP_INIT")
        self.dram.write(spa, data)

    def flush_tlb(self, asid: int) -> None:
        """Drop an ASID's cached translations, as the hypervisor asks through TLB_CONTROL."""
        self.counters.tlb_flushes += 1

    def set_mfdm(self) -> None:
        """SYSCFG.MFDM on every processor."""
        for cpu in range(self.profile.cpus):
            self.sysregs.set_mfdm(cpu)

    def set_snp_enable(self) -> None:
        """SYSCFG.SNP_EN and VMPL_EN on every processor."""
        for cpu in range(self.profile.cpus):
            self.sysregs.set_snp_enable(cpu)

    def clear_hsave_pa(self) -> None:
        """VM_HSAVE_PA := 0 on every processor."""
        for cpu in range(self.profile.cpus):
            self.sysregs.set_hsave_pa(cpu, 0)

    def _read_over_rmp(self, spa: int, length: int) -> bytes:
        rmp = self.rmp
        end = spa + length
        lo, hi = max(spa, rmp.base), min(end, rmp.end + 1)
        before = self.dram.read(spa, lo - spa) if spa < lo else b""
        after = self.dram.read(hi, end - hi) if hi < end else b""
        return before + rmp.read_memory(lo, hi - lo) + after
