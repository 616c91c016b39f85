"""`softcvm boot`: its report, its JSON, its exit statuses, and that it always does the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softcvm.abi.ovmf import RESET_BLOCK_GUID
from softcvm.abi.rmp import PageState
from softcvm.cli import main as cli
from softcvm.guest import firmware
from tests.vmm import images

SMALL = ("--memory", "64M")
PYTHONPATH = os.pathsep.join(p for p in sys.path if p)


def run(*argv: str, seed: str = "0") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "softcvm", "boot", *argv],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=PYTHONPATH, PYTHONHASHSEED=seed),
        check=False,
        timeout=100,
    )


def booted(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["boot", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_boot_without_arguments_boots_the_builtin_firmware(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = booted(capsys)
    assert "equal to what `softcvm measure` predicts" in out
    assert "0 broken" in out
    assert "| done" in out


def test_boot_of_a_real_ovmf_prints_the_digest_that_measure_prints(
    capsys: pytest.CaptureFixture[str], ovmf_image: Path
) -> None:
    options = ("--vcpus", "4", "--vcpu-type", "EPYC-Milan")
    found = json.loads(booted(capsys, str(ovmf_image), *options, *SMALL, "--json"))
    assert cli.main(["measure", "--mode", "snp", *options, "--ovmf", str(ovmf_image)]) == 0
    assert capsys.readouterr().out.strip() == found["launch_digest"]


def test_json_has_these_keys_and_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(booted(capsys, "--guest", "scripted", "--vcpus", "2", *SMALL, "--json"))
    assert list(found) == [
        "launch_digest",
        "vcpus",
        "memory_bytes",
        "pages",
        "counters",
        "invariants",
        "leaked_pages",
    ]
    assert len(bytes.fromhex(found["launch_digest"])) == 48
    assert (found["vcpus"], found["memory_bytes"]) == (2, 64 << 20)
    assert list(found["pages"]) == ["launch", "peak", "after_teardown"]
    states = {state.name for state in PageState}
    for census in found["pages"].values():
        assert set(census) <= states
        assert sum(census.values()) == 1 << 40 - 12
    assert set(found["counters"]) >= {
        "ioctls",
        "exits",
        "rmpupdate",
        "psmash",
        "pvalidate",
        "zaps",
        "tlb_flushes",
        "cache_flushes",
        "bytes_zeroed",
        "bytes_encrypted",
    }
    assert all(found["counters"][name] > 0 for name in ("psmash", "zaps", "cache_flushes"))
    assert found["invariants"]
    for invariant in found["invariants"]:
        assert set(invariant) == {"name", "checked", "held"}
        assert invariant["held"] is True
    assert found["leaked_pages"] == 0


@pytest.mark.parametrize("cpu", ["milan", "genoa"])
@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("order", ["0", "9"])
@pytest.mark.parametrize("guest", ["payload", "scripted"])
def test_every_host_boots(
    capsys: pytest.CaptureFixture[str], cpu: str, kernel: str, order: str, guest: str
) -> None:
    host = ("--cpu", cpu, "--kernel", kernel, "--gmem-order", order)
    assert "| done\n" in booted(capsys, *SMALL, "--guest", guest, *host)


def test_kernel_hashes_are_part_of_the_digest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(b"kernel")
    options = ("--append", "quiet")
    with_hashes = json.loads(
        booted(capsys, *SMALL, "--json", "--kernel-image", str(kernel), *options)
    )
    image = tmp_path / "builtin.fd"
    image.write_bytes(firmware.build())
    measured = ("--mode", "snp", "--vcpus", "1", "--vcpu-type", "EPYC-v4", "--ovmf", str(image))
    assert cli.main(["measure", *measured, "--kernel", str(kernel), *options]) == 0
    assert capsys.readouterr().out.strip() == with_hashes["launch_digest"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"a\nb", "a\\nb"),
        (b"\x1b[31m", "\\x1b[31m"),
        (b"\xff", "\\udcff"),
        ("\u732b".encode(), ""),
    ],
)
def test_a_firmware_of_any_name_boots_and_is_named_on_one_line(
    tmp_path: Path, name: bytes, shown: str, encoding: str
) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(firmware.build())
    done = subprocess.run(
        [sys.executable, "-m", "softcvm", "boot", path, *SMALL],
        capture_output=True,
        env=dict(os.environ, PYTHONPATH=PYTHONPATH, PYTHONIOENCODING=encoding),
        check=False,
        timeout=100,
    )
    lines = done.stdout.decode(encoding).splitlines()
    shown = shown or {"utf-8": "\u732b", "ascii": "\\u732b"}[encoding]
    assert (done.returncode, done.stderr) == (0, b"")
    assert lines[1] == f"guest         1 vCPU, 64M, {tmp_path}/{shown}"


def test_a_boot_that_gives_up_says_why_and_ends_with_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["boot", "--guest", "scripted", *SMALL, "--no-implicit-conversion"]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "implicit conversion is off" in err
    assert "BROKEN guest_passed_its_own_checks" in out


def test_a_launch_that_fails_says_why_and_ends_with_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["boot", *SMALL, "--cpu", "milan", "--vcpu-type", "EPYC-Genoa"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "CPUID" in err


def no_metadata() -> bytes:
    return images.IMAGES["no metadata"]()


def truncated_metadata() -> bytes:
    data = bytearray(firmware.build())
    at = data.index(b"ASEV")
    data[at + 12 : at + 16] = (10_000).to_bytes(4, "little")
    return bytes(data)


def overlapping_metadata() -> bytes:
    data = bytearray(firmware.build())
    at = data.index(b"ASEV") + 16
    data[at + 12 : at + 16] = data[at : at + 4]  # the second section where the first is
    return bytes(data)


def no_reset_block() -> bytes:
    data = bytearray(firmware.build())
    data[data.index(RESET_BLOCK_GUID)] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(no_reset_block(), "no SEV-ES reset block", id="no reset block"),
        pytest.param(b"", "empty", id="empty file"),
        pytest.param(b"hello", "multiple of 4096", id="not pages"),
        pytest.param(bytes(8192), "not an OVMF image", id="zeros"),
        pytest.param(no_metadata(), "no SEV metadata", id="no metadata"),
        pytest.param(truncated_metadata(), "metadata", id="truncated metadata"),
        pytest.param(overlapping_metadata(), "overlaps", id="overlapping metadata"),
        pytest.param(firmware.build()[4096:-4096], "not an OVMF image", id="truncated image"),
    ],
)
def test_a_bad_image_gets_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: bytes, says: str
) -> None:
    path = tmp_path / "bad.fd"
    path.write_bytes(data)
    refused(capsys, [str(path)], says, "bad.fd")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/no/such/file.fd"], "/no/such/file.fd: No such file"),
        (["/"], "/: "),
        (["--memory", "0"], "too small"),
        (["--memory", "4K"], "too small"),
        (["--memory", "1M"], "too small"),
        (["--memory", "8M"], "outside the 8M of RAM"),
        (["--memory", "10M"], "too small"),
        (["--memory", "65537"], "4K pages"),
        (["--memory", "1G1"], "not a size"),
        (["--memory", "-1G"], "memory"),
        (["--memory", "64T"], "46 bits"),
        (["--cpu", "milan", "--memory", "8T"], "43 bits"),
        (["--memory", "999999P"], "46 bits"),
        (["--vcpus", "0"], "at least one vCPU"),
        (["--vcpus", "-3"], "at least one vCPU"),
        (["--vcpus", "many"], "not a number"),
        (["--vcpus", "1025"], "at most 1024"),
        (["--vcpu-type", "EPYC-Bologna"], "EPYC-Bologna"),
        (["--cpu", "naples"], "milan, genoa"),
        (["--kernel", "2.6"], "6.12, 6.18, 7.3"),
        (["--gmem-order", "4"], "0 (4K) or 9 (2M)"),
        (["--guest-features", "0x20"], "SNP"),
        (["--initrd", "x"], "--kernel-image"),
        (["--append", "x"], "--kernel-image"),
        (["--kernel-image", "/no/such/kernel"], "/no/such/kernel"),
        (["--trace", "/no/such/folder/trace"], "/no/such/folder/trace"),
        (["--trace", ""], "'': No such file"),
        (["--guest-features", "0x10000000000000001"], "does not fit into 64 bits"),
        (["--guest-features=-1"], "does not fit into 64 bits"),
        (["--kernel-image", ""], "'': No such file"),
        (["--kernel-image", "/proc/self/mem"], "/proc/self/mem: Input/output error"),
        (["one.fd", "two.fd"], "two.fd"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    refused(capsys, argv, says)


def test_kernel_hashes_on_firmware_without_a_table_for_them_are_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plain.fd"
    path.write_bytes(images.IMAGES["OvmfX64"]())
    refused(capsys, [str(path), "--kernel-image", str(path)], "hashes of a kernel", "plain.fd")


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], *says: str) -> None:
    assert cli.main(["boot", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("softcvm boot: ")
    for text in says:
        assert text in err


def test_the_event_stream_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    streams = []
    for seed in ("0", "12345"):
        path = tmp_path / f"trace{seed}"
        done = run("--vcpus", "2", *SMALL, "--trace", str(path), "--json", seed=seed)
        assert done.returncode == 0, done.stderr
        streams.append((path.read_bytes(), done.stdout))
    assert streams[0] == streams[1]
    lines = streams[0][0].decode().splitlines()
    assert len(lines) > 1000
    assert {"RmpTransition", "FirmwareCommand", "Ioctl"} <= {
        json.loads(line)["event"] for line in lines
    }


def test_a_trace_that_finds_no_room_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["boot", *SMALL, "--trace", "/dev/full"]) == 1
    assert capsys.readouterr() == ("", "softcvm boot: /dev/full: No space left on device\n")


def test_a_trace_that_nobody_reads_is_not_taken_for_a_failed_launch() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*SMALL, "--trace", f"/proc/{os.getpid()}/fd/{writer}")
    os.close(writer)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"/fd/{writer}: Broken pipe\n")
    assert done.stderr.count("\n") == 1


def test_an_interrupt_ends_with_130_and_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from softcvm.vmm.vmm import Vmm

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Vmm, "run", interrupted)
    trace = tmp_path / "trace"
    assert cli.main(["boot", *SMALL, "--trace", str(trace)]) == 130
    assert capsys.readouterr() == ("", "")
    assert trace.read_text().endswith("}\n")


def test_the_payload_prints_through_its_ghcb_and_asks_to_be_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = booted(capsys, "--memory", "64M")
    console = [
        line.split("| ")[1] for line in out.splitlines() if line.startswith(" " * 14 + "|")
    ]
    assert console == [
        "payload up in 64-bit mode: C-bit 51, hypervisor features 3",
        "accepted 8 2M pages and 256 4K pages, wrote and read back all; size mismatches: 0",
        "shared a page with a device and took it back",
        "secrets page version 3, with a key for VMPL0",
        "done",
    ]


def test_the_payload_accepts_2m_pages_by_4k_where_the_host_has_no_larger_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = booted(capsys, "--memory", "64M", "--gmem-order", "0", "--json")
    counters = json.loads(out)["counters"]
    # 8 refused as 2M, 8 times 512; 256; one given up and taken back; the GHCB given up
    assert counters["pvalidate"] == 8 + 8 * 512 + 256 + 2 + 1


def test_the_payload_finds_a_device_that_does_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softcvm.vmm.devices.Bounce.write", lambda self, value, size: None)
    assert cli.main(["boot", "--memory", "64M"]) == 1
    assert "PAYLOAD_DEVICE" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--memory", "16M"], "--memory 16M is too small: the payload needs 32M"),
        (["--memory", "512G"], "machine code runs in guests up to 256G"),
        (["--guest", "payload", "x.fd"], "it is in the built-in firmware only"),
    ],
)
def test_a_payload_that_cannot_run_is_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert cli.main(["boot", *arguments]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1
