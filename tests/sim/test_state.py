"""State: what a fingerprint sees, and that no attribute of any class escapes it."""

import copy
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import softcvm
from softcvm.sim.state import State, fingerprint, unlisted


class Counter(State):
    saved = ("value", "parts")
    derived = {"hits": "statistics"}

    def __init__(self, value: int) -> None:
        self.value = value
        self.parts: dict[str, object] = {}
        self.hits = 0


class Slotted(State):
    __slots__ = ("value",)
    saved = ("value",)

    def __init__(self) -> None:
        self.value = 1


class Forgetful(Counter):
    def __init__(self) -> None:
        super().__init__(1)
        self.pending: list[int] = []


def test_saved_attributes_make_a_state_and_derived_ones_do_not() -> None:
    a, b = Counter(1), Counter(1)
    b.hits = 9
    assert fingerprint(a) == fingerprint(b)
    b.value = 2
    assert fingerprint(a) != fingerprint(b)


def test_the_order_of_insertion_into_dicts_and_sets_does_not_show() -> None:
    a, b = Counter(1), Counter(1)
    a.parts = {"x": {1, 2, 30}, "y": b"\x00"}
    b.parts = {"y": b"\x00", "x": {30, 2, 1}}
    assert fingerprint(a) == fingerprint(b)


def test_values_that_print_alike_differ() -> None:
    prints = [
        fingerprint(value) for value in (1, True, "1", b"1", (1,), [[1]], {1}, {1: 1}, None)
    ]
    assert len(set(prints)) == len(prints)


def test_who_points_at_whom_is_part_of_the_state() -> None:
    shared, other = Counter(1), Counter(1)
    assert fingerprint([shared, shared]) != fingerprint([shared, other])
    shared.parts = {"self": shared}
    assert fingerprint(shared) == fingerprint(copy.deepcopy(shared))


def test_an_object_without_state_is_an_error() -> None:
    with pytest.raises(TypeError, match="object has no state"):
        fingerprint([object()])


def test_unlisted_names_what_a_class_forgot() -> None:
    assert unlisted(Counter(1)) == set()
    assert unlisted(Slotted()) == set()
    assert unlisted(Forgetful()) == {"pending"}


def state_classes() -> Iterator[type[State]]:
    for found in pkgutil.walk_packages(softcvm.__path__, "softcvm."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    waiting = [State]
    while waiting:
        klass = waiting.pop()
        waiting += klass.__subclasses__()
        if klass.__module__.startswith("softcvm."):
            yield klass


def assigned_attributes(klass: type) -> set[str]:
    """Names that the methods of a class assign as self.NAME, read from its code."""
    import ast
    import inspect
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(klass)))
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in ast.walk(target):
                if not isinstance(part, ast.Attribute) or not isinstance(part.ctx, ast.Store):
                    continue
                if isinstance(part.value, ast.Name) and part.value.id == "self":
                    found.add(part.attr)
    return found


def test_every_state_class_lists_every_attribute_it_has() -> None:
    """Saved or derived, from the code itself: no instance has to be made for a class to be seen."""
    missing: dict[str, list[str]] = {}
    seen = 0
    for klass in state_classes():
        seen += 1
        listed: set[str] = set()
        properties: set[str] = set()
        for base in klass.__mro__:
            listed.update(vars(base).get("saved", ()), vars(base).get("derived", {}))
            properties.update(n for n, v in vars(base).items() if isinstance(v, property))
        forgotten = assigned_attributes(klass) - listed - properties
        if forgotten:
            missing[f"{klass.__module__}.{klass.__qualname__}"] = sorted(forgotten)
    assert seen > 3
    assert missing == {}
