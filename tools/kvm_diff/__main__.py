"""python -m tools.kvm_diff: compare, report, and end with status 1 if anything differs."""

import argparse
import sys

from tools.kvm_diff.real import nearest_profile, real_kernel, why_not
from tools.kvm_diff.run import compare

__all__ = ("main",)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kvm_diff", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kernel", default=nearest_profile(), help="profile of the model")
    parser.add_argument("--stop-after", type=int, default=5, help="differences to shrink")
    args = parser.parse_args(argv)
    missing = why_not()
    if missing:
        print(f"nothing to compare with: {missing}", file=sys.stderr)
        return 2
    with real_kernel() as real:
        report = compare(real, args.kernel, args.seed, args.calls, args.stop_after)
    print(report.as_text())
    return 1 if report.differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
