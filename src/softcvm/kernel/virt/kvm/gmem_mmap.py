"""Host mappings of KVM's files: guest_memfd (6.18) and the vCPU's kvm_run (v7.2).

A guest_memfd can be mapped only when it was created with MMAP, and touched only when it was
created INIT_SHARED; pages of a VM with private memory never are, but for the option of
gmem_convert.py.  kvm_run and its neighbours
are kernel memory.

Locks: a fault holds mmap_lock and takes folio locks, with the option invalidate_lock before.
"""

from errno import EINVAL, ENODEV
from typing import TYPE_CHECKING

from softcvm.abi.kvm.memory import KVM_DIRTY_LOG_PAGE_OFFSET, GmemFlag
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.memory import SIGBUS, BadAccess
from softcvm.kernel.mm.mmap import MAP_PRIVATE, MAP_TYPE, PROT_EXEC, MmStruct, Vma, VmOps
from softcvm.kernel.virt.kvm.gmem_convert import kvm_gmem_shared_until
from softcvm.kernel.virt.kvm.gmem_inode import FolioRun, GmemInode, kvm_gmem_get_folio
from softcvm.sim.addr import PAGE_SHIFT, Pfn
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("GmemVmOps", "VcpuVmOps")


class GmemVmOps(VmOps):
    """kvm_gmem_vm_ops"""

    def __init__(self, inode: GmemInode) -> None:
        self.inode = inode

    def may_map(self, pgoff: int, npages: int, prot: int, flags: int) -> None:
        if not self.inode.flags & GmemFlag.MMAP:
            raise KernelError(ENODEV, "the guest_memfd was created without MMAP")
        if flags & MAP_TYPE == MAP_PRIVATE:
            raise KernelError(EINVAL, "a guest_memfd is mapped MAP_SHARED")

    def memory(self, pgoff: int) -> bytearray | None:
        return None

    def fault(self, pgoff: int, npages: int) -> Steps[list[tuple[Pfn, int]]]:
        """kvm_gmem_fault_user_mapping(): folios, zeroed once; up to `npages` of them."""
        inode = self.inode
        if not inode.linux.profile.gmem_in_place:
            return (yield from self._fault(pgoff, npages))
        yield from inode.invalidate_lock.acquire_read()
        try:
            return (yield from self._fault(pgoff, npages))
        finally:
            inode.invalidate_lock.release_read()

    def _fault(self, pgoff: int, npages: int) -> Steps[list[tuple[Pfn, int]]]:
        inode = self.inode
        if pgoff >= inode.npages:
            raise BadAccess(SIGBUS, pgoff << PAGE_SHIFT, "beyond the end of the guest_memfd")
        last = min(pgoff + npages, inode.npages)
        if inode.flags & GmemFlag.INIT_SHARED:
            pass
        elif inode.linux.profile.gmem_in_place:
            last = min(last, kvm_gmem_shared_until(inode, pgoff))
        else:
            raise BadAccess(SIGBUS, pgoff << PAGE_SHIFT, "the guest_memfd is not INIT_SHARED")
        run = yield from kvm_gmem_get_folio(inode, pgoff, last)
        try:
            self._clear(run)
        finally:
            inode.unlock_folios(run.lock)
        return [(run.pfn, run.npages)]

    def mapped(self, mm: MmStruct, vma: Vma) -> None:
        self.inode.i_mmap.append((mm, vma))

    def unmapped(self, mm: MmStruct, vma: Vma) -> None:
        self.inode.i_mmap = [(m, v) for m, v in self.inode.i_mmap if v is not vma]

    def _clear(self, run: FolioRun) -> None:
        if run.hwpoison:
            raise BadAccess(SIGBUS, run.pgoff << PAGE_SHIFT, "hardware poison")
        if not run.uptodate:
            self.inode.linux.page_alloc.clear_pages(run.pfn, run.npages)
            self.inode.mark_uptodate(run.pgoff, run.pgoff + run.npages)


class VcpuVmOps(VmOps):
    """kvm_vcpu_vm_ops: page 0 is kvm_run, page 1 the data of port I/O, page 2 the coalesced
    MMIO ring; the dirty ring begins at page 64."""

    def __init__(self, vcpu: "KvmVcpu") -> None:
        self.vcpu = vcpu

    def may_map(self, pgoff: int, npages: int, prot: int, flags: int) -> None:
        """A range that begins or ends in the dirty ring is shared and not executable.  EINVAL.

        Anything else goes; a page where there is nothing is SIGBUS when it is touched.
        """
        ends = self._ring_page(pgoff), self._ring_page(pgoff + npages - 1)
        if ends == (None, None):
            return
        if prot & PROT_EXEC or flags & MAP_TYPE == MAP_PRIVATE:
            raise KernelError(EINVAL, f"a dirty ring mapped with prot {prot}, flags {flags:#x}")

    def _ring_page(self, pgoff: int) -> bytearray | None:
        ring, page = self.vcpu.dirty_ring, pgoff - KVM_DIRTY_LOG_PAGE_OFFSET
        return ring.pages[page] if ring is not None and 0 <= page < len(ring.pages) else None

    def memory(self, pgoff: int) -> bytearray | None:
        if pgoff == 0:
            return self.vcpu.run.data
        if pgoff == 1:
            return self.vcpu.pio_data
        if pgoff == 2:
            return self.vcpu.kvm.coalesced_mmio_ring
        return self._ring_page(pgoff)

    def fault(self, pgoff: int, npages: int) -> Steps[list[tuple[Pfn, int]]]:
        yield from ()
        raise BadAccess(SIGBUS, pgoff << PAGE_SHIFT, "beyond the pages of a vCPU")

    def mapped(self, mm: MmStruct, vma: Vma) -> None:
        """Nothing to remember: the mapping holds the file."""

    def unmapped(self, mm: MmStruct, vma: Vma) -> None:
        """Nothing to forget."""
