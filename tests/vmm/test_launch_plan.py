"""The order of a launch, and what is refused before it starts."""

import hashlib

import pytest

from softcvm.abi.launch_digest import LaunchPageType as T
from softcvm.guest import firmware
from softcvm.vmm.kernel_hashes import hash_table, hash_table_of_files
from softcvm.vmm.launch_plan import LaunchUpdate, snp_launch_plan, svsm_launch_plan
from softcvm.vmm.ovmf import OvmfError, parse
from softcvm.vmm.vmsa import VmmType
from tests.vmm import images
from tests.vmm.images import AMD_SEV_SECTIONS, CPUID, HASHES, KERNEL_HASHES, SEC_MEM, SECRETS

# The table of an empty kernel, initrd and command line: recorded from sev-snp-measure 0.0.13, spaced by hand.
EMPTY_TABLE = bytes.fromhex(
    "06d63894224fc94cb479a793d411fd21 a800"
    "d82dd09720bd944caa78e7714d36ab2a 3200 6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    "31f7ba442f3ad74b9af141e29169781d 3200 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    "3794e74dd2ab7f42b835d5b172d2045b 3200 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    "0000000000000000"
)


def shape(updates: tuple[LaunchUpdate, ...]) -> list[tuple[int, int, T]]:
    return [(u.gpa, u.npages, u.page_type) for u in updates]


AMD_SEV_PLAN = [
    (0xFFFF_F000, 1, T.NORMAL),
    (0x80_0000, 9, T.ZERO),
    (0x80_A000, 3, T.ZERO),
    (0x80_D000, 1, T.SECRETS),
    (0x80_E000, 1, T.CPUID),
    (0x80_F000, 1, T.ZERO),
    (0x81_0000, 1, T.ZERO),
    (0x81_1000, 15, T.ZERO),
]


def test_the_image_comes_first_then_its_sections_in_order() -> None:
    data = images.amd_sev()
    plan = snp_launch_plan(parse(data))
    assert shape(plan) == AMD_SEV_PLAN
    assert plan[0].data == data
    assert all(update.data is None for update in plan[1:])


def test_a_plan_covers_each_4k_page_once() -> None:
    plan = snp_launch_plan(parse(firmware.build()), hashes=EMPTY_TABLE)
    pages = [update.gpa + 4096 * i for update in plan for i in range(update.npages)]
    assert len(pages) == len(set(pages))
    assert all(
        update.data is None or len(update.data) == 4096 * update.npages for update in plan
    )


def test_ec2_launches_the_cpuid_page_last() -> None:
    plan = snp_launch_plan(parse(images.amd_sev()), vmm_type=VmmType.EC2)
    assert shape(plan) == [*AMD_SEV_PLAN[:4], *AMD_SEV_PLAN[5:], AMD_SEV_PLAN[4]]


def test_gce_does_not_measure_sec_mem() -> None:
    plan = snp_launch_plan(parse(images.amd_sev()), vmm_type=VmmType.GCE)
    kinds = {u.what: u.page_type for u in plan}
    assert kinds["SEC_MEM"] is T.UNMEASURED
    assert kinds["SVSM_CAA"] is T.ZERO


def test_the_hash_table_lies_where_the_firmware_looks() -> None:
    plan = snp_launch_plan(parse(images.amd_sev()), hashes=EMPTY_TABLE)
    update = next(u for u in plan if u.what == "KERNEL_HASHES")
    assert update.page_type is T.NORMAL
    assert update.data == bytes(0xC00) + EMPTY_TABLE + bytes(0x1000 - 0xC00 - 176)


def test_hash_pages_of_two_pages_are_filled_as_qemu_does() -> None:
    sections = images.metadata([(0x80_0000, 0x2000, KERNEL_HASHES)])
    image = parse(images.image([images.area(HASHES, 0x80_1000, 0x400)], sections=sections))
    data = snp_launch_plan(image, hashes=EMPTY_TABLE)[1].data
    assert data == bytes(0x1000) + EMPTY_TABLE + bytes(0x1000 - 176)


def test_an_svsm_brings_its_own_sections_and_the_ovmf_image_none() -> None:
    ovmf = parse(images.ovmf_x64())
    svsm = parse(images.svsm(0x4000), end=ovmf.gpa - 0x2000)
    plan = svsm_launch_plan(ovmf, svsm)
    assert shape(plan) == [
        (0xFFFF_F000, 1, T.NORMAL),
        (0xFFFF_9000, 4, T.NORMAL),
        (0, 0x9E, T.ZERO),
        (0x9_E000, 1, T.SECRETS),
        (0x9_F000, 1, T.CPUID),
    ]


REFUSED = {
    "no KERNEL_HASHES section": images.ovmf_x64(),
    "no hash table area": images.image(sections=images.metadata(AMD_SEV_SECTIONS)),
    "no hash table area for": images.image(
        [images.area(HASHES, 0, 0)], sections=images.metadata(AMD_SEV_SECTIONS)
    ),
    "area of 175 bytes cannot hold": images.image(
        [images.area(HASHES, 0x81_0C00, 175)], sections=images.metadata(AMD_SEV_SECTIONS)
    ),
    "outside its KERNEL_HASHES section 0x810000..0x811000": images.image(
        [images.area(HASHES, 0x81_0F51, 176)], sections=images.metadata(AMD_SEV_SECTIONS)
    ),
    "outside its KERNEL_HASHES section 0x812000..0x813000": images.image(
        [images.area(HASHES, 0x81_0C00, 0x400)],
        sections=images.metadata(
            [(at, 0x1000, KERNEL_HASHES) for at in (0x81_0000, 0x81_2000)]
        ),
    ),
    "is outside its KERNEL_HASHES": images.image(
        [images.area(HASHES, 0x80_FFFF, 176)], sections=images.metadata(AMD_SEV_SECTIONS)
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_hashes_that_the_firmware_cannot_take_are_refused(fault: str) -> None:
    image = parse(REFUSED[fault])
    assert snp_launch_plan(image)
    with pytest.raises(OvmfError, match=fault):
        snp_launch_plan(image, hashes=EMPTY_TABLE)


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ((0x80_0000, 0x2000, SECRETS), "SECRETS section 0x800000..0x802000 is not one page"),
        ((0x80_0000, 0x3000, CPUID), "CPUID section 0x800000..0x803000 is not one page"),
        ((0x80_0000, 0x1000, 5), "no VMM knows how to launch the type 0x5 section"),
    ],
)
def test_sections_that_nobody_can_launch_are_refused(
    section: tuple[int, int, int], fault: str
) -> None:
    sections = images.metadata([(0x90_0000, 0x1000, SEC_MEM), section])
    with pytest.raises(OvmfError, match=fault):
        snp_launch_plan(parse(images.amd_sev(sections=sections)))


def test_the_hash_table_of_nothing_has_the_recorded_bytes() -> None:
    empty = hashlib.sha256(b"").digest()
    assert hash_table(empty, empty, hashlib.sha256(b"\0").digest()) == EMPTY_TABLE
    assert hash_table_of_files("/dev/null", "/dev/null", "") == EMPTY_TABLE
    assert hash_table_of_files("/dev/null", None, None) == EMPTY_TABLE
