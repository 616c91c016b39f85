"""Launch digests of a real OVMF image against sev-snp-measure's library call."""

from pathlib import Path

from bench.sides import Bench, Side, Unavailable, timed
from softcvm.abi.cpu_types import CPU_SIGNATURES
from softcvm.vmm.measure import launch_digest, launch_digests
from softcvm.vmm.ovmf import parse

__all__ = ("BENCHES", "ovmf_image")

_FOLDERS = ("/usr/share/ovmf", "/usr/share/OVMF")
_SIGNATURE = CPU_SIGNATURES["EPYC-v4"]


def ovmf_image() -> Path:
    """The plain image of Debian's ovmf, or any that can launch an SNP guest."""
    for folder in _FOLDERS:
        for path in sorted(
            Path(folder).glob("*.fd"), key=lambda p: (p.name != "OVMF.fd", p.name)
        ):
            if "VARS" not in path.name and parse(path.read_bytes()).has_metadata:
                return path
    raise Unavailable("no OVMF image with SEV metadata: apt install ovmf")


def _against_sev_snp_measure() -> tuple[Side, Side]:
    from sevsnpmeasure import guest, vcpu_types
    from sevsnpmeasure.sev_mode import SevMode

    path = ovmf_image()

    def ours() -> bytes:
        return launch_digest(parse(path.read_bytes()), 1, _SIGNATURE)

    def theirs() -> bytes:
        sig = vcpu_types.CPU_SIGS["EPYC-v4"]
        digest: bytes = guest.calc_launch_digest(
            SevMode.SEV_SNP, 1, sig, str(path), "", "", "", 1, ""
        )
        return digest

    if ours() != theirs():
        raise RuntimeError(f"{path}: the digests differ; the times would mean nothing")
    return timed(ours, repeat=5), timed(theirs, repeat=5)


def _many_counts() -> tuple[Side, Side]:
    path = ovmf_image()

    def many() -> None:
        launch_digests(parse(path.read_bytes()), range(1, 33), _SIGNATURE)

    def one() -> None:
        launch_digest(parse(path.read_bytes()), 1, _SIGNATURE)

    return timed(many, repeat=5), timed(one, repeat=5)


BENCHES = (
    Bench(
        "measure",
        "launch digest of a real OVMF image, cold",
        "sev-snp-measure's library call",
        0.85,
        _against_sev_snp_measure,
    ),
    Bench(
        "measure-32",
        "launch digests of that image for 1 to 32 vCPUs",
        "one of them",
        1.5,
        _many_counts,
    ),
)
