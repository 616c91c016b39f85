"""Tracepoints and the one-line encoding of events."""

import copy
import json
from enum import IntEnum
from typing import NamedTuple

from softcvm.sim.events import Event, Tracepoints, encode


class Status(IntEnum):
    FAIL_OVERLAP = 4


class Inner(NamedTuple):
    gfn: int
    pfn: int


class Happened(NamedTuple):
    what: str
    pfn: int
    status: Status
    raw: bytes
    parts: tuple[object, ...]
    maybe: int | None = None


EVENT = Happened(
    "rmpupdate", 0x1004A, Status.FAIL_OVERLAP, b"\x00\xff", (Inner(1, 2), (3, b"\x01"))
)


def test_an_event_is_one_line_of_json_with_its_name_first() -> None:
    line = encode(EVENT)
    assert "\n" not in line
    assert json.loads(line) == {
        "event": "Happened",
        "what": "rmpupdate",
        "pfn": 0x1004A,
        "status": "FAIL_OVERLAP",
        "raw": "00ff",
        "parts": [{"gfn": 1, "pfn": 2}, [3, "01"]],
        "maybe": None,
    }
    assert list(json.loads(line)) == ["event", *Happened._fields]


def test_equal_events_are_equal_bytes() -> None:
    assert encode(EVENT) == encode(copy.deepcopy(EVENT))
    assert encode(EVENT) != encode(EVENT._replace(pfn=0x1004B))


def test_without_a_collector_there_is_nothing_to_call() -> None:
    assert Tracepoints().emit is None


def test_every_collector_sees_every_event_in_order_of_attachment() -> None:
    tp = Tracepoints()
    seen: list[tuple[str, Event]] = []
    detach_first = tp.attach(lambda event: seen.append(("first", event)))
    detach_second = tp.attach(lambda event: seen.append(("second", event)))
    assert tp.emit is not None
    tp.emit(EVENT)
    assert seen == [("first", EVENT), ("second", EVENT)]
    detach_first()
    assert tp.emit is not None
    tp.emit(EVENT)
    assert seen[2:] == [("second", EVENT)]
    detach_second()
    assert tp.emit is None


def test_a_copied_machine_has_no_collectors() -> None:
    tp = Tracepoints()
    tp.attach(lambda event: None)
    assert copy.deepcopy(tp).emit is None
