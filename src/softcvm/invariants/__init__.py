"""What must always hold, as sentences with their sources; docs/invariants.md is made from them.

watched = watch(machine)            # before the run: sentences about events
...
for result in check_all(machine, watched): ...
"""

from softcvm.invariants import hardware, kernel, kvm
from softcvm.invariants.registry import (
    Checked,
    Violation,
    Watch,
    always,
    always_on,
    check_all,
    registered,
    sometimes,
    watch,
)

__all__ = (
    "Checked",
    "Violation",
    "Watch",
    "always",
    "always_on",
    "check_all",
    "hardware",
    "kernel",
    "kvm",
    "registered",
    "sometimes",
    "watch",
)
