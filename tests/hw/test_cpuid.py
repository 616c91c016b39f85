"""hw/cpu/cpuid.py: what the instruction answers is what firmware lets a guest believe, and KVM passes it on.

The rules of firmware (hw/psp/cpuid_rules.py) come from another source than the tables, so each checks the
other; signatures and widths are compared with sev-snp-measure's and with the profile.
"""

import pytest
from sevsnpmeasure.vcpu_types import CPU_SIGS

from softcvm.abi.cpuid import CpuidEntry, read_page, signature_fields
from softcvm.abi.kvm.vcpu import KvmCpuidEntry2
from softcvm.hw.cpu.cpuid import CpuidResult, cpuid, leaves
from softcvm.hw.profile import PROFILES, CpuProfile
from softcvm.hw.psp.cpuid_rules import rules, sanitize, sanitize_page
from softcvm.machine import Machine
from softcvm.vmm.cpuid import cpuid_page, vcpu_cpuid
from softcvm.vmm.kvm import Kvm

profiles = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)


@profiles
def test_every_leaf_passes_the_rules_of_this_processors_firmware(profile: CpuProfile) -> None:
    for (function, index), result in leaves(profile).items():
        entry = CpuidEntry(function, index, xcr0_in=_xcr0(function, index), **result._asdict())
        if function == 0xD and index in (0, 1):
            entry = entry._replace(ebx=sanitize(profile, entry).ebx)  # depends on XCR0 and XSS
        assert sanitize(profile, entry) == entry, f"{function:#x}.{index}"


def _xcr0(function: int, index: int) -> int:
    return 0x207 if function == 0xD and index in (0, 1) else 0


@profiles
def test_no_leaf_is_unknown_to_firmware(profile: CpuProfile) -> None:
    assert set(leaves(profile)) <= set(rules(profile))


@profiles
def test_a_leaf_that_is_not_there_reads_as_zero(profile: CpuProfile) -> None:
    assert cpuid(profile, 0x8000_00FF) == CpuidResult()
    assert cpuid(profile, 0x7, 5) == CpuidResult()


def test_the_vendor_and_the_brand_are_text() -> None:
    for profile in PROFILES.values():
        vendor = cpuid(profile, 0)
        words = (vendor.ebx, vendor.edx, vendor.ecx)
        assert b"".join(word.to_bytes(4, "little") for word in words) == b"AuthenticAMD"
        brand = b"".join(
            word.to_bytes(4, "little")
            for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004)
            for word in cpuid(profile, leaf)
        )
        assert profile.name.capitalize().encode() in brand


def test_signatures_are_of_the_models_that_sev_snp_measure_knows() -> None:
    for name, qemu in (("milan", "EPYC-Milan"), ("genoa", "EPYC-Genoa")):
        mine = signature_fields(cpuid(PROFILES[name], 1).eax)
        assert mine[:2] == signature_fields(CPU_SIGS[qemu])[:2]


@profiles
def test_memory_encryption_is_the_profiles(profile: CpuProfile) -> None:
    result = cpuid(profile, 0x8000_001F)
    assert result.ebx & 0x3F == profile.c_bit
    assert result.ebx >> 6 & 0x3F == profile.phys_bits_lost
    assert result.ebx >> 12 & 0xF == profile.vmpls
    assert (result.ecx, result.edx) == (profile.max_asid, profile.min_sev_asid)
    assert cpuid(profile, 0x8000_0008).eax & 0xFF == profile.phys_bits + profile.phys_bits_lost


def supported(cpu: str) -> list[KvmCpuidEntry2]:
    machine = Machine(cpu=cpu, memory=1 << 32)
    with Kvm(machine.process()) as kvm:
        return kvm.supported_cpuid()


@profiles
def test_what_kvm_supports_less_what_a_vmm_masks_passes_firmware(profile: CpuProfile) -> None:
    for signature in (profile.signature, CPU_SIGS["EPYC-v4"]):
        page = cpuid_page(vcpu_cpuid(supported(profile.name), signature))
        assert sanitize_page(profile, page) is None


@profiles
def test_what_kvm_emulates_would_not_pass_unmasked(profile: CpuProfile) -> None:
    """The TSC deadline timer and TSC_ADJUST: why QEMU masks them for SNP guests."""
    page = cpuid_page(supported(profile.name))
    corrected = sanitize_page(profile, page)
    assert corrected is not None
    changed = [
        mine.eax_in
        for mine, theirs in zip(read_page(page), read_page(corrected), strict=True)
        if mine != theirs
    ]
    assert changed == [0x1, 0x7]


def test_a_buffer_that_is_too_small_for_kvms_answer_is_e2big() -> None:
    from errno import E2BIG

    from softcvm.abi.kvm import _generated_kvm as nr

    machine = Machine(memory=1 << 32)
    sys = machine.process()
    fd = sys.open("/dev/kvm")
    with pytest.raises(OSError, match="KVM_GET_SUPPORTED_CPUID") as failed:
        sys.ioctl(
            fd, nr.KVM_GET_SUPPORTED_CPUID, bytearray((3).to_bytes(8, "little") + bytes(120))
        )
    assert failed.value.errno == E2BIG
