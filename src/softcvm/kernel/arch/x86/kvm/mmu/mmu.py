"""Nested page faults: from a guest physical address to a leaf (arch/x86/kvm/mmu/mmu.c, v7.2).

Owns the order of the checks between #NPF and the installed leaf, the level of the leaf, and
KVM_PRE_FAULT_MEMORY.  Pages come from guest_memfd.py (private) or the VMM's address space
(shared); leaves go to tdp_mmu.py; what the RMP says about the level is the vendor's hook.

Simpler than Linux: host mappings are 4K, so shared leaves are; a vCPU is never in SMM or a
nested guest.

Locks: srcu is held by the caller; mmu_lock is taken for read to install.  A fault that raced
with an invalidation sees it by mmu_invalidate_seq and the range in progress, and is retried.
"""

from enum import IntEnum
from errno import EAGAIN, EFAULT, EINTR, EINVAL, EIO, ENOENT, EOPNOTSUPP
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import KvmPreFaultMemory, MemFlag, VmType
from softcvm.abi.kvm.run import KvmExit, MemoryExitFlag
from softcvm.abi.svm import PfErr
from softcvm.kernel.arch.x86.kvm.mmu.tdp_mmu import kvm_mmu_unmap_gfn_range, tdp_mmu_map
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.memory import get_user_pages
from softcvm.kernel.virt.kvm.dirty_log import mark_page_dirty_in_slot
from softcvm.kernel.virt.kvm.guest_memfd import kvm_gmem_get_pfn
from softcvm.kernel.virt.kvm.mem_attributes import kvm_hugepage_mixed, kvm_mem_is_private
from softcvm.sim.addr import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Gfn,
    Gpa,
    Pfn,
    PgLevel,
    pages_per_level,
)
from softcvm.sim.steps import Point, Steps, preempt

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "KvmPageFault",
    "RetPf",
    "kvm_arch_vcpu_pre_fault_memory",
    "kvm_mmu_page_fault",
    "kvm_prepare_memory_fault_exit",
    "kvm_zap_gfn_range",
)

_PRIVATE_ACCESS, _WRITE = int(PfErr.PRIVATE_ACCESS), int(PfErr.WRITE)
_RSVD, _GUEST_FINAL = int(PfErr.RSVD), int(PfErr.GUEST_FINAL)
_READONLY, _LOG_DIRTY_PAGES = int(MemFlag.READONLY), int(MemFlag.LOG_DIRTY_PAGES)
_MMU_SEQ_TAKEN = Point("fault: mmu_seq snapshot")
_LOOKS_PER_FAULT = 2
"""kvm_vcpu_pre_fault_memory() and kvm_tdp_map_page() both look for a signal."""


class RetPf(IntEnum):
    """What became of a fault (enum RET_PF_*, arch/x86/kvm/mmu/mmu_internal.h)."""

    RETRY = 1
    EMULATE = 2
    FIXED = 5
    SPURIOUS = 6


_COUNTED = {
    RetPf.EMULATE: "pf_emulate",
    RetPf.FIXED: "pf_fixed",
    RetPf.SPURIOUS: "pf_spurious",
}


class KvmPageFault(NamedTuple):
    """KVM resolved, or refused, a fault on gfn (Linux: tracepoint kvm_page_fault)."""

    vm: int
    vcpu: int
    gfn: int
    npages: int
    error_code: int
    result: str
    level: int


class _Mapping(NamedTuple):
    """Pages that a fault is about to map, with a reference to put."""

    pfn: Pfn
    npages: int
    max_level: PgLevel
    writable: bool
    gmem: bool


def kvm_prepare_memory_fault_exit(vcpu: "KvmVcpu", gfn: int, *, is_private: bool) -> None:
    """Fill kvm_run for KVM_EXIT_MEMORY_FAULT; always one page, and the kind of access that was
    attempted."""
    run = vcpu.run
    run.exit_reason = KvmExit.MEMORY_FAULT
    run.memory_fault_flags = MemoryExitFlag.PRIVATE if is_private else 0
    run.memory_fault_gpa = gfn << PAGE_SHIFT
    run.memory_fault_size = PAGE_SIZE


def kvm_mmu_page_fault(vcpu: "KvmVcpu", gpa: Gpa, error_code: int) -> Steps[RetPf]:
    """#NPF on one address.  EMULATE is a shared access to a GPA without a memslot (MMIO) or a
    read-only one.

    KernelError with kvm_run.memory_fault filled: KVM_RUN returns it to user space.
    """
    kvm = vcpu.kvm
    gfn = Gfn(gpa >> PAGE_SHIFT)
    if (
        kvm.arch.vm_type is VmType.SW_PROTECTED
        and not error_code & _RSVD
        and kvm_mem_is_private(kvm, gfn)
    ):
        error_code |= _PRIVATE_ACCESS
    if error_code & _RSVD and error_code & _PRIVATE_ACCESS:
        kvm.linux.warn("kvm_mmu_page_fault", f"reserved-bit fault on private GPA {gpa:#x}")
        raise KernelError(EFAULT, "emulated MMIO is never private")
    kvm.linux.counters.npf += 1
    vcpu.stat["pf_taken"] += 1
    result, _ = yield from _do_page_fault(vcpu, gfn, 1, error_code, prefetch=False)
    if result in _COUNTED:
        vcpu.stat[_COUNTED[result]] += 1
    return result


def kvm_arch_vcpu_pre_fault_memory(
    vcpu: "KvmVcpu", proc: "Process", range_: KvmPreFaultMemory
) -> Steps[None]:
    """KVM_PRE_FAULT_MEMORY with vcpu->mutex held: map [gpa, gpa + size) as reads would.

    range_ is advanced past what was mapped, on failure too.  An error after the first page is
    success.
    """
    gpa, size = range_.gpa, range_.size
    if range_.flags:
        raise KernelError(EINVAL, f"flags {range_.flags:#x}")
    if (gpa | size) & PAGE_MASK or gpa + size >= 1 << 64 or not size:
        raise KernelError(EINVAL, f"{gpa:#x} + {size:#x}: unaligned, empty or wraps")
    kvm = vcpu.kvm
    yield from kvm.srcu.acquire_read()
    some = False
    try:
        while size:
            if proc.signal_pending():
                raise KernelError(EINTR, "signal while prefaulting")
            npages = proc.pages_before_signal(size >> PAGE_SHIFT, _LOOKS_PER_FAULT)
            done = yield from _pre_fault(vcpu, proc, gpa >> PAGE_SHIFT, npages)
            proc.looked((done - 1) * _LOOKS_PER_FAULT)
            gpa = gpa + (done << PAGE_SHIFT) & (1 << 64) - 1
            size -= done << PAGE_SHIFT
            range_.gpa, range_.size = gpa, size
            some = True
    except KernelError:
        if not some:
            raise
    finally:
        kvm.srcu.release_read()


def _pre_fault(vcpu: "KvmVcpu", proc: "Process", gfn: int, npages: int) -> Steps[int]:
    """Map the run that begins at gfn; how many of npages that was."""
    kvm = vcpu.kvm
    if not kvm.arch.pre_fault_allowed:
        raise KernelError(EOPNOTSUPP, "the VM may not prefault before it is launched")
    error_code = _GUEST_FINAL
    if kvm.arch.has_private_mem and kvm_mem_is_private(kvm, Gfn(gfn)):
        error_code |= _PRIVATE_ACCESS
    while True:
        if proc.signal_pending():
            raise KernelError(EINTR, "signal while prefaulting")
        if kvm.vm_dead:
            raise KernelError(EIO, "the VM is dead")
        result, mapped = yield from _do_page_fault(
            vcpu, Gfn(gfn), npages, error_code, prefetch=True
        )
        if result is RetPf.EMULATE:
            raise KernelError(ENOENT, f"GFN {gfn:#x} has no memslot")
        if result is not RetPf.RETRY:
            return min(mapped, npages)
        yield from preempt("retry a fault")


def kvm_zap_gfn_range(kvm: "Kvm", start: int, end: int) -> Steps[None]:
    """Zap [start, end) and make every fault in flight look again."""
    yield from kvm.mmu_lock.acquire_write()
    kvm.mmu_invalidate_begin()
    kvm.mmu_invalidate_range_add(start, end)
    flush = False
    for space in kvm.memslots:
        for slot in space.overlapping(start, end):
            lo, hi = max(start, slot.base_gfn), min(end, slot.end_gfn)
            flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)
    if flush:
        kvm.flush_remote_tlbs()
    kvm.mmu_invalidate_end()
    kvm.mmu_lock.release_write()


def _do_page_fault(
    vcpu: "KvmVcpu", gfn: Gfn, npages: int, error_code: int, *, prefetch: bool
) -> Steps[tuple[RetPf, int]]:
    """kvm_mmu_do_page_fault(): the result, and how many pages from gfn on are mapped by it.

    npages > 1 is a prefault that may map a run: what the loop over single faults would map.
    """
    kvm = vcpu.kvm
    is_private = bool(error_code & _PRIVATE_ACCESS)
    outcome, level, mapped = "", 0, 0
    try:
        result, level, mapped = yield from _direct_page_fault(
            vcpu, gfn, npages, error_code, is_private, prefetch
        )
        if kvm.linux.tp.emit:
            outcome = result.name
        if result is RetPf.EMULATE and is_private:
            kvm_prepare_memory_fault_exit(vcpu, gfn, is_private=True)
            raise KernelError(EFAULT, f"private GFN {gfn:#x} cannot be emulated")
        if result is RetPf.RETRY:
            kvm.linux.counters.mmu_retries += 1
        return result, mapped
    except KernelError as error:
        outcome = str(error)
        raise
    finally:
        if kvm.linux.tp.emit and outcome:
            kvm.linux.tp.emit(
                KvmPageFault(kvm.id, vcpu.vcpu_id, gfn, mapped, error_code, outcome, level)
            )


def _direct_page_fault(
    vcpu: "KvmVcpu", gfn: Gfn, npages: int, error_code: int, is_private: bool, prefetch: bool
) -> Steps[tuple[RetPf, int, int]]:
    """direct_page_fault() and kvm_faultin_pfn(), checks in their order."""
    kvm = vcpu.kvm
    slot = kvm.gfn_to_memslot(gfn)
    mmu_seq = kvm.mmu_invalidate_seq
    yield _MMU_SEQ_TAKEN
    if is_private != kvm_mem_is_private(kvm, gfn):
        kvm_prepare_memory_fault_exit(vcpu, gfn, is_private=is_private)
        wanted = "private" if is_private else "shared"
        raise KernelError(EFAULT, f"{wanted} access to GFN {gfn:#x}, which is not")
    if slot is None:
        if is_private:
            kvm_prepare_memory_fault_exit(vcpu, gfn, is_private=True)
            raise KernelError(EFAULT, f"private GFN {gfn:#x} has no memslot")
        return RetPf.EMULATE, 0, 0
    if slot.invalid:
        if prefetch and kvm.linux.profile.prefault_eagain_on_dying_slot:
            raise KernelError(EAGAIN, f"slot {slot.key:#x} is being deleted or moved")
        return RetPf.RETRY, 0, 0
    if kvm.mmu_invalidate_retry_gfn(mmu_seq, gfn):
        return RetPf.RETRY, 0, 0
    npages = min(npages, slot.end_gfn - gfn, kvm.mem_attr.run(gfn)[1] - gfn)
    write = bool(error_code & _WRITE)
    if is_private or slot.gmem_only:
        found = yield from _faultin_pfn_gmem(vcpu, slot, gfn, npages, is_private)
    elif write and slot.flags & _READONLY:
        return RetPf.EMULATE, 0, 0
    else:
        found = yield from _faultin_pfn_hva(kvm, slot, gfn, npages, write)
    try:
        if kvm.mmu_invalidate_retry_gfn(mmu_seq, gfn, gfn + found.npages):
            return RetPf.RETRY, 0, 0
        yield from kvm.mmu_lock.acquire_read()
        try:
            if kvm.mmu_invalidate_retry_gfn(mmu_seq, gfn, gfn + found.npages):
                return RetPf.RETRY, 0, 0
            return _map(vcpu, slot, gfn, found)
        finally:
            kvm.mmu_lock.release_read()
    finally:
        if found.gmem:
            kvm.linux.page_alloc.put_pages(found.pfn, found.npages)


def _faultin_pfn_gmem(
    vcpu: "KvmVcpu", slot: "KvmMemorySlot", gfn: Gfn, npages: int, is_private: bool
) -> Steps[_Mapping]:
    """kvm_mmu_faultin_pfn_gmem(): any failure fills kvm_run.memory_fault."""
    kvm = vcpu.kvm
    try:
        if not slot.can_be_private:
            raise KernelError(
                EFAULT, f"private GFN {gfn:#x}: slot {slot.key:#x} has no guest_memfd"
            )
        pfn, npages, max_order = yield from kvm_gmem_get_pfn(kvm, slot, gfn, npages)
    except KernelError:
        kvm_prepare_memory_fault_exit(vcpu, gfn, is_private=is_private)
        raise
    level = PgLevel.PG_2M if max_order >= 9 else PgLevel.PG_4K
    if level > PgLevel.PG_4K:
        allowed = kvm.ops.gmem_max_mapping_level(kvm, pfn, is_private)
        if allowed:
            level = PgLevel(min(level, allowed))
        held = npages
        npages = kvm.ops.gmem_mapping_run(kvm, pfn, npages, is_private)
        if npages < held:
            kvm.linux.page_alloc.put_pages(pfn, held)
            kvm.linux.page_alloc.get_pages(pfn, npages)
    return _Mapping(pfn, npages, level, writable=not slot.flags & _READONLY, gmem=True)


def _faultin_pfn_hva(
    kvm: "Kvm", slot: "KvmMemorySlot", gfn: Gfn, npages: int, write: bool
) -> Steps[_Mapping]:
    """__kvm_mmu_faultin_pfn(): the page behind the slot's user address; any failure is
    EFAULT."""
    writable = not slot.flags & _READONLY
    hva = slot.hva(gfn)
    try:
        runs = yield from get_user_pages(kvm.mm, hva, npages, write=writable)
    except KernelError as error:
        if npages > 1:
            return (yield from _faultin_pfn_hva(kvm, slot, gfn, 1, write))
        if not writable or write:
            raise KernelError(EFAULT, f"no page for GFN {gfn:#x}: {error.why}") from error
        try:
            runs = yield from get_user_pages(kvm.mm, hva, 1, write=False)
        except KernelError:
            raise KernelError(EFAULT, f"no page for GFN {gfn:#x}: {error.why}") from error
        writable = False
    pfn, count = runs[0]
    return _Mapping(pfn, count, PgLevel.PG_4K, writable, gmem=False)


def _map(
    vcpu: "KvmVcpu", slot: "KvmMemorySlot", gfn: Gfn, found: _Mapping
) -> tuple[RetPf, int, int]:
    """direct_map(): choose the level, install leaves; the pages from gfn on that are mapped
    now."""
    kvm = vcpu.kvm
    level = _max_mapping_level(kvm, slot, gfn, found.max_level)
    size = pages_per_level(level)
    if level is PgLevel.PG_4K:
        npages = found.npages
        if found.max_level > level:  # the next huge page may be fit for more
            huge = pages_per_level(found.max_level)
            npages = min(npages, huge - gfn % huge)
        base, pfn, count = int(gfn), int(found.pfn), npages
    else:
        base = gfn - gfn % size
        pfn = found.pfn - (gfn - base)
        count = size
        if level is found.max_level:
            # Geometry allows all whole pages of a slot alike, and pages of one kind are not mixed.
            alike = min(gfn + found.npages, slot.end_gfn, kvm.mem_attr.run(base)[1])
            count = max(size, (alike - base) // size * size)
        while (
            base + count + size <= gfn + found.npages
            and _max_mapping_level(kvm, slot, base + count, found.max_level) is level
        ):
            count += size
    if found.writable and slot.flags & _LOG_DIRTY_PAGES:
        mark_page_dirty_in_slot(vcpu, slot, base, count)
    npt = kvm.arch.npt
    held = npt.translate(base, count)
    if (
        held is not None
        and (held.npages, held.pfn) == (count, pfn)
        and held.level >= level
        and held.writable >= found.writable
    ):
        return RetPf.SPURIOUS, held.level, base + count - gfn
    if held is not None or count > 1:
        _split_leaf(kvm, base, level)
        _split_leaf(kvm, base + count - 1, level)
    tdp_mmu_map(kvm, base, pfn, count, level, writable=found.writable)
    return RetPf.FIXED, level, base + count - gfn


def _split_leaf(kvm: "Kvm", gfn: int, level: PgLevel) -> None:
    """tdp_mmu_split_huge_page(): a larger leaf around gfn becomes leaves of one level less."""
    leaf = kvm.arch.npt.lookup(gfn)
    if leaf is not None and leaf.level > level:
        kvm.arch.npt.set(leaf.gfn, leaf.pfn, leaf.npages, level, writable=leaf.writable)


def _max_mapping_level(
    kvm: "Kvm", slot: "KvmMemorySlot", gfn: int, max_level: PgLevel
) -> PgLevel:
    """__kvm_mmu_max_mapping_level(): the largest level that geometry and attributes allow."""
    level = max_level
    while level > PgLevel.PG_4K:
        if not slot.lpage_disallowed(gfn, level) and not kvm_hugepage_mixed(kvm, gfn, level):
            break
        level = PgLevel(level - 1)
    if slot.flags & _LOG_DIRTY_PAGES:
        return PgLevel.PG_4K
    return level
