"""What differs between two runs of a script."""

from typing import NamedTuple

from tools.kvm_diff.play import Outcome
from tools.kvm_diff.script import Script

__all__ = ("Difference", "first_difference")


class Difference(NamedTuple):
    """Call number `at` was answered in two ways."""

    at: int
    label: str
    real: str
    model: str


def first_difference(
    script: Script, real: list[Outcome], model: list[Outcome]
) -> Difference | None:
    """The first call with another result or other memory after it; a call that is not modelled
    ends the comparison.

    A page is compared where the real kernel lets it be read by process_vm_readv(2): a page that
    may be written but not read is left to the script's own loads.
    """
    for i, (call, ours, theirs) in enumerate(zip(script.calls, model, real, strict=False)):
        if ours.unmodelled:
            return None
        if ours.text != theirs.text:
            return Difference(i, call.label, theirs.text, ours.text)
        modelled = dict(ours.memory)
        for page, checksum in theirs.memory:
            if modelled.get(page) != checksum:
                shown = f"{modelled[page]:08x}" if page in modelled else "unreadable"
                return Difference(
                    i, call.label, f"page {page}: {checksum:08x}", f"page {page}: {shown}"
                )
    return None
