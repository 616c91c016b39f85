"""Choices: ordinary days, and scripted ones."""

import pytest

from softcvm.sim.choice import Choices, Ordinary, Scripted


def test_nothing_fails_on_an_ordinary_day() -> None:
    choices: Choices = Ordinary()
    assert [choices.choose("alloc", 3) for _ in range(4)] == [0, 0, 0, 0]


def test_picks_are_played_by_label_and_then_it_is_ordinary_again() -> None:
    script = {"alloc": [0, 1], "busy": [2]}
    choices: Choices = Scripted(script)
    asked = [("alloc", 2), ("busy", 3), ("alloc", 2), ("alloc", 2), ("busy", 3), ("other", 2)]
    assert [choices.choose(label, outcomes) for label, outcomes in asked] == [0, 2, 1, 0, 0, 0]
    assert script == {"alloc": [0, 1], "busy": [2]}


def test_a_pick_that_is_no_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match="'alloc' has 2 outcomes, not 2"):
        Scripted({"alloc": [2]}).choose("alloc", 2)
