"""Dirty logging: which pages of a memslot were written (virt/kvm/kvm_main.c, arch/x86/kvm/mmu/mmu.c, v7.2).

A slot with KVM_MEM_LOG_DIRTY_PAGES has a bitmap.  A page enters it when KVM makes its leaf writable or writes
to it itself; fetching the log takes it out and write-protects the leaf, so that the next write is a fault
again.  Owns marking, the two ioctls that read the bitmap, and what switching the flag does to leaves.  SVM has
no page-modification log; a guest_memfd slot never logs (KVM_SET_USER_MEMORY_REGION2 refuses the flag); dirty
rings are Unmodelled where they are enabled, so that KVM_RESET_DIRTY_RINGS finds none.

Locks: slots_lock for the ioctls, mmu_lock around bitmap and leaves; marking needs neither, because a bit is set
atomically.
"""

from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import KvmClearDirtyLog, KvmDirtyLog
from softcvm.kernel.arch.x86.kvm.mmu.tdp_mmu import kvm_mmu_write_protect
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import copy_from_user, copy_to_user
from softcvm.kernel.virt.kvm.memslots import KVM_USER_MEM_SLOTS, KvmMemorySlot
from softcvm.sim.addr import Hva
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.mm.mmap import MmStruct
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = (
    "DirtyLogCleared",
    "PagesDirtied",
    "kvm_vm_ioctl_clear_dirty_log",
    "kvm_vm_ioctl_get_dirty_log",
    "kvm_vm_ioctl_reset_dirty_pages",
    "mark_page_dirty_in_slot",
)

_BITS_PER_LONG = 64


class PagesDirtied(NamedTuple):
    """Pages entered the dirty bitmap of a memslot."""

    vm: int
    slot: int
    gfn: int
    npages: int


class DirtyLogCleared(NamedTuple):
    """Pages left the dirty bitmap of a memslot and are write-protected."""

    vm: int
    slot: int
    gfn: int
    npages: int


def mark_page_dirty_in_slot(
    kvm: "Kvm", slot: KvmMemorySlot | None, gfn: int, npages: int = 1
) -> None:
    """Set the bits of [gfn, gfn + npages), all inside the slot, if it logs."""
    if slot is None or slot.dirty_bitmap is None:
        return
    first = gfn - slot.base_gfn
    slot.dirty_bitmap.set(first, first + npages, True)
    if kvm.linux.tp.emit:
        kvm.linux.tp.emit(PagesDirtied(kvm.id, slot.key, gfn, npages))


def kvm_vm_ioctl_get_dirty_log(kvm: "Kvm", mm: "MmStruct", log: KvmDirtyLog) -> Steps[None]:
    """KVM_GET_DIRTY_LOG: copy the bitmap out, and start anew unless user space does that itself.

    EINVAL: no such slot number.  ENOENT: no log.  EFAULT: after the bitmap was cleared, which is lost then.
    """
    yield from kvm.slots_lock.acquire()
    try:
        slot, bitmap = _logging_slot(kvm, log.slot)
        if kvm.manual_dirty_log_protect:
            image = _longs(bitmap, 0, slot.npages)
        else:
            yield from kvm.mmu_lock.acquire_write()
            image = _longs(bitmap, 0, slot.npages)
            dirty = [(s, e) for s, e, _ in bitmap.held()]
            _start_anew(kvm, slot, bitmap, dirty)
            kvm.mmu_lock.release_write()
            if dirty:
                kvm.flush_remote_tlbs()
        yield from copy_to_user(mm, Hva(log.dirty_bitmap), image)
    finally:
        kvm.slots_lock.release()


def kvm_vm_ioctl_clear_dirty_log(
    kvm: "Kvm", mm: "MmStruct", log: KvmClearDirtyLog
) -> Steps[None]:
    """KVM_CLEAR_DIRTY_LOG: take the pages whose bits the caller sets out of the log.

    EINVAL: slot number, first_page, range.  ENOENT: no log.  EFAULT.
    """
    yield from kvm.slots_lock.acquire()
    try:
        slot, bitmap = _check_clear(kvm, log)
        size = -(-log.num_pages // _BITS_PER_LONG) * 8
        image = b""
        if size:
            image = yield from copy_from_user(mm, Hva(log.dirty_bitmap), size)
        yield from kvm.mmu_lock.acquire_write()
        dirty = [
            (max(s, lo), min(e, hi))
            for lo, hi in _bit_runs(image, log.first_page)
            for s, e, held in bitmap.runs(lo, min(hi, slot.npages))
            if held
        ]
        _start_anew(kvm, slot, bitmap, dirty)
        kvm.mmu_lock.release_write()
        if dirty:
            kvm.flush_remote_tlbs()
    finally:
        kvm.slots_lock.release()


def kvm_vm_ioctl_reset_dirty_pages(kvm: "Kvm") -> int:
    """KVM_RESET_DIRTY_RINGS.  EINVAL: the VM has no rings."""
    raise KernelError(EINVAL, f"VM {kvm.id} has no dirty rings")


def _logging_slot(kvm: "Kvm", number: int) -> tuple[KvmMemorySlot, RangeMap[bool]]:
    slot = _find(kvm, number)
    if slot is None or slot.dirty_bitmap is None:
        raise KernelError(ENOENT, f"slot {number:#x} keeps no dirty bitmap")
    return slot, slot.dirty_bitmap


def _find(kvm: "Kvm", number: int) -> KvmMemorySlot | None:
    as_id, slot_id = number >> 16, number & 0xFFFF
    if as_id >= len(kvm.memslots) or slot_id >= KVM_USER_MEM_SLOTS:
        raise KernelError(EINVAL, f"no slot {number:#x}")
    return kvm.memslots[as_id].by_id.get(slot_id)


def _check_clear(kvm: "Kvm", log: KvmClearDirtyLog) -> tuple[KvmMemorySlot, RangeMap[bool]]:
    _find(kvm, log.slot)
    if log.first_page % _BITS_PER_LONG:
        raise KernelError(EINVAL, f"first_page {log.first_page:#x} is not the first of a word")
    slot, bitmap = _logging_slot(kvm, log.slot)
    left = slot.npages - log.first_page
    if log.num_pages > left or (log.num_pages < left and log.num_pages % _BITS_PER_LONG):
        raise KernelError(
            EINVAL, f"pages {log.first_page:#x} + {log.num_pages:#x} of {slot.npages:#x}"
        )
    return slot, bitmap


def _start_anew(
    kvm: "Kvm", slot: KvmMemorySlot, bitmap: RangeMap[bool], dirty: list[tuple[int, int]]
) -> None:
    """kvm_arch_mmu_enable_log_dirty_pt_masked(): clear runs of set bits and write-protect their leaves."""
    for first, last in dirty:
        bitmap.set(first, last, False)
        kvm_mmu_write_protect(kvm, slot, slot.base_gfn + first, slot.base_gfn + last)
        if kvm.linux.tp.emit:
            kvm.linux.tp.emit(
                DirtyLogCleared(kvm.id, slot.key, slot.base_gfn + first, last - first)
            )


def _longs(bitmap: RangeMap[bool], first: int, last: int) -> bytes:
    """Bits [first, last) as user space sees them: little endian, in whole 64-bit words."""
    image = 0
    for s, e, dirty in bitmap.runs(first, last):
        if dirty:
            image |= ((1 << e - s) - 1) << s - first
    return image.to_bytes(-(-(last - first) // _BITS_PER_LONG) * 8, "little")


def _bit_runs(image: bytes, first: int) -> list[tuple[int, int]]:
    """Runs [lo, hi) of set bits, counted from `first`."""
    bits = int.from_bytes(image, "little")
    runs = []
    at = first
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        length = (~bits & bits + 1).bit_length() - 1
        bits >>= length
        runs.append((at + skip, at + skip + length))
        at += skip + length
    return runs
