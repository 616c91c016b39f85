"""The `softcvm` command itself: help, versions, exit statuses, and what it does not import."""

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import softcvm
from softcvm.cli import main as cli
from softcvm.cli.errors import OutputError, UsageError
from softcvm.sim.errors import Unmodelled

ROOT = Path(__file__).parents[2]


def run(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "softcvm", *argv],
        capture_output=True,
        text=True,
        env=child_env(),
        check=False,
        timeout=60,
    )


def child_env() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))


def test_help_names_each_command_and_shows_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, (_, line) in cli.COMMANDS.items():
        assert f"\n  {name} " in out
        assert line in out
    assert "example:\n  softcvm boot" in out


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert softcvm.__version__ == project["version"]
    assert cli.main(["--version"]) == 0
    assert cli.main(["measure", "--version"]) == 0
    assert capsys.readouterr().out == f"softcvm {softcvm.__version__}\n" * 2


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "a command is needed: boot, measure"),
        (["bot"], "no command 'bot': there is boot, measure"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["no\nsuch"], "no command 'no\\\\nsuch'"),
    ],
)
def test_a_wrong_command_gets_one_line_and_status_2(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("softcvm: ")
    assert text.replace("\\\\", "\\") in err
    assert err.count("\n") == 1


class Fake:
    """A sub-command that ends as it is told."""

    DESCRIPTION = EXAMPLES = ""

    def __init__(self, end: BaseException) -> None:
        self.end = end

    def add_arguments(self, parser: object) -> None: ...

    def run(self, args: object) -> int:
        raise self.end


@pytest.mark.parametrize(
    ("end", "status", "err"),
    [
        (UsageError("x: bad\nfile"), 2, "softcvm fake: x: bad\\nfile\n"),
        (
            Unmodelled("KVM_SEV_SEND_START"),
            1,
            "softcvm fake: not modelled: KVM_SEV_SEND_START\n",
        ),
        (OutputError("trace: No space left"), 1, "softcvm fake: trace: No space left\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_end_of_a_command_is_its_exit_status(
    end: BaseException,
    status: int,
    err: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "fake_command", Fake(end))
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", ""))
    assert cli.main(["fake"]) == status
    assert capsys.readouterr() == ("", err)


@pytest.mark.parametrize(
    "bug", [ValueError("a bug"), OSError("a bug"), AssertionError("a bug")]
)
def test_a_bug_is_not_hidden(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fake_command", Fake(bug))
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", ""))
    with pytest.raises(type(bug), match="a bug"):
        cli.main(["fake"])


def test_the_module_runs_as_a_command() -> None:
    done = run("measure", "--mode", "sev", "--ovmf", "/nonexistent")
    assert done.returncode == 2
    assert done.stderr == "softcvm measure: /nonexistent: No such file or directory\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_the_command_quietly(
    unbuffered: str, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    reader, writer = os.pipe()
    os.close(reader)
    argv = ["measure", "--mode", "sev", "--ovmf", str(tmp_path / "image")]
    with subprocess.Popen(
        [sys.executable, "-m", "softcvm", *argv],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**child_env(), "PYTHONUNBUFFERED": unbuffered},
    ) as child:
        os.close(writer)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (141, b"")


def in_shell(line: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """`line` with $softcvm for the command."""
    return subprocess.run(
        ["sh", "-c", line.replace("$softcvm", f"'{sys.executable}' -m softcvm")],
        capture_output=True,
        text=True,
        env={**child_env(), **env},
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        ("--help", ""),  # argparse itself is silent about an unbuffered one
        ("measure --version", ""),
        ("measure --mode sev --ovmf $image", ""),
        ("measure --mode sev --ovmf $image", "1"),
    ],
)
def test_output_that_finds_no_room_is_told_in_one_line(
    words: str, unbuffered: str, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    done = in_shell(
        f"$softcvm {words} >/dev/full", PYTHONUNBUFFERED=unbuffered, image=str(image)
    )
    assert done.returncode == 1
    assert done.stderr.startswith("softcvm")
    assert done.stderr.endswith(": standard output: No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("$softcvm --help >&-", 0),
        ("$softcvm boot --help >&- 2>&-", 0),
        ("$softcvm boot /nonexistent 2>&-", 2),
        ("$softcvm boot /nonexistent <&- >&- 2>&-", 2),
        ("$softcvm boot /nonexistent 2>/dev/full", 2),
        ("$softcvm boot --memory 64M >&- 2>&-", 0),
        ("$softcvm boot --memory 64M --json >/dev/null 2>&-", 0),
    ],
)
def test_streams_that_are_closed_or_full_do_not_change_the_exit_status(
    line: str, status: int
) -> None:
    done = in_shell(line)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children begin with SIGINT's default action, also where this runs in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_command_ends_without_a_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "firmware"
    os.mkfifo(fifo)
    argv = [sys.executable, "-m", "softcvm", "measure", "--mode", "sev", "--ovmf", str(fifo)]
    with (
        subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_env()
        ) as child,
        fifo.open("wb"),  # this opens when the command comes to reading it, and waits
    ):
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"")


# What a user waits for who only asks for help, and what costs as much as all of Python's own start.
NOT_FOR_HELP = (
    "typing dataclasses uuid ctypes pathlib json hashlib inspect contextlib subprocess "
    "cryptography unicorn rich numpy softcvm.vmm softcvm.machine softcvm.kernel softcvm.hw"
)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["measure", "--help"]])
def test_help_imports_nothing_it_can_do_without(argv: list[str]) -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from softcvm.cli.main import main\n"
        f"main({argv!r})\n"
        f"print(sorted((set(sys.modules) - before) & set({NOT_FOR_HELP.split()!r})), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        env=child_env(),
        check=True,
    )
    assert done.stderr.strip() == "[]"


def test_the_packages_names_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, softcvm\n"
        "assert set(softcvm.__all__) <= set(dir(softcvm))\n"
        "assert [m for m in sys.modules if m.startswith('softcvm.')] == []\n"
        "from softcvm import HostSignal, Sys\n"
        "import softcvm.abi.sys as home\n"
        "assert Sys is home.Sys and HostSignal is home.HostSignal and softcvm.Sys is Sys\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=child_env())
    with pytest.raises(AttributeError, match="has no attribute 'Frobnicate'"):
        _ = softcvm.Frobnicate
