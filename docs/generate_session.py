"""Writes the session in README.md from what `softcvm boot` prints.  `python docs/generate_session.py`"""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from softcvm.cli.main import main

__all__ = ("readme",)

README = Path(__file__).parent.parent / "README.md"
MARKS = re.compile(r"(<!-- session -->\n).*?(<!-- end of session -->\n)", re.DOTALL)
LAST_SHOWN = "bytes_encrypted"


def readme(text: str) -> str:
    """README.md with the session as it is now."""
    return MARKS.sub(lambda marks: f"{marks[1]}{session()}{marks[2]}", text)


def session() -> str:
    """A boot of the built-in firmware; counters beyond the summary are left out."""
    out = StringIO()
    with redirect_stdout(out):
        main(["boot"])
    lines = out.getvalue().splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith(LAST_SHOWN)) + 1
    tail = next(i for i, line in enumerate(lines) if line.startswith("leaked pages"))
    shown = ["$ softcvm boot", *lines[:end], "...", *lines[tail:]]
    return "\n".join(["```console", *shown, "```", ""])


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
