"""What `softcvm boot` prints: JSON or text; and progress on stderr, where that is a terminal.

A table is as wide as its numbers need, also on a narrow terminal: a digit cut off is a wrong number.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from softcvm.cli.boot_run import BootResult, Claim
from softcvm.cli.errors import printable
from softcvm.cli.sizes import format_size
from softcvm.vmm.launch import Progress
from softcvm.vmm.vmm import GuestConfig

__all__ = ("print_json", "print_report", "progress")

_WHEN = {"launch": "launch", "peak": "peak", "after_teardown": "after teardown"}


def print_json(config: GuestConfig, result: BootResult) -> None:
    """One object; its keys are part of the command's interface."""
    print(
        json.dumps(
            {
                "launch_digest": result.launch_digest.hex(),
                "vcpus": config.vcpus,
                "memory_bytes": config.board.memory_bytes,
                "pages": result.pages,
                "counters": result.counters,
                "invariants": [
                    {"name": claim.name, "checked": claim.checked, "held": claim.held}
                    for claim in result.claims
                ],
                "leaked_pages": result.leaked_pages,
            },
            indent=2,
        )
    )


def print_report(
    firmware: str, host: str, config: GuestConfig, result: BootResult, lines: Sequence[str]
) -> None:
    guest = f"{config.vcpus} vCPU{'s' * (config.vcpus > 1)}, {format_size(config.board.memory_bytes)}"
    same = result.launch_digest == result.predicted_digest
    print(f"host          {host}")
    print(f"guest         {guest}, {printable(firmware)}")
    for line in lines:
        print(f"              | {line}")
    print(f"launch digest {result.launch_digest.hex()}")
    if same:
        print("              equal to what `softcvm measure` predicts")
    else:
        print(f"              NOT the predicted {result.predicted_digest.hex()}")
    _table(("4K pages by RMP state", *_WHEN.values()), _page_rows(result))
    _table(("counter", ""), [(name, f"{value:,}") for name, value in result.counters.items()])
    print(f"leaked pages  {result.leaked_pages}")
    broken = [claim for claim in result.claims if not claim.held]
    checked = sum(claim.checked for claim in result.claims)
    print(f"invariants    {len(result.claims)}, {len(broken)} broken, {checked:,} checks")
    for claim in broken:
        _print_broken(claim)


def _page_rows(result: BootResult) -> list[tuple[str, ...]]:
    censuses = [result.pages.get(when, {}) for when in _WHEN]
    states = list(dict.fromkeys(state for census in censuses for state in census))
    return [(state, *(f"{census.get(state, 0):,}" for census in censuses)) for state in states]


def _print_broken(claim: Claim) -> None:
    print(f"  BROKEN {claim.name}")
    for why in claim.broken[:8]:
        print(f"         {why}")
    if len(claim.broken) > 8:
        print(f"         and {len(claim.broken) - 8} more")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


@contextmanager
def progress() -> Iterator[Progress | None]:
    """A bar per stage on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    with Bars(console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=min(done, total))

        yield show
