"""Events: what the layers below say happened, as typed tuples.

An event class is a NamedTuple of plain values (ints, strings, bytes, None, enums).  hw and kernel emit;
nothing below `machine` collects.  With no collector an emission site costs one attribute test:

    if tp.emit:
        tp.emit(Psmash(pfn, status))
"""

import json
from collections.abc import Callable
from enum import Enum
from typing import Any

__all__ = ("Collector", "Event", "Tracepoints", "encode")

Event = tuple[Any, ...]
"""A NamedTuple whose class name is the event's name."""
Collector = Callable[[Event], None]


class Tracepoints:
    """Where a machine's events go: to every attached collector, in the order they were attached."""

    __slots__ = ("_collectors", "emit")

    def __init__(self) -> None:
        self._collectors: tuple[Collector, ...] = ()
        self.emit: Collector | None = None

    def attach(self, collector: Collector) -> Callable[[], None]:
        """Start sending events to a collector; the returned call stops it."""
        self._set((*self._collectors, collector))

        def detach() -> None:
            self._set(tuple(c for c in self._collectors if c is not collector))

        return detach

    def _set(self, collectors: tuple[Collector, ...]) -> None:
        self._collectors = collectors
        if not collectors:
            self.emit = None
        elif len(collectors) == 1:
            self.emit = collectors[0]
        else:
            self.emit = self._fan_out

    def _fan_out(self, event: Event) -> None:
        for collector in self._collectors:
            collector(event)

    def __deepcopy__(self, memo: object) -> "Tracepoints":
        return Tracepoints()  # collectors belong to the observer, not to the copied machine


def encode(event: Event) -> str:
    """One line of JSON: the event's name, then its fields in order.  Equal events give equal bytes."""
    fields: tuple[str, ...] = event._fields  # type: ignore[attr-defined]
    record: dict[str, Any] = {"event": type(event).__name__}
    for name, value in zip(fields, event, strict=True):
        record[name] = _plain(value)
    return json.dumps(record, separators=(",", ":"))


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            return {name: _plain(part) for name, part in zip(value._fields, value, strict=True)}
        return [_plain(part) for part in value]
    return value
