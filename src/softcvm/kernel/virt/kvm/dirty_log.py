"""Dirty logging: which pages of a memslot were written (virt/kvm/kvm_main.c, arch/x86/kvm/mmu/mmu.c, v7.2).

A slot with KVM_MEM_LOG_DIRTY_PAGES has a bitmap.  A page enters it when KVM makes its leaf writable or writes
to it itself; fetching the log takes it out and write-protects the leaf, so that the next write is a fault
again.  A VM with dirty rings (dirty_ring.py) has no bitmaps: the page enters the ring of the vCPU that wrote.
Owns marking and the ioctls.  SVM has no page-modification log; a guest_memfd slot never logs
(KVM_SET_USER_MEMORY_REGION2 refuses the flag).

Locks: slots_lock for the ioctls, mmu_lock around bitmap and leaves; marking needs neither, because a bit is set
atomically.
"""

from errno import E2BIG, EINVAL, ENOENT, ENXIO
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import KvmClearDirtyLog, KvmDirtyGfn, KvmDirtyLog, MemFlag
from softcvm.kernel.arch.x86.kvm.mmu.tdp_mmu import kvm_mmu_write_protect
from softcvm.kernel.arch.x86.kvm.vcpu import KvmRequest
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import copy_from_user, copy_to_user
from softcvm.kernel.virt.kvm.dirty_ring import (
    KVM_DIRTY_RING_MAX_ENTRIES,
    KVM_DIRTY_RING_RSVD_ENTRIES,
    KvmDirtyRing,
)
from softcvm.kernel.virt.kvm.memslots import KVM_USER_MEM_SLOTS, KvmMemorySlot
from softcvm.sim.addr import PAGE_SIZE, Hva
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.mm.mmap import MmStruct
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = (
    "DirtyLogCleared",
    "PagesDirtied",
    "kvm_vm_ioctl_clear_dirty_log",
    "kvm_vm_ioctl_enable_dirty_log_ring",
    "kvm_vm_ioctl_get_dirty_log",
    "kvm_vm_ioctl_reset_dirty_pages",
    "mark_page_dirty_in_slot",
)

_BITS_PER_LONG = 64
_LOG_DIRTY_PAGES = int(MemFlag.LOG_DIRTY_PAGES)


class PagesDirtied(NamedTuple):
    """Pages of a memslot entered its dirty bitmap, or a vCPU's dirty ring."""

    vm: int
    slot: int
    gfn: int
    npages: int


class DirtyLogCleared(NamedTuple):
    """Pages of a memslot left the dirty bitmap or ring and are write-protected."""

    vm: int
    slot: int
    gfn: int
    npages: int


def mark_page_dirty_in_slot(
    vcpu: "KvmVcpu", slot: KvmMemorySlot | None, gfn: int, npages: int = 1
) -> None:
    """Log [gfn, gfn + npages), all inside the slot, as written by this vCPU, if the slot logs."""
    if slot is None or not slot.flags & _LOG_DIRTY_PAGES:
        return
    kvm = vcpu.kvm
    first = gfn - slot.base_gfn
    if vcpu.dirty_ring is not None:
        for offset in range(first, first + npages):
            if vcpu.dirty_ring.full:
                kvm.linux.warn("kvm_dirty_ring_push", "it should never get full")
            vcpu.dirty_ring.push(slot.key, offset)
            if vcpu.dirty_ring.soft_full:
                vcpu.arch.requests |= KvmRequest.DIRTY_RING_SOFT_FULL
    elif slot.dirty_bitmap is not None:
        slot.dirty_bitmap.set(first, first + npages, True)
    if kvm.linux.tp.emit:
        kvm.linux.tp.emit(PagesDirtied(kvm.id, slot.key, gfn, npages))


def kvm_vm_ioctl_get_dirty_log(kvm: "Kvm", mm: "MmStruct", log: KvmDirtyLog) -> Steps[None]:
    """KVM_GET_DIRTY_LOG: copy the bitmap out, and start anew unless user space does that itself.

    ENXIO: dirty rings.  EINVAL: no such slot number.  ENOENT: no log.  EFAULT: after the bitmap was cleared, which is lost then.
    """
    yield from kvm.slots_lock.acquire()
    try:
        _check_bitmaps(kvm)
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

    ENXIO: dirty rings.  EINVAL: slot number, first_page, range.  ENOENT: no log.  EFAULT.
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
            for lo, hi in _bit_runs(int.from_bytes(image, "little"), log.first_page)
            for s, e, held in bitmap.runs(lo, min(hi, slot.npages))
            if held
        ]
        _start_anew(kvm, slot, bitmap, dirty)
        kvm.mmu_lock.release_write()
        if dirty:
            kvm.flush_remote_tlbs()
    finally:
        kvm.slots_lock.release()


def kvm_vm_ioctl_enable_dirty_log_ring(kvm: "Kvm", size: int) -> Steps[None]:
    """KVM_CAP_DIRTY_LOG_RING(_ACQ_REL): rings of `size` bytes for the vCPUs to come.

    EINVAL: no power of two, below a page, enabled already, or there are vCPUs.  E2BIG.
    """
    size &= (1 << 32) - 1  # the kernel's parameter is a u32
    if not size or size & (size - 1):
        raise KernelError(EINVAL, f"a dirty ring of {size:#x} bytes is no power of two")
    if size < max(PAGE_SIZE, KVM_DIRTY_RING_RSVD_ENTRIES * KvmDirtyGfn.SIZE):
        raise KernelError(EINVAL, f"a dirty ring of {size:#x} bytes is below a page")
    if size > KVM_DIRTY_RING_MAX_ENTRIES * KvmDirtyGfn.SIZE:
        raise KernelError(E2BIG, f"a dirty ring of {size:#x} bytes")
    if kvm.dirty_ring_size:
        raise KernelError(EINVAL, f"VM {kvm.id} has dirty rings already")
    yield from kvm.lock.acquire()
    try:
        if kvm.created_vcpus:
            raise KernelError(EINVAL, "vCPUs exist already")
        kvm.dirty_ring_size = size
    finally:
        kvm.lock.release()


def kvm_vm_ioctl_reset_dirty_pages(kvm: "Kvm") -> Steps[int]:
    """KVM_RESET_DIRTY_RINGS: take back what user space has harvested; how many entries that was.

    EINVAL: the VM has no rings.
    """
    if not kvm.dirty_ring_size:
        raise KernelError(EINVAL, f"VM {kvm.id} has no dirty rings")
    cleared = 0
    yield from kvm.slots_lock.acquire()
    try:
        for vcpu in kvm.vcpus:
            if vcpu.dirty_ring is not None:
                cleared += yield from _dirty_ring_reset(kvm, vcpu.dirty_ring)
        if cleared:
            kvm.flush_remote_tlbs()
    finally:
        kvm.slots_lock.release()
    return cleared


def _dirty_ring_reset(kvm: "Kvm", ring: KvmDirtyRing) -> Steps[int]:
    """kvm_dirty_ring_reset(): neighbours of one slot are reset together, a 64-bit mask at a time."""
    count = slot = offset = mask = 0
    while (entry := ring.pop_harvested()) is not None:
        count += 1
        delta = entry.offset - offset
        if mask and entry.slot == slot and 0 <= delta < _BITS_PER_LONG:
            mask |= 1 << delta
            continue
        backwards = mask << -delta if -_BITS_PER_LONG < delta < 0 else 0
        if entry.slot == slot and backwards and not backwards >> _BITS_PER_LONG:
            offset, mask = entry.offset, backwards | 1
            continue
        yield from _reset_dirty_gfn(kvm, slot, offset, mask)
        slot, offset, mask = entry.slot, entry.offset, 1
    yield from _reset_dirty_gfn(kvm, slot, offset, mask)
    return count


def _reset_dirty_gfn(kvm: "Kvm", number: int, offset: int, mask: int) -> Steps[None]:
    """kvm_reset_dirty_gfn(): user space may have written anything into the entries.

    A mask of which one page lies beyond the slot is dropped whole.
    """
    if not mask:
        return
    try:
        slot = _find(kvm, number)
    except KernelError:
        return
    if slot is None or offset + mask.bit_length() > slot.npages:
        return
    yield from kvm.mmu_lock.acquire_write()
    for first, last in _bit_runs(mask, offset):
        _write_protect(kvm, slot, first, last)
    kvm.mmu_lock.release_write()


def _check_bitmaps(kvm: "Kvm") -> None:
    """kvm_use_dirty_bitmap()"""
    if kvm.dirty_ring_size:
        raise KernelError(ENXIO, f"VM {kvm.id} has dirty rings and no bitmaps")


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
    _check_bitmaps(kvm)
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
    """Clear runs of set bits and write-protect their leaves."""
    for first, last in dirty:
        bitmap.set(first, last, False)
        _write_protect(kvm, slot, first, last)


def _write_protect(kvm: "Kvm", slot: KvmMemorySlot, first: int, last: int) -> None:
    """kvm_arch_mmu_enable_log_dirty_pt_masked(): the next write to these pages is a fault."""
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


def _bit_runs(bits: int, first: int) -> list[tuple[int, int]]:
    """Runs [lo, hi) of set bits, counted from `first`."""
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
