"""The shortest script with the same difference (delta debugging, Zeller 1999)."""

from collections.abc import Callable, Iterator

from tools.kvm_diff.compare import Difference
from tools.kvm_diff.script import Call, Script, Struct

__all__ = ("shrink",)

Test = Callable[[Script], Difference | None]


def shrink(script: Script, found: Difference, test: Test) -> tuple[Script, Difference]:
    """Leave out what the difference does not need: calls first, then fields of arguments.

    The same difference is one with the same call and the same two sorts of answers.
    """
    script = _cut(script, found)
    while True:
        before = script
        script, found = _shorten(script, found, test)
        script, found = _simplify(script, found, test)
        if script == before:
            return script, found


def _cut(script: Script, found: Difference) -> Script:
    return script._replace(calls=script.calls[: found.at + 1])


def _same(a: Difference | None, b: Difference) -> bool:
    return a is not None and _sort(a) == _sort(b)


def _sort(difference: Difference) -> tuple[str, str, str]:
    """Success against failure is the same difference whatever number was returned."""
    label, real, model = difference.label, difference.real, difference.model
    if real.isdigit() != model.isdigit():
        real, model = ("number" if text.isdigit() else text for text in (real, model))
    return label, real, model


def _shorten(script: Script, found: Difference, test: Test) -> tuple[Script, Difference]:
    """Leave out runs of calls, half of the script first."""
    size = max(1, len(script.calls) // 2)
    while True:
        shorter = _without(script, size, found, test)
        if shorter is not None:
            script, found = shorter
        elif size > 1:
            size //= 2
        else:
            return script, found


def _without(
    script: Script, size: int, found: Difference, test: Test
) -> tuple[Script, Difference] | None:
    """The script without some `size` calls in a row, if it still differs."""
    calls = script.calls
    for start in range(len(calls) - 1, -1, -size):
        first = max(0, start - size + 1)
        candidate = script._replace(calls=calls[:first] + calls[start + 1 :])
        now = test(candidate)
        if now is not None and _same(now, found):
            return _cut(candidate, now), now
    return None


def _simplify(script: Script, found: Difference, test: Test) -> tuple[Script, Difference]:
    """Fields that may as well be 0; the arena unwatched."""
    if script.watch:
        quiet = script._replace(watch=False)
        now = test(quiet)
        if now is not None and _same(now, found):
            script, found = _cut(quiet, now), now
    i = 0
    while i < len(script.calls):
        for simpler in _simpler(script.calls[i]):
            calls = (*script.calls[:i], simpler, *script.calls[i + 1 :])
            candidate = script._replace(calls=calls)
            now = test(candidate)
            if now is not None and _same(now, found):
                script, found = _cut(candidate, now), now
                break
        i += 1
    return script, found


def _simpler(call: Call) -> Iterator[Call]:
    """The call with fewer fields in its argument, the fewest first."""
    for at, arg in enumerate(call.args):
        if not isinstance(arg, Struct):
            continue
        for left in range(len(arg.fields)):
            for first in range(left + 1):
                kept = arg.fields[first : first + left]
                args = (*call.args[:at], arg._replace(fields=kept), *call.args[at + 1 :])
                yield call._replace(args=args)
