"""User memory of SEV guests: pinning it, and KVM_MEMORY_ENCRYPT_REG_REGION (arch/x86/kvm/svm/sev.c, v7.2).

Ciphertext depends on the address it lies at, so memory of a SEV guest must not move: it is pinned for one
command, or for as long as it is registered.  Private memory of SNP needs none of this: guest_memfd does not
move its pages.

Locks: kvm->lock around everything here.
"""

from errno import EINVAL, ENOMEM, ENOTTY
from typing import TYPE_CHECKING

from softcvm.kernel.arch.x86.kvm.svm.sev_info import (
    EncRegion,
    is_mirroring_enc_context,
    sev_guest,
    sev_info,
)
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.memory import get_user_pages
from softcvm.sim.addr import PAGE_SHIFT, Pfn
from softcvm.sim.steps import Steps, lockdep_assert_held

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = (
    "PinnedRuns",
    "sev_clflush_pages",
    "sev_mem_enc_register_region",
    "sev_mem_enc_unregister_region",
    "sev_pin_memory",
    "sev_unpin_memory",
    "sev_unpin_regions",
)

PinnedRuns = tuple[tuple[Pfn, int], ...]
"""Frames behind a user range in its order, neighbours that lie together as one run."""

_INT_MAX = (1 << 31) - 1
_ULONG = 1 << 64


def sev_pin_memory(
    kvm: "Kvm", proc: "Process", uaddr: int, ulen: int, *, write: bool
) -> Steps[PinnedRuns]:
    """Pin every page that [uaddr, uaddr + ulen) touches; neither has to be aligned.

    EINVAL: an empty or wrapping range, more pages than fit an int.  ENOMEM: RLIMIT_MEMLOCK without
    CAP_IPC_LOCK, or pages that are not there.
    """
    lockdep_assert_held(kvm.lock)
    sev, page_alloc = sev_info(kvm), kvm.linux.page_alloc
    if ulen == 0 or uaddr + ulen >= _ULONG:
        raise KernelError(EINVAL, f"user range {uaddr:#x} + {ulen:#x}")
    first, last = uaddr >> PAGE_SHIFT, (uaddr + ulen - 1) >> PAGE_SHIFT
    npages = last - first + 1
    if npages > _INT_MAX:
        raise KernelError(EINVAL, f"{npages:#x} pages to pin")
    locked = sev.pages_locked + npages
    limit = proc.rlimits.memlock >> PAGE_SHIFT
    if locked > limit and not proc.rlimits.cap_ipc_lock:
        raise KernelError(ENOMEM, f"{locked} locked pages, RLIMIT_MEMLOCK allows {limit}")
    try:
        found = yield from get_user_pages(proc.mm, first << PAGE_SHIFT, npages, write=write)
    except KernelError as error:
        raise KernelError(ENOMEM, f"pinning {npages} pages: {error.why}") from error
    runs = _merged(found)
    for pfn, count in runs:
        page_alloc.get_pages(pfn, count)
    sev.pages_locked = locked
    return runs


def sev_unpin_memory(kvm: "Kvm", runs: PinnedRuns) -> None:
    sev_info(kvm).pages_locked -= sum(count for _, count in runs)
    for pfn, count in runs:
        kvm.linux.page_alloc.put_pages(pfn, count)


def sev_clflush_pages(kvm: "Kvm", runs: PinnedRuns) -> None:
    """Write back what the host wrote, unless caches are coherent across encryption."""
    soc = kvm.linux.soc
    if not soc.profile.sme_coherent:
        soc.caches.clflush(sum(count for _, count in runs))


def sev_mem_enc_register_region(
    kvm: "Kvm", proc: "Process", addr: int, size: int
) -> Steps[int]:
    """Pin a range until it is unregistered; ranges may overlap and repeat.

    ENOTTY: not an encrypted VM.  EINVAL: a mirror; a bad range.  ENOMEM.
    """
    yield from kvm.lock.acquire()
    try:
        if not sev_guest(kvm):
            raise KernelError(ENOTTY, "a region of a VM that is not SEV")
        if is_mirroring_enc_context(kvm):
            raise KernelError(EINVAL, "a mirror's memory is its owner's business")
        runs = yield from sev_pin_memory(kvm, proc, addr, size, write=False)
        sev_clflush_pages(kvm, runs)
        sev_info(kvm).regions.append(EncRegion(addr, size, runs))
        return 0
    finally:
        kvm.lock.release()


def sev_mem_enc_unregister_region(kvm: "Kvm", addr: int, size: int) -> Steps[int]:
    """Unpin the oldest region of exactly this range, its lines out of the caches first.

    EINVAL: a mirror, before the lock is taken; no such region.  ENOTTY: not an encrypted VM.
    """
    if is_mirroring_enc_context(kvm):
        raise KernelError(EINVAL, "a mirror's memory is its owner's business")
    yield from kvm.lock.acquire()
    try:
        if not sev_guest(kvm):
            raise KernelError(ENOTTY, "a region of a VM that is not SEV")
        regions = sev_info(kvm).regions
        found = next((r for r in regions if (r.uaddr, r.size) == (addr, size)), None)
        if found is None:
            raise KernelError(EINVAL, f"region {addr:#x} + {size:#x} is not registered")
        kvm.linux.soc.caches.wbinvd_on_all_cpus()
        sev_unpin_memory(kvm, found.runs)
        regions.remove(found)
        return 0
    finally:
        kvm.lock.release()


def sev_unpin_regions(kvm: "Kvm") -> None:
    """What user space did not unregister, when the VM goes."""
    regions = sev_info(kvm).regions
    for region in regions:
        sev_unpin_memory(kvm, region.runs)
    regions.clear()


def _merged(found: list[tuple[Pfn, int]]) -> PinnedRuns:
    runs: list[tuple[Pfn, int]] = []
    for pfn, count in found:
        if runs and runs[-1][0] + runs[-1][1] == pfn:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((pfn, count))
    return tuple(runs)
