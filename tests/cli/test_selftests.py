"""`softcvm selftests`: judged on programs whose ends are known, and on the kernel's own where they are built."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softcvm.cli.main import main
from softcvm.cli.selftests_build import NEEDS, PACKAGE, cached_tree, find_tests
from softcvm.cli.selftests_run import _judge, pick
from tests.conftest import Require

KVM = Path("tools/testing/selftests/kvm")
ASSERTION = """\
Random seed: 0x6b8b4567
==== Test Assertion Failure ====
  x86_64/some_test.c:107: rc == 0
  pid=7 tid=7 errno=0 - Success
     1\t0x0000000000401a2b: main at some_test.c:5
     2\t (inlined by) main at some_test.c:5
  KVM allowed an invalid bit
"""
ALWAYS = (
    "guest_memfd_test",
    "pre_fault_memory_test",
    "private_mem_kvm_exits_test",
    "sev_init2_tests",
    "sev_migrate_tests",
    "sev_smoke_test",
    "hwcr_msr_test",
    "set_sregs_test",
)
"""Short tests."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A kernel tree with four programs that end as selftests do."""
    folder = tmp_path / KVM
    (folder / "x86_64").mkdir(parents=True)
    (folder / "Makefile").touch()
    ends = {
        "good_test": "exit 0",
        "x86_64/skipping_test": "echo '1..0 # SKIP - Requirement not met: luck'; exit 4",
        "bad_test": f"cat <<'END'\n{ASSERTION}END\nexit 254",
        "slow_test": "sleep 60",
    }
    for name, body in ends.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def test_each_end_is_told_with_the_tests_own_reason(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["selftests", "--source", str(tree), "--timeout", "5", "--json", "--jobs", "4"]
    )
    told = json.loads(capsys.readouterr().out)
    assert status == 1
    ends = {test["name"]: (test["outcome"], test["why"]) for test in told["tests"]}
    assert ends["good_test"] == ("pass", "")
    assert ends["skipping_test"] == ("skip", "Requirement not met: luck")
    assert ends["bad_test"] == ("fail", "some_test.c:107: rc == 0; KVM allowed an invalid bit")
    assert ends["slow_test"][0] == "time"
    assert told["counts"] == {"pass": 1, "skip": 1, "fail": 1, "time": 1}


def test_only_a_run_in_which_all_pass_succeeds(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftests", "--source", str(tree), "good_test"]) == 0
    assert "1 runs: 1 passed, 0 skipped, 0 failed" in capsys.readouterr().out
    assert main(["selftests", "--source", str(tree), "skipping_test"]) == 1
    out = capsys.readouterr().out
    assert "[1/1] skip" in out
    assert "Requirement not met: luck" in out


def test_ctrl_c_leaves_nothing_behind(tree: Path) -> None:
    argv = [sys.executable, "-m", "softcvm", "selftests", "--source", str(tree), "slow_test"]
    runner = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not _named(tree) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _named(tree), "the slow test never started"
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=20)
    assert runner.returncode == 130
    assert not _named(tree)


def _named(tree: Path) -> list[int]:
    """Processes other than the runner that carry the slow test's path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(tree / KVM / "slow_test").encode() in words:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such_test"], "no_such_test"),
        (["--kernel", "5.4"], "6.12"),
        (["--jobs", "0"], "positive"),
        (["--timeout", "x"], "--timeout"),
        (["--build"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tree: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["selftests", "--source", str(tree), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_folder_without_selftests_is_no_kernel_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftests", "--source", str(tmp_path)]) == 2
    assert "no kernel tree" in capsys.readouterr().err


def test_without_debians_package_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("softcvm.cli.selftests_build.TARBALL", tmp_path / "none.tar.xz")
    assert main(["selftests"]) == 1
    assert PACKAGE in capsys.readouterr().err


def test_conversions_are_run_with_several_memslots_too(tree: Path) -> None:
    built = {"private_mem_conversions_test": tree, "guest_memfd_test": tree}
    titles = [test.title for test in pick(built, [])]
    assert titles == [
        "private_mem_conversions_test",
        "private_mem_conversions_test -n 4 -m 2",
        "guest_memfd_test",
    ]


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (125, "softcvm exec: not modelled: X\n(docs)", ("fail", "not modelled: X")),
        (-9, "going on\n", ("fail", "signal 9: going on")),
        (1, "", ("fail", "exit status 1: nothing said")),
        (4, "odd words", ("skip", "odd words")),
    ],
)
def test_an_end_is_explained(status: int, text: str, expected: tuple[str, str]) -> None:
    assert _judge(status, text, 1.0) == expected


@pytest.mark.parametrize("name", ALWAYS)
def test_the_kernels_own_test_passes(
    require: Require, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    built = find_tests(cached_tree())
    require("selftests", name in built, f"softcvm selftests --build (needs {PACKAGE}, {NEEDS})")
    status = main(["selftests", "--jobs", "1", name])
    assert status == 0, capsys.readouterr().out
