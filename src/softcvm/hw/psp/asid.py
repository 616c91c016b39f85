"""ASIDs: which are taken, which may run, and which still have lines in a cache somewhere.

[ABI-56860 r1.58 SNP_ACTIVATE, SNP_DF_FLUSH, SNP_DECOMMISSION; SEV-API-55766; ASPFW].  Per ASID one mask of
core complexes (CCX) each for allocated (activated, not yet launched), in use (launched) and
dirty; what is in none of them is clean.

  allocate   ACTIVATE               clean -> allocated
  use        LAUNCH_FINISH          allocated -> in use
  release    DECOMMISSION, legacy DEACTIVATE    allocated -> clean, in use -> dirty
  flush      DF_FLUSH               dirty -> clean on every CCX whose cores all did WBINVD
  all_dirty  SNP_INIT               everything -> dirty

WBINVD itself is hw/caches.py.
"""

from softcvm.hw.caches import Caches
from softcvm.hw.profile import CpuProfile
from softcvm.sim.state import State

__all__ = ("AsidTable",)


class AsidTable(State):
    saved = ("allocated", "in_use", "dirty")
    derived = {"profile": "the processor's", "caches": "the machine's, saved there"}

    def __init__(self, profile: CpuProfile, caches: Caches) -> None:
        self.profile = profile
        self.caches = caches
        self.allocated: dict[int, int] = {}
        self.in_use: dict[int, int] = {}
        self.dirty: dict[int, int] = {}

    @property
    def all_ccx(self) -> int:
        """One bit for each core complex of the machine."""
        return (1 << -(-self.profile.cpus // self.profile.cpus_per_ccx)) - 1

    def taken(self, asid: int) -> bool:
        return asid in self.allocated or asid in self.in_use

    def clean(self) -> bool:
        """No guest has an ASID and none waits for a flush."""
        return not (self.allocated or self.in_use or self.dirty)

    def all_dirty(self) -> None:
        self.allocated.clear()
        self.in_use.clear()
        self.dirty = dict.fromkeys(range(1, self.profile.max_asid + 1), self.all_ccx)
        self.caches.wbinvd_done.clear()

    def allocate(self, asid: int) -> None:
        self.allocated[asid] = self.all_ccx

    def use(self, asid: int) -> None:
        """The guest may run; a second ACTIVATE of a running guest goes here directly."""
        self.allocated.pop(asid, None)
        self.in_use[asid] = self.all_ccx

    def release(self, asid: int) -> None:
        self.allocated.pop(asid, None)
        ran = self.in_use.pop(asid, 0)
        if ran:
            self.dirty[asid] = ran
            self.caches.wbinvd_done -= set(self._cpus(ran))

    def flush(self) -> bool:
        """DF_FLUSH; False when a core has not done WBINVD since it was last asked to."""
        eligible = 0
        for ccx in range(self.all_ccx.bit_length()):
            if self.caches.wbinvd_done.issuperset(self._cpus(1 << ccx)):
                eligible |= 1 << ccx
        if eligible == self.all_ccx:
            self.dirty.clear()
            return True
        if eligible:
            self.dirty = {a: left for a, ccx in self.dirty.items() if (left := ccx & ~eligible)}
        return False

    def _cpus(self, mask: int) -> list[int]:
        """Logical processors of the core complexes in a mask."""
        per_ccx = self.profile.cpus_per_ccx
        return [cpu for cpu in range(self.profile.cpus) if mask >> cpu // per_ccx & 1]
