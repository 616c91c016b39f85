"""`softcvm selftests`: build the kernel's KVM selftests and run them, unmodified, on the software host."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from softcvm import __version__
from softcvm.cli.errors import OutputError, UsageError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from softcvm.cli.selftests_run import Result, Test

__all__ = ("DESCRIPTION", "EXAMPLES", "add_arguments", "run")

DESCRIPTION = """\
Run the kernel's own KVM selftests on the software host, each under `softcvm exec`.  They are
built from Debian's linux-source-6.12 (unpacked and built in ~/.cache/softcvm), or in a kernel
tree of yours; nothing of them is changed.  A test that skips counts as failed: on hardware
without SEV they all skip, which is what this host is for."""

EXAMPLES = """\
examples:
  softcvm selftests
  softcvm selftests guest_memfd_test sev_init2_tests
  softcvm selftests --source ~/linux --json > results.json

Exit status: 0 when every test passed, 1 when one did not or they cannot be built, 2 for bad
input."""

_OUTCOMES = ("pass", "skip", "fail", "time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--version", action="version", version=f"softcvm {__version__}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--source", metavar="DIR", type=Path, help="a kernel tree; built there if it is not yet"
    )
    where.add_argument("--build", action="store_true", help="build Debian's again")
    add("--list", action="store_true", help="the names of the built tests, nothing is run")
    add("--kernel", metavar="V", default="6.12", help="6.12, 6.18 or 7.3 (6.12)")
    add("--machine", metavar="M", default="genoa", help="milan or genoa (genoa)")
    add("--timeout", metavar="S", type=float, default=120.0, help="seconds for a test (120)")
    add("--jobs", metavar="N", type=int, default=os.cpu_count() or 1, help="tests at a time")
    add("--json", action="store_true", help="the results as JSON, nothing else on stdout")
    add("name", nargs="*", metavar="NAME", help="only these tests")


def run(args: argparse.Namespace) -> int:
    from softcvm.cli.selftests_build import BuildError, ensure_built, find_tests
    from softcvm.cli.selftests_run import pick
    from softcvm.hw.profile import PROFILES as MACHINES
    from softcvm.kernel.profile import PROFILES as KERNELS

    for given, known in ((args.kernel, KERNELS), (args.machine, MACHINES)):
        if given not in known:
            raise UsageError(f"no {given!r}: there is {', '.join(known)}")
    if args.jobs < 1 or args.timeout <= 0:
        raise UsageError("--jobs and --timeout take positive numbers")
    try:
        tree = ensure_built(args.source, again=args.build)
    except BuildError as error:
        raise OutputError(str(error)) from error
    built = find_tests(tree)
    try:
        tests = pick(built, args.name)
    except KeyError as error:
        raise UsageError(f"no test {error} among the {len(built)} built in {tree}") from error
    if args.list:
        print("\n".join(dict.fromkeys(test.name for test in tests)))
        return 0
    results = _run(args, tests)
    if args.json:
        print(json.dumps(_as_json(args, results), indent=1))
    else:
        _print_summary(results)
    return int(any(result.outcome != "pass" for result in results))


def _run(args: argparse.Namespace, tests: "Sequence[Test]") -> "list[Result]":
    from contextlib import closing

    from softcvm.cli.selftests_run import run_all

    options = ("--kernel", args.kernel, "--machine", args.machine)
    results: list[Result] = []
    with closing(run_all(tests, options, args.timeout, args.jobs)) as running:
        for result in running:
            results.append(result)
            if not args.json:
                count = f"[{len(results):{len(str(len(tests)))}}/{len(tests)}]"
                line = (
                    f"{count} {result.outcome:4} {result.seconds:6.1f} s  {result.test.title}"
                )
                print(line, flush=True)
    return sorted(results, key=lambda result: result.test.title)


def _print_summary(results: "list[Result]") -> None:
    missed = [result for result in results if result.outcome != "pass"]
    if missed:
        width = max(len(result.test.title) for result in missed)
        print()
        for result in missed:
            why = printable(result.why)[:200]
            print(f"{result.outcome:4}  {result.test.title:{width}}  {why}")
    counts = [sum(r.outcome == outcome for r in results) for outcome in _OUTCOMES]
    told = ("passed", "skipped", "failed", "out of time")
    print(
        f"\n{len(results)} runs: "
        + ", ".join(f"{n} {t}" for n, t in zip(counts, told, strict=True))
    )


def _as_json(args: argparse.Namespace, results: "list[Result]") -> dict[str, object]:
    return {
        "softcvm": __version__,
        "kernel": args.kernel,
        "machine": args.machine,
        "counts": {o: sum(r.outcome == o for r in results) for o in _OUTCOMES},
        "tests": [
            {
                "name": result.test.name,
                "arguments": list(result.test.arguments),
                "outcome": result.outcome,
                "status": result.status,
                "seconds": round(result.seconds, 1),
                "why": result.why,
            }
            for result in results
        ],
    }
