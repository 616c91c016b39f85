"""`softcvm measure` against sev-snp-measure's own command, and what it says of bad input."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sevsnpmeasure import cli as outsider
from sevsnpmeasure.guest import snp_calc_launch_digest

from softcvm.cli.main import main
from softcvm.cli.measure import MODES, VMM_TYPES
from softcvm.guest import firmware
from softcvm.vmm.vmsa import VmmType
from tests.vmm import images

Result = tuple[int, str, str]
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files that good and bad commands name."""
    monkeypatch.chdir(tmp_path)
    for name, data in {
        "amdsev.fd": images.amd_sev(0x4000),
        "ovmfx64.fd": images.ovmf_x64(0x8000),
        "builtin.fd": firmware.build(),
        "svsm.bin": images.svsm(0x8000),
        "vars.fd": bytes(0x2000),
        "kernel": b"kernel" * 1000,
        "initrd": b"initrd",
        "text": b"not firmware\n",
        "zeros": bytes(0x4000),
        "truncated.fd": images.amd_sev(0x4000)[:0x3000],
        "overlap.fd": images.amd_sev(
            sections=images.metadata([(0x80_0000, 0x2000, 1), (0x80_1000, 0x1000, 2)])
        ),
    }.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def ours(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> Result:
        status = main(["measure", *argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def theirs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*argv: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["sev-snp-measure", *argv])
        status: int = outsider.main()
        return status, *capsys.readouterr()

    return run


SNP = "--mode snp --vcpus 2 --vcpu-type EPYC-v4"
BOOT = "--kernel kernel --initrd initrd --append console=ttyS0"
SVSM = "--mode snp:svsm --ovmf ovmfx64.fd --svsm svsm.bin --vcpus 2 --vcpu-type EPYC-v4"
GOOD = [
    f"{SNP} --ovmf amdsev.fd",
    f"{SNP} --ovmf ovmfx64.fd",
    f"{SNP} --ovmf builtin.fd {BOOT}",
    f"{SNP} --ovmf amdsev.fd {BOOT}",
    f"{SNP} --ovmf amdsev.fd --kernel kernel",
    f"{SNP} --ovmf amdsev.fd --kernel kernel --append= --initrd=",
    f"{SNP} --ovmf amdsev.fd --append= --initrd=",
    f"{SNP} --ovmf amdsev.fd -v",
    f"{SNP} --ovmf amdsev.fd --verbose --output-format base64",
    f"{SNP} --ovmf amdsev.fd --output-format base64",
    f"{SNP} --ovmf amdsev.fd --guest-features 0x21",
    f"{SNP} --ovmf amdsev.fd --guest-features 33",
    f"{SNP} --ovmf amdsev.fd --snp-ovmf-hash {'a1' * 48}",
    f"{SNP} --ovmf amdsev.fd --vmm-type ec2",
    f"{SNP} --ovmf amdsev.fd --vmm-type gce {BOOT}",
    f"{SNP} --ovmf amdsev.fd --vmm QEMU",  # an abbreviation
    "--mode snp --vcpus 3 --vmm-type gce --ovmf amdsev.fd",
    "--mode snp --vcpus 3 --vmm-type ec2 --ovmf amdsev.fd",
    "--mode snp --vcpus 64 --vcpu-sig 0xa00f11 --ovmf amdsev.fd",
    "--mode snp --vcpus 1 --vcpu-sig 10489617 --vcpu-type EPYC --ovmf amdsev.fd",
    "--mode snp --vcpus 1 --vcpu-sig 0 --vcpu-type EPYC-Milan --ovmf amdsev.fd",
    "--mode snp --vcpus 1 --vcpu-family 0 --vcpu-sig 9 --vcpu-type EPYC --ovmf amdsev.fd",
    "--mode snp --vcpus 1 --vcpu-family 25 --vcpu-model 17 --vcpu-stepping 0 --ovmf amdsev.fd",
    "--mode snp --vcpus 1 --vcpu-family 6 --vcpu-model 15 --vcpu-stepping 3 --vcpu-type EPYC "
    "--vcpu-sig 7 --ovmf amdsev.fd",
    "--mode seves --vcpus 4 --vcpu-type EPYC-Rome --ovmf amdsev.fd",
    f"--mode seves --vcpus 4 --vcpu-type EPYC-Rome --ovmf amdsev.fd -v {BOOT}",
    "--mode seves --vcpus 1 --vmm-type ec2 --ovmf ovmfx64.fd",
    "--mode sev --ovmf amdsev.fd",
    f"--mode sev --ovmf amdsev.fd -v {BOOT}",
    "--mode sev --ovmf zeros --vcpus 4 --vcpu-type EPYC",  # no table is needed for SEV
    "--mode snp:ovmf-hash --ovmf amdsev.fd",
    "--mode snp:ovmf-hash --ovmf amdsev.fd --output-format base64 -v --vcpus 5",
    f"{SVSM} --vars-size 540672",
    f"{SVSM} --vars-file vars.fd -v",
    f"{SVSM} --vars-file vars.fd --guest-features 0x21",
]


@pytest.mark.parametrize("line", GOOD)
def test_prints_what_sev_snp_measure_prints(line: str, ours: Run, theirs: Run) -> None:
    argv = line.split()
    expected = theirs(*argv)
    assert expected[0] == 0, "the outsider refuses this"
    assert ours(*argv) == expected


def test_prints_what_sev_snp_measure_prints_for_a_real_image(
    ovmf_images: list[Path], ours: Run, theirs: Run
) -> None:
    for path in ovmf_images:
        argv = [*SNP.split(), "--ovmf", str(path)]
        assert ours(*argv) == theirs(*argv)


@pytest.mark.parametrize(
    "line",
    [
        f"{SNP} --ovmf amdsev.fd",
        "--mode seves --vcpus 3 --vmm-type ec2 --ovmf amdsev.fd",
        f"{SVSM} --vars-file vars.fd",
    ],
)
def test_dumps_the_vmsas_that_sev_snp_measure_dumps(
    line: str, ours: Run, theirs: Run, folder: Path
) -> None:
    dumps = []
    for run in (theirs, ours):
        assert run(*line.split(), "--dump-vmsa")[0] == 0
        dumps.append({path.name: path.read_bytes() for path in folder.glob("vmsa*.bin")})
        for name in dumps[-1]:
            (folder / name).unlink()
    assert dumps[0] == dumps[1]
    assert len(dumps[0]) in (2, 3)


def test_a_list_of_vcpu_counts_prints_a_digest_per_line(ours: Run) -> None:
    status, out, err = ours(
        "--mode=snp", "--vcpus=4,1,2", "--vcpu-type=EPYC", "--ovmf=amdsev.fd"
    )
    single = [
        snp_calc_launch_digest(n, 0x800F12, "amdsev.fd", None, None, None, 1, "").hex()
        for n in (4, 1, 2)
    ]
    assert (status, out.split(), err) == (0, single, "")


def test_json_gives_an_object_per_line(ours: Run) -> None:
    argv = ["--mode", "snp", "--vcpus", "1,2", "--vcpu-type", "EPYC", "--ovmf", "amdsev.fd"]
    status, out, _ = ours(*argv, "--json")
    objects = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(o["vcpus"], o["mode"], o["vmm_type"], o["vcpu_sig"]) for o in objects] == [
        (1, "snp", "QEMU", 0x800F12),
        (2, "snp", "QEMU", 0x800F12),
    ]
    assert [o["launch_digest"] for o in objects] == ours(*argv)[1].split()


def test_json_of_the_modes_without_vcpus(ours: Run) -> None:
    sev = ["--mode", "sev", "--ovmf", "amdsev.fd"]
    shown = json.loads(ours(*sev, "--json")[1])
    assert (shown["launch_digest"], shown["vcpus"]) == (ours(*sev)[1].strip(), None)
    image_only = ["--mode", "snp:ovmf-hash", "--ovmf", "amdsev.fd"]
    shown = json.loads(ours(*image_only, "--json")[1])
    assert shown == {"mode": "snp:ovmf-hash", "snp_ovmf_hash": ours(*image_only)[1].strip()}


BAD = {
    "--ovmf amdsev.fd": "--mode",
    f"{SNP}": "--ovmf",
    "--mode tdx --ovmf amdsev.fd": "invalid choice: 'tdx'",
    f"{SNP} --ovmf missing.fd": "missing.fd: No such file or directory",
    f"{SNP} --ovmf .": ".: Is a directory",
    f"{SNP} --ovmf amdsev.fd/x": "amdsev.fd/x: Not a directory",
    f"{SNP} --ovmf /dev/null": "/dev/null: the image is empty",
    f"{SNP} --ovmf /dev/zero": "/dev/zero: the image is larger than 16 MiB",
    f"{SNP} --ovmf text": "text: the image has 13 bytes, not a multiple of 4096",
    f"{SNP} --ovmf zeros": "zeros: not an OVMF image, or a truncated one",
    f"{SNP} --ovmf truncated.fd": "truncated.fd: not an OVMF image, or a truncated one",
    f"{SNP} --ovmf overlap.fd": "overlap.fd: SECRETS section 0x801000..0x802000 overlaps SEC_MEM",
    "--mode seves --vcpus 1 --vcpu-type EPYC --ovmf zeros": "zeros: not an OVMF image",
    "--mode sev --ovmf text": "text: the image has 13 bytes",
    "--mode sev --ovmf overlap.fd": "overlap.fd: SECRETS section",
    "--mode snp:ovmf-hash --ovmf text": "text: the image has 13 bytes",
    "--mode snp --vcpu-type EPYC --ovmf amdsev.fd": "mode snp needs --vcpus",
    "--mode snp --vcpus 1 --ovmf amdsev.fd": "mode snp needs --vcpu-type",
    "--mode snp --vcpus 0 --vcpu-type EPYC --ovmf amdsev.fd": "--vcpus: a guest has 1 to 4096 vCPUs",
    "--mode snp --vcpus -1 --vcpu-type EPYC --ovmf amdsev.fd": "--vcpus",
    "--mode snp --vcpus 4097 --vcpu-type EPYC --ovmf amdsev.fd": "not 4097",
    f"--mode snp --vcpus {'9' * 30} --vcpu-type EPYC --ovmf amdsev.fd": "1 to 4096",
    f"--mode snp --vcpus {'9' * 5000} --vcpu-type EPYC --ovmf amdsev.fd": "is not a number",
    "--mode snp --vcpus four --vcpu-type EPYC --ovmf amdsev.fd": "'four' is not a number",
    "--mode snp --vcpus 1,,2 --vcpu-type EPYC --ovmf amdsev.fd": "'1,,2' is not a number",
    "--mode snp --vcpus 1 --vcpu-type epyc --ovmf amdsev.fd": "unknown vCPU type 'epyc' (there is EPYC,",
    "--mode snp --vcpus 1 --vcpu-sig x --ovmf amdsev.fd": "--vcpu-sig: 'x' is not a number",
    "--mode snp --vcpus 1 --vcpu-sig 0 --ovmf amdsev.fd": "mode snp needs --vcpu-type",
    "--mode snp --vcpus 1 --vcpu-sig=-1 --ovmf amdsev.fd": "-0x1 is not a CPUID signature",
    "--mode snp --vcpus 1 --vcpu-sig 0x100000000 --ovmf amdsev.fd": "is not a CPUID signature",
    "--mode snp --vcpus 1 --vcpu-family 25 --ovmf amdsev.fd": "needs --vcpu-model and --vcpu-stepping",
    "--mode snp --vcpus 1 --vcpu-family 271 --vcpu-model 0 --vcpu-stepping 0 --ovmf amdsev.fd": "no CPUID",
    "--mode snp --vcpus 1 --vcpu-family x --ovmf amdsev.fd": "--vcpu-family: invalid int value: 'x'",
    f"{SNP} --ovmf amdsev.fd --vmm-type xen": "unknown VMM type 'xen' (there is QEMU, ec2, gce)",
    f"{SNP} --ovmf amdsev.fd --initrd initrd": "--initrd needs --kernel",
    f"{SNP} --ovmf amdsev.fd --append quiet": "--append needs --kernel",
    f"{SNP} --ovmf amdsev.fd --kernel missing": "missing: No such file",
    f"{SNP} --ovmf amdsev.fd --kernel .": ".: Is a directory",
    f"{SNP} --ovmf amdsev.fd --kernel kernel --initrd missing": "missing: No such file",
    f"{SNP} --ovmf amdsev.fd --kernel=": "'': No such file",
    f"{SNP} --ovmf amdsev.fd --kernel /proc/self/mem": "/proc/self/mem: Input/output error",
    f"{SNP} --ovmf ovmfx64.fd --kernel kernel": "ovmfx64.fd: the firmware has no KERNEL_HASHES section",
    "--mode sev --ovmf ovmfx64.fd --kernel kernel": "the firmware has no hash table area",
    "--mode sev --ovmf zeros --kernel kernel": "the firmware has no hash table area",
    "--mode seves --vcpus 1 --vcpu-type EPYC --ovmf ovmfx64.fd --kernel kernel": "no hash table area",
    f"{SNP} --ovmf amdsev.fd --guest-features 1g": "--guest-features: '1g' is not a number",
    f"{SNP} --ovmf amdsev.fd --guest-features -1": "--guest-features",
    f"{SNP} --ovmf amdsev.fd --guest-features=-1": "does not fit into 64 bits",
    f"{SNP} --ovmf amdsev.fd --guest-features 0x10000000000000000": "does not fit into 64 bits",
    f"{SNP} --ovmf amdsev.fd --output-format octal": "invalid choice: 'octal'",
    f"{SNP} --ovmf amdsev.fd --snp-ovmf-hash xyz": "--snp-ovmf-hash is not 48 bytes in hex",
    f"{SNP} --ovmf amdsev.fd --snp-ovmf-hash abcd": "--snp-ovmf-hash is not 48 bytes in hex",
    f"--mode seves --vcpus 1 --vcpu-type EPYC --ovmf amdsev.fd --snp-ovmf-hash {'a1' * 48}": "mode snp only",
    "--mode sev --ovmf amdsev.fd --dump-vmsa": "no VMSA is measured in mode sev",
    f"{SNP} --ovmf amdsev.fd --frobnicate": "unrecognized arguments: --frobnicate",
    f"{SNP} --ovmf amdsev.fd stray": "unrecognized arguments: stray",
    f"{SVSM}": "needs --svsm, and --vars-file or --vars-size",
    "--mode snp:svsm --ovmf ovmfx64.fd --vcpus 1 --vcpu-type EPYC --vars-size 4096": "needs --svsm",
    f"{SVSM} --vars-file missing": "missing: No such file",
    f"{SVSM} --vars-file missing --kernel kernel": "missing: No such file",
    f"{SVSM} --vars-file text": "OVMF_VARS of 13 bytes: not a number of 4K pages",
    f"{SVSM} --vars-size 0": "OVMF_VARS of 0 bytes",
    f"{SVSM} --vars-size 4G": "OVMF_VARS of 4294967296 bytes",
    f"{SVSM} --vars-size {0xFFFF_8000 - 0x1000}": "svsm.bin: an image of 0x8000 bytes cannot end at 0x1000",
    f"{SVSM} --vars-size huge": "--vars-size: 'huge' is not a size",
    f"{SVSM} --vars-size 4096 --vars-file vars.fd": "not allowed with argument",
    f"{SVSM} --vars-size 4096 --svsm amdsev.fd": "amdsev.fd: no SVSM info block in the footer table",
    f"{SVSM} --vars-size 4096 --svsm zeros": "zeros: not an OVMF image, or a truncated one",
    f"{SVSM} --vars-size 4096 --vmm-type ec2": "only QEMU launches an SVSM",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_gets_one_line_and_status_2(line: str, ours: Run) -> None:
    status, out, err = ours(*line.split())
    assert (status, out) == (2, "")
    assert err.startswith("softcvm measure: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert BAD[line] in err


@pytest.mark.parametrize("name", ["new\nline", "esc\x1b[31m", "byte\udcff", "空"])
def test_a_strange_file_name_still_gets_one_printable_line(name: str, ours: Run) -> None:
    status, _, err = ours(*SNP.split(), "--ovmf", name)
    assert status == 2
    assert err[:-1].isprintable()
    assert "No such file" in err


def test_vmsas_that_cannot_be_written_are_an_error(ours: Run, folder: Path) -> None:
    (folder / "vmsa1.bin").mkdir()
    status, out, err = ours(*SNP.split(), "--ovmf", "amdsev.fd", "--dump-vmsa")
    assert (status, out, err) == (2, "", "softcvm measure: vmsa1.bin: Is a directory\n")


def test_a_kernel_that_an_svsm_guest_does_not_measure_is_noted(ours: Run, theirs: Run) -> None:
    argv = f"{SVSM} --vars-size 4096 --kernel kernel".split()
    status, out, err = ours(*argv)
    assert (status, out) == theirs(*argv)[:2]
    assert err == "softcvm measure: note: mode snp:svsm measures no kernel\n"


def test_a_command_line_that_is_not_text_is_measured_as_its_bytes(folder: Path) -> None:
    argv = [sys.executable, "-m", "softcvm", "measure", *SNP.split(), "--ovmf", "amdsev.fd"]
    argv += ["--kernel", "kernel", "--append"]
    raw = subprocess.run([*argv, b"a=\xff"], capture_output=True, check=False, env=child_env())
    text = subprocess.run(
        [*argv, "a=\udcff"], capture_output=True, check=False, env=child_env()
    )
    assert raw.returncode == 0, raw.stderr
    assert raw.stdout == text.stdout


def child_env() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))


def test_the_options_know_the_modes_and_vmms_of_the_library() -> None:
    assert set(VMM_TYPES) == {vmm.value for vmm in VmmType}
    assert set(MODES) == {"sev", "seves", "snp", "snp:ovmf-hash", "snp:svsm"}


def test_all_options_of_sev_snp_measure_are_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sev-snp-measure", "--help"])
    with pytest.raises(SystemExit):
        outsider.main()
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert main(["measure", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(options) > 15
    assert {option for option in options if option not in shown} == set()
