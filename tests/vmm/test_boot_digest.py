"""The digest of an executed launch: sev-snp-measure's, and the one that measure.py predicts."""

from itertools import product
from pathlib import Path

import pytest
from sevsnpmeasure import guest
from sevsnpmeasure.sev_mode import SevMode

from softcvm.abi.cpu_types import CPU_SIGNATURES
from softcvm.guest import firmware
from softcvm.vmm.kernel_hashes import hash_table_of_files
from softcvm.vmm.measure import launch_digest
from softcvm.vmm.ovmf import OvmfError, read
from tests.vmm.guests import config, launched_digest, machine
from tests.vmm.images import IMAGES

CPU_TYPES = ("EPYC-v4", "EPYC-Milan", "EPYC-Genoa-v1")
Kernel = tuple[str | None, str | None, str | None]
NO_KERNEL: Kernel = (None, None, None)


def theirs(path: Path, vcpus: int, cpu_type: str, features: int, kernel: Kernel) -> str:
    digest: bytes = guest.calc_launch_digest(
        SevMode.SEV_SNP, vcpus, CPU_SIGNATURES[cpu_type], str(path), *kernel, features
    )
    return digest.hex()


def check(
    path: Path, vcpus: int, cpu_type: str, kernel: Kernel = NO_KERNEL, features: int = 1
) -> None:
    """executed == predicted == sev-snp-measure's"""
    table = hash_table_of_files(kernel[0], *kernel[1:]) if kernel[0] is not None else None
    image = read(str(path))
    subject = config(image, vcpus, cpu_type, features=features, hashes=table)
    executed = launched_digest(subject)
    sig = CPU_SIGNATURES[cpu_type]
    predicted = launch_digest(image, vcpus, sig, guest_features=features, hashes=table)
    assert executed == predicted.hex() == theirs(path, vcpus, cpu_type, features, kernel)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    for name in ("kernel", "initrd"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    return str(tmp_path / "kernel"), str(tmp_path / "initrd"), "console=ttyS0"


@pytest.fixture
def builtin(tmp_path: Path) -> Path:
    path = tmp_path / "builtin.fd"
    path.write_bytes(firmware.build())
    return path


def bootable(path: Path) -> bool:
    return read(str(path)).has_metadata


def takes_hashes(path: Path) -> bool:
    try:
        launch_digest(read(str(path)), 1, 1, hashes=bytes(176))
    except OvmfError:
        return False
    return True


def test_r2_2_the_digest_of_a_launched_ovmf_is_that_of_sev_snp_measure(
    ovmf_image: Path,
) -> None:
    check(ovmf_image, 4, "EPYC-v4")


@pytest.mark.parametrize(
    ("vcpus", "cpu_type"), [(1, "EPYC-v4"), (2, "EPYC-Milan"), (64, "EPYC-Genoa-v1")]
)
def test_the_digest_of_a_launched_builtin_firmware_is_that_of_sev_snp_measure(
    builtin: Path, vcpus: int, cpu_type: str
) -> None:
    check(builtin, vcpus, cpu_type)


def test_the_digest_of_a_launch_with_kernel_hashes_is_that_of_sev_snp_measure(
    builtin: Path, kernel: Kernel
) -> None:
    check(builtin, 2, "EPYC-v4", kernel)


def test_the_digest_with_debug_swap_is_that_of_sev_snp_measure(builtin: Path) -> None:
    check(builtin, 2, "EPYC-v4", features=0x21)


@pytest.mark.parametrize("name", IMAGES)
def test_digests_of_launched_made_up_images_are_those_of_sev_snp_measure(
    name: str, tmp_path: Path, kernel: Kernel
) -> None:
    path = tmp_path / "image.fd"
    path.write_bytes(IMAGES[name]())
    check(path, 2, "EPYC-Milan")
    if takes_hashes(path):
        check(path, 1, "EPYC-v4", kernel)


@pytest.mark.parametrize("version", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("cpu", ["milan", "genoa"])
@pytest.mark.parametrize("order", [0, 9])
def test_the_host_is_no_part_of_the_digest(version: str, cpu: str, order: int) -> None:
    subject = config(vcpus=2)
    host = machine(version, cpu, order)
    predicted = launch_digest(subject.image, 2, subject.vcpu_sig)
    assert launched_digest(subject, host) == predicted.hex()


@pytest.mark.parametrize("vcpus", [1, 2, 4, 64])
@pytest.mark.parametrize("cpu_type", CPU_TYPES)
def test_digests_of_every_launched_image_at_hand_are_those_of_sev_snp_measure(
    ovmf_images: list[Path], builtin: Path, kernel: Kernel, vcpus: int, cpu_type: str
) -> None:
    seen = 0
    paths = [path for path in (*ovmf_images, builtin) if bootable(path)]
    for path, features in product(paths, (0x1, 0x21)):
        check(path, vcpus, cpu_type, features=features)
        seen += 1
        if takes_hashes(path):
            check(path, vcpus, cpu_type, kernel, features)
    assert seen >= 2
