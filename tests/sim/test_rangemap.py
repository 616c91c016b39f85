"""RangeMap against the plainest thing that could be right: a value for each page in a dict."""

import copy
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcvm.sim import rangemap
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import fingerprint

LIMIT = 96

bounds = st.tuples(st.integers(0, LIMIT - 1), st.integers(1, LIMIT)).map(
    lambda pair: (pair[0], max(pair[0] + 1, pair[1]))
)
single = st.integers(0, LIMIT - 1).map(lambda page: (page, page + 1))
changes = st.lists(st.tuples(single | bounds, st.integers(0, 3)), max_size=60)


def pages_of(runs: list[tuple[int, int, int]]) -> dict[int, int]:
    return {page: value for start, end, value in runs for page in range(start, end)}


def built(
    bucket_max: int, steps: list[tuple[tuple[int, int], int]]
) -> tuple[RangeMap[int], dict[int, int]]:
    """The same changes in both.  BUCKET_MAX shrinks so that a few runs already fill buckets."""
    pages = dict.fromkeys(range(LIMIT), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rangemap, "BUCKET_MAX", bucket_max)
        table = RangeMap(0, LIMIT)
        for (start, end), value in steps:
            table.set(start, end, value)
            pages.update(dict.fromkeys(range(start, end), value))
    return table, pages


@pytest.mark.parametrize("bucket_max", [2, 3, 4, 512])
@settings(max_examples=120)
@given(steps=changes, window=bounds)
def test_any_changes_read_back_as_a_dict_of_pages_does(
    bucket_max: int, steps: list[tuple[tuple[int, int], int]], window: tuple[int, int]
) -> None:
    table, pages = built(bucket_max, steps)
    assert {page: table[page] for page in range(LIMIT)} == pages
    assert pages_of(table.runs()) == pages
    start, end = window
    inside = {page: value for page, value in pages.items() if start <= page < end}
    assert pages_of(table.runs(start, end)) == inside
    assert pages_of(table.held(start, end)) == {p: v for p, v in inside.items() if v != 0}
    assert table.uniform(start, end) == (len(set(inside.values())) == 1)


@pytest.mark.parametrize("bucket_max", [2, 3, 4])
@settings(max_examples=120)
@given(steps=changes)
def test_equal_neighbours_are_one_run_across_buckets_too(
    bucket_max: int, steps: list[tuple[tuple[int, int], int]]
) -> None:
    table, pages = built(bucket_max, steps)
    runs = table.runs()
    assert [start for start, _, _ in runs[1:]] == [end for _, end, _ in runs[:-1]]
    assert all(left[2] != right[2] for left, right in pairwise(runs))
    assert len(table) == 1 + sum(pages[page] != pages[page - 1] for page in range(1, LIMIT))
    for page in range(0, LIMIT, 7):
        start, end, value = table.run(page)
        assert start <= page < end
        assert {pages[p] for p in range(start, end)} == {value}
        assert start == 0 or pages[start - 1] != value
        assert end == LIMIT or pages[end] != value


@settings(max_examples=60)
@given(steps=changes, window=bounds)
def test_update_changes_each_page_of_the_range_by_itself(
    steps: list[tuple[tuple[int, int], int]], window: tuple[int, int]
) -> None:
    table, pages = built(3, steps)
    start, end = window
    table.update(start, end, lambda value: value * 5 % 4)
    for page in range(start, end):
        pages[page] = pages[page] * 5 % 4
    assert pages_of(table.runs()) == pages


@settings(max_examples=60)
@given(steps=changes, other=changes)
def test_equal_contents_are_equal_whatever_the_history(
    steps: list[tuple[tuple[int, int], int]], other: list[tuple[tuple[int, int], int]]
) -> None:
    table, pages = built(2, steps)
    again = RangeMap(0, LIMIT)
    for page, value in sorted(pages.items(), reverse=True):
        again.set(page, page + 1, value)
    assert table == again
    assert fingerprint(table) == fingerprint(again)
    different, other_pages = built(2, other)
    assert (table == different) == (pages == other_pages)


def test_a_copy_is_not_changed_with_its_original() -> None:
    table: RangeMap[int] = RangeMap(0, LIMIT)
    table.set(3, 9, 1)
    for twin in (table.copy(), copy.deepcopy(table)):
        table.set(5, 6, 2)
        assert twin.runs() == [(0, 3, 0), (3, 9, 1), (9, LIMIT, 0)]
        table.set(5, 6, 1)


def test_clear_leaves_one_run_of_the_default() -> None:
    table: RangeMap[int] = RangeMap(7, LIMIT)
    table.set(1, 2, 1)
    table.clear()
    assert table.runs() == [(0, LIMIT, 7)]


@pytest.mark.parametrize(
    ("start", "end"), [(4, 4), (5, 4), (-1, 4), (0, LIMIT + 1), (LIMIT, LIMIT + 1)]
)
def test_a_range_that_is_empty_or_leaves_the_map_is_refused(start: int, end: int) -> None:
    table: RangeMap[int] = RangeMap(0, LIMIT)
    with pytest.raises(ValueError, match="not inside"):
        table.set(start, end, 1)
    assert len(table) == 1
