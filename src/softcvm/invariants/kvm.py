"""What holds of KVM's own books: leaves, memslots, bindings, references, ASIDs.  Linux v7.2.

kernel.py asks whether page frames and the RMP agree with them; here they are held against each other and
against what user space can still reach (owners.py).  Sentences walk runs, slots and files, never pages.
"""

from collections.abc import Iterator
from errno import EIO
from itertools import pairwise
from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KVM_MEMORY_ATTRIBUTE_PRIVATE, MemFlag, VmType
from softcvm.hw.npt import Mapping
from softcvm.hw.rmp import ASID_MASK, ASID_SHIFT, ASSIGNED, VALIDATED
from softcvm.invariants.owners import gmem_files, open_files
from softcvm.invariants.registry import Checking, Violation, always, always_on
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info, sev_snp_guest
from softcvm.kernel.arch.x86.kvm.svm.svm import SvmOps
from softcvm.kernel.errors import KernelError
from softcvm.kernel.host import KvmBug, Warn
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.kernel.virt.kvm.gmem_inode import GmemFile
from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu
from softcvm.sim.addr import PAGE_SHIFT, PgLevel, pages_per_level
from softcvm.sim.steps import run
from softcvm.uapi.vcpu import kvm_vcpu_ioctl
from softcvm.uapi.vm import kvm_vm_ioctl

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot
    from softcvm.machine import Machine

__all__ = ()

_MISMANAGED = frozenset(
    {"kvm_mmu_invalidate_end", "mmu_invalidate_retry_gfn", "kvm_destroy_vm", "kvm_gmem_get_pfn"}
)
"""Where Linux warns that its own invalidations or bindings do not agree."""


class _Piece:
    """Part of a leaf inside one memslot and of one attribute: gfn + i maps to pfn + i."""

    __slots__ = ("gfn", "npages", "pfn", "private", "slot")

    def __init__(
        self, gfn: int, npages: int, pfn: int, *, private: bool, slot: "KvmMemorySlot | None"
    ) -> None:
        self.gfn, self.npages, self.pfn = gfn, npages, pfn
        self.private, self.slot = private, slot


def _pieces(kvm: Kvm) -> Iterator[_Piece]:
    """All that a VM maps, cut where slots or attributes change."""
    for leaf in kvm.arch.npt.mappings():
        yield from _pieces_of(kvm, leaf)


def _pieces_of(kvm: Kvm, leaf: Mapping) -> Iterator[_Piece]:
    end = leaf.gfn + leaf.npages
    for first, last, attributes in kvm.mem_attr.runs(leaf.gfn, end):
        private = bool(attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE)
        at = first
        for slot in kvm.memslots[0].overlapping(first, last):
            if at < slot.base_gfn:
                hole = slot.base_gfn - at
                yield _Piece(at, hole, leaf.pfn + at - leaf.gfn, private=private, slot=None)
                at = slot.base_gfn
            stop = min(last, slot.end_gfn)
            yield _Piece(at, stop - at, leaf.pfn + at - leaf.gfn, private=private, slot=slot)
            at = stop
        if at < last:
            yield _Piece(at, last - at, leaf.pfn + at - leaf.gfn, private=private, slot=None)


def _folios(piece: _Piece) -> Iterator[tuple[int, int, int | None]]:
    """(first gfn, pages, pfn or None) of what the slot's guest_memfd has where a piece is mapped."""
    slot = piece.slot
    if slot is None or slot.gmem_file is None:
        return
    to_gfn = slot.base_gfn - slot.gmem_pgoff
    start = piece.gfn - to_gfn
    for first, last, folio in slot.gmem_file.inode.folios.runs(start, start + piece.npages):
        pfn = None if folio is None else first + folio.delta
        yield first + to_gfn, last - first, pfn


@always(
    "a leaf lies inside a memslot that is not being deleted",
    source="virt/kvm/kvm_main.c kvm_invalidate_memslot(); arch/x86/kvm/mmu/mmu.c kvm_faultin_pfn(), v7.2",
    whole_machine=True,
)
def leaves_lie_in_memslots(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for piece in _pieces(kvm):
            looked_at += 1
            if piece.slot is None or piece.slot.invalid:
                why = (
                    f"VM {kvm.id} maps GFN {piece.gfn:#x} + {piece.npages:#x} without a memslot"
                )
                yield Violation(piece.pfn, why)
    return looked_at


@always(
    "memory is mapped private exactly where its attribute says private",
    source="arch/x86/kvm/mmu/mmu.c kvm_faultin_pfn(); virt/kvm/kvm_main.c kvm_vm_set_mem_attributes(), v7.2",
    whole_machine=True,
)
def leaf_kinds_follow_attributes(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        if not kvm.arch.has_private_mem:
            continue
        for piece in _pieces(kvm):
            looked_at += 1
            slot = piece.slot
            if slot is None or slot.gmem_only:
                continue
            frames = slot.gmem_file.inode.folios.held() if slot.gmem_file else []
            in_gmem = any(
                folio is not None
                and first + folio.delta < piece.pfn + piece.npages
                and piece.pfn < last + folio.delta
                for first, last, folio in frames
            )
            if in_gmem and not piece.private:
                why = f"VM {kvm.id} maps GFN {piece.gfn:#x}, which is shared, into guest_memfd"
                yield Violation(piece.pfn, why)
            if piece.private and not in_gmem:
                why = (
                    f"VM {kvm.id} maps GFN {piece.gfn:#x}, which is private, out of guest_memfd"
                )
                yield Violation(piece.pfn, why)
    return looked_at


@always(
    "private memory is mapped only where the memslot has a guest_memfd that is open",
    source="arch/x86/kvm/mmu/mmu.c kvm_mmu_faultin_pfn_gmem(); virt/kvm/guest_memfd.c kvm_gmem_release(), v7.2",
    whole_machine=True,
)
def private_leaves_have_a_guest_memfd(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for piece in _pieces(kvm):
            if not piece.private or piece.slot is None:
                continue
            looked_at += 1
            if not piece.slot.can_be_private or piece.slot.gmem_file is None:
                why = f"VM {kvm.id}: private GFN {piece.gfn:#x}, slot {piece.slot.key:#x}"
                yield Violation(piece.pfn, why)
    return looked_at


@always(
    "a leaf into guest_memfd leads to the folio that the file has there now",
    source="virt/kvm/guest_memfd.c kvm_gmem_get_pfn(), kvm_gmem_punch_hole(), v7.2",
    whole_machine=True,
)
def gmem_leaves_lead_to_their_folio(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for piece in _pieces(kvm):
            if piece.slot is None or not (piece.private or piece.slot.gmem_only):
                continue
            for gfn, npages, pfn in _folios(piece):
                looked_at += 1
                mapped = piece.pfn + gfn - piece.gfn
                if pfn != mapped:
                    has = "nothing" if pfn is None else f"PFN {pfn:#x}"
                    why = f"VM {kvm.id} maps GFN {gfn:#x} + {npages:#x}, the file has {has}"
                    yield Violation(mapped, why)
    return looked_at


@always(
    "a shared leaf leads to the page that the process has behind the memslot's address",
    source="arch/x86/kvm/mmu/mmu.c __kvm_mmu_faultin_pfn(); mmu_notifier invalidation, v7.2",
    whole_machine=True,
)
def shared_leaves_lead_to_the_users_page(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for piece in _pieces(kvm):
            slot = piece.slot
            if slot is None or piece.private or slot.gmem_only:
                continue
            start = slot.hva(piece.gfn) >> PAGE_SHIFT
            for first, _, delta in kvm.mm.pages.runs(start, start + piece.npages):
                looked_at += 1
                mapped = piece.pfn + first - start
                if delta is None or first + delta != mapped:
                    has = "nothing" if delta is None else f"PFN {first + delta:#x}"
                    gfn = piece.gfn + first - start
                    yield Violation(
                        mapped, f"VM {kvm.id} maps GFN {gfn:#x}, the process has {has}"
                    )
    return looked_at


@always(
    "no huge leaf covers memory of both kinds",
    source="virt/kvm/kvm_main.c; arch/x86/kvm/mmu/mmu.c kvm_arch_post_set_memory_attributes(), v7.2",
    whole_machine=True,
)
def huge_leaves_are_of_one_kind(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for leaf in kvm.arch.npt.mappings():
            if leaf.level == PgLevel.PG_4K:
                continue
            size = pages_per_level(leaf.level)
            if leaf.gfn % size or leaf.npages % size:
                yield Violation(leaf.pfn, f"VM {kvm.id}: half a leaf at GFN {leaf.gfn:#x}")
            for first, last, _ in kvm.mem_attr.runs(leaf.gfn, leaf.gfn + leaf.npages):
                for gfn in {first, last - 1}:
                    looked_at += 1
                    base = gfn - gfn % size
                    if not kvm.mem_attr.uniform(base, base + size):
                        yield Violation(leaf.pfn, f"VM {kvm.id}: GFN {gfn:#x} is mixed")
    return looked_at


@always(
    "a page of a logging memslot that can be written without a fault is in the dirty log",
    source="arch/x86/kvm/mmu/spte.c make_spte(), mmu.c kvm_arch_mmu_enable_log_dirty_pt_masked(), v7.2",
    whole_machine=True,
)
def writable_leaves_are_logged(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for slot in kvm.memslots[0].all():
            if slot.dirty_bitmap is None:
                continue
            for leaf in kvm.arch.npt.mappings(slot.base_gfn, slot.end_gfn):
                looked_at += 1
                first = leaf.gfn - slot.base_gfn
                for s, _, dirty in slot.dirty_bitmap.runs(first, first + leaf.npages):
                    if leaf.writable and not dirty:
                        why = f"VM {kvm.id}: GFN {slot.base_gfn + s:#x} is writable and clean"
                        yield Violation(leaf.pfn + s - first, why)
    return looked_at


@always(
    "no leaf of a read-only memslot can be written",
    source="arch/x86/kvm/mmu/mmu.c; Documentation/virt/kvm/api.rst KVM_MEM_READONLY, v7.2",
    whole_machine=True,
)
def readonly_slots_have_readonly_leaves(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for slot in kvm.memslots[0].all():
            if slot.flags & MemFlag.READONLY:
                for leaf in kvm.arch.npt.mappings(slot.base_gfn, slot.end_gfn):
                    looked_at += 1
                    if leaf.writable:
                        yield Violation(leaf.pfn, f"VM {kvm.id}: GFN {leaf.gfn:#x}")
    return looked_at


@always(
    "before LAUNCH_FINISH an SNP guest has no pages but those that firmware measured, and none is mapped private",
    source="arch/x86/kvm/svm/sev.c snp_launch_finish(), pre_fault_allowed, v7.2",
    whole_machine=True,
)
def nothing_is_prepared_before_the_launch_is_over(m: "Machine") -> Checking:
    looked_at = 0
    launching: dict[int, Kvm] = {}
    for kvm in m.linux.vm_list:
        if kvm.arch.vm_type is not VmType.SNP or kvm.arch.pre_fault_allowed:
            continue
        if sev_snp_guest(kvm):
            launching[int(sev_info(kvm).asid)] = kvm
        for piece in _pieces(kvm):
            looked_at += 1
            if piece.private:
                yield Violation(piece.pfn, f"VM {kvm.id} maps private GFN {piece.gfn:#x}")
    if launching:
        for start, _, (attrs, _) in m.soc.rmp.map.held(0, m.soc.memory_pages):
            owner = launching.get((attrs & ASID_MASK) >> ASID_SHIFT)
            if attrs & ASSIGNED and owner is not None:
                looked_at += 1
                if not attrs & VALIDATED:
                    yield Violation(start, f"VM {owner.id} has it unmeasured, raw {attrs:#x}")
    return looked_at


@always(
    "a file's bindings are its memslots, each index bound once, and every memslot finds itself there",
    source="virt/kvm/guest_memfd.c kvm_gmem_bind(), kvm_gmem_unbind(), kvm_gmem_release(), v7.2",
    whole_machine=True,
)
def bindings_agree(m: "Machine") -> Checking:
    looked_at = 0
    files = gmem_files(m)
    for gmem in files:
        live = {slot.key: slot for space in gmem.kvm.memslots for slot in space.all()}
        bound: dict[int, int] = {}
        for first, last, key in gmem.bindings.held():
            looked_at += 1
            slot = live.get(-1 if key is None else key)
            if slot is None or slot.gmem_file is not gmem:
                yield Violation(-1, f"index {first:#x} is bound to slot {key}, which is not")
                continue
            bound[slot.key] = bound.get(slot.key, 0) + last - first
            if not slot.gmem_pgoff <= first < last <= slot.gmem_pgoff + slot.npages:
                yield Violation(-1, f"index {first:#x} is not the range of slot {key}")
        mine = {key: slot.npages for key, slot in live.items() if slot.gmem_file is gmem}
        if bound != mine:
            yield Violation(-1, f"inode {gmem.inode.ino}: bound {bound}, slots {mine}")
    for kvm in m.linux.vm_list:
        for slot in (slot for space in kvm.memslots for slot in space.all()):
            looked_at += 1
            if slot.gmem_file is not None and slot.gmem_file not in files:
                yield Violation(-1, f"VM {kvm.id}: slot {slot.key:#x} has a file nobody has")
    return looked_at


@always(
    "memslots of an address space do not overlap, and all pages of slots are counted",
    source="virt/kvm/kvm_main.c kvm_set_memory_region(), v7.2",
    whole_machine=True,
)
def memslots_do_not_overlap(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        pages = 0
        for space in kvm.memslots:
            slots = space.all()
            looked_at += len(slots)
            pages += sum(slot.npages for slot in slots)
            if {slot.id: slot for slot in slots} != space.by_id:
                yield Violation(-1, f"VM {kvm.id}: slots by id are not slots by address")
            for one, next_ in pairwise(slots):
                if one.end_gfn > next_.base_gfn:
                    yield Violation(-1, f"VM {kvm.id}: slots {one.id} and {next_.id}")
        if pages != kvm.nr_memslot_pages:
            yield Violation(-1, f"VM {kvm.id} counts {kvm.nr_memslot_pages} pages of {pages}")
    return looked_at


@always(
    "a VM lives as long as a file of it is open, its own, its vCPUs', its guest_memfds', or a mirror lives",
    source="virt/kvm/kvm_main.c kvm_get_kvm(), kvm_put_kvm(); guest_memfd.c kvm_gmem_release(), v7.2",
    whole_machine=True,
)
def vm_references_are_exact(m: "Machine") -> Checking:
    counted = {id(kvm): 0 for kvm in m.linux.vm_list}
    looked_at = 0
    for file, _ in open_files(m):
        match file.private:
            case Kvm() as kvm:
                pass
            case KvmVcpu(kvm=kvm) | GmemFile(kvm=kvm):
                pass
            case _:
                continue
        looked_at += 1
        if id(kvm) not in counted:
            yield Violation(-1, f"an open {file.kind.value} file of VM {kvm.id}, which is gone")
        counted[id(kvm)] = counted.get(id(kvm), 0) + 1
    for kvm in m.linux.vm_list:
        owner = sev_info(kvm).enc_context_owner
        if owner is not None and id(owner) in counted:
            counted[id(owner)] += 1
    for kvm in m.linux.vm_list:
        have, want = kvm.users_count, counted[id(kvm)]
        if have != want or not want:
            why = f"VM {kvm.id} counts {have} references, {want} files and mirrors there are"
            yield Violation(-1, why)
    return looked_at


@always(
    "a file is referenced once by each descriptor and each mapping, and by nobody else",
    source="fs/file_table.c fput(); include/linux/fs.h get_file(), v7.2",
    whole_machine=True,
)
def file_references_are_exact(m: "Machine") -> Checking:
    opened = open_files(m)
    for file, references in opened:
        if file.refcount != references:
            why = f"a {file.kind.value} file counts {file.refcount} references of {references}"
            yield Violation(-1, why)
    return len(opened)


@always(
    "an ASID is in use while one VM holds it, and is given out again only after a flush",
    source="arch/x86/kvm/svm/sev.c sev_asid_new(), sev_asid_free(), __sev_recycle_asids(), v7.2",
    whole_machine=True,
)
def asids_have_one_holder(m: "Machine") -> Checking:
    ops = m.linux.kvm_x86_ops
    if not isinstance(ops, SvmOps):
        return 0
    used, reclaim = ops.asids.used, ops.asids.reclaim
    held: dict[int, int] = {}
    for kvm in m.linux.vm_list:
        sev = sev_info(kvm)
        if not sev.active:
            if sev.asid:
                yield Violation(-1, f"VM {kvm.id} is not SEV and has ASID {sev.asid}")
            continue
        if sev.enc_context_owner is not None:
            continue  # the owner's: mirrors_agree()
        if sev.asid in held:
            yield Violation(-1, f"VMs {held[sev.asid]} and {kvm.id} have ASID {sev.asid}")
        held[sev.asid] = kvm.id
    if not reclaim <= used:
        yield Violation(-1, f"ASIDs {sorted(reclaim - used)} wait for a flush but are free")
    # What firmware does not let go of is lost: sev_vm_destroy() returns without sev_asid_free().
    lost = m.soc.psp.asids.allocated.keys() | m.soc.psp.asids.in_use.keys()
    unheld = used - reclaim - held.keys() - lost
    if unheld or held.keys() - (used - reclaim):
        why = f"ASIDs in use {sorted(used - reclaim)}, held by VMs {sorted(held)}"
        yield Violation(-1, why)
    return len(used)


@always(
    "an ASID that is dirty in a cache is not free to be given out",
    source="arch/x86/kvm/svm/sev.c sev_asid_free(), __sev_recycle_asids(), sev_flush_asids(), v7.2",
    whole_machine=True,
)
def dirty_asids_wait_for_a_flush(m: "Machine") -> Checking:
    ops = m.linux.kvm_x86_ops
    if not isinstance(ops, SvmOps):
        return 0
    dirty = m.soc.psp.asids.dirty.keys()
    free = sorted(dirty - ops.asids.used)
    if free:
        yield Violation(-1, f"ASIDs {free} are dirty and free")
    return len(dirty)


@always(
    "mirrors and owners know each other, share an ASID, and only an owner has mirrors",
    source="arch/x86/kvm/svm/sev.c sev_vm_copy_enc_context_from(), sev_migrate_from(), v7.2",
    whole_machine=True,
)
def mirrors_agree(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        sev = sev_info(kvm)
        if sev.migration_in_progress:
            yield Violation(-1, f"VM {kvm.id} is in a migration that is over")
        for mirror in sev.mirror_vms:
            looked_at += 1
            if sev_info(mirror).enc_context_owner is not kvm or mirror not in m.linux.vm_list:
                yield Violation(-1, f"VM {mirror.id} is no mirror of VM {kvm.id}")
        owner = sev.enc_context_owner
        if owner is None:
            continue
        looked_at += 1
        if sev_info(owner).mirror_vms.count(kvm) != 1:
            yield Violation(-1, f"VM {owner.id} does not know its mirror {kvm.id}")
        if sev_info(owner).asid != sev.asid or sev.mirror_vms:
            yield Violation(-1, f"mirror {kvm.id}: ASID {sev.asid}, mirrors {sev.mirror_vms}")
    return looked_at


@always(
    "a dead VM, and a VM of another address space, answers EIO to every ioctl",
    source="virt/kvm/kvm_main.c kvm_vm_ioctl(), kvm_vcpu_ioctl(), v7.2; asked by asking",
    whole_machine=True,
)
def strangers_and_the_dead_get_eio(m: "Machine") -> Checking:
    looked_at = 0
    for kvm in m.linux.vm_list:
        for proc in m.linux.processes:
            if proc.mm is kvm.mm and not kvm.vm_dead:
                continue
            looked_at += 1 + len(kvm.vcpus)
            for what, errno in _asked(kvm, proc):
                if errno != EIO:
                    yield Violation(-1, f"VM {kvm.id}, process {proc.pid}: {what} gave {errno}")
    return looked_at


def _asked(kvm: Kvm, proc: "Process") -> Iterator[tuple[str, int]]:
    """Harmless ioctls, and how they end."""
    nothing = UserPtr(proc.mm, 0)
    try:
        run(kvm_vm_ioctl(kvm, proc, k.KVM_CHECK_EXTENSION, k.KVM_CAP_USER_MEMORY, nothing))
        yield "KVM_CHECK_EXTENSION", 0
    except KernelError as error:
        yield "KVM_CHECK_EXTENSION", error.errno
    for vcpu in kvm.vcpus:
        try:
            run(kvm_vcpu_ioctl(vcpu, proc, k.KVM_GET_REGS, 0, nothing))
            yield f"KVM_GET_REGS of vCPU {vcpu.vcpu_id}", 0
        except KernelError as error:
            yield f"KVM_GET_REGS of vCPU {vcpu.vcpu_id}", error.errno


@always_on(
    Warn,
    "every invalidation that begins ends once, over the memslots it began with",
    source="virt/kvm/kvm_main.c kvm_mmu_invalidate_end(), kvm_destroy_vm(); guest_memfd.c, v7.2",
)
def no_warning_about_own_books(event: Warn) -> Iterator[Violation]:
    if event.where in _MISMANAGED:
        yield Violation(-1, f"{event.where}: {event.why}")


@always_on(
    KvmBug,
    "no VM is killed by KVM for a mistake of its own in the invalidation count",
    source="virt/kvm/kvm_main.c kvm_mmu_invalidate_end() KVM_BUG_ON, v7.2",
)
def no_bug_in_the_invalidation_count(event: KvmBug) -> Iterator[Violation]:
    if "mmu_invalidate" in event.why:
        yield Violation(-1, f"VM {event.vm}: {event.why}")
