"""python -m tools.hostile: run it, report, and end with status 1 if anything failed."""

import argparse
import sys
import tempfile
from pathlib import Path

from tools.hostile.build import build
from tools.hostile.run import run_for

__all__ = ("main",)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.hostile", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the first run (default 1)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        report = run_for(program, args.seconds, args.seed, verbose=True)
    print(report.as_text())
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
