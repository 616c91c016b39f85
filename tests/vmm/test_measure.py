"""Launch digests: those of sev-snp-measure, and those recorded step by step from an independent chain."""

from itertools import product
from pathlib import Path

import pytest
from sevsnpmeasure import guest
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmm_types import VMMType

from softcvm.abi.cpu_types import CPU_SIGNATURES
from softcvm.abi.launch_digest import LaunchPageType, extend
from softcvm.guest import firmware
from softcvm.vmm import measure
from softcvm.vmm.kernel_hashes import hash_table_of_files
from softcvm.vmm.ovmf import OvmfError, parse, read
from softcvm.vmm.vmsa import VmmType
from tests.vmm import images
from tests.vmm.conftest import Write

COUNTS = (1, 2, 4, 64)
CPU_TYPES = ("EPYC-v4", "EPYC-Milan", "EPYC-Genoa-v1")
VMMS = {VmmType.QEMU: VMMType.QEMU, VmmType.EC2: VMMType.ec2, VmmType.GCE: VMMType.gce}


class Boot:
    """A kernel, its initrd and command line as files, and how each side is told of them."""

    def __init__(self, folder: Path) -> None:
        self.kernel = folder / "kernel"
        self.initrd = folder / "initrd"
        self.kernel.write_bytes(bytes(range(256)) * 999)
        self.initrd.write_bytes(b"initrd")

    def cases(self) -> list[tuple[str | None, str | None, str | None]]:
        kernel, initrd = str(self.kernel), str(self.initrd)
        line = "console=ttyS0 loglevel=7 name=ümlaut"
        return [
            (kernel, None, None),
            (kernel, initrd, None),
            (kernel, initrd, line),
            (kernel, None, ""),
        ]


@pytest.fixture
def boot(tmp_path: Path) -> Boot:
    return Boot(tmp_path)


def theirs(
    path: Path,
    vcpus: int,
    sig: int,
    features: int = 1,
    vmm: VMMType = VMMType.QEMU,
    kernel: tuple[str | None, str | None, str | None] = (None, None, None),
    mode: SevMode = SevMode.SEV_SNP,
) -> str:
    digest: bytes = guest.calc_launch_digest(
        mode, vcpus, sig, str(path), *kernel, features, "", vmm_type=vmm
    )
    return digest.hex()


def takes_hashes(path: Path) -> bool:
    try:
        measure.launch_digest(read(str(path)), 1, 1, hashes=bytes(176))
    except OvmfError:
        return False
    return True


def check_snp(path: Path, counts: tuple[int, ...], boot: Boot) -> None:
    image = read(str(path))
    kernels: list[tuple[str | None, str | None, str | None]] = [(None, None, None)]
    kernels += boot.cases()[2:3] if takes_hashes(path) else []
    for kernel, cpu in product(kernels, CPU_TYPES):
        table = hash_table_of_files(kernel[0], *kernel[1:]) if kernel[0] is not None else None
        sig = CPU_SIGNATURES[cpu]
        digests = measure.launch_digests(image, counts, sig, hashes=table)
        for count, digest in zip(counts, digests, strict=True):
            assert digest.hex() == theirs(path, count, sig, kernel=kernel)


def test_digests_of_every_ovmf_image_at_hand_are_those_of_sev_snp_measure(
    ovmf_images: list[Path], boot: Boot
) -> None:
    for path in ovmf_images:
        check_snp(path, COUNTS, boot)


def test_digests_of_made_up_images_are_those_of_sev_snp_measure(
    synthetic: Path, boot: Boot
) -> None:
    check_snp(synthetic, COUNTS, boot)


def test_the_made_up_images_cover_firmware_with_and_without_a_hash_table(write: Write) -> None:
    taking = {name for name, build in images.IMAGES.items() if takes_hashes(write(build()))}
    assert taking == {"AmdSev suffix", "AmdSev"}
    assert takes_hashes(write(firmware.build()))


@pytest.mark.parametrize("vmm", VMMS)
def test_digests_for_each_vmm_are_those_of_sev_snp_measure(
    vmm: VmmType, synthetic: Path, boot: Boot
) -> None:
    image = read(str(synthetic))
    for vcpus, features in product((1, 3), (0x1, 0x21)):
        ours = measure.launch_digest(
            image, vcpus, 0xA00F11, guest_features=features, vmm_type=vmm
        )
        assert ours.hex() == theirs(synthetic, vcpus, 0xA00F11, features, VMMS[vmm])


def test_an_ap_that_starts_at_the_reset_vector_is_told_from_the_boot_cpu_as_ec2_does_not(
    write: Write,
) -> None:
    path = write(images.amd_sev(eip=0xFFFF_FFF0))
    for ours, vmm in VMMS.items():
        digest = measure.launch_digest(read(str(path)), 2, 1, vmm_type=ours)
        assert digest.hex() == theirs(path, 2, 1, vmm=vmm)


def test_digests_with_each_way_of_giving_a_kernel_are_those_of_sev_snp_measure(
    write: Write, boot: Boot
) -> None:
    path = write(images.amd_sev(0x4000))
    image = read(str(path))
    for (kernel, initrd, line), vmm in product(boot.cases(), VMMS):
        assert kernel is not None
        table = hash_table_of_files(kernel, initrd, line)
        given = (kernel, initrd, line)
        snp = measure.launch_digest(image, 2, 1, hashes=table, vmm_type=vmm)
        assert snp.hex() == theirs(path, 2, 1, vmm=VMMS[vmm], kernel=given)
        seves = measure.seves_launch_digests(image, (2,), 1, hashes=table, vmm_type=vmm)[0]
        assert seves.hex() == theirs(path, 2, 1, 0, VMMS[vmm], given, SevMode.SEV_ES)
        sev = measure.sev_launch_digest(image, hashes=table)
        assert sev.hex() == theirs(path, 2, 1, kernel=given, mode=SevMode.SEV)


@pytest.mark.parametrize("vmm", VMMS)
def test_sev_and_sev_es_digests_are_those_of_sev_snp_measure(
    vmm: VmmType, synthetic: Path
) -> None:
    image = read(str(synthetic))
    digests = measure.seves_launch_digests(image, COUNTS, 0x830F10, vmm_type=vmm)
    expected = [
        theirs(synthetic, n, 0x830F10, 0, VMMS[vmm], mode=SevMode.SEV_ES) for n in COUNTS
    ]
    assert [digest.hex() for digest in digests] == expected
    assert measure.sev_launch_digest(image).hex() == theirs(synthetic, 1, 0, mode=SevMode.SEV)


@pytest.mark.parametrize("launch_offset", [0, 0x1234])
def test_svsm_digests_are_those_of_sev_snp_measure(launch_offset: int, tmp_path: Path) -> None:
    ovmf_path, svsm_path, vars_size = tmp_path / "ovmf.fd", tmp_path / "svsm.bin", 540_672
    ovmf_path.write_bytes(images.ovmf_x64(0x37_C000))
    svsm_path.write_bytes(images.svsm(launch_offset=launch_offset))
    ovmf = read(str(ovmf_path))
    svsm = read(str(svsm_path), end=ovmf.gpa - vars_size)
    assert svsm.gpa == 0xFFAE_A000
    for count, digest in zip(
        COUNTS, measure.svsm_launch_digests(ovmf, svsm, COUNTS, 0x800F12), strict=True
    ):
        expected = guest.svsm_calc_launch_digest(
            count, 0x800F12, str(ovmf_path), vars_size, str(svsm_path), False
        )
        assert digest == expected


def test_a_hash_of_the_image_stands_for_its_bytes(synthetic: Path) -> None:
    image = read(str(synthetic))
    ovmf_hash = measure.snp_ovmf_hash(image)
    assert ovmf_hash == guest.calc_snp_ovmf_hash(str(synthetic))
    other = guest.snp_calc_launch_digest(2, 5, str(synthetic), None, None, None, 1, "ab" * 48)
    assert measure.launch_digest(image, 2, 5, ovmf_hash=bytes.fromhex("ab" * 48)) == other
    assert measure.launch_digest(image, 2, 5, ovmf_hash=ovmf_hash) == measure.launch_digest(
        image, 2, 5
    )


def test_many_counts_in_any_order_give_the_digest_of_each(synthetic: Path) -> None:
    image = read(str(synthetic))
    counts = [5, 1, 300, 2, 5, 17]
    many = measure.launch_digests(image, counts, 7)
    assert many == [measure.launch_digest(image, count, 7) for count in counts]
    es = measure.seves_launch_digests(image, counts, 7)
    assert es == [measure.seves_launch_digests(image, [count], 7)[0] for count in counts]


@pytest.mark.parametrize("count", [0, -1, 4097, 1 << 70])
def test_an_absurd_number_of_vcpus_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 4096 vCPUs"):
        measure.launch_digest(parse(firmware.build()), count, 1)


def test_no_second_vcpu_starts_on_firmware_whose_ap_reset_address_is_0() -> None:
    image = parse(images.amd_sev(eip=0))
    measure.launch_digest(image, 1, 1)
    with pytest.raises(OvmfError, match="AP reset address is 0"):
        measure.launch_digest(image, 2, 1)


# An image's own bytes enter the chain as one page, so images with the sections of the recorded ones, and
# the recorded hash of the page in place of ours, must give the recorded digests.
AMD_SEV_PAGE = "161ace084859674ded7322ad102eb33f49457e0f7845a8f9ad0e03a59eac3e3e360f8b78345363feaeac956ebba2d894"
OVMF_X64_PAGE = "3c11386e135b00d4065b771e222fda89b2fda0ab0cc364dfbbc7f0e4460c7dc970fcda61ec05a35d81aa2d521f694601"
EMPTY = ("", "", "")
RECORDED = [
    # image, vCPUs, features, VMM, kernel and initrd and command line, digest
    ("AmdSev suffix", 1, 0x01, "QEMU", None, "19358ba9a7615534a9a1e2f0dfc29384dcd4dcb7062ff9c6013b26869a5fc6ecabe033c48dd6f6db5d6d76e7c5df632d"),
    ("AmdSev suffix", 1, 0x21, "QEMU", None, "e1e1ca029dd7973ab9513295be68198472dcd4fc834bd9af9b63f6e8a1674dbf281a9278a4a2ebe0eed9f22adbcd0e2b"),
    ("AmdSev suffix", 4, 0x01, "QEMU", None, "49a5df7673889babb3ee480795e1be1571b812264c2c7cc3ac6f92298a2f8683d8c691b26d8114dd6afbd324c2150ae1"),
    ("AmdSev suffix", 4, 0x21, "QEMU", None, "d68d266388700e557d590470821a64a38014b2af64e3fe4e520f6806f41e876d42215e43c25466708691b16c769d6f35"),
    ("AmdSev suffix", 1, 0x01, "QEMU", EMPTY, "ddc5224521617a536ee7ce9dd6224d1b58a8d4fda1c741f3ac99fc4bfa04ba6e9fc98646d4a07a9079397fa3852819b5"),
    ("AmdSev suffix", 1, 0x21, "QEMU", ("", "", "console=ttyS0 loglevel=7"), "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977"),
    ("AmdSev suffix", 4, 0x01, "QEMU", EMPTY, "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5"),
    ("AmdSev suffix", 1, 0x01, "ec2", EMPTY, "0883bd0eeb716e65b7b977a321c278d1e51b33b5c655fab985443bbcc65c086b9c15e8a0bd8811050dec7e24964e5056"),
    ("AmdSev suffix", 1, 0x01, "gce", EMPTY, "5da7106cf14cf46b1725ebab123eb9e53bd46a1e9f400cd0c08e7827b04b688ea8b4e403c8404efed4397ea5d5d0722e"),
    ("OvmfX64 suffix", 1, 0x01, "QEMU", None, "da0296de8193586a5512078dcd719eccecbd87e2b825ad4148c44f665dc87df21e5b49e21523a9ad993afdb6a30b4005"),
    ("OvmfX64 suffix", 1, 0x21, "QEMU", None, "28797ae0afaba4005a81e629acebfb59e6687949d6be44007cd5506823b0dd66f146aaae26ff291eed7b493d8a64c385"),
    ("OvmfX64 suffix", 4, 0x01, "QEMU", None, "479f9790ab0fc8853278a4720f13e3e89565184045076e2fa6149790fd2fda28da8da3aa223d771a7bb5498dcdee3ff7"),
]  # fmt: skip
"""Expected values of sev-snp-measure's own tests (tests/test_guest.py, 0.0.13)."""


@pytest.mark.parametrize(("name", "vcpus", "features", "vmm", "kernel", "expected"), RECORDED)
def test_digests_recorded_for_edk2_builds(
    name: str,
    vcpus: int,
    features: int,
    vmm: str,
    kernel: tuple[str, str, str] | None,
    expected: str,
    tmp_path: Path,
) -> None:
    page = AMD_SEV_PAGE if name.startswith("AmdSev") else OVMF_X64_PAGE
    seed = extend(bytes(48), bytes.fromhex(page), LaunchPageType.NORMAL, 0xFFFF_F000)
    hashes = None
    if kernel is not None:
        for file, text in zip(("kernel", "initrd"), kernel[:2], strict=True):
            (tmp_path / file).write_text(text)
        hashes = hash_table_of_files(
            str(tmp_path / "kernel"), str(tmp_path / "initrd"), kernel[2]
        )
    digest = measure.launch_digest(
        parse(images.IMAGES[name]()),
        vcpus,
        0x800F12,
        guest_features=features,
        vmm_type=VmmType(vmm),
        hashes=hashes,
        ovmf_hash=seed,
    )
    assert digest.hex() == expected
