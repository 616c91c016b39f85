"""Who uses what: open files of all processes, and the owner of every page frame that is in use.

Walks from what user space can name (file descriptors and mappings) and from the list of VMs, the way a
reader of the kernel would, and never asks the books that are to be checked.
"""

from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.snp_platform import SNP_TMR_SIZE
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info
from softcvm.kernel.fs.file import File
from softcvm.kernel.virt.kvm.gmem_inode import GmemFile, GmemInode
from softcvm.sim.addr import PAGE_SHIFT

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm
    from softcvm.machine import Machine

__all__ = ("OpenFile", "Owned", "gmem_files", "gmem_inodes", "open_files", "page_owners")


class OpenFile(NamedTuple):
    """A file that some process can reach, and by how many descriptors and mappings."""

    file: File
    references: int


class Owned(NamedTuple):
    """Frames [start, end) and who has them."""

    start: int
    end: int
    owner: str


def open_files(m: "Machine") -> list[OpenFile]:
    """Every open file description, each once, in the order of processes and numbers."""
    found: dict[int, OpenFile] = {}
    for proc in m.linux.processes:
        mapped = [vma.file for vma in proc.mm.vmas]
        for file in [*proc.files.fds.values(), *mapped]:
            if file is not None:
                _, references = found.get(id(file), (file, 0))
                found[id(file)] = OpenFile(file, references + 1)
    return list(found.values())


def gmem_files(m: "Machine") -> list[GmemFile]:
    files = [opened.file.private for opened in open_files(m)]
    return [gmem for gmem in files if isinstance(gmem, GmemFile)]


def gmem_inodes(m: "Machine") -> list[GmemInode]:
    """Every guest_memfd that is reachable, each once."""
    return list({id(gmem.inode): gmem.inode for gmem in gmem_files(m)}.values())


def page_owners(m: "Machine") -> list[Owned]:
    """Every frame somebody answers for, in order of frames; two owners of one are two entries."""
    linux = m.linux
    owned = [Owned(start, end, "the board") for start, end in linux.page_alloc.reserved]
    dev = linux.sev_dev
    owned.append(Owned(dev.cmd_buf, dev.cmd_buf + 2, "command buffers"))
    if dev.sev_es_tmr is not None:
        owned.append(
            Owned(dev.sev_es_tmr, dev.sev_es_tmr + (SNP_TMR_SIZE >> PAGE_SHIFT), "the TMR")
        )
    for kvm in linux.vm_list:
        owned += _of_vm(kvm)
    for inode in gmem_inodes(m):
        for start, end, folio in inode.folios.held():
            if folio is not None:
                name = f"guest_memfd {inode.ino}"
                owned.append(Owned(start + folio.delta, end + folio.delta, name))
    for proc in linux.processes:
        for vma in proc.mm.vmas:
            if vma.ops is None:
                for start, end, delta in proc.mm.pages.held(vma.start, vma.end):
                    if delta is not None:
                        name = f"process {proc.pid}"
                        owned.append(Owned(start + delta, end + delta, name))
    owned += [
        Owned(start, end, "a last reference")
        for start, end, _ in linux.page_alloc.waiting.held()
    ]
    return sorted(owned)


def _of_vm(kvm: "Kvm") -> list[Owned]:
    """Pages that KVM and kvm_amd allocated for a VM and its vCPUs."""
    sev = sev_info(kvm)
    pages = {
        "context": sev.snp_context,
        "request page": sev.guest_req_buf,
        "response page": sev.guest_resp_buf,
    }
    pages |= {f"VMSA of vCPU {vcpu.vcpu_id}": vcpu.arch.svm.vmsa for vcpu in kvm.vcpus}
    return [
        Owned(pfn, pfn + 1, f"{what}, VM {kvm.id}")
        for what, pfn in pages.items()
        if pfn is not None
    ]
