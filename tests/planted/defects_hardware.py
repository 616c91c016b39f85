"""Defects of processor and firmware: the instructions on the RMP, the checks of an access, launch, encryption."""

from tests.planted.plant import Defect, Edit, Scene, Selftest

__all__ = ("HARDWARE",)

INSN, PSP = "hw.insn.", "hw.psp."
OLD_LAUNCH = PSP + "sev_launch:_launch_update"

HARDWARE = (
    Defect(
        "rmpupdate_keeps_validated",
        "RMPUPDATE leaves a page validated that it binds anew",
        "none: RMPUPDATE",
        (Edit(INSN + "rmpupdate:_commit", "attrs = 0\n", "attrs = VALIDATED\n"),),
        Scene("launch", "a_changed_page_starts_afresh"),
    ),
    Defect(
        "rmpupdate_changes_immutable_entries",
        "RMPUPDATE takes a page from firmware",
        "none: RMPUPDATE",
        (Edit(INSN + "rmpupdate:_check_entries", "if attrs & IMMUTABLE:", "if False:"),),
        Scene("hostile", "immutable_changes_by_firmware_only"),
    ),
    Defect(
        "psmash_forgets_validation",
        "PSMASH makes the guest's 4K pages unvalidated",
        "none: PSMASH",
        (
            Edit(
                INSN + "psmash:psmash",
                "attrs & ~(PAGESIZE | LEFTOVER | VMSA)",
                "attrs & ~(PAGESIZE | LEFTOVER | VMSA | 1 << 62)",
            ),
        ),
        Scene("boot", "psmash_changes_size_only"),
    ),
    Defect(
        "psmash_binds_all_to_one_address",
        "PSMASH binds the 4K pages one page further than the 2M page",
        "none: PSMASH",
        (
            Edit(
                INSN + "psmash:psmash",
                "(attrs & ~(PAGESIZE | LEFTOVER | VMSA), gfn)",
                "(attrs & ~(PAGESIZE | LEFTOVER | VMSA), gfn + 1)",
            ),
        ),
        Scene("boot", "calls_end_as_they_should"),
    ),
    Defect(
        "pvalidate_makes_immutable",
        "PVALIDATE changes more than `validated`",
        "none: PVALIDATE",
        (Edit(INSN + "pvalidate:pvalidate", "& ~VALIDATED | want", "& ~VALIDATED | want | 4"),),
        Scene("boot", "pvalidate_changes_validated_only"),
    ),
    Defect(
        "unvalidated_pages_can_be_used",
        "a guest reaches a page that it never accepted, without #VC",
        "none: the check of a private access",
        (Edit("hw.access:check_private", "elif not attrs & VALIDATED:", "elif False:"),),
        Scene("boot", "guest_passed_its_own_checks"),
    ),
    Defect(
        "host_writes_are_not_checked",
        "the host can write a guest's page",
        "none: the check of a host write",
        (
            Edit(
                "hw.access:check_hypervisor_owned",
                "if attrs & ASSIGNED and rmp.covered(s):",
                "if False:",
            ),
        ),
        Scene("launch", "host_cannot_write_assigned_pages"),
    ),
    Defect(
        "asid_counter_is_wrong",
        "the counter of an ASID's pages misses those of a 2M entry",
        "none: the RMP",
        (
            Edit(
                "hw.rmp:Rmp.store",
                "self._count(new >> ASID_SHIFT, e - s)",
                "self._count(new >> ASID_SHIFT, 1)",
            ),
        ),
        Scene("launch", "asid_counters_are_exact"),
    ),
    Defect(
        "used_asid_is_clean",
        "DECOMMISSION leaves the ASID clean, so that it needs no flush",
        "none: SNP_DECOMMISSION",
        (Edit(PSP + "asid:AsidTable.release", "self.dirty[asid] = ran", "pass"),),
        Scene("asids", "a_used_asid_is_dirty"),
    ),
    Defect(
        "digest_leaves_out_the_address",
        "the launch digest does not say where a page lies",
        "none: SNP_LAUNCH_UPDATE",
        (Edit(PSP + "launch:_measure_and_encrypt", "gpa = gfn + i << PAGE_SHIFT", "gpa = 0"),),
        Scene("boot", "launch_digest_is_the_predicted_one"),
    ),
    Defect(
        "cpuid_page_is_not_checked",
        "firmware takes a CPUID page with values that the processor does not have",
        "none: SNP_LAUNCH_UPDATE",
        (
            Edit(
                PSP + "launch:_contents",
                "if corrected is not None:",
                "if False:",
            ),
        ),
        Scene("launch", "calls_end_as_they_should"),
    ),
    Defect(
        "launch_page_in_plain",
        "a launched page lies in memory unencrypted",
        "none: SNP_LAUNCH_UPDATE",
        (
            Edit(
                PSP + "launch:_measure_and_encrypt",
                "dram.write(spa, plain, key)",
                "dram.write(spa, plain)",
            ),
        ),
        Scene("launch", "host_reads_no_plaintext"),
    ),
    Defect(
        "registers_in_plain",
        "the VMSA lies in memory unencrypted, so that the host reads the guest's registers",
        "none: SNP_LAUNCH_UPDATE",
        (
            Edit(
                PSP + "launch:_measure_and_encrypt",
                "dram.write(spa, plain, key)",
                "dram.write(spa, plain, None if page_type is LaunchPageType.VMSA else key)",
            ),
        ),
        Scene("launch", "host_reads_no_plaintext"),
    ),
    Defect(
        "sev_launch_with_another_key",
        "LAUNCH_UPDATE_DATA encrypts with a key that is not the guest's",
        "none: LAUNCH_UPDATE_DATA",
        (
            Edit(
                OLD_LAUNCH,
                "_key(psp, guest)",
                "Key(bytes(range(len(_key(psp, guest).material))))",
            ),
        ),
        Selftest("sev_smoke_test", "Test Assertion Failure"),
    ),
    Defect(
        "sev_launch_in_plain",
        "LAUNCH_UPDATE_DATA measures and does not encrypt",
        "none: LAUNCH_UPDATE_DATA",
        (Edit(OLD_LAUNCH, "plain, _key(psp, guest)", "plain"),),
        Selftest("sev_smoke_test", "Test Assertion Failure"),
    ),
)
