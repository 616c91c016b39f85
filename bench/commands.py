"""Start-up of the commands, as whole processes."""

import subprocess
import sys
from pathlib import Path

from bench.sides import Bench, Side, Unavailable, timed

__all__ = ("BENCHES",)


def _script(name: str) -> list[str]:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise Unavailable(f"{path}: not installed in this environment")
    return [str(path)]


def _run(command: list[str]) -> Side:
    def call() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return timed(call, repeat=3)


def _help(*words: str) -> tuple[Side, Side]:
    ours = [*_script("softcvm"), *words, "--help"]
    return _run(ours), _run([*_script("sev-snp-measure"), "--help"])


BENCHES = (
    Bench("help", "softcvm --help", "sev-snp-measure --help", 1.0, _help),
    Bench(
        "measure-help",
        "softcvm measure --help",
        "sev-snp-measure --help",
        1.0,
        lambda: _help("measure"),
    ),
)
