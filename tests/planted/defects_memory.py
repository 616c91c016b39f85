"""Defects of KVM's memory: guest_memfd, memslots, attributes, the nested page table, references."""

from tests.planted.plant import Defect, Edit, Scene, Selftest

__all__ = ("MEMORY",)

KVM, MMU = "kernel.virt.kvm.", "kernel.arch.x86.kvm.mmu.mmu:"
INODE, FILE, PFN = KVM + "gmem_inode:", KVM + "guest_memfd:", KVM + "gmem_pfn:"
SLOTS, ATTRIBUTES = KVM + "memslots:", KVM + "mem_attributes:"
CONVERSIONS = "private_mem_conversions_test"
EXITS = "private_mem_kvm_exits_test"

MEMORY = (
    # Errors and their order
    Defect(
        "fallocate_unaligned_is_unsupported",
        "fallocate() of an unaligned range fails with EOPNOTSUPP instead of EINVAL",
        "kvm_gmem_fallocate()",
        (Edit(INODE + "kvm_gmem_fallocate", "KernelError(EINVAL,", "KernelError(EOPNOTSUPP,"),),
        Selftest("guest_memfd_test", "PUNCH_HOLE with !PAGE_SIZE offset"),
    ),
    Defect(
        "fallocate_grows_the_file",
        "fallocate() beyond the end of the file succeeds",
        "kvm_gmem_allocate()",
        (
            Edit(INODE + "kvm_gmem_allocate", "offset + length > inode.size", "False"),
            Edit(
                INODE + "kvm_gmem_allocate",
                "offset + length >> PAGE_SHIFT",
                "min(offset + length, inode.size) >> PAGE_SHIFT",
            ),
        ),
        Selftest("guest_memfd_test", "fallocate beginning at total_size should fail"),
    ),
    Defect(
        "punch_hole_ends_at_the_end",
        "PUNCH_HOLE behind the end of the file fails instead of doing nothing",
        "kvm_gmem_punch_hole()",
        (
            Edit(
                INODE + "kvm_gmem_punch_hole",
                "start = min(",
                'if offset >= inode.size:\n        raise KernelError(EINVAL, "")\n    start = min(',
            ),
        ),
        Selftest("guest_memfd_test", "fallocate(PUNCH_HOLE) at total_size should succeed"),
    ),
    Defect(
        "gmem_flags_are_not_looked_at",
        "KVM_CREATE_GUEST_MEMFD takes flags that do not exist",
        "kvm_gmem_create()",
        (Edit(FILE + "kvm_gmem_create", "flags & ~supported", "False"),),
        Selftest("guest_memfd_test", "guest_memfd() with flag '0x1' should fail with EINVAL"),
    ),
    Defect(
        "gmem_size_is_rounded",
        "KVM_CREATE_GUEST_MEMFD takes a size that is no multiple of a page",
        "kvm_gmem_create()",
        (Edit(FILE + "kvm_gmem_create", "or size & PAGE_MASK", ""),),
        Selftest("guest_memfd_test", "non-page-aligned page size '0x1'"),
        long=True,
    ),
    Defect(
        "gmem_inodes_share_a_number",
        "every guest_memfd has the same inode number",
        "__kvm_gmem_create()",
        (Edit(INODE + "GmemInode.__init__", "linux.next_ino += 1", "pass"),),
        Selftest("guest_memfd_test", "different memfd should have different inode numbers"),
    ),
    Defect(
        "prefault_without_a_memslot_is_efault",
        "KVM_PRE_FAULT_MEMORY of a GPA without a memslot fails with EFAULT instead of ENOENT",
        "kvm_tdp_map_page()",
        (Edit(MMU + "_pre_fault", "KernelError(ENOENT,", "KernelError(EFAULT,"),),
        Selftest("pre_fault_memory_test", "KVM_PRE_FAULT_MEMORY failed"),
    ),
    Defect(
        "prefault_does_not_say_how_far_it_came",
        "KVM_PRE_FAULT_MEMORY leaves the range as it was given",
        "kvm_vcpu_pre_fault_memory()",
        (
            Edit(
                MMU + "kvm_arch_vcpu_pre_fault_memory",
                "range_.gpa, range_.size = gpa, size",
                "pass",
            ),
        ),
        Selftest("pre_fault_memory_test", "expecting range.size to change on success"),
    ),
    Defect(
        "overlapping_memslots_are_taken",
        "a memslot may overlap another one",
        "kvm_set_memory_region()",
        (
            Edit(
                SLOTS + "_set_memory_region",
                "if any(s.id != new.id for s in slots.overlapping(new.base_gfn, new.end_gfn)):",
                "if False:",
            ),
        ),
        Scene("logging", "memslots_do_not_overlap"),
    ),
    # KVM_EXIT_MEMORY_FAULT
    Defect(
        "memory_fault_exit_is_not_private",
        "KVM_EXIT_MEMORY_FAULT does not say that the access was private",
        "kvm_prepare_memory_fault_exit()",
        (
            Edit(
                MMU + "kvm_prepare_memory_fault_exit",
                "MemoryExitFlag.PRIVATE if is_private else 0",
                "0",
            ),
        ),
        Selftest(EXITS, "memory_fault.flags"),
    ),
    Defect(
        "memory_fault_exit_tells_a_gfn",
        "KVM_EXIT_MEMORY_FAULT has the GFN where the GPA belongs",
        "kvm_prepare_memory_fault_exit()",
        (Edit(MMU + "kvm_prepare_memory_fault_exit", "gfn << PAGE_SHIFT", "gfn"),),
        Selftest(EXITS, "memory_fault.gpa"),
    ),
    # Zaps
    Defect(
        "conversion_does_not_zap",
        "setting attributes leaves what was mapped before",
        "kvm_pre_set_memory_attributes()",
        (
            Edit(
                ATTRIBUTES + "_pre_set",
                "flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)",
                "pass",
            ),
        ),
        Scene("memory", "leaf_kinds_follow_attributes"),
    ),
    Defect(
        "conversion_leaves_private_bytes_mapped",
        "as above, under a running guest: private data goes where the host reads it",
        "kvm_pre_set_memory_attributes()",
        (
            Edit(
                ATTRIBUTES + "_pre_set",
                "flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)",
                "pass",
            ),
        ),
        Selftest(CONVERSIONS, "Host expected 0x11"),
    ),
    Defect(
        "punch_hole_does_not_zap",
        "PUNCH_HOLE frees pages that the guest still has mapped",
        "kvm_gmem_invalidate_start()",
        (
            Edit(
                INODE + "kvm_gmem_invalidate_start_file",
                "flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)",
                "pass",
            ),
        ),
        Scene("memory", "nested_mappings_lead_to_allocated_pages"),
    ),
    Defect(
        "punch_hole_zaps_one_page_less",
        "PUNCH_HOLE leaves the last page of the range mapped",
        "kvm_gmem_invalidate_start()",
        (
            Edit(
                INODE + "kvm_gmem_invalidate_start_file",
                "kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)",
                "kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi - 1)",
            ),
        ),
        Scene("memory", "gmem_leaves_lead_to_their_folio"),
    ),
    Defect(
        "punch_hole_does_not_flush",
        "PUNCH_HOLE zaps leaves and leaves their translations in the processors",
        "kvm_gmem_invalidate_start()",
        (Edit(INODE + "kvm_gmem_invalidate_start_file", "if flush:", "if False:"),),
        Scene("memory", "zaps_are_flushed"),
    ),
    Defect(
        "deleted_memslot_stays_mapped",
        "deleting a memslot leaves its leaves",
        "kvm_arch_flush_shadow_memslot()",
        (
            Edit(
                SLOTS + "_invalidate",
                "flush = kvm_mmu_unmap_gfn_range(kvm, slot, slot.base_gfn, slot.end_gfn)",
                "flush = False",
            ),
        ),
        Scene("memory", "leaves_lie_in_memslots"),
    ),
    Defect(
        "munmap_is_not_noticed",
        "unmapping user memory leaves it mapped in the guest",
        "kvm_mmu_notifier_invalidate_range_start()",
        (
            Edit(
                KVM + "mmu_notifier:KvmMmuNotifier.invalidate_range_start",
                "flush |= kvm_mmu_unmap_gfn_range(kvm, slot, lo, hi)",
                "pass",
            ),
        ),
        Scene("memory", "shared_leaves_lead_to_the_users_page"),
    ),
    Defect(
        "logging_leaves_memory_writable",
        "switching the dirty log on does not write-protect what is mapped",
        "kvm_mmu_slot_apply_flags()",
        (
            Edit(
                SLOTS + "_change_flags",
                "kvm_mmu_write_protect(kvm, new, new.base_gfn, new.end_gfn)",
                "pass",
            ),
        ),
        Scene("logging", "writable_leaves_are_logged"),
    ),
    # Contents
    Defect(
        "page_is_not_zeroed",
        "a page that comes back to guest_memfd has the contents of before",
        "kvm_gmem_prepare_folio()",
        (
            Edit(
                PFN + "_prepare_folios",
                "inode.linux.page_alloc.clear_pages(run.pfn, run.npages)",
                "pass",
            ),
        ),
        Selftest(CONVERSIONS, "Guest expected 0x0"),
        long=True,
    ),
    # Books
    Defect(
        "invalidation_never_ends",
        "PUNCH_HOLE begins an invalidation and does not end it",
        "kvm_gmem_invalidate_end()",
        (
            Edit(
                INODE + "kvm_gmem_punch_hole",
                "yield from kvm_gmem_invalidate_end(inode, start, end)",
                "pass",
            ),
        ),
        Scene("memory", "nothing_is_under_way"),
    ),
    Defect(
        "folio_reference_is_leaked",
        "a fault keeps its reference to the page that it mapped",
        "kvm_mmu_finish_page_fault()",
        (Edit(MMU + "_direct_page_fault", "if found.gmem:", "if False:"),),
        Scene("memory", "page_references_are_exact"),
    ),
    Defect(
        "gmem_file_reference_is_leaked",
        "a fault keeps its reference to the guest_memfd",
        "kvm_gmem_get_pfn()",
        (Edit(PFN + "kvm_gmem_get_pfn", "kvm.linux.task_work.fput(file)", "pass"),),
        Scene("memory", "file_references_are_exact"),
    ),
    Defect(
        "gmem_release_leaks_the_vm",
        "closing a guest_memfd keeps its reference to the VM",
        "kvm_gmem_release()",
        (Edit(FILE + "kvm_gmem_release", "yield from kvm.put()", "pass"),),
        Scene("memory", "vm_references_are_exact"),
    ),
    Defect(
        "deleted_memslot_stays_bound",
        "deleting a memslot leaves its binding in the guest_memfd",
        "kvm_gmem_unbind()",
        (
            Edit(
                FILE + "_unbind",
                "gmem.bindings.set(slot.gmem_pgoff, slot.gmem_pgoff + slot.npages, None)",
                "pass",
            ),
        ),
        Scene("memory", "bindings_agree"),
    ),
    Defect(
        "deleted_memslot_stays_counted",
        "deleting a memslot leaves its pages in nr_memslot_pages",
        "kvm_commit_memory_region()",
        (Edit(SLOTS + "_delete", "kvm.nr_memslot_pages -= old.npages", "pass"),),
        Scene("memory", "memslots_do_not_overlap"),
    ),
    Defect(
        "strangers_may_use_a_vm",
        "a VM answers the ioctls of a process that did not create it",
        "kvm_vm_ioctl()",
        (Edit("uapi.vm:check_usable", "kvm.mm is not proc.mm", "False"),),
        Scene("launch", "strangers_and_the_dead_get_eio"),
    ),
)
