"""A defect as a change of a function's source, and how it is switched on: the product has no switches for them.

A place is `module:function` or `module:Class.method`.  The function is compiled anew from its source with one
piece of text replaced, and the code object alone is exchanged, so that everybody who holds the function has the
defect, and taking the old one back leaves nothing behind.  A text that is not there exactly once is an error:
the function has changed, and the defect is to be looked at again.
"""

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

__all__ = ("Defect", "Edit", "Scene", "Selftest", "planted")

SRC = "softcvm."


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new` in the source of the function at `place`."""

    place: str
    old: str
    new: str


@dataclass(frozen=True)
class Selftest:
    """One of the kernel's selftests, run unmodified: it must fail, and these are its words."""

    name: str
    says: str


@dataclass(frozen=True)
class Scene:
    """A run that softcvm checks itself (scenes.py), and the sentence that must be broken."""

    scene: str
    breaks: str


@dataclass(frozen=True)
class Defect:
    """`broken` is one sentence on what is wrong, `linux` where the bug would be."""

    name: str
    broken: str
    linux: str
    edits: tuple[Edit, ...]
    caught_by: Selftest | Scene
    long: bool = False


@contextmanager
def planted(edits: Sequence[Edit]) -> Iterator[None]:
    """The defect is there inside of the block."""
    with ExitStack() as stack:
        for place in dict.fromkeys(edit.place for edit in edits):
            mine = [edit for edit in edits if edit.place == place]
            stack.enter_context(_edited(_find(place), mine))
        yield


@contextmanager
def _edited(function: FunctionType, edits: Sequence[Edit]) -> Iterator[None]:
    good = function.__code__
    function.__code__ = _compiled(function, edits)
    try:
        yield
    finally:
        function.__code__ = good


def _find(place: str) -> FunctionType:
    module, _, path = place.partition(":")
    found: Any = import_module(SRC + module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    function = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", found))
    assert isinstance(function, FunctionType), place
    return function


def _compiled(function: FunctionType, edits: Sequence[Edit]) -> CodeType:
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        times = source.count(edit.old)
        if times != 1:
            raise ValueError(f"{edit.place} has {times} times {edit.old!r}")
        source = source.replace(edit.old, edit.new)
    place = edits[0].place
    scratch: dict[str, Any] = {}
    exec(compile(source, f"<{place}, planted>", "exec"), dict(function.__globals__), scratch)
    made = scratch[function.__name__]
    if made.__code__.co_freevars != function.__code__.co_freevars:
        raise ValueError(f"{place} is a closure")
    if inspect.isgeneratorfunction(made) != inspect.isgeneratorfunction(function):
        raise ValueError(f"{place} would change its kind")
    changed: CodeType = made.__code__
    return changed
