"""guest_memfd files: one VM's view of the storage (virt/kvm/guest_memfd.c, v7.2).

A file holds a reference to its VM; a memslot points to the file without one.  Here: creation,
bindings and release.  The storage itself, with fallocate and invalidation, is gmem_inode.py;
handing pages to a guest is gmem_pfn.py; mapping them into the host is gmem_mmap.py; converting
shared<->private is mem_attributes.py; putting a page in the RMP is arch/x86/kvm/svm/gmem.py.

Locks, outermost first: kvm.slots_lock, inode.invalidate_lock, kvm.mmu_lock.
"""

from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

from softcvm.abi.kvm.memory import GmemFlag
from softcvm.kernel.errors import KernelError
from softcvm.kernel.fs.file import File, FileKind
from softcvm.kernel.virt.kvm.gmem_inode import (
    GmemFile,
    GmemInode,
    kvm_gmem_get_file,
    kvm_gmem_invalidate_end_file,
    kvm_gmem_invalidate_start_file,
    truncate_inode_pages_range,
)
from softcvm.kernel.virt.kvm.gmem_pfn import kvm_gmem_get_pfn, kvm_gmem_populate
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, Pgoff
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "GmemFile",
    "GmemInode",
    "kvm_gmem_bind",
    "kvm_gmem_create",
    "kvm_gmem_get_pfn",
    "kvm_gmem_link",
    "kvm_gmem_populate",
    "kvm_gmem_release",
    "kvm_gmem_supported_flags",
    "kvm_gmem_unbind",
)

_S64 = 1 << 63


def kvm_gmem_supported_flags(kvm: "Kvm | None", linux: "Linux") -> GmemFlag:
    """Flags of KVM_CREATE_GUEST_MEMFD for this VM (KVM_CAP_GUEST_MEMFD_FLAGS)."""
    if not linux.profile.gmem_mmap:
        return GmemFlag(0)
    if kvm is None or not kvm.arch.has_private_mem:
        return GmemFlag.MMAP | GmemFlag.INIT_SHARED
    return GmemFlag.MMAP


def kvm_gmem_create(kvm: "Kvm", proc: "Process", size: int, flags: int) -> int:
    """KVM_CREATE_GUEST_MEMFD.  The fd is not close-on-exec and pins the VM."""
    supported = int(kvm_gmem_supported_flags(kvm, kvm.linux))
    if flags & ~supported:
        raise KernelError(EINVAL, f"flags {flags:#x}, of which {supported:#x} are supported")
    if not 0 < size < 1 << 63 or size & PAGE_MASK:
        raise KernelError(EINVAL, f"size {size:#x}")
    fd = proc.files.get_unused_fd(proc.rlimits.nofile)
    return _install_view(kvm, proc, fd, GmemInode(kvm.linux, size, GmemFlag(flags)))


def kvm_gmem_link(kvm: "Kvm", proc: "Process", fd: int, flags: int) -> int:
    """KVM_LINK_GUEST_MEMFD (proposed): another VM's view of the inode behind fd, as a new file.

    EINVAL: flags, no guest_memfd, or a file that is this VM's already.  EMFILE.
    """
    if flags:
        raise KernelError(EINVAL, f"flags {flags:#x}")
    try:
        gmem = proc.files.lookup(fd).private
    except KernelError as error:
        raise KernelError(EINVAL, error.why) from error
    if not isinstance(gmem, GmemFile):
        raise KernelError(EINVAL, f"fd {fd} is no guest_memfd")
    if gmem.kvm is kvm:
        raise KernelError(EINVAL, f"VM {kvm.id} has fd {fd} already")
    number = proc.files.get_unused_fd(proc.rlimits.nofile)
    return _install_view(kvm, proc, number, gmem.inode)


def _install_view(kvm: "Kvm", proc: "Process", fd: int, inode: GmemInode) -> int:
    """A file of the inode for this VM, under a descriptor that is reserved."""
    gmem = GmemFile(inode, kvm.get())
    inode.files.append(gmem)
    gmem.file = File(FileKind.GUEST_MEMFD, gmem, kvm_gmem_release)
    return proc.files.install(fd, gmem.file)


def kvm_gmem_bind(
    kvm: "Kvm", proc: "Process", slot: "KvmMemorySlot", fd: int, offset: int
) -> Steps[None]:
    """Bind a memslot that nobody sees yet to indices of a guest_memfd of the same VM.  EBADF,
    EINVAL."""
    file = proc.files.fget(fd)
    try:
        gmem = file.private
        if not isinstance(gmem, GmemFile):
            raise KernelError(EINVAL, f"fd {fd} is no guest_memfd")
        if gmem.kvm is not kvm:
            raise KernelError(EINVAL, f"fd {fd} is the guest_memfd of VM {gmem.kvm.id}")
        inode = gmem.inode
        end = offset + (slot.npages << PAGE_SHIFT)
        if kvm.linux.profile.gmem_bind_offset_signed and offset < _S64 <= end:
            end -= 2 * _S64
        if offset & PAGE_MASK or end > inode.size:
            raise KernelError(
                EINVAL, f"offset {offset:#x}: the slot ends beyond the guest_memfd"
            )
        start = offset >> PAGE_SHIFT
        yield from inode.invalidate_lock.acquire_write()
        try:
            if gmem.bindings.held(start, start + slot.npages):
                raise KernelError(
                    EINVAL, f"index {start:#x} + {slot.npages:#x} is bound already"
                )
            if kvm.linux.choices.choose("gmem_bind_xarray", 2):
                raise KernelError(ENOMEM, "no memory for the bindings (injected)")
            slot.gmem_file = gmem
            slot.gmem_pgoff = Pgoff(start)
            slot.gmem_only = bool(inode.flags & GmemFlag.MMAP)
            gmem.bindings.set(start, start + slot.npages, slot.key)
            gmem.slots[slot.key] = slot
        finally:
            inode.invalidate_lock.release_write()
    finally:
        kvm.linux.task_work.fput(file)


def kvm_gmem_unbind(slot: "KvmMemorySlot") -> Steps[None]:
    """The slot is gone.  Under slots_lock, after synchronize_srcu()."""
    gmem = slot.gmem_file
    if gmem is None:
        return
    file = kvm_gmem_get_file(slot)
    if file is None:
        # Being closed: release cannot have walked the bindings yet, it needs our slots_lock.
        _unbind(slot, gmem)
        return
    yield from gmem.inode.invalidate_lock.acquire_write()
    _unbind(slot, gmem)
    gmem.inode.invalidate_lock.release_write()
    gmem.inode.linux.task_work.fput(file)


def _unbind(slot: "KvmMemorySlot", gmem: GmemFile) -> None:
    gmem.bindings.set(slot.gmem_pgoff, slot.gmem_pgoff + slot.npages, None)
    gmem.slots.pop(slot.key, None)
    slot.gmem_file = None


def kvm_gmem_release(file: File) -> Steps[None]:
    """Last fput(): unmap this VM only.  Memory and RMP state go with the inode, right after."""
    gmem = file.private
    if not isinstance(gmem, GmemFile):
        raise TypeError(f"release of a {file.kind.value} file as a guest_memfd")
    kvm, inode = gmem.kvm, gmem.inode
    yield from kvm.slots_lock.acquire()
    yield from inode.invalidate_lock.acquire_write()
    for slot in gmem.slots.values():
        slot.gmem_file = None
    yield from kvm_gmem_invalidate_start_file(gmem, 0, gmem.bindings.limit)
    yield from kvm_gmem_invalidate_end_file(gmem, 0, gmem.bindings.limit)
    inode.files.remove(gmem)
    inode.invalidate_lock.release_write()
    kvm.slots_lock.release()
    gmem.bindings.clear()
    gmem.slots.clear()
    yield from kvm.put()
    if not inode.files:
        yield from truncate_inode_pages_range(inode, 0, inode.npages)  # evict_inode()
        inode.linux.gmem_inodes.remove(inode)
