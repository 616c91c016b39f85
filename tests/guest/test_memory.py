"""guest/memory.py: the order of page-state changes and PVALIDATE, and what ends a guest."""

import itertools

import pytest

from softcvm.abi.insn import Pvalidate, PvalidateOut, Touch, Vmgexit
from softcvm.guest.boot_info import Extent, subtract
from softcvm.guest.ghcb import GhcbClient
from softcvm.guest.memory import GuestMemory, pieces
from tests.guest.fake_host import Ended, FakeHost
from tests.guest.test_ghcb import GHCB, finish

MIB2 = 0x20_0000


def memory(*, evict: bool = False) -> GuestMemory:
    return GuestMemory(GhcbClient(GHCB), evict=evict)


def kinds(host: FakeHost) -> list[type]:
    return [type(op) for op in host.ops if isinstance(op, Vmgexit | Pvalidate | Touch)]


def test_to_private_asks_first_then_validates_then_evicts() -> None:
    host = FakeHost(finish)
    host.run(memory(evict=True).set_private([Extent(MIB2, 2 * MIB2)]))
    assert kinds(host) == [Vmgexit, Pvalidate, Touch]


def test_to_shared_rescinds_first_then_asks() -> None:
    host = FakeHost(finish)
    host.run(memory().set_shared([Extent(MIB2, 2 * MIB2)]))
    assert kinds(host) == [Pvalidate, Vmgexit]


def test_an_unaligned_extent_is_cut_into_4k_2m_and_4k() -> None:
    assert list(pieces(MIB2 - 0x1000, 3 * MIB2 + 0x3000)) == [
        (MIB2 - 0x1000, MIB2, False),
        (MIB2, 3 * MIB2, True),
        (3 * MIB2, 3 * MIB2 + 0x3000, False),
    ]


@pytest.mark.parametrize(
    ("start", "end"), [(0x1000, 0x5000), (MIB2 - 0x1000, MIB2 + 0x1000), (MIB2, 2 * MIB2)]
)
def test_pieces_cover_exactly_the_extent(start: int, end: int) -> None:
    found = list(pieces(start, end))
    assert found[0][0] == start
    assert found[-1][1] == end
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))


def test_a_size_mismatch_falls_back_to_4k() -> None:
    host = FakeHost(finish)
    host.pvalidate = lambda op: (
        PvalidateOut(6, False, 0) if op.size else PvalidateOut(0, False, op.count)
    )
    subject = memory()
    host.run(subject.set_private([Extent(MIB2, 3 * MIB2)]))
    sizes = [(op.gpa, op.size, op.count) for op in host.ops if isinstance(op, Pvalidate)]
    assert sizes == [(MIB2, 1, 2), (MIB2, 0, 512), (2 * MIB2, 1, 1), (2 * MIB2, 0, 512)]
    assert (subject.huge, subject.sizemismatches) == (0, 2)


def test_validating_twice_ends_the_guest() -> None:
    host = FakeHost(finish)
    host.pvalidate = lambda op: PvalidateOut(0, True, op.count)
    with pytest.raises(Ended) as ended:
        host.run(memory().set_private([Extent(0x1000, 0x2000)]))
    assert (ended.value.reason_set, ended.value.reason) == (1, 2)


def test_a_run_that_ends_early_is_gone_on_with() -> None:
    host = FakeHost(finish)
    host.pvalidate = lambda op: PvalidateOut(0, False, min(op.count, 3))
    host.run(memory().set_private([Extent(0x1000, 0x9000)]))
    starts = [op.gpa for op in host.ops if isinstance(op, Pvalidate)]
    assert starts == [0x1000, 0x4000, 0x7000]


def test_holes_are_cut_out_of_extents() -> None:
    ram = (Extent(0, 0x5000), Extent(0x8000, 0xA000))
    holes = (Extent(0x9000, 0xB000), Extent(0x1000, 0x2000))
    assert subtract(ram, holes) == (
        Extent(0, 0x1000),
        Extent(0x2000, 0x5000),
        Extent(0x8000, 0x9000),
    )
