"""Runs of the hostile program: one under `softcvm exec --check`, and as many as fit into some seconds."""

import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from errno import errorcode
from pathlib import Path
from time import monotonic

from softcvm.uapi.numbers import ioctl_name

__all__ = ("Outcome", "Report", "Run", "run_for", "run_once")

_ERRNOS, _THREADS, _LAST = 136, 4, 16
_HEADER = (Path(__file__).parent / "hostile.h").read_text()
_WHATS: list[str] = re.findall(r'"([^"]+)"', _HEADER.split("#define NAMES", 1)[1])
_COUNTS_SIZE = 8 * len(_WHATS) * _ERRNOS
_TALLY_SIZE = _COUNTS_SIZE + 8 * _THREADS * (1 + 4 * _LAST)
_SHOWN = 16
_GRACE = 60.0
"""Seconds after a run's end in which softcvm must have ended too."""


class Outcome(Enum):
    ENDED = "ended well"
    UNMODELLED = "asked for something that is not modelled"
    FAILED = "failed"
    HUNG = "hung"


@dataclass
class Run:
    """One seed.  counts: how often each kind of call ended how (an errno's name, or "ok")."""

    seed: int
    outcome: Outcome
    text: str
    counts: Counter[tuple[str, str]]
    last: list[str]
    """Of each thread, its last calls; the very last one may not have been answered."""


@dataclass
class Report:
    """Many seeds."""

    first_seed: int
    seconds: float = 0.0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    unmodelled: Counter[str] = field(default_factory=Counter)
    failures: list[Run] = field(default_factory=list)

    def add(self, run: Run) -> None:
        self.outcomes[run.outcome] += 1
        self.counts += run.counts
        if run.outcome is Outcome.UNMODELLED:
            what = run.text.splitlines()[0].removeprefix("softcvm exec: not modelled: ")
            self.unmodelled[re.sub(r"0x[0-9a-f]+", "0x…", what)] += 1
        elif run.outcome is not Outcome.ENDED:
            self.failures.append(run)

    def as_text(self) -> str:
        lines = [
            f"{sum(self.counts.values())} calls in {sum(self.outcomes.values())} runs "
            f"from seed {self.first_seed}, {self.seconds:.0f} s: "
            + ", ".join(f"{n} {outcome.value}" for outcome, n in self.outcomes.most_common())
        ]
        kinds: dict[str, Counter[str]] = {}
        for (what, answer), n in self.counts.items():
            kinds.setdefault(what, Counter())[answer] += n
        for what, answers in sorted(kinds.items()):
            told = ", ".join(f"{answer} {n}" for answer, n in answers.most_common())
            lines.append(f"  {what}: {told}")
        if self.unmodelled:
            lines.append("not modelled:")
            lines += [f"  {n}  {text}" for text, n in self.unmodelled.most_common()]
        for run in self.failures:
            text = run.text.splitlines()
            if len(text) > 2 * _SHOWN:
                text[_SHOWN:-_SHOWN] = ["…"]
            lines += ["", f"seed {run.seed} {run.outcome.value}:", *text, *run.last]
        return "\n".join(lines)


def run_once(program: Path, seed: int, seconds: int = 10, calls: int = 20_000) -> Run:
    """Run one seed.  Every process that it leaves behind is a failure."""
    with tempfile.NamedTemporaryFile() as tally, tempfile.TemporaryFile("w+") as told:
        tally.truncate(_TALLY_SIZE)
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            "softcvm",
            "exec",
            "--check",
            "--",
        ]
        command += [str(program), str(seed), str(seconds), str(calls), tally.name]
        path = os.pathsep.join(p for p in sys.path if p)
        child = subprocess.Popen(
            command,
            env=dict(os.environ, PYTHONPATH=path),
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
        hung = False
        try:
            child.wait(seconds + _GRACE)
        except subprocess.TimeoutExpired:
            hung = True
            child.send_signal(signal.SIGABRT)  # says where its threads are
            child.wait()
        told.seek(0)
        text = told.read().strip()
        counts, last = _read(Path(tally.name).read_bytes())
    outcome = Outcome.HUNG if hung else _outcome(child.returncode, text)
    left = _left_of(child.pid)
    if left and not hung:
        outcome, text = Outcome.FAILED, f"{text}\nleft behind: {left}"
    return Run(seed, outcome, text, counts, last)


def run_for(program: Path, seconds: float, first_seed: int, *, verbose: bool = False) -> Report:
    """Seeds one after the other, until so many seconds are over."""
    report = Report(first_seed)
    begun = monotonic()
    seed = first_seed
    while monotonic() - begun < seconds:
        left = seconds - (monotonic() - begun)
        run = run_once(program, seed, max(1, min(10, round(left))))
        report.add(run)
        report.seconds = monotonic() - begun
        if verbose:
            calls = sum(run.counts.values())
            why = "" if run.outcome is Outcome.ENDED else f": {run.text.splitlines()[:1]}"
            print(
                f"{report.seconds:6.0f} s  seed {seed}  {calls} calls  {run.outcome.value}{why}",
                flush=True,
            )
        seed += 1
    return report


def _outcome(status: int, text: str) -> Outcome:
    if "Traceback" in text or "Fatal Python" in text:
        return Outcome.FAILED
    if status == 125 and text.startswith("softcvm exec: not modelled: "):
        return Outcome.UNMODELLED
    return Outcome.ENDED if status == 0 and not text else Outcome.FAILED


def _left_of(session: int) -> list[int]:
    """Processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def _read(tally: bytes) -> tuple[Counter[tuple[str, str]], list[str]]:
    """struct tally of hostile.h."""
    counts: Counter[tuple[str, str]] = Counter()
    numbers = struct.unpack_from(f"<{len(_WHATS) * _ERRNOS}Q", tally)
    for at, number in enumerate(numbers):
        if number:
            what, error = divmod(at, _ERRNOS)
            counts[_WHATS[what], errorcode.get(error, str(error)) if error else "ok"] = number
    last = []
    for thread in range(_THREADS):
        base = _COUNTS_SIZE + 8 * thread * (1 + 4 * _LAST)
        (at,) = struct.unpack_from("<Q", tally, base)
        for n in range(max(0, at - 4), at):
            what, fd, request, arg = struct.unpack_from(
                "<4Q", tally, base + 8 + 32 * (n % _LAST)
            )
            if what < len(_WHATS):
                last.append(
                    f"thread {thread}: {_WHATS[what]} {fd} {ioctl_name(request)} {arg:#x}"
                )
    return counts, last
