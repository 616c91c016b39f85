"""What a guest of this project checks about its own machine, and how it ends when a check fails.

A failed check is the guest's finding, not an error of the program: it says what it saw on the console and
asks for termination with reason set SOFTCVM and the check's number, which is how its VMM learns it.
"""

from enum import IntEnum

from softcvm.guest.console import Console
from softcvm.guest.ghcb import GuestSteps, TermSet, terminate

__all__ = ("Check", "expect")


class Check(IntEnum):
    """Reason codes of TermSet.SOFTCVM; 0 is a good end.  PAYLOAD_: of payload.S."""

    PASSED = 0
    MEMORY_KEEPS_DATA = 1
    BOUNCE = 2
    NEIGHBOURS_KEEP_DATA = 3
    REJOIN = 4
    SMASH_KEEPS_DATA = 5
    UNVALIDATED = 6
    SIZEMISMATCH = 7
    PERMISSION = 8
    BAD_INPUT = 9
    DOUBLE_VALIDATION = 10
    IMPLICIT_CONVERSION = 11
    INTERCEPT = 12
    TABLES = 13
    VMPL = 14
    PROCESSORS = 15
    PAYLOAD_PROTOCOL = 32
    PAYLOAD_PSC = 33
    PAYLOAD_PVALIDATE = 34
    PAYLOAD_CONTENTS = 35
    PAYLOAD_DEVICE = 36
    PAYLOAD_SECRETS = 37


def expect(console: Console, holds: bool, check: Check, saw: object) -> GuestSteps[None]:
    """Go on if it holds."""
    if holds:
        return
    yield from console.line(f"FAILED {check.name}: {saw}")
    yield from terminate(TermSet.SOFTCVM, check)
