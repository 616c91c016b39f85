"""Installing and removing leaves of a VM's nested page table (arch/x86/kvm/mmu/tdp_mmu.c,
v7.2).

One table serves private and shared mappings: under SNP the C-bit of the guest's own page table
tells them apart and the gfn does not.  A vCPU of this model never enters SMM, so only address
space 0 has a table. Callers hold mmu_lock and flush.
"""

from typing import TYPE_CHECKING, NamedTuple

from softcvm.sim.addr import PgLevel
from softcvm.sim.steps import lockdep_assert_held

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "SpteInstalled",
    "SptesZapped",
    "kvm_mmu_unmap_gfn_range",
    "kvm_mmu_write_protect",
    "kvm_mmu_zap_all",
    "tdp_mmu_map",
)


class SpteInstalled(NamedTuple):
    """Leaves were installed: gfn + i maps to pfn + i."""

    vm: int
    gfn: int
    npages: int
    pfn: int
    level: PgLevel


class SptesZapped(NamedTuple):
    """`leaves` mappings that touched [start, end) are gone."""

    vm: int
    start: int
    end: int
    leaves: int


def tdp_mmu_map(
    kvm: "Kvm", gfn: int, pfn: int, npages: int, level: PgLevel, *, writable: bool
) -> None:
    """Install leaves of one level over a run."""
    lockdep_assert_held(kvm.mmu_lock)
    kvm.arch.npt.set(gfn, pfn, npages, level, writable=writable)
    if kvm.linux.tp.emit:
        kvm.linux.tp.emit(SpteInstalled(kvm.id, gfn, npages, pfn, level))


def kvm_mmu_unmap_gfn_range(kvm: "Kvm", slot: "KvmMemorySlot", start: int, end: int) -> bool:
    """Zap the leaves of a slot in [start, end); whether a flush is needed."""
    if slot.as_id != 0:
        return False
    return _zap(kvm, start, end)


def kvm_mmu_write_protect(kvm: "Kvm", slot: "KvmMemorySlot", start: int, end: int) -> bool:
    """Make the leaves of a slot in [start, end) read-only; whether any was writable."""
    lockdep_assert_held(kvm.mmu_lock)
    return slot.as_id == 0 and kvm.arch.npt.write_protect(start, end)


def kvm_mmu_zap_all(kvm: "Kvm") -> bool:
    """Zap everything the VM has; whether a flush is needed."""
    return _zap(kvm, 0, kvm.arch.npt.map.limit)


def _zap(kvm: "Kvm", start: int, end: int) -> bool:
    lockdep_assert_held(kvm.mmu_lock)
    leaves = kvm.arch.npt.zap(start, end)
    if not leaves:
        return False
    kvm.linux.counters.zaps += leaves
    if kvm.linux.tp.emit:
        kvm.linux.tp.emit(SptesZapped(kvm.id, start, end, leaves))
    return True
