"""The runner: picks benchmarks, prints a line for each, fails when a goal is missed.

Exit status: 0 when every goal was reached, 1 when one was missed or could not be measured, 2 for bad input.
"""

import argparse
import json
import sys

from bench import boot, commands, cpu, encryption, exec, kernel, measure, rmp
from bench.sides import Bench, Ratios, Unavailable, measured

__all__ = ("ALL", "main")

ALL: dict[str, Bench] = {
    bench.name: bench
    for module in (rmp, kernel, measure, encryption, cpu, exec, commands, boot)
    for bench in module.BENCHES
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__.splitlines()[0], epilog=f"names: {', '.join(ALL)}"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of A B (7)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per benchmark"
    )
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - ALL.keys())
    if unknown or args.rounds < 1:
        print(
            f"bench: {f'no benchmark {unknown[0]!r}' if unknown else '--rounds is at least 1'}",
            file=sys.stderr,
        )
        return 2
    good = True
    for bench in [ALL[name] for name in dict.fromkeys(args.names)] or ALL.values():
        try:
            result = measured(bench, args.rounds)
        except Unavailable as missing:
            print(f"bench: {bench.name}: {missing}", file=sys.stderr)
            good = False
            continue
        good &= result.reached
        print(_json(result) if args.json else _line(result), flush=True)
    return 0 if good else 1


def _line(result: Ratios) -> str:
    bench = result.bench
    verdict = "reached" if result.reached else "MISSED"
    spread = f"[{min(result.rounds):.3f} .. {max(result.rounds):.3f}]"
    return (
        f"{bench.name:<18} {result.median:8.3f} {spread:<20} <= {bench.goal:<5} {verdict}\n"
        f"{'':18} {bench.ours}\n{'':18} / {bench.peer}"
    )


def _json(result: Ratios) -> str:
    bench = result.bench
    return json.dumps(
        {
            "name": bench.name,
            "ours": bench.ours,
            "peer": bench.peer,
            "goal": bench.goal,
            "median": result.median,
            "rounds": list(result.rounds),
            "reached": result.reached,
        }
    )
