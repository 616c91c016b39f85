"""Caught programs: what their system calls cost, and two of the kernel's selftests' loads."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from bench.sides import Bench, Side, Unavailable
from softcvm.cli.selftests_build import cached_tree, find_tests

__all__ = ("BENCHES",)

_BUILD = TemporaryDirectory(prefix="softcvm-bench-")
_CONVERSIONS = "private_mem_conversions_test"
_CONVERSIONS_SECONDS = 6.0
_ALL_SLOTS = 32764
"""KVM_CAP_NR_MEMSLOTS."""


@cache
def _program() -> Path:
    source, program = Path(__file__).with_name("exec_calls.c"), Path(_BUILD.name) / "exec_calls"
    try:
        subprocess.run(["cc", "-O2", "-o", program, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{source.name} needs a C compiler: {error}") from error
    return program


def _softcvm(*command: str) -> list[str]:
    return [str(Path(sys.executable).parent / "softcvm"), "exec", "--", *command]


def _printed(command: list[str]) -> Side:
    """What a command prints: seconds."""

    def side() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
        return float(done.stdout)

    return side


def _native(*words: str) -> Side:
    return _printed([str(_program()), *words])


def _caught(*words: str) -> Side:
    return _printed(_softcvm(str(_program()), *words))


def _conversions() -> tuple[Side, Side]:
    test = find_tests(cached_tree()).get(_CONVERSIONS)
    if test is None:
        raise Unavailable(f"no {_CONVERSIONS}: `softcvm selftests --build` builds it")
    command = _softcvm(str(test))

    def side() -> float:
        begun = perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{_CONVERSIONS} ended with {done.returncode}: {done.stderr}")
        return perf_counter() - begun

    return side, lambda: _CONVERSIONS_SECONDS


BENCHES = (
    Bench(
        "exec-ioctl",
        "a caught program's ioctl of /dev/kvm",
        "a byte there and back between two processes, over a Unix socket",
        1.5,
        lambda: (_caught("ioctl"), _native("pingpong")),
    ),
    Bench(
        "exec-syscall",
        "a caught program's system call that is not softcvm's",
        "the same call of a program that runs freely",
        1.6,
        lambda: (_caught("syscall"), _native("syscall")),
    ),
    Bench(
        "exec-conversions",
        f"{_CONVERSIONS} under softcvm exec",
        f"{_CONVERSIONS_SECONDS:g} s",
        1.0,
        _conversions,
        rounds=3,
    ),
    Bench(
        "exec-slots",
        "a memory slot, as a caught program adds all that a VM can have",
        "a slot of a quarter as many",
        1.3,
        lambda: (
            _caught("slots", str(_ALL_SLOTS)),
            _caught("slots", str(_ALL_SLOTS // 4)),
        ),
        rounds=3,
    ),
)
