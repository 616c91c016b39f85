"""Write the scoreboard in docs/selftests.md: softcvm selftests --json > FILE; python tools/selftests_scoreboard.py FILE"""

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ("main", "scoreboard")

PAGE = Path(__file__).parents[1] / "docs" / "selftests.md"
BEGIN, END = "<!-- scoreboard -->", "<!-- end of scoreboard -->"
_WORDS = {"pass": "pass", "skip": "skip", "fail": "fail", "time": "no end"}
_LONGEST = 160


def scoreboard(results: dict[str, Any]) -> str:
    """One row for each run: what became of it, and the test's own reason."""
    counts = results["counts"]
    told = ", ".join(f"{counts[outcome]} {word}" for outcome, word in _WORDS.items())
    lines = [
        f"Kernel profile {results['kernel']}, machine {results['machine']}: {told}.",
        "",
        "| test | | why |",
        "|---|---|---|",
    ]
    for test in results["tests"]:
        title = " ".join((test["name"], *test["arguments"]))
        why = " ".join(test["why"].replace("|", "\\|").split())[:_LONGEST]
        lines.append(f"| {title} | {_WORDS[test['outcome']]} | {why} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    results = json.loads(Path(argv[0]).read_text())
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{scoreboard(results)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
