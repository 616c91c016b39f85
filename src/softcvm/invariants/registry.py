"""Invariants as named sentences, and how they are checked.

Owns the two decorators, the list they fill, and the two ways to check: check_all() looks at a machine as
it stands, a Watch looks at each event as it passes.  The sentences are in hardware.py and kernel.py.

An invariant of a state is checked at quiescent points: no generator of Steps is suspended half way through
a change.  Where a lock excludes others, the point after its release is quiescent.  Invariants of hardware
hold after every instruction.
"""

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from softcvm.hw.soc import Soc
from softcvm.sim.events import Event

if TYPE_CHECKING:
    from softcvm.machine import Machine

__all__ = (
    "Always",
    "Checked",
    "Checking",
    "OnEvent",
    "Sometimes",
    "Violation",
    "Watch",
    "always",
    "always_on",
    "check_all",
    "registered",
    "sometimes",
    "watch",
)


class Violation(NamedTuple):
    """Where a sentence is not true.  pfn is -1 where no page is meant."""

    pfn: int
    why: str


Checking = Generator[Violation, None, int]
"""Yields violations and returns how many things it looked at."""


class Always(NamedTuple):
    """A sentence about a state: check(soc) for hardware, check(machine) for the kernel."""

    name: str
    sentence: str
    source: str
    needs: str
    """What must be true of the guest or host for the sentence to bind; empty: nothing."""
    whole_machine: bool
    check: Callable[[Any], Checking]


class OnEvent(NamedTuple):
    """A sentence about each event of one type."""

    name: str
    sentence: str
    source: str
    event: type
    check: Callable[[Any], Iterator[Violation]]


class Sometimes(NamedTuple):
    """A state that a test or a search must reach at least once, told by the events that pass."""

    name: str
    sentence: str
    event: type
    check: Callable[[Any], bool]


class Checked(NamedTuple):
    """The result for one sentence: how many things were looked at, and what broke it."""

    name: str
    sentence: str
    checked: int
    held: bool
    violations: tuple[Violation, ...]


_ALWAYS: list[Always] = []
_ON_EVENT: list[OnEvent] = []
_SOMETIMES: list[Sometimes] = []


def always(
    sentence: str, *, source: str, needs: str = "", whole_machine: bool = False
) -> Callable[[Callable[[Any], Checking]], Callable[[Any], Checking]]:
    """Register a sentence about a state."""

    def register(check: Callable[[Any], Checking]) -> Callable[[Any], Checking]:
        _ALWAYS.append(Always(check.__name__, sentence, source, needs, whole_machine, check))
        return check

    return register


def always_on(
    event: type, sentence: str, *, source: str
) -> Callable[[Callable[[Any], Iterator[Violation]]], Callable[[Any], Iterator[Violation]]]:
    """Register a sentence about every event of a type."""

    def register(
        check: Callable[[Any], Iterator[Violation]],
    ) -> Callable[[Any], Iterator[Violation]]:
        _ON_EVENT.append(OnEvent(check.__name__, sentence, source, event, check))
        return check

    return register


def sometimes(
    event: type, sentence: str
) -> Callable[[Callable[[Any], bool]], Callable[[Any], bool]]:
    """Register a state worth reaching."""

    def register(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
        _SOMETIMES.append(Sometimes(check.__name__, sentence, event, check))
        return check

    return register


def registered() -> tuple[tuple[Always, ...], tuple[OnEvent, ...], tuple[Sometimes, ...]]:
    """Every sentence, in the order of the files."""
    return tuple(_ALWAYS), tuple(_ON_EVENT), tuple(_SOMETIMES)


class Watch:
    """Checks sentences about events while they pass, and notes which `sometimes` came true."""

    def __init__(self, soc: Soc) -> None:
        self.checked: dict[str, int] = {rule.name: 0 for rule in _ON_EVENT}
        self.violations: dict[str, list[Violation]] = {rule.name: [] for rule in _ON_EVENT}
        self.reached: set[str] = set()
        self._rules: dict[type, list[OnEvent]] = {}
        for rule in _ON_EVENT:
            self._rules.setdefault(rule.event, []).append(rule)
        self._hopes: dict[type, list[Sometimes]] = {}
        for hope in _SOMETIMES:
            self._hopes.setdefault(hope.event, []).append(hope)
        self.detach = soc.tp.attach(self._see)

    def _see(self, event: Event) -> None:
        for rule in self._rules.get(type(event), ()):
            self.checked[rule.name] += 1
            self.violations[rule.name].extend(rule.check(event))
        for hope in self._hopes.get(type(event), ()):
            if hope.name not in self.reached and hope.check(event):
                self.reached.add(hope.name)

    def results(self) -> list[Checked]:
        return [
            Checked(
                rule.name,
                rule.sentence,
                self.checked[rule.name],
                not self.violations[rule.name],
                tuple(self.violations[rule.name]),
            )
            for rule in _ON_EVENT
        ]


def watch(subject: "Machine | Soc") -> Watch:
    """Begin to watch a machine's events; detach() ends it, results() may be asked any time."""
    return Watch(subject if isinstance(subject, Soc) else subject.soc)


def check_all(
    subject: "Machine | Soc", watched: Watch | None = None, *, hostile: bool = False
) -> list[Checked]:
    """Check every sentence about the state of a Machine (or of a Soc alone), and add what a Watch saw.

    hostile: leave out the sentences that need a well-behaved guest or host.
    """
    soc = subject if isinstance(subject, Soc) else subject.soc
    out = []
    for rule in _ALWAYS:
        if (hostile and rule.needs) or (rule.whole_machine and subject is soc):
            continue
        checking = rule.check(subject if rule.whole_machine else soc)
        found: list[Violation] = []
        try:
            while True:
                found.append(next(checking))
        except StopIteration as stop:
            looked_at: int = stop.value
        out.append(Checked(rule.name, rule.sentence, looked_at, not found, tuple(found)))
    return out + (watched.results() if watched else [])
