"""Range maps: a value over every page of a range, stored as runs of equal values.

One structure serves the RMP, memory attributes, the gmem page index, nested page tables and host
mappings.  It owns how runs are split, merged and searched; what a value means is the caller's.

A value may be position independent on purpose: a translation is stored as its delta (gfn - pfn), so
that a contiguous GiB is one run and splitting a run never rewrites a value.

Runs lie in buckets of at most BUCKET_MAX, found by bisection on the first page of each bucket.  Buckets
are bounded by how many runs they hold and not by address, because some maps span 2^52 pages
(memory attributes take any aligned range) while others are dense; the cost of a change then depends on
the runs it touches and, by a logarithm, on how many runs there are.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

__all__ = ("BUCKET_MAX", "RangeMap")

V = TypeVar("V")

BUCKET_MAX = 512
"""Runs a bucket holds before it is cut in two."""


class RangeMap(Generic[V]):
    """A total map from pages 0 .. limit-1 to values; equal neighbours are always one run.

    Values are compared with ==, so they must be immutable.  Ranges are half open, [start, end).
    """

    __slots__ = ("_firsts", "_starts", "_values", "default", "limit")

    def __init__(self, default: V, limit: int = 1 << 52) -> None:
        self.default = default
        self.limit = limit
        self._firsts: list[int] = [0]
        self._starts: list[list[int]] = [[0]]
        self._values: list[list[V]] = [[default]]

    def __len__(self) -> int:
        """Number of runs, those of the default value included."""
        return sum(map(len, self._starts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeMap) and self.runs() == other.runs()

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, page: int) -> V:
        """The value at a page."""
        at = bisect_right(self._firsts, page) - 1
        return self._values[at][bisect_right(self._starts[at], page) - 1]

    def run(self, page: int) -> tuple[int, int, V]:
        """The whole run (start, end, value) that holds a page."""
        firsts = self._firsts
        at = bisect_right(firsts, page)
        starts = self._starts[at - 1]
        i = bisect_right(starts, page)
        value = self._values[at - 1][i - 1]
        if i < len(starts):
            return starts[i - 1], starts[i], value
        return starts[i - 1], firsts[at] if at < len(firsts) else self.limit, value

    def runs(self, start: int = 0, end: int | None = None) -> list[tuple[int, int, V]]:
        """Every run in [start, end), clipped to it, in order.  A list: the map may change meanwhile."""
        end = self.limit if end is None else end
        if start >= end:
            return []
        firsts = self._firsts
        at = bisect_right(firsts, start) - 1
        starts = self._starts[at]
        i = bisect_right(starts, start) - 1
        if i + 1 < len(starts):
            stop = starts[i + 1]
        else:
            stop = firsts[at + 1] if at + 1 < len(firsts) else self.limit
        if end <= stop:
            return [(start, end, self._values[at][i])]
        out: list[tuple[int, int, V]] = []
        page = start
        while page < end:
            starts, values = self._starts[at], self._values[at]
            last = len(starts) - 1
            while i < last:
                stop = starts[i + 1]
                if stop >= end:
                    out.append((page, end, values[i]))
                    return out
                out.append((page, stop, values[i]))
                page = stop
                i += 1
            stop = min(end, self._stop(at, i))
            out.append((page, stop, values[i]))
            page = stop
            at += 1
            i = 0
        return out

    def held(self, start: int = 0, end: int | None = None) -> list[tuple[int, int, V]]:
        """The runs in [start, end) whose value is not the default."""
        default = self.default
        found = self.runs(start, end)
        if len(found) == 1:
            return found if found[0][2] != default else []
        return [run for run in found if run[2] != default]

    def uniform(self, start: int, end: int) -> bool:
        """True when one value covers all of [start, end)."""
        at = bisect_right(self._firsts, start) - 1
        starts = self._starts[at]
        i = bisect_right(starts, start)
        return end <= (starts[i] if i < len(starts) else self._stop(at, i - 1))

    def set(self, start: int, end: int, value: V) -> None:
        """Give every page of [start, end) this value.

        Raises ValueError for an empty or reversed range, or one that leaves the map.
        """
        if not 0 <= start < end <= self.limit:
            raise ValueError(f"range [{start:#x}, {end:#x}) is not inside [0, {self.limit:#x})")
        firsts = self._firsts
        at = bisect_right(firsts, start) - 1
        starts, values = self._starts[at], self._values[at]
        i = bisect_right(starts, start) - 1
        last = i + 1 == len(starts)
        if last:
            stop = firsts[at + 1] if at + 1 < len(firsts) else self.limit
        else:
            stop = starts[i + 1]
        if end > stop or (at and start == starts[0]) or (last and end == stop):
            self._set_across(at, start, end, value)
            return
        held = values[i]
        if held == value:
            return
        if end == stop:
            self._set_tail(starts, values, i, start, value)
        elif start > starts[i]:
            starts.insert(i + 1, start)
            starts.insert(i + 2, end)
            values.insert(i + 1, value)
            values.insert(i + 2, held)
        elif i and values[i - 1] == value:
            starts[i] = end
        else:
            starts.insert(i + 1, end)
            values.insert(i, value)
        if len(starts) > BUCKET_MAX:
            self._rebucket(at, at + 1, starts, values)

    def update(self, start: int, end: int, change: Callable[[V], V]) -> None:
        """Replace each run's value v in [start, end) by change(v)."""
        for s, e, value in self.runs(start, end):
            new = change(value)
            if new != value:
                self.set(s, e, new)

    def clear(self) -> None:
        self._firsts, self._starts, self._values = [0], [[0]], [[self.default]]

    def copy(self) -> "RangeMap[V]":
        other = RangeMap(self.default, self.limit)
        other._firsts = self._firsts.copy()
        other._starts = [starts.copy() for starts in self._starts]
        other._values = [values.copy() for values in self._values]
        return other

    def __deepcopy__(self, memo: object) -> "RangeMap[V]":
        return self.copy()  # values are immutable by contract

    def state(self) -> Iterable[object]:
        """What a fingerprint must see (sim.state)."""
        return self.held()

    def _stop(self, at: int, i: int) -> int:
        """Where run i of bucket `at` ends."""
        starts = self._starts[at]
        if i + 1 < len(starts):
            return starts[i + 1]
        return self._firsts[at + 1] if at + 1 < len(self._firsts) else self.limit

    @staticmethod
    def _set_tail(starts: list[int], values: list[V], i: int, start: int, value: V) -> None:
        """set() from a page of run i up to where run i + 1 of the same bucket begins."""
        joins = values[i + 1] == value
        if start > starts[i]:
            if joins:
                starts[i + 1] = start
            else:
                starts.insert(i + 1, start)
                values.insert(i + 1, value)
        elif i and values[i - 1] == value:
            stop = i + 2 if joins else i + 1
            del starts[i:stop], values[i:stop]
        elif joins:
            del starts[i + 1], values[i]
        else:
            values[i] = value

    @staticmethod
    def _splice(
        starts: list[int], values: list[V], stop: int, start: int, end: int, value: V
    ) -> None:
        """Write one run into the runs of [starts[0], stop), which holds [start, end)."""
        i = bisect_right(starts, start) - 1
        j = bisect_left(starts, end, i) - 1  # the last run that begins before end
        last = values[j]
        if i == j and last == value:
            return
        lo, hi = i, j + 1
        new_starts: list[int] = []
        new_values: list[V] = []
        if starts[i] < start:
            lo += 1
            joined = values[i] == value
        else:
            joined = i > 0 and values[i - 1] == value
        if not joined:
            new_starts.append(start)
            new_values.append(value)
        if hi < len(starts):
            stop = starts[hi]
        if stop > end:
            if last != value:
                new_starts.append(end)
                new_values.append(last)
        elif hi < len(starts) and values[hi] == value:
            hi += 1
        starts[lo:hi] = new_starts
        values[lo:hi] = new_values

    def _set_across(self, at: int, start: int, end: int, value: V) -> None:
        """set() of any range: over several runs, or where a run that may join lies in another bucket."""
        firsts = self._firsts
        lo = at - 1 if at and firsts[at] == start else at
        hi = bisect_right(firsts, end)  # one past the bucket that holds page `end`
        stop = firsts[hi] if hi < len(firsts) else self.limit
        if hi == lo + 1:
            starts, values = self._starts[lo], self._values[lo]
        else:
            starts = [page for bucket in self._starts[lo:hi] for page in bucket]
            values = [held for bucket in self._values[lo:hi] for held in bucket]
        self._splice(starts, values, stop, start, end, value)
        if hi > lo + 1 or len(starts) > BUCKET_MAX:
            self._rebucket(lo, hi, starts, values)

    def _rebucket(self, lo: int, hi: int, starts: list[int], values: list[V]) -> None:
        """Put runs back as buckets lo .. hi-1, cut to half of BUCKET_MAX where they are too many."""
        if len(starts) <= BUCKET_MAX:
            cuts = [0]
        else:
            cuts = list(range(0, len(starts), BUCKET_MAX // 2))
        self._starts[lo:hi] = (
            [starts[cut : cut + BUCKET_MAX // 2] for cut in cuts] if len(cuts) > 1 else [starts]
        )
        self._values[lo:hi] = (
            [values[cut : cut + BUCKET_MAX // 2] for cut in cuts] if len(cuts) > 1 else [values]
        )
        self._firsts[lo:hi] = [bucket[0] for bucket in self._starts[lo : lo + len(cuts)]]
