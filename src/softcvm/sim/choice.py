"""Choices: the points at which something outside the model decides.

The model never draws a random number.  Where the real world could go several ways (an allocation fails,
firmware is busy, an RMP entry is locked for a moment) it asks, and outcome 0 is always the ordinary one.
"""

from typing import Protocol

__all__ = ("Choices", "Ordinary", "Scripted")


class Choices(Protocol):
    def choose(self, label: str, outcomes: int) -> int:
        """Pick an outcome in 0 .. outcomes-1; 0 is what happens on an ordinary day."""
        ...


class Ordinary:
    """Nothing fails."""

    def choose(self, label: str, outcomes: int) -> int:
        return 0


class Scripted:
    """Plays back picks by label; a label that runs out is ordinary again."""

    def __init__(self, picks: dict[str, list[int]]) -> None:
        self._picks = {label: list(outcomes) for label, outcomes in picks.items()}

    def choose(self, label: str, outcomes: int) -> int:
        waiting = self._picks.get(label)
        pick = waiting.pop(0) if waiting else 0
        if not 0 <= pick < outcomes:
            raise ValueError(f"choice {label!r} has {outcomes} outcomes, not {pick}")
        return pick
