"""Writes docs/invariants.md from softcvm.invariants.  `python docs/generate_invariants.py`"""

from pathlib import Path

from softcvm.invariants import registered
from softcvm.invariants.registry import Always

__all__ = ("page",)

PAGE = Path(__file__).parent / "invariants.md"

HEAD = """\
<!-- Made from src/softcvm/invariants by docs/generate_invariants.py; a test compares. -->

# Invariants

What must always hold, each as the sentence a reviewer would say. `softcvm boot` checks all of them when a
launch is over, at the peak of the guest's memory, and after teardown; tests check them after every step.
Sources are keys of [sources](sources.md).
"""

HARDWARE = """
## Of the hardware

They hold after every instruction, access and firmware command, whatever guests and hypervisor try.
"""

EVENTS = """
## Of every change

They hold of each event of the named type (`RmpTransition`: an entry of the table changes, or is refused to).
"""

KERNEL = """
## Of Linux and KVM

They hold at quiescent points: no system call is under way and no vCPU is inside an exit.
"""

SOMETIMES = """
## What must be reached

States in which the sentences above are worth something. A search or a test that never reaches them has
not tested them.
"""


def page() -> str:
    """The page as it should be."""
    always, on_event, sometimes = registered()
    out = [HEAD, HARDWARE]
    out += [_always(rule) for rule in always if not rule.whole_machine]
    out.append(EVENTS)
    out += [
        f"\n- **{_sentence(rule.sentence)}** (`{rule.event.__name__}`)  \n"
        f"  `{rule.name}`; {rule.source}\n"
        for rule in on_event
    ]
    out.append(KERNEL)
    out += [_always(rule) for rule in always if rule.whole_machine]
    out.append(SOMETIMES)
    out.append("\n")
    out += [f"- {_sentence(hope.sentence)} (`{hope.name}`)\n" for hope in sometimes]
    return "".join(out)


def _always(rule: Always) -> str:
    text = f"\n- **{_sentence(rule.sentence)}**  \n  `{rule.name}`; {rule.source}"
    if rule.needs:
        text += f"  \n  Needs: {rule.needs}."
    return text + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
