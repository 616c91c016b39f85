"""Converting guest_memfd pages in place, by memory attributes: an option that no release has.

The review of KVM_CREATE_GUEST_MEMFD in November 2023 sketched it: a hook from
KVM_SET_MEMORY_ATTRIBUTES takes host mappings of the parts that become private away, and the host
that touches them gets SIGSEGV, or EFAULT from a system call.  What becomes shared is the
hypervisor's in the RMP at once and can be mapped; its contents are whatever the technology leaves.
An index has one attribute because no two GFNs of a VM can be bound to it.

Owns who may touch an index from the host, and the hook.  The series that was queued for 7.4 keeps the
attributes in the inode instead and answers with SIGBUS; that is not modelled.

Locks: the inode's invalidate_lock, for write around the change of the store (several in order of
their numbers), for read around a host fault.
"""

from typing import TYPE_CHECKING

from softcvm.abi.kvm.memory import KVM_MEMORY_ATTRIBUTE_PRIVATE
from softcvm.kernel.mm.memory import SIGSEGV, BadAccess
from softcvm.kernel.virt.kvm.gmem_inode import GmemInode
from softcvm.sim.addr import PAGE_SHIFT, Pfn
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = ("kvm_gmem_convert", "kvm_gmem_shared_until")


def kvm_gmem_convert(
    kvm: "Kvm", slots: "list[KvmMemorySlot]", start: int, end: int, attributes: int
) -> Steps[None]:
    """Store attributes for [start, end) and convert what is resident.  Under slots_lock, SPTEs zapped."""
    bound = [slot for slot in slots if slot.gmem_only and slot.gmem_file is not None]
    held = {slot.gmem_file.inode.ino: slot.gmem_file.inode for slot in bound if slot.gmem_file}
    inodes = [held[ino] for ino in sorted(held)]
    for inode in inodes:
        yield from inode.invalidate_lock.acquire_write()
    kvm.mem_attr.set(start, end, attributes)
    for slot in bound:
        if slot.gmem_file is None:
            continue
        first = max(start, slot.base_gfn) - slot.base_gfn + slot.gmem_pgoff
        last = min(end, slot.end_gfn) - slot.base_gfn + slot.gmem_pgoff
        if attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE:
            yield from _unmap_from_host(slot.gmem_file.inode, first, last)
        else:
            _make_shared(slot.gmem_file.inode, first, last)
    for inode in reversed(inodes):
        inode.invalidate_lock.release_write()


def _unmap_from_host(inode: GmemInode, first: int, last: int) -> Steps[None]:
    for mm, vma in list(inode.i_mmap):
        yield from mm.zap_file_pages(vma, first, last)


def _make_shared(inode: GmemInode, first: int, last: int) -> None:
    for start, end, folio in inode.folios.held(first, last):
        if folio is not None:
            pfn = Pfn(start + folio.delta)
            inode.linux.kvm_x86_ops.gmem_invalidate(inode.linux, pfn, Pfn(pfn + end - start))


def kvm_gmem_shared_until(inode: GmemInode, index: int) -> int:
    """Where the run that the host may touch from index on ends.  Under invalidate_lock.

    BadAccess SIGSEGV where a VM holds it private, or nobody has bound it.
    """
    stop = index
    for gmem in inode.files:
        _, bound_end, key = gmem.bindings.run(index)
        if key is None:
            continue
        slot = gmem.slots[key]
        gfn = slot.base_gfn + index - slot.gmem_pgoff
        _, alike, attributes = gmem.kvm.mem_attr.run(gfn)
        if attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE:
            raise BadAccess(SIGSEGV, index << PAGE_SHIFT, f"index {index:#x} is private")
        here = min(bound_end, index + alike - gfn)
        stop = here if stop == index else min(stop, here)
    if stop == index:
        raise BadAccess(
            SIGSEGV, index << PAGE_SHIFT, f"index {index:#x} is bound to no memslot"
        )
    return stop
