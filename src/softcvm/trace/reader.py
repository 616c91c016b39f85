"""A trace read back: one record a line, in the order in which things happened.

Owns the syntax and what is wrong with a line.  What a record says in words is listing.py; which pages it
is about is places.py.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ("Record", "TraceError", "read")

Record = dict[str, Any]
"""An event as sim.events.encode() wrote it: "event" and the event's fields, in their order."""


class TraceError(Exception):
    """A line that is no event; the text begins with its number, from 1."""


def read(lines: Iterable[str]) -> Iterator[Record]:
    """The records of a trace, one at a time: a trace may be larger than memory.  TraceError."""
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"line {number} is not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("event"), str):
            raise TraceError(f"line {number} is no event of a trace")
        yield record
