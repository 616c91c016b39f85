"""Memory attributes: which guest pages the VMM says are private (virt/kvm/kvm_main.c, v7.2).

Owns KVM_SET_MEMORY_ATTRIBUTES and who may read the answer when.  The store is kvm.mem_attr, gfn
-> attributes, where absence is 0 and means shared; it needs no memslot and outlives them.
Contents, RMP state and host mappings do not change here: a page made shared stays in the gmem
and assigned until somebody punches it; converting in place is an option, gmem_convert.py.

Whether a huge page is MIXED follows from the store (`uniform`) and is not kept a second time;
that a fault cannot install one while half of it is changing is the work of the widened
invalidation range.

Locks: writers hold slots_lock.  Readers hold nothing, may be stale, and check again against
mmu_invalidate_seq, or hold slots_lock.
"""

from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import KVM_MEMORY_ATTRIBUTE_PRIVATE, KvmMemoryAttributes
from softcvm.kernel.arch.x86.kvm.mmu.tdp_mmu import kvm_mmu_unmap_gfn_range
from softcvm.kernel.errors import KernelError
from softcvm.kernel.virt.kvm.gmem_convert import kvm_gmem_convert
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, Gfn, PgLevel, pages_per_level
from softcvm.sim.steps import Steps, preempt

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "SetMemoryAttributes",
    "kvm_hugepage_mixed",
    "kvm_mem_is_private",
    "kvm_range_is_private",
    "kvm_supported_mem_attributes",
    "kvm_vm_ioctl_set_mem_attributes",
)


class SetMemoryAttributes(NamedTuple):
    """Pages [start, end) of a VM got these attributes; `runs` of them had others before."""

    vm: int
    start: int
    end: int
    attributes: int
    runs: int


def kvm_supported_mem_attributes(kvm: "Kvm | None") -> int:
    """KVM_CAP_MEMORY_ATTRIBUTES"""
    return KVM_MEMORY_ATTRIBUTE_PRIVATE if kvm is None or kvm.arch.has_private_mem else 0


def kvm_mem_is_private(kvm: "Kvm", gfn: Gfn) -> bool:
    return bool(kvm.mem_attr[gfn] & KVM_MEMORY_ATTRIBUTE_PRIVATE)


def kvm_range_is_private(kvm: "Kvm", start: int, end: int) -> bool:
    """kvm_range_has_memory_attributes(PRIVATE, PRIVATE)"""
    return kvm.mem_attr.uniform(start, end) and kvm_mem_is_private(kvm, Gfn(start))


def kvm_hugepage_mixed(kvm: "Kvm", gfn: int, level: PgLevel) -> bool:
    """hugepage_test_mixed(): the huge page around gfn is not all of one kind."""
    size = pages_per_level(level)
    base = gfn - gfn % size
    return not kvm.mem_attr.uniform(base, base + size)


def kvm_vm_ioctl_set_mem_attributes(kvm: "Kvm", attrs: KvmMemoryAttributes) -> Steps[None]:
    """KVM_SET_MEMORY_ATTRIBUTES, after the copy-in."""
    address, size, attributes = attrs.address, attrs.size, attrs.attributes
    if attrs.flags:
        raise KernelError(EINVAL, f"flags {attrs.flags:#x}")
    supported = kvm_supported_mem_attributes(kvm)
    if attributes & ~supported:
        raise KernelError(EINVAL, f"attributes {attributes:#x} of {supported:#x}")
    if size == 0 or address + size >= 1 << 64:
        raise KernelError(EINVAL, f"{address:#x} + {size:#x} is empty or wraps")
    if (address | size) & PAGE_MASK:
        raise KernelError(EINVAL, f"{address:#x} + {size:#x} is not page aligned")
    start = address >> PAGE_SHIFT
    end = address + size >> PAGE_SHIFT
    yield from kvm.slots_lock.acquire()
    try:
        yield from _set_mem_attributes(kvm, start, end, attributes)
    finally:
        kvm.slots_lock.release()


def _set_mem_attributes(kvm: "Kvm", start: int, end: int, attributes: int) -> Steps[None]:
    """kvm_vm_set_mem_attributes(): invalidate the old kind, store, end."""
    store = kvm.mem_attr
    before = store.runs(start, end)
    if len(before) == 1 and before[0][2] == attributes:
        return
    if kvm.linux.choices.choose("mem_attr_reserve", 2):
        raise KernelError(ENOMEM, "no memory to store attributes (injected)")
    slots = [slot for space in kvm.memslots for slot in space.overlapping(start, end)]
    if slots:
        yield from _pre_set(kvm, slots, start, end)
    else:
        yield from preempt("kvm_vm_set_mem_attributes")
    changed = sum([old != attributes for _, _, old in store.runs(start, end)])
    if kvm.linux.profile.gmem_in_place:
        yield from kvm_gmem_convert(kvm, slots, start, end, attributes)
    else:
        store.set(start, end, attributes)
    if kvm.linux.tp.emit:
        kvm.linux.tp.emit(SetMemoryAttributes(kvm.id, start, end, attributes, changed))
    if slots:
        yield from kvm.mmu_lock.acquire_write()
        kvm.mmu_invalidate_end()
        kvm.mmu_lock.release_write()


def _pre_set(kvm: "Kvm", slots: "list[KvmMemorySlot]", start: int, end: int) -> Steps[None]:
    """kvm_pre_set_memory_attributes() and its arch part: no new mapping in the range, none of
    the old."""
    yield from kvm.mmu_lock.acquire_write()
    kvm.mmu_invalidate_begin()
    flush = False
    for slot in slots:
        lo, hi = max(start, slot.base_gfn), min(end, slot.end_gfn)
        kvm.mmu_invalidate_range_add(lo, hi)
        for level in (PgLevel.PG_2M, PgLevel.PG_1G):
            _add_huge_edges(kvm, slot, lo, hi, level)
        flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)
    if flush:
        kvm.flush_remote_tlbs()
    kvm.mmu_lock.release_write()


def _add_huge_edges(
    kvm: "Kvm", slot: "KvmMemorySlot", start: int, end: int, level: PgLevel
) -> None:
    """9129633d568e: also keep out huge pages that the range covers in part and that are not
    mixed yet."""
    size = pages_per_level(level)
    head = start - start % size
    tail = (end - 1) - (end - 1) % size
    if head != start or head + size > end:
        _add_if_possible(kvm, slot, head, level)
    if tail != head and tail + size > end:
        _add_if_possible(kvm, slot, tail, level)


def _add_if_possible(kvm: "Kvm", slot: "KvmMemorySlot", base: int, level: PgLevel) -> None:
    end = base + pages_per_level(level)
    if (
        base >= slot.base_gfn
        and end <= slot.end_gfn
        and not kvm_hugepage_mixed(kvm, base, level)
    ):
        kvm.mmu_invalidate_range_add(base, end)
