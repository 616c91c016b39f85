"""`softcvm trace`: list what a recorded run did, all of it or what concerns one page, VM or kind of event."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from softcvm import __version__
from softcvm.cli.errors import UsageError
from softcvm.cli.sizes import parse_u64

if TYPE_CHECKING:
    from softcvm.trace.reader import Record

__all__ = ("DESCRIPTION", "EXAMPLES", "add_arguments", "run")

DESCRIPTION = """\
List the events that `softcvm boot --trace` recorded, one a line with its number in the
file: system calls, exits, faults, RMP transitions, firmware commands, zaps, allocations.
Several filters are joined by "and", several events by "or"."""

EXAMPLES = """\
examples:
  softcvm trace run.json
  softcvm trace run.json --gpa 0x100000
  softcvm trace run.json --event RmpTransition --event NestedPageFault --pfn 0x107
  softcvm trace run.json --count

Exit status: 0, also when nothing matches; 2 for bad input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--version", action="version", version=f"softcvm {__version__}")
    add("file", metavar="FILE", help="what --trace wrote; - for standard input")
    only = parser.add_argument_group("only events that")
    only.add_argument("--event", metavar="NAME", action="append", help="have this name")
    only.add_argument(
        "--gpa", metavar="ADDRESS", type=parse_u64, help="name this guest physical address"
    )
    only.add_argument(
        "--pfn", metavar="PAGE", type=parse_u64, help="name this page frame of the host"
    )
    only.add_argument("--vm", metavar="N", type=parse_u64, help="name this VM")
    output = parser.add_argument_group("output")
    output.add_argument("--count", action="store_true", help="how many of each event, no list")
    output.add_argument("--json", action="store_true", help="the events as they were recorded")


def run(args: argparse.Namespace) -> int:
    with _opened(args.file) as file:
        events = _matching(file, args)
        if args.count:
            _print_counts(events, as_json=args.json)
        elif args.json:
            _print_records(events)
        else:
            _print_listing(events)
    return 0


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    """The file, whose faults are the user's."""
    from softcvm.cli.inputs import naming
    from softcvm.trace.reader import TraceError

    try:
        if path == "-":
            yield sys.stdin
            return
        with naming(path):
            file = open(path, encoding="utf-8")  # noqa: SIM115 - what the caller prints is not its fault
        with file:
            yield file
    except TraceError as error:
        raise UsageError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text: {error.reason}") from error


def _matching(file: TextIO, args: argparse.Namespace) -> "Iterator[tuple[int, Record]]":
    """The events that pass every filter, with their numbers."""
    from softcvm.trace.places import frames, guest_frames
    from softcvm.trace.reader import read

    tests: list[Callable[[Record], bool]] = []
    if args.event:
        wanted = set(args.event)
        tests.append(lambda record: record["event"] in wanted)
    if args.vm is not None:
        tests.append(lambda record: record.get("vm") == args.vm)
    if args.gpa is not None:
        gfn = args.gpa >> 12
        tests.append(lambda record: any(s <= gfn < e for s, e in guest_frames(record)))
    if args.pfn is not None:
        tests.append(lambda record: any(s <= args.pfn < e for s, e in frames(record)))
    for number, record in enumerate(read(file), 1):
        with _whole(number, record):
            passes = all(test(record) for test in tests)
        if passes:
            yield number, record


@contextmanager
def _whole(number: int, record: "Record") -> Iterator[None]:
    """A record whose fields are not those of its event is damaged."""
    from softcvm.trace.reader import TraceError

    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TraceError(f"line {number} is no {record['event']}: {error!r}") from error


def _print_listing(events: "Iterator[tuple[int, Record]]") -> None:
    from softcvm.trace.listing import describe

    for number, record in events:
        with _whole(number, record):
            text = describe(record)
        print(f"{number:7}  {text}")


def _print_records(events: "Iterator[tuple[int, Record]]") -> None:
    import json

    for _, record in events:
        print(json.dumps(record, separators=(",", ":")))


def _print_counts(events: "Iterator[tuple[int, Record]]", *, as_json: bool) -> None:
    import json

    counts = Counter(record["event"] for _, record in events)
    if as_json:
        print(json.dumps(dict(counts.most_common())))
        return
    for name, count in counts.most_common():
        print(f"{count:9}  {name}")
