"""Defects of SEV in Linux: initialisation, launch, ASIDs, migration, pinned memory, the RMP and its pages."""

from tests.planted.plant import Defect, Edit, Scene, Selftest

__all__ = ("SEV",)

SVM, RMP = "kernel.arch.x86.kvm.svm.", "kernel.arch.x86.virt.svm.sev:"
CORE, GMEM, LAUNCH = SVM + "sev:", SVM + "gmem:", SVM + "launch:"
OLD_LAUNCH, MIGRATE, REGIONS = SVM + "sev_launch:", SVM + "sev_migrate:", SVM + "sev_regions:"
ASIDS, VMSA = SVM + "asid:SevAsids.", SVM + "vmsa:"
FIRMWARE_PAGES = "kernel.drivers.crypto.ccp.firmware_pages:"
INIT2, MOVES, SMOKE = "sev_init2_tests", "sev_migrate_tests", "sev_smoke_test"

SEV = (
    # Initialisation
    Defect(
        "init2_takes_any_flag",
        "KVM_SEV_INIT2 takes flags that do not exist",
        "__sev_guest_init()",
        (Edit(CORE + "_check_init", "if data.flags:", "if False:"),),
        Selftest(INIT2, "KVM_SEV_INIT2 should fail, invalid flag"),
    ),
    Defect(
        "init2_gives_features_to_plain_sev",
        "KVM_SEV_INIT2 gives a guest without VMSA the features of one",
        "__sev_guest_init()",
        (
            Edit(
                CORE + "_check_init",
                "supported_vmsa_features(kvm.linux) if es_active else 0",
                "supported_vmsa_features(kvm.linux)",
            ),
        ),
        Selftest(INIT2, "KVM_SEV_INIT2 should fail, unknown feature"),
    ),
    Defect(
        "init2_takes_any_vm",
        "KVM_SEV_INIT2 turns a VM of another type into a SEV guest",
        "sev_guest_init2()",
        (
            Edit(
                CORE + "_sev_guest_init2",
                "if not sev_info(kvm).need_init:",
                "if False:",
            ),
        ),
        Selftest(INIT2, "KVM_SEV_INIT2 should fail, VM type is KVM_X86_DEFAULT_VM"),
        long=True,
    ),
    Defect(
        "es_init_makes_plain_sev",
        "KVM_SEV_ES_INIT makes a guest without encrypted state",
        "sev_guest_init()",
        (Edit(CORE + "_sev_guest_init", "vm_type = VmType.SEV_ES", "pass"),),
        Selftest(MOVES, "KVM_SEV_ES_INIT failed"),
    ),
    # Moving and mirroring
    Defect(
        "moved_vm_is_not_dead",
        "the source of a migration lives on",
        "sev_vm_move_enc_context_from()",
        (Edit(MIGRATE + "sev_vm_move_enc_context_from", "source.vm_dead = True", "pass"),),
        Selftest(MOVES, "VM that was migrated from should be dead"),
    ),
    Defect(
        "move_does_not_count_vcpus",
        "a SEV-ES guest moves to a VM with fewer vCPUs",
        "sev_check_source_vcpus()",
        (
            Edit(
                MIGRATE + "_check_source_vcpus",
                "if src.online_vcpus != dst.online_vcpus:",
                "if False:",
            ),
            Edit(MIGRATE + "_migrate_from", "strict=True", "strict=False"),
        ),
        Selftest(MOVES, "SEV-ES migrations require same number of vCPUS"),
        long=True,
    ),
    Defect(
        "move_leaves_the_flag",
        "a migration is never over for its destination",
        "sev_unlock_two_vms()",
        (
            Edit(
                MIGRATE + "_unlock_two_vms",
                "sev_info(dst).migration_in_progress = False",
                "pass",
            ),
        ),
        Selftest(MOVES, "Migration failed, ret: -1, errno: 16"),
    ),
    Defect(
        "mirror_may_do_all",
        "a mirror may launch the guest of its owner",
        "sev_mem_enc_ioctl()",
        (
            Edit(
                CORE + "sev_mem_enc_ioctl",
                "is_mirroring_enc_context(kvm) and cmd.id not in _ALLOWED_FROM_MIRROR",
                "False",
            ),
        ),
        Selftest(MOVES, "Should not be able call command"),
        long=True,
    ),
    Defect(
        "mirror_of_itself",
        "a VM may be its own mirror",
        "sev_lock_two_vms()",
        (Edit(MIGRATE + "_lock_two_vms", "KernelError(EINVAL,", "KernelError(EBUSY,"),),
        Selftest(MOVES, "Should not be able copy context to self"),
        long=True,
    ),
    Defect(
        "mirror_leaks_its_owner",
        "a mirror that goes keeps its reference to the owner",
        "sev_vm_destroy()",
        (Edit(CORE + "_drop_mirror", "yield from owner.put()", "yield from ()"),),
        Scene("sev", "vm_references_are_exact"),
    ),
    Defect(
        "move_forgets_the_mirrors_owner",
        "after a migration the mirrors still point to the source",
        "sev_migrate_from()",
        (
            Edit(
                MIGRATE + "_migrate_from",
                "sev_info(mirror).enc_context_owner = dst_kvm.get()",
                "dst_kvm.get()",
            ),
        ),
        Scene("sev", "mirrors_agree"),
    ),
    # Launch of SEV and SEV-ES
    Defect(
        "vmsa_without_fpu",
        "the measured VMSA has no FPU state",
        "sev_es_sync_vmsa()",
        (Edit(VMSA + "vmsa_image", "sync_fpu(save, vcpu.arch.fpu)", "pass"),),
        Selftest(SMOKE, "mismatch at"),
    ),
    Defect(
        "termination_without_a_reason",
        "KVM_SYSTEM_EVENT_SEV_TERM comes without the GHCB MSR",
        "sev_handle_vmgexit_msr_protocol()",
        (
            Edit(
                SVM + "ghcb:_terminate",
                "run.system_event_ndata = 1",
                "run.system_event_ndata = 0",
            ),
        ),
        Selftest(SMOKE, "system_event.ndata"),
    ),
    Defect(
        "launch_finish_is_forgotten",
        "KVM_SEV_LAUNCH_FINISH succeeds without asking firmware",
        "sev_launch_finish()",
        (
            Edit(
                OLD_LAUNCH + "sev_launch_finish",
                "yield from sev_issue_cmd(kvm, proc, sev.fd, SevCmd.LAUNCH_FINISH, data, cmd)",
                "yield from ()",
            ),
        ),
        Selftest(SMOKE, "status.state"),
    ),
    # Pinned memory
    Defect(
        "unpinning_is_not_counted",
        "pages that are unpinned still count towards RLIMIT_MEMLOCK",
        "sev_unpin_memory()",
        (
            Edit(
                REGIONS + "sev_unpin_memory",
                "sev_info(kvm).pages_locked -= sum(count for _, count in runs)",
                "pass",
            ),
        ),
        Scene("sev", "page_references_are_exact"),
    ),
    Defect(
        "region_stays_pinned",
        "the pages of an unregistered region stay pinned",
        "__unregister_enc_region_locked()",
        (
            Edit(
                REGIONS + "sev_unpin_memory",
                "kvm.linux.page_alloc.put_pages(pfn, count)",
                "pass",
            ),
        ),
        Scene("sev", "page_references_are_exact"),
    ),
    # ASIDs
    Defect(
        "freed_asid_is_free_at_once",
        "an ASID is given out again before caches and firmware were flushed",
        "sev_asid_free()",
        (Edit(ASIDS + "free", "self.reclaim.add(asid)", "self.used.discard(asid)"),),
        Scene("launch", "dirty_asids_wait_for_a_flush"),
    ),
    Defect(
        "asids_are_recycled_without_a_flush",
        "ASIDs become free again without WBINVD and DF_FLUSH",
        "__sev_recycle_asids()",
        (
            Edit(
                ASIDS + "_recycle",
                "yield from sev_do_cmd(",
                "yield from () if True else sev_do_cmd(",
            ),
        ),
        Scene("asids", "calls_end_as_they_should"),
    ),
    Defect(
        "asid_is_leaked",
        "a VM keeps its ASID beyond its end",
        "sev_vm_destroy()",
        (Edit(CORE + "sev_vm_destroy", "yield from asids.free(sev.asid)", "pass"),),
        Scene("launch", "asids_have_one_holder"),
    ),
    # The RMP
    Defect(
        "freed_page_stays_the_guests",
        "guest_memfd frees pages that are still assigned in the RMP",
        "sev_gmem_invalidate()",
        (
            Edit(
                GMEM + "sev_gmem_invalidate",
                "_make_shared(linux, run.start, PgLevel.PG_4K, run.end - run.start)",
                "pass",
            ),
        ),
        Scene("launch", "free_pages_are_the_hypervisors"),
    ),
    Defect(
        "freed_2m_entry_is_not_smashed",
        "freeing part of a 2M page leaves its 2M entry",
        "sev_gmem_invalidate()",
        (
            Edit(
                GMEM + "_invalidate_2m",
                "status = snp_rmptable_psmash(linux, pfn)",
                "status = PsmashStatus.SUCCESS",
            ),
        ),
        Scene("boot", "calls_end_as_they_should"),
    ),
    Defect(
        "page_of_another_asid",
        "a page is assigned to the ASID after the guest's own",
        "sev_gmem_prepare()",
        (Edit(GMEM + "_make_private", "level, sev.asid,", "level, sev.asid + 1,"),),
        Scene("launch", "nested_mappings_lead_to_own_pages"),
    ),
    Defect(
        "page_at_another_gpa",
        "a page is bound to the GPA after its own",
        "sev_gmem_prepare()",
        (Edit(GMEM + "_make_private", "gfn_to_gpa(gfn), level", "gfn_to_gpa(gfn + 1), level"),),
        Scene("launch", "nested_mappings_lead_to_pages_bound_there"),
    ),
    Defect(
        "prepared_page_is_immutable",
        "a page that is faulted in becomes immutable, which only firmware can undo",
        "sev_gmem_prepare()",
        (Edit(GMEM + "_make_private", "immutable=False", "immutable=True"),),
        Scene("launch", "no_page_stays_pre_guest"),
    ),
    Defect(
        "private_page_is_not_assigned",
        "a private page is mapped that the RMP still has as the hypervisor's",
        "sev_gmem_prepare()",
        (Edit(GMEM + "sev_gmem_prepare", "if not run.assigned:", "if False:"),),
        Scene("launch", "private_leaves_are_assigned"),
    ),
    Defect(
        "level_of_the_rmp_is_ignored",
        "a 2M leaf is mapped over pages that the RMP holds as 4K",
        "sev_gmem_max_mapping_level()",
        (
            Edit(
                GMEM + "sev_gmem_max_mapping_level",
                "return found.level if found.assigned else PgLevel.PG_4K",
                "return PgLevel.PG_2M",
            ),
            Edit(
                GMEM + "sev_gmem_mapping_run",
                "if not is_private or not sev_snp_guest(kvm):",
                "if True:",
            ),
        ),
        Scene("boot", "calls_end_as_they_should"),
    ),
    Defect(
        "rmp_fault_is_not_resolved",
        "a fault for the page size of the RMP is answered without PSMASH",
        "sev_handle_rmp_fault()",
        (
            Edit(
                GMEM + "_resolve_rmp_fault",
                "status = snp_rmptable_psmash(linux, pfn)",
                "raise RmpError(EINVAL, 'no PSMASH')",
            ),
        ),
        Scene("boot", "guest_passed_its_own_checks"),
    ),
    Defect(
        "direct_map_is_left_whole",
        "the kernel's large mappings hold guests' pages beside its own",
        "adjust_direct_map()",
        (
            Edit(
                RMP + "_rmpupdate",
                "linux.snp.direct_map.adjust(pfn, level, valid)",
                "pass",
            ),
        ),
        Scene("launch", "calls_end_as_they_should"),
    ),
    # Launch of SNP
    Defect(
        "refused_launch_page_is_not_reclaimed",
        "a page that firmware refused to measure stays Pre-Guest",
        "sev_gmem_post_populate()",
        (
            Edit(
                LAUNCH + "sev_gmem_post_populate",
                "yield from snp_launch_update_revert(kvm, pfn, args)",
                "pass",
            ),
        ),
        Scene("launch", "no_page_stays_pre_guest"),
    ),
    Defect(
        "refused_launch_page_stays_assigned",
        "a page that firmware refused to measure is reclaimed and never given back",
        "snp_page_reclaim()",
        (
            Edit(
                CORE + "snp_page_reclaim",
                "kvm_rmp_make_shared(kvm, pfn, PgLevel.PG_4K)",
                "pass",
            ),
        ),
        Scene("launch", "nothing_is_prepared_before_the_launch_is_over"),
    ),
    Defect(
        "prefault_before_the_launch_is_over",
        "private memory may be faulted in while the guest is being measured",
        "kvm_arch_vcpu_pre_fault_memory()",
        (
            Edit(
                "kernel.arch.x86.kvm.mmu.mmu:_pre_fault",
                "if not kvm.arch.pre_fault_allowed:",
                "if False:",
            ),
        ),
        Scene("launch", "nothing_is_prepared_before_the_launch_is_over"),
    ),
    Defect(
        "vmsas_are_measured_backwards",
        "the VMSAs of the vCPUs are measured in the wrong order",
        "snp_launch_update_vmsa()",
        (
            Edit(
                LAUNCH + "_snp_launch_update_vmsa",
                "for vcpu in kvm.vcpus:\n            yield from _measure_vmsa",
                "for vcpu in kvm.vcpus[::-1]:\n            yield from _measure_vmsa",
            ),
        ),
        Scene("boot", "launch_digest_is_the_predicted_one"),
    ),
    Defect(
        "cpuid_page_is_measured_as_data",
        "the CPUID page is handed to firmware as an ordinary page",
        "sev_gmem_post_populate()",
        (
            Edit(
                LAUNCH + "sev_gmem_post_populate",
                "page_type=args.type",
                "page_type=1 if args.type is LaunchPageType.CPUID else args.type",
            ),
        ),
        Scene("boot", "launch_digest_is_the_predicted_one"),
    ),
    Defect(
        "launch_page_without_contents",
        "launch pages are measured as they were found, their contents left out",
        "sev_gmem_post_populate()",
        (
            Edit(
                LAUNCH + "sev_gmem_post_populate",
                "linux.soc.host_write(pfn_to_spa(pfn), contents, linux.snp.direct_map.level(pfn))",
                "pass",
            ),
        ),
        Scene("boot", "launch_digest_is_the_predicted_one"),
    ),
    # Teardown
    Defect(
        "vmsa_page_stays_the_guests",
        "the page of a vCPU's registers is freed while the RMP has it as the guest's",
        "sev_free_vcpu()",
        (Edit(VMSA + "sev_free_vcpu", "if sev_snp_guest(vcpu.kvm):", "if False:"),),
        Scene("launch", "free_pages_are_the_hypervisors"),
    ),
    Defect(
        "vmsa_page_is_leaked",
        "the page of a vCPU's registers is never freed",
        "sev_free_vcpu()",
        (Edit(VMSA + "sev_free_vcpu", "linux.page_alloc.free_run(vmsa, 1)", "pass"),),
        Scene("launch", "every_page_has_one_owner"),
    ),
    Defect(
        "context_page_stays_firmwares",
        "the page of a guest's context is freed while it is firmware's",
        "snp_free_firmware_pages()",
        (
            Edit(
                FIRMWARE_PAGES + "snp_free_firmware_pages",
                "yield from snp_reclaim_pages(linux, pfn, 1 << order, locked=locked)",
                "yield from ()",
            ),
        ),
        Scene("launch", "free_pages_are_the_hypervisors"),
    ),
    Defect(
        "guest_is_not_decommissioned",
        "firmware keeps the guest when its VM ends",
        "snp_decommission_context()",
        (
            Edit(
                CORE + "sev_vm_destroy",
                "yield from snp_decommission_context(asids, kvm)",
                "sev.snp_context = None",
            ),
        ),
        Scene("launch", "every_page_has_one_owner"),
    ),
)
