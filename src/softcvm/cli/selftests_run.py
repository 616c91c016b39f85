"""One selftest under `softcvm exec`: started, waited for, and what became of it.

Owns the processes it starts: each test has a session of its own, which is ended when its time is up or the runner
is interrupted; what softcvm traces dies with it.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

__all__ = ("Result", "Test", "pick", "run_all")

_SKIPPED = 4
_KEPT = 1 << 20
"""Bytes of a test's output that are looked at."""
_GRACE = 3.0
_FURTHER_ARGUMENTS = {"private_mem_conversions_test": (("-n", "4", "-m", "2"),)}
"""Tests that are run once more, with these arguments."""
_SKIP = re.compile(
    r"# SKIP -? ?(.*)|^(?:__)?(?:Skipping|skip)[:, ]+(.*)", re.IGNORECASE | re.MULTILINE
)
_UNMODELLED = re.compile(r"^softcvm exec: (.*)", re.MULTILINE)
_ASSERTION = re.compile(r"^==== Test Assertion Failure ====\n\s*(.*)\n(.*)", re.MULTILINE)
_TRACE_LINE = re.compile(r"\s*\d+\t|\s*pid=|\s*\(stack")


@dataclass(frozen=True, slots=True)
class Test:
    name: str
    path: Path
    arguments: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return " ".join((self.name, *self.arguments))


@dataclass(frozen=True, slots=True)
class Result:
    """`outcome`: pass, skip, fail or time (its time was up); `why` is one line of the test's own words."""

    test: Test
    outcome: str
    status: int | None
    seconds: float
    why: str


def pick(built: dict[str, Path], names: Sequence[str]) -> list[Test]:
    """Every test, or those with these names, each with its further arguments.  KeyError: no such test."""
    return [
        Test(name, built[name], arguments)
        for name in (names or built)
        for arguments in ((), *_FURTHER_ARGUMENTS.get(name, ()))
    ]


def run_all(
    tests: Sequence[Test], options: Sequence[str], limit: float, jobs: int
) -> Generator[Result, None, None]:
    """Run them, at most `jobs` at a time; results as they come.  Closed early, it ends what runs."""
    running = _Running()
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = [pool.submit(_run, test, options, limit, running) for test in tests]
        for done in as_completed(waiting):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        running.kill()
        pool.shutdown(wait=True)


class _Running:
    """The processes that are there now, to be killed from another thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._over = False

    def start(self, argv: Sequence[str], output: int) -> "subprocess.Popen[bytes] | None":
        with self._lock:
            if self._over:
                return None
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            self._processes.add(process)
            return process

    def ended(self, process: "subprocess.Popen[bytes]") -> None:
        with self._lock:
            self._processes.discard(process)

    def kill(self) -> None:
        with self._lock:
            self._over = True
            processes = list(self._processes)
        for process in processes:
            _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """softcvm is told first, and ends its program; who does not listen is killed."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        os.killpg(process.pid, signal.SIGKILL)


def _run(test: Test, options: Sequence[str], limit: float, running: _Running) -> Result:
    program = [str(test.path), *test.arguments]
    argv = [sys.executable, "-m", "softcvm", "exec", *options, "--", *program]
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = running.start(argv, output.fileno())
        if process is None:
            return Result(test, "fail", None, 0.0, "interrupted")
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            _kill(process)
            process.wait()
        finally:
            running.ended(process)
        output.seek(0)
        text = output.read(_KEPT).decode(errors="replace")
    outcome, why = _judge(status, text, limit)
    return Result(test, outcome, status, time.monotonic() - began, why)


def _judge(status: int | None, text: str, limit: float) -> tuple[str, str]:
    """What the exit status says, and the test's own reason for it."""
    if status is None:
        return "time", f"no end after {limit:.0f} s; last words: {_last(text)}"
    if status == 0:
        return "pass", ""
    if status == _SKIPPED:
        said = _SKIP.search(text)
        return "skip", (said.group(1) or said.group(2)).strip() if said else _last(text)
    if ours := _UNMODELLED.search(text):
        return "fail", ours.group(1)
    if assertion := _ASSERTION.search(text):
        return "fail", _assertion(text[assertion.start() :])
    killed = f"signal {-status}" if status < 0 else f"exit status {status}"
    return "fail", f"{killed}: {_last(text)}"


def _assertion(text: str) -> str:
    """The place and condition, and the message below the stack."""
    lines = text.splitlines()
    message = [
        line.strip() for line in lines[2:12] if line.strip() and not _TRACE_LINE.match(line)
    ]
    return "; ".join([lines[1].strip().rsplit("/", 1)[-1], *message[:1]])


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "nothing said"
