"""DRAM in a mapping against DRAM as frames of its own: the same reads after the same writes."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcvm.attach.dram_memory import DramMemory
from softcvm.hw.counters import HwCounters
from softcvm.hw.dram import Dram
from softcvm.hw.dram_mapped import MappedDram
from softcvm.hw.memenc import Key

PAGE, PAGES = 4096, 6
KEYS = [None, Key(bytes(range(32))), Key(bytes(range(1, 33)))]
keys = st.sampled_from(KEYS)
spans = st.tuples(st.integers(0, PAGES * PAGE - 1), st.integers(1, 2 * PAGE)).map(
    lambda pair: (pair[0], min(pair[1], PAGES * PAGE - pair[0]))
)
pages = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda pair: (pair[0], min(pair[1], PAGES - pair[0]))
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), spans, keys, st.integers(0, 255)),
        st.tuples(st.just("zero"), pages),
        st.tuples(st.just("pin"), pages),
        st.tuples(st.just("unpin"), pages),
        st.tuples(st.just("turn"), st.integers(0, PAGES - 1), keys),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(steps=steps, looks=st.lists(st.tuples(spans, keys), min_size=1, max_size=4))
def test_any_writes_read_alike(
    steps: Iterable[tuple[Any, ...]], looks: list[tuple[tuple[int, int], Key | None]]
) -> None:
    plain = Dram(PAGES, HwCounters())
    mapped = MappedDram(PAGES, HwCounters(), DramMemory(PAGES * PAGE))
    for step in steps:
        match step:
            case ("write", (spa, length), key, byte):
                data = bytes((byte + i) & 0xFF for i in range(length))
                plain.write(spa, data, key)
                mapped.write(spa, data, key)
            case ("zero", (pfn, count)):
                plain.zero(pfn, count)
                mapped.zero(pfn, count)
            case ("pin", (pfn, count)):
                mapped.pin_raw(pfn, count)
            case ("unpin", (pfn, count)):
                mapped.unpin_raw(pfn, count)
            case ("turn", pfn, key) if not mapped.pinned(pfn):
                mapped.turn(pfn, key)
    for (spa, length), key in looks:
        assert mapped.read(spa, length, key) == plain.read(spa, length, key)
    assert [mapped.raw(pfn) for pfn in range(PAGES)] == [plain.raw(pfn) for pfn in range(PAGES)]


def test_a_frame_that_is_used_from_outside_holds_what_the_chips_hold() -> None:
    memory = DramMemory(PAGES * PAGE)
    dram = MappedDram(PAGES, HwCounters(), memory)
    dram.write(0, b"secret" * 100, KEYS[1])
    assert bytes(memory.view[:6]) == b"secret"
    dram.pin_raw(0, 1)
    assert bytes(memory.view[:PAGE]) == dram.raw(0)
    assert dram.read(0, 6, KEYS[1]) == b"secret"
    dram.write(0, b"SECRET", KEYS[1])
    assert bytes(memory.view[:PAGE]) == dram.raw(0)
    with pytest.raises(ValueError, match="from outside"):
        dram.turn(0, KEYS[1])


def test_memory_takes_room_as_it_is_written_and_gives_it_back() -> None:
    memory = DramMemory(1 << 40)
    dram = MappedDram(1 << 28, HwCounters(), memory)
    dram.write(1 << 39, b"x" * PAGE)
    assert list(memory.populated()) == [(1 << 27, (1 << 27) + 1)]
    dram.zero(1 << 26, 1 << 27)
    assert list(memory.populated()) == []
