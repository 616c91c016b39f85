"""The page allocator against a list of frames."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcvm import Machine
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.page_alloc import PageAllocator

FRAMES = 2048
_FREE = 0


def allocator() -> PageAllocator:
    return PageAllocator(Machine(memory=64 << 20).linux, FRAMES)


class Frames:
    """What the allocator is, frame by frame."""

    def __init__(self) -> None:
        self.free = [True] * FRAMES
        self.free[0] = False

    def take(self, npages: int, order: int) -> list[int] | None:
        size = 1 << order
        found: list[int] = []
        page = 0
        while len(found) < npages and page + size <= FRAMES:
            if all(self.free[page : page + size]):
                found += range(page, page + size)
            page += size
        if len(found) < npages:
            return None
        for frame in found:
            self.free[frame] = False
        return found


operations = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.integers(1, 600), st.sampled_from([0, 0, 0, 1, 9])),
        st.tuples(st.just("free"), st.integers(0, 10**6), st.integers(1, 700)),
    ),
    max_size=25,
)


@given(operations)
def test_it_gives_the_lowest_free_frames(steps: list[tuple[str, int, int]]) -> None:
    pages, plain = allocator(), Frames()
    held: list[int] = []
    for what, amount, other in steps:
        if what == "alloc":
            size = 1 << other
            npages = amount // size * size or size
            expected = plain.take(npages, other)
            try:
                got = [p + i for p, n in pages.alloc_run(npages, other) for i in range(n)]
            except KernelError:
                assert expected is None
            else:
                assert got == expected
                held += got
        elif held:
            held.sort()
            first = amount % len(held)
            for frame in held[first : first + other]:
                pages.free_run(frame, 1)
                plain.free[frame] = True
            del held[first : first + other]
    assert pages.free_pages == sum(plain.free)


def test_a_run_is_what_single_pages_would_be() -> None:
    one, many = allocator(), allocator()
    for pages in (one, many):
        pages.alloc_run(100)
        pages.free_run(7, 3)
        pages.free_run(50, 1)
    assert [one.alloc_pages() for _ in range(10)] == [
        p + i for p, n in many.alloc_run(10) for i in range(n)
    ]
    assert one.frames == many.frames


def test_a_page_with_a_reference_is_free_when_the_last_is_put() -> None:
    pages = allocator()
    ((pfn, _),) = pages.alloc_run(8)
    pages.get_pages(pfn + 2, 3)
    pages.get_pages(pfn + 4, 1)
    pages.free_run(pfn, 8)
    assert pages.free_pages == FRAMES - 1 - 3
    pages.put_pages(pfn + 2, 3)
    assert pages.free_pages == FRAMES - 1 - 1
    pages.put_pages(pfn + 4, 1)
    assert pages.free_pages == FRAMES - 1


def test_freeing_twice_is_a_mistake_of_the_model() -> None:
    pages = allocator()
    pages.alloc_run(4)
    pages.free_run(2, 1)
    with pytest.raises(ValueError, match="free already"):
        pages.free_run(1, 3)


def test_a_leaked_page_never_comes_back() -> None:
    pages = allocator()
    pages.alloc_run(4)
    pages.leak(2, 1)
    pages.free_run(1, 4)
    assert pages.leaked_pages == 1
    assert [p for p, _ in pages.alloc_run(3)] == [1, 3]
