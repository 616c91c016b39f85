"""The chain of PAGE_INFO hashes against sev-snp-measure's, and where firmware's layout differs from it."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevsnpmeasure.gctx import GCTX

from softcvm.abi import launch_digest as ld
from softcvm.abi.launch_digest import LaunchPageType, PageInfo

digests = st.binary(min_size=48, max_size=48)
gpas = st.integers(0, (1 << 52) - 1).map(lambda gpa: gpa & ~0xFFF)


@given(seed=digests, gpa=gpas, data=st.binary(max_size=64))
def test_each_page_type_extends_the_digest_as_sev_snp_measure_does(
    seed: bytes, gpa: int, data: bytes
) -> None:
    page = data.ljust(4096, b"\xff")
    theirs, ours, zeros = GCTX(seed=seed), seed, bytes(48)
    theirs.update_normal_pages(gpa, page)
    ours = ld.extend(ours, ld.sha384(page), LaunchPageType.NORMAL, gpa)
    theirs.update_vmsa_page(page[:0x2F0] + bytes(16) + page[0x300:])
    ours = ld.extend(ours, ld.vmsa_contents(page), LaunchPageType.VMSA, ld.VMSA_GPA)
    theirs.update_zero_pages(gpa, 4096)
    ours = ld.extend(ours, zeros, LaunchPageType.ZERO, gpa)
    theirs.update_unmeasured_pages(gpa, 4096)
    ours = ld.extend(ours, zeros, LaunchPageType.UNMEASURED, gpa)
    theirs.update_secrets_page(gpa)
    ours = ld.extend(ours, zeros, LaunchPageType.SECRETS, gpa)
    theirs.update_cpuid_page(gpa)
    ours = ld.extend(ours, zeros, LaunchPageType.CPUID, gpa)
    assert ours == theirs.ld()


# Each step of an AmdSev image's launch, recorded from sev-snp-measure and derived again independently.
STEPS = [
    (0x80_0000, 0x9000, 3, "411a1360ae4001ab44e1c8a5f14115068566f56b565be90042aa16cc26de1492ef3025f10b7cdd14911ae69aaea7881a"),
    (0x80_A000, 0x3000, 3, "e0b2ff7ad80630d6c56ba3d43c7dd1cccca220d9cc60092fe69e5f31a6ab4e9537aa477497f03636ae29b18630df8477"),
    (0x80_D000, 0x1000, 5, "230c05427474c0649ea31849fe3144dbbef0921570105732b69ff5463dee1fe8612dee2db0866719377099718ecb46d8"),
    (0x80_E000, 0x1000, 6, "17af371be37e5a8f0f3d83cd4195cfb47b60caabf8c209e6c68ab44d6484381a057812c0760811d53f47b522a16e5574"),
    (0x80_F000, 0x1000, 3, "1de7f0d81360fb802b5e2a7327f58ed1a2c9d1947a2e3cf0ae34184e6e1b4cb102da9ac69f421cded3105d12d523e4e9"),
    (0x81_0000, 0x1000, 3, "367f275c105049c7c528b3bbe13bef40ddbdb2b20f78848b65caf7110113d78231b1bb03d7058e9ce16b56f6e0c7166d"),
    (0x81_1000, 0xF000, 3, "2a436bb1f7bd08b3888d20579f83961e6cd34b45f10bfa96bfb8086d15e258e407b2b04f62e1e6536aa64ba1b16dd65c"),
]  # fmt: skip
AMD_SEV_PAGE = "161ace084859674ded7322ad102eb33f49457e0f7845a8f9ad0e03a59eac3e3e360f8b78345363feaeac956ebba2d894"
AMD_SEV_LD = "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"
FIRST_ZERO_PAGE = "cb97f2e22ca4c090feb9453ef6cb076f8ded7ae48c9bbb892569c328b133f089f711d5c5a57afc127cf91d7a32e0736a"


def test_each_recorded_step_of_a_launch_is_reproduced() -> None:
    digest = ld.extend(ld.INITIAL_LD, bytes.fromhex(AMD_SEV_PAGE), 1, 0xFFFF_F000)
    assert digest.hex() == AMD_SEV_LD
    assert ld.extend(digest, bytes(48), 3, 0x80_0000).hex() == FIRST_ZERO_PAGE
    for gpa, size, page_type, expected in STEPS:
        digest = ld.extend_run(digest, [bytes(48)] * (size >> 12), page_type, gpa)
        assert digest.hex() == expected


def test_page_info_has_the_permission_bytes_in_firmwares_order() -> None:
    raw = ld.page_info(bytes(48), bytes(48), 1, 0x1000, imi=True, perms=(1, 2, 4))
    info = PageInfo(raw)
    assert (info.length, info.page_type, info.imi_page, info.gpa) == (0x70, 1, 1, 0x1000)
    assert raw[0x64:0x68] == bytes([0, 1, 2, 4])
    assert (info.vmpl1_perms, info.vmpl2_perms, info.vmpl3_perms) == (1, 2, 4)
    assert ld.extend(bytes(48), bytes(48), 1, 0x1000, imi=True, perms=(1, 2, 4)) == (
        hashlib.sha384(raw).digest()
    )


@given(seed=digests, gpa=gpas, run=st.lists(digests, max_size=5))
def test_extending_by_a_run_is_extending_by_each_page(
    seed: bytes, gpa: int, run: list[bytes]
) -> None:
    one_by_one = seed
    for number, contents in enumerate(run):
        one_by_one = ld.extend(one_by_one, contents, LaunchPageType.NORMAL, gpa + 4096 * number)
    assert ld.extend_run(seed, run, LaunchPageType.NORMAL, gpa) == one_by_one


@given(
    st.lists(
        st.sampled_from([bytes(4096), b"\xff" * 4096, b"\xff" * 4095 + b"\0", b"x" * 4096])
    )
)
def test_pages_that_repeat_have_the_digests_of_their_bytes(pages: list[bytes]) -> None:
    assert ld.page_digests(b"".join(pages)) == [hashlib.sha384(page).digest() for page in pages]


def test_a_vmsas_tsc_fields_are_not_measured() -> None:
    page = bytearray(4096)
    same = ld.vmsa_contents(bytes(page))
    page[0x2F0:0x300] = b"\xab" * 16
    assert ld.vmsa_contents(bytes(page)) == same == hashlib.sha384(bytes(4096)).digest()
    page[0x300] = 1
    assert ld.vmsa_contents(bytes(page)) != same


def test_digests_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="digests of 47 and 48 bytes"):
        ld.page_info(bytes(47), bytes(48), 1, 0)
    with pytest.raises(ValueError, match="digests of 48 and 4096 bytes"):
        ld.extend(bytes(48), bytes(4096), 1, 0)
