"""Writes docs/planted.md from the tables in tests/planted.  `PYTHONPATH=. python docs/generate_planted.py`"""

from pathlib import Path

from tests.planted.defects_hardware import HARDWARE
from tests.planted.defects_memory import MEMORY
from tests.planted.defects_sev import SEV
from tests.planted.plant import Defect, Selftest
from tests.planted.scenes import CLAIMS

__all__ = ("page",)

PAGE = Path(__file__).parent / "planted.md"

HEAD = """\
<!-- Made from the tables in tests/planted by docs/generate_planted.py; a test compares. -->

# Planted defects

Each of these defects is switched on alone, and something must notice: one of the kernel's own selftests, run
unmodified under [`softcvm exec`](exec.md), an [invariant](invariants.md) at a quiescent point of a run, or
another check of that run. Without a defect the same runs pass. The product has no switch for any of them: a piece of
a function's source is replaced while a test runs (tests/planted/plant.py), so a defect looks like the patch
that would bring it into Linux. `pytest tests/planted -k NAME` runs one; those marked *long* run with `make long`.
"""

TABLES = (
    ("KVM's memory", MEMORY),
    ("SEV in Linux", SEV),
    ("Processor and firmware", HARDWARE),
)


def page() -> str:
    """The page as it should be."""
    out = [HEAD]
    for title, table in TABLES:
        out.append(f"\n## {title}\n\n| defect | where | seen by |\n|---|---|---|\n")
        out += [_row(defect) for defect in table]
    return "".join(out)


def _row(defect: Defect) -> str:
    where = defect.linux.removeprefix("none: ")
    where = f"`{where}`" if where.endswith("()") else where
    long = ", *long*" if defect.long else ""
    return f"| `{defect.name}`: {defect.broken} | {where} | {_seen(defect)}{long} |\n"


def _seen(defect: Defect) -> str:
    by = defect.caught_by
    if isinstance(by, Selftest):
        return f"{by.name}: “{by.says}”"
    if by.breaks in CLAIMS:
        return f"{CLAIMS[by.breaks]} ({by.scene})"
    return f"`{by.breaks}` ({by.scene})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
