"""ASIDs of encrypted guests: handing them out, and out again after a flush (arch/x86/kvm/svm/sev.c, v7.2).

Owns the two bitmaps.  A freed ASID only goes to `reclaim`: its lines may still be in caches, so it is not
given out again before every CPU did WBINVD and firmware a DF_FLUSH, which clears all of them at once.

Locks: sev_bitmap_lock around the bitmaps, inside it sev_deactivate_lock for write, so that no DEACTIVATE
undoes the WBINVD before DF_FLUSH has seen it.
"""

from errno import EBUSY, ENOTTY
from typing import TYPE_CHECKING

from softcvm.abi.snp_firmware import SevCmd, SnpCmd
from softcvm.hw.cpu.cpuid import cpuid
from softcvm.kernel.drivers.crypto.ccp.sev_dev import sev_do_cmd
from softcvm.kernel.errors import KernelError
from softcvm.kernel.locks import Rank
from softcvm.sim.addr import Asid
from softcvm.sim.state import State
from softcvm.sim.steps import Mutex, RwSem, Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = ("SevAsids",)

_SVM_LEAF = 0x8000_000A
"""CPUID leaf whose EBX is the number of ASIDs."""


class SevAsids(State):
    """ASIDs 1 .. max_sev_asid: below min_sev_asid for SEV-ES and SNP, the rest for plain SEV."""

    saved = ("used", "reclaim", "next_asid", "asid_generation")
    derived = {
        "linux": "the host",
        "min_sev_asid": "the processor's",
        "max_sev_asid": "the processor's",
        "sev_bitmap_lock": "free at quiescent points",
        "sev_deactivate_lock": "free at quiescent points",
    }

    def __init__(self, linux: "Linux") -> None:
        self.linux = linux
        self.min_sev_asid = linux.soc.profile.min_sev_asid
        self.max_sev_asid = linux.soc.profile.max_asid
        self.used: set[int] = set()
        """sev_asid_bitmap: given out, or given back and not flushed yet."""
        self.reclaim: set[int] = set()
        """sev_reclaim_asid_bitmap: given back."""
        self.next_asid = self.max_sev_asid + 1
        """Of vCPUs without SEV (svm_cpu_data.next_asid)."""
        self.asid_generation = 1
        """How often those began anew; a vCPU of an older generation takes another."""
        self.sev_bitmap_lock = Mutex(linux.lockdep, "sev_bitmap_lock", Rank.SEV_BITMAP_LOCK)
        self.sev_deactivate_lock = RwSem(
            linux.lockdep, "sev_deactivate_lock", Rank.SEV_DEACTIVATE_LOCK
        )

    def new(self, *, es_active: bool) -> Steps[Asid]:
        """sev_asid_new(): the lowest free one, after a flush if there is none.

        ENOTTY: this kind of guest has no range.  EBUSY: all in use.
        """
        low = 1 if es_active else self.min_sev_asid
        high = self.min_sev_asid - 1 if es_active else self.max_sev_asid
        if low > high:
            raise KernelError(
                ENOTTY, f"no ASIDs for {'SEV-ES and SNP' if es_active else 'SEV'}"
            )
        yield from self.sev_bitmap_lock.acquire()
        try:
            asid = self._first_free(low, high)
            if asid is None and (yield from self._recycle(low, high)):
                asid = self._first_free(low, high)
            if asid is None:
                raise KernelError(EBUSY, f"ASIDs {low} to {high} are all in use")
            self.used.add(asid)
            return asid
        finally:
            self.sev_bitmap_lock.release()

    def new_plain(self) -> int:
        """new_asid(): the next one without SEV; past the last, all are flushed and given out anew."""
        soc = self.linux.soc
        if self.next_asid > cpuid(soc.profile, _SVM_LEAF, 0).ebx - 1:
            self.next_asid = self.max_sev_asid + 1
            self.asid_generation += 1
            soc.flush_tlb(0)
        self.next_asid += 1
        return self.next_asid - 1

    def free(self, asid: Asid) -> Steps[None]:
        """sev_asid_free(): not to be used again before the next flush."""
        yield from self.sev_bitmap_lock.acquire()
        self.reclaim.add(asid)
        self.sev_bitmap_lock.release()

    def _first_free(self, low: int, high: int) -> Asid | None:
        return next(
            (Asid(asid) for asid in range(low, high + 1) if asid not in self.used), None
        )

    def _recycle(self, low: int, high: int) -> Steps[bool]:
        """__sev_recycle_asids(): flush if it frees one of this range; then all reclaimed ones are free."""
        if not any(low <= asid <= high for asid in self.reclaim):
            return False
        yield from self.sev_deactivate_lock.acquire_write()
        try:
            self.linux.soc.caches.wbinvd_on_all_cpus()
            yield from sev_do_cmd(
                self.linux,
                SnpCmd.DF_FLUSH if self.linux.sev_dev.snp_initialized else SevCmd.DF_FLUSH,
            )
        except KernelError as error:
            self.linux.warn("sev_flush_asids", error.why)
            return False
        finally:
            self.sev_deactivate_lock.release_write()
        self.used -= self.reclaim
        self.reclaim.clear()
        return True
