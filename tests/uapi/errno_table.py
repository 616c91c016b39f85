"""How a table of refusals is read and played: one call, its checks in the kernel's order.

A Fault is one thing wrong with an otherwise good call.  `says` is a word of the reason that the
model gives (the Ioctl event), which tells apart checks that share an errno.  `fields` are the
arguments that it spoils; names with an underscore spoil the surroundings instead: _pointer (the
argument's address), or what the table's own Call knows.
"""

import errno
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, Protocol

from softcvm import Machine
from softcvm.uapi.events import Ioctl

__all__ = ("KERNELS", "Call", "Fault", "both", "outcome", "pairs")

KERNELS = ("6.12", "6.18", "7.3")


class Fault(NamedTuple):
    why: str
    errno: str
    says: str
    fields: dict[str, int]
    kernels: tuple[str, ...] = KERNELS


class Call(Protocol):
    """One call that would succeed, on a machine of its own."""

    machine: Machine

    def __call__(self, fields: dict[str, int]) -> None: ...


def both(first: Fault, second: Fault) -> dict[str, int] | None:
    """The arguments with two things wrong; None where one field cannot be wrong in two ways."""
    if first.fields.keys() & second.fields.keys() or "_pointer" in second.fields:
        return None
    return {**first.fields, **second.fields}


def pairs(table: Sequence[Fault], kernel: str) -> Iterator[tuple[Fault, dict[str, int]]]:
    """Every two faults that can come together: who is checked first, and the arguments."""
    rows = [fault for fault in table if kernel in fault.kernels]
    for first, second in combinations(rows, 2):
        fields = both(first, second)
        if fields is not None:
            yield first, fields


def outcome(call: Call, fields: dict[str, int]) -> tuple[str, str]:
    """The errno's name, "0" for none, and the reason of the last ioctl."""
    reasons: list[Ioctl] = []
    detach = call.machine.events.attach(
        lambda event: reasons.append(event) if isinstance(event, Ioctl) else None
    )
    try:
        call(fields)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return "EOPNOTSUPP", reasons[-1].why  # Python knows 95 by its other name
        return errno.errorcode[error.errno or 0], reasons[-1].why
    finally:
        detach()
    return "0", ""
