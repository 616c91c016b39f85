"""State that can be compared: every stateful class says which attributes make it what it is.

A class lists its attributes as `saved` (part of snapshot and fingerprint) or `derived` (with the reason
why it is not).  tests/ check that no attribute is in neither list.  A snapshot is copy.deepcopy: classes
whose parts cannot be copied (a running generator) define __deepcopy__.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from hashlib import blake2b
from typing import Any, ClassVar

__all__ = ("State", "fingerprint", "unlisted")


class State:
    """Base of everything that a snapshot must carry."""

    saved: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[Mapping[str, str]] = {}


def unlisted(obj: State) -> set[str]:
    """Attributes of an instance that its class neither saves nor calls derived."""
    listed: set[str] = set()
    present: set[str] = set(getattr(obj, "__dict__", {}))
    for klass in type(obj).__mro__:
        listed.update(vars(klass).get("saved", ()), vars(klass).get("derived", {}))
        slots = vars(klass).get("__slots__", ())
        present.update((slots,) if isinstance(slots, str) else slots)
    return present - listed


def fingerprint(root: object) -> str:
    """A digest of everything saved below `root`; equal states give equal fingerprints."""
    seen: dict[int, int] = {}
    digest = blake2b(digest_size=16)
    keep: list[object] = []
    for token in _tokens(root, seen, keep):
        digest.update(token)
        digest.update(b"\0")
    return digest.hexdigest()


def _saved(obj: State) -> Iterable[str]:
    for klass in reversed(type(obj).__mro__):
        yield from vars(klass).get("saved", ())


def _tokens(value: Any, seen: dict[int, int], keep: list[object]) -> Iterable[bytes]:
    match value:
        case None | bool() | int() | str() if not isinstance(value, Enum):
            yield f"{type(value).__name__}:{value!r}".encode()
        case Enum():
            yield f"{type(value).__name__}.{value.name}".encode()
        case bytes() | bytearray():
            yield b"bytes:" + bytes(value)
        case tuple() | list():
            yield f"({len(value)}".encode()
            for part in value:
                yield from _tokens(part, seen, keep)
        case dict():
            yield f"{{{len(value)}".encode()
            for key in sorted(value, key=repr):
                yield from _tokens(key, seen, keep)
                yield from _tokens(value[key], seen, keep)
        case set() | frozenset():
            yield f"<{len(value)}".encode()
            for part in sorted(value, key=repr):
                yield from _tokens(part, seen, keep)
        case _:
            yield from _object_tokens(value, seen, keep)


def _object_tokens(value: Any, seen: dict[int, int], keep: list[object]) -> Iterable[bytes]:
    if id(value) in seen:
        yield f"@{seen[id(value)]}".encode()
        return
    seen[id(value)] = len(seen)
    keep.append(value)  # or its id could be used again
    yield type(value).__name__.encode()
    if isinstance(value, State):
        for name in _saved(value):
            yield name.encode()
            yield from _tokens(getattr(value, name), seen, keep)
    elif hasattr(value, "__bytes__"):  # abi layouts
        yield bytes(value)
    elif hasattr(value, "state"):
        for part in value.state():
            yield from _tokens(part, seen, keep)
    else:
        raise TypeError(f"{type(value).__name__} has no state() and cannot be fingerprinted")
