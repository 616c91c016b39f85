"""Random sequences on a few 2M regions: the model and the reference give the same answers and the same
entries.  The reference (reference.py) is written from the architecture's text and shares no code."""

from collections.abc import Sequence
from random import Random
from typing import Protocol, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcvm.abi.insn import Rmpadjust, Rmpquery
from softcvm.abi.rmp import RmpState
from softcvm.hw.rmp import RmpEntry
from tests.hw.both import ASIDS, COVERED, MEMORY, Both

T = TypeVar("T")

# Few enough that operations meet: heads, their neighbours, both ends of regions, the end of the table.
PFNS = (0, 1, 511, 512, 513, 514, 515, 1023, 1024, 1536, COVERED - 1, COVERED, MEMORY - 1)
NEAR = (0, 1, 512, 513, 514)
# A page is bound where it "belongs" more often than elsewhere, or nothing would ever match.
HOME = 0x400

REGIONS = (0, 512, 1024, 1536)
OFTEN = (True, True, True, True, True, False)
KINDS = (
    *("assign", "assign", "assign", "reclaim", "smash", "map", "map", "validate", "validate"),
    *("adjust", "adjust", "query", "data", "data", "data", "fetch", "host", "firmware", "use"),
    *("any_update", "read"),
)

Step = tuple[str, tuple[object, ...]]


class Pick(Protocol):
    """Draws one of several: Hypothesis, which shrinks, or a seeded generator, which goes far."""

    def __call__(self, several: Sequence[T], /) -> T: ...


def operation(pick: Pick) -> Step:
    """One call of Both, likely to meet what earlier ones left."""
    kind = pick(KINDS)
    size = pick((0, 1))
    pfn = pick(REGIONS) if size and pick(OFTEN) else pick((*NEAR, *NEAR, *PFNS))
    gfn = (pfn if pick(OFTEN) else pick(PFNS)) + HOME
    gpa = gfn * 4096
    asid = pick((1, 1, 1, 1, 1, 1, *ASIDS))
    count = pick((1, 1, 1, 2, 5))
    vmpl = pick((0, 0, 1, 1, 3))
    match kind:
        case "assign":
            return "rmpupdate", (pfn, RmpState(1, size, int(not pick(OFTEN)), gpa, asid), count)
        case "reclaim":
            return "rmpupdate", (pfn, RmpState(0, size, 0, 0, 0), count)
        case "any_update":
            assigned, large, immutable = pick((0, 1)), pick((0, 1)), pick((0, 1))
            new = RmpState(assigned, large, immutable, pick((0, gpa, gpa + 1)), pick((0, asid)))
            return "rmpupdate", (pfn, new, count, pick((0, 0, 8)))
        case "smash":
            return "psmash", (pfn if size else pick(REGIONS), pick((1, 2)))
        case "map":
            return "map_nested", (asid, gfn, pfn, bool(size), pick(OFTEN))
        case "validate":
            return "pvalidate", (asid, gpa, size, pick(OFTEN), count)
        case "adjust":
            perms = pick((0, 1, 3, 15, 31, 31, 0x80))
            op = Rmpadjust(gpa, size, pick((0, 1, 1, 2, 3)), perms, pick((False, True)))
            return "rmpadjust", (asid, vmpl, op)
        case "query":
            return "rmpquery", (asid, vmpl, Rmpquery(gpa, pick((0, 1, 2, 3))))
        case "data":
            return "data", (
                asid,
                vmpl,
                gpa + pick((0, 8, 4088)),
                pick((False, True)),
                pick(OFTEN),
            )
        case "fetch":
            return "fetch", (asid, vmpl, gpa, pick((False, True)))
        case "host":
            return "host_write", (pfn, pick((False, True)), count)
        case "use":
            return "set_in_use", (pfn % COVERED, not pick(OFTEN))
        case "read":
            return "rmpread", (pfn,)
        case _:
            return "firmware", (pfn % COVERED, pick(firmware_entries(gpa, asid)))


@st.composite
def operations(draw: st.DrawFn) -> Step:
    return operation(lambda several: draw(st.sampled_from(several)))


def firmware_entries(gpa: int, asid: int) -> tuple[RmpEntry, ...]:
    return (
        RmpEntry(),
        RmpEntry(immutable=1),  # HV-Fixed
        RmpEntry(assigned=1, immutable=1, lock=1),  # Firmware
        RmpEntry(assigned=1),  # Reclaim
        RmpEntry(assigned=1, immutable=1, lock=1, vmsa=1),  # Context
        RmpEntry(assigned=1, asid=asid, gpa=gpa, validated=1, perms=(31, 7, 0, 0)),  # launched
        RmpEntry(assigned=1, asid=asid, gpa=gpa, validated=1, vmsa=1, perms=(31, 0, 0, 0)),
    )


def a_running_guest() -> Both:
    """ASID 1 holds a validated 2M page at pfn 0 and 4K pages from pfn 512, the last not validated."""
    both = Both()
    gpa = HOME * 4096
    both.rmpupdate(0, RmpState(1, 1, 0, gpa, 1))
    both.rmpupdate(512, RmpState(1, 0, 0, gpa + (512 << 12), 1), count=4)
    both.map_nested(1, HOME, 0, large=True, writable=True)
    for pfn in range(512, 516):
        both.map_nested(1, HOME + pfn, pfn, large=False, writable=True)
    both.pvalidate(1, gpa, 1, True, 1)
    both.pvalidate(1, gpa + (512 << 12), 0, True, 3)
    both.rmpadjust(1, 0, Rmpadjust(gpa, 1, 1, 0xF))
    both.rmpadjust(1, 0, Rmpadjust(gpa + (513 << 12), 0, 1, 0xF))
    return both


def play(both: Both, steps: list[Step]) -> None:
    for name, args in steps:
        match name, args:
            case "map_nested", (asid, gfn, pfn, large, writable):
                both.map_nested(asid, gfn, pfn, large=large, writable=writable)  # type: ignore[arg-type]
            case "data", (asid, vmpl, gpa, write, c):
                both.data(asid, vmpl, gpa, write=write, c=c)  # type: ignore[arg-type]
            case "fetch", (asid, vmpl, gpa, user):
                both.fetch(asid, vmpl, gpa, user=user)  # type: ignore[arg-type]
            case "host_write", (pfn, large, npages):
                both.host_write(pfn, npages, large=large)  # type: ignore[arg-type]
            case _:
                getattr(both, name)(*args)
    both.compare_table()


@settings(max_examples=60)
@given(steps=st.lists(operations(), min_size=10, max_size=40))
def test_any_sequence_ends_in_the_same_answers_and_the_same_table(steps: list[Step]) -> None:
    play(Both(), steps)


@settings(max_examples=100)
@given(steps=st.lists(operations(), min_size=5, max_size=40))
def test_any_sequence_around_a_running_guest_ends_the_same(steps: list[Step]) -> None:
    play(a_running_guest(), steps)


def walk_far(seed: int, rounds: int) -> None:
    """Longer than Hypothesis goes: the table is compared every 50 operations."""
    chance = Random(seed)
    both = a_running_guest()
    for number in range(rounds):
        if number % 10 == 0:
            both = a_running_guest()  # or everything ends up immutable
        play(both, [operation(chance.choice) for _ in range(50)])


@pytest.mark.parametrize("seed", range(4))
def test_a_long_random_walk_ends_the_same(seed: int) -> None:
    walk_far(seed, 40)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4, 12))
def test_a_very_long_random_walk_ends_the_same(seed: int) -> None:
    walk_far(seed, 1200)


def test_the_worlds_meet_every_kind_of_answer() -> None:
    """One hand-made sequence; what the random ones are for is only shown if these answers can occur."""
    from tests.hw import reference as ref

    both = Both()
    gpa = HOME * 4096
    assert both.rmpupdate(0, RmpState(1, 1, 0, gpa, 1)) == ref.SUCCESS
    assert both.rmpupdate(1, RmpState(1, 0, 0, gpa, 2)) == ref.FAIL_OVERLAP
    both.map_nested(1, HOME, 0, large=True, writable=True)
    assert both.data(1, 0, gpa, write=True, c=True) == ref.Vc(gpa)
    assert both.pvalidate(1, gpa + 4096, 0, True, 1) == ref.Npf(0xD_8000_0007, gpa + 4096)
    assert both.pvalidate(1, gpa, 1, True, 1) == ref.Done((0, 0, 1))
    assert both.pvalidate(1, gpa, 1, True, 1) == ref.Done((0, 1, 1))
    assert both.data(1, 0, gpa, write=True, c=True) == ref.Done()
    assert both.data(1, 2, gpa, write=True, c=True) == ref.Npf(0x15_8000_0007, gpa)
    assert not both.host_write(5, large=False)
    assert not both.host_write(5, large=True)
    assert both.host_write(512, large=True)
    assert both.psmash(0) == ref.SUCCESS
    assert both.data(1, 0, gpa, write=False, c=True) == ref.Npf(0x5_8000_0005, gpa)
    both.map_nested(1, HOME, 0, large=False, writable=True)
    assert both.data(1, 0, gpa, write=False, c=True) == ref.Done()
    assert both.pvalidate(1, gpa, 1, True, 1) == ref.Done((6, 0, 0))
    assert both.rmpupdate(0, RmpState(1, 1, 0, gpa, 1)) == ref.FAIL_OVERLAP
    both.set_in_use(3, True)
    assert both.rmpupdate(3, RmpState()) == ref.FAIL_INUSE
    assert both.psmash(0) == ref.FAIL_BADADDR
    both.compare_table()
