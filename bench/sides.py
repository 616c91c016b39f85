"""What a benchmark is: two sides to time in turn, or an amount to hold against a limit.

Machines drift by tens of percent between runs, so only ratios are reported, and each is taken round by
round: A B A B ...  The median of the rounds is held against the goal.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

__all__ = ("Bench", "Ratios", "Side", "Unavailable", "measured", "timed")

Side = Callable[[], float]
"""One round of one side: seconds, or another amount."""


class Bench(NamedTuple):
    """ours / peer <= goal.  `sides` sets up and gives both; what it raises as Unavailable is a skip."""

    name: str
    ours: str
    peer: str
    goal: float
    sides: Callable[[], tuple[Side, Side]]
    rounds: int | None = None
    """For a benchmark whose rounds are all equal or very long."""


class Unavailable(Exception):
    """Something this benchmark needs is not here."""


class Ratios(NamedTuple):
    bench: Bench
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def reached(self) -> bool:
        return self.median <= self.bench.goal


def timed(call: Callable[[], object], repeat: int = 1) -> Side:
    """A side that takes the time of `repeat` calls."""

    def side() -> float:
        begun = perf_counter()
        for _ in range(repeat):
            call()
        return (perf_counter() - begun) / repeat

    return side


def measured(bench: Bench, rounds: int) -> Ratios:
    """Both sides once to warm up, then in turn."""
    ours, peer = bench.sides()
    rounds = bench.rounds or rounds
    if rounds > 1:
        ours()
        peer()
    ratios = []
    for _ in range(rounds):
        a = ours()
        b = peer()
        ratios.append(a / b)
    return Ratios(bench, tuple(ratios))
