"""vmm/board.py against QEMU's q35 (hw/i386/pc_q35.c) as its own code comments and memory maps give it."""

import itertools

import pytest

from softcvm.vmm.board import BoardError, plan_board

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def ram(memory: int, phys_bits: int = 46) -> tuple[tuple[int, int], ...]:
    return plan_board(memory, 64 << 10, phys_bits).e820


@pytest.mark.parametrize(
    ("memory", "low", "high"),
    [
        (1 * GIB, 1 * GIB, 0),
        (2816 * MIB - 4096, 2816 * MIB - 4096, 0),
        (2816 * MIB, 2 * GIB, 768 * MIB),
        (4 * GIB, 2 * GIB, 2 * GIB),
        (64 * GIB, 2 * GIB, 62 * GIB),
    ],
)
def test_ram_is_split_at_2_gib_from_2816_mib_on(memory: int, low: int, high: int) -> None:
    e820 = ram(memory)
    assert e820[:2] == ((0, 0xA_0000), (MIB, low))
    assert e820[2:] == (((4 * GIB, 4 * GIB + high),) if high else ())


def test_a_guest_that_would_meet_the_hypertransport_hole_goes_on_at_1_tib() -> None:
    assert ram(1009 * GIB)[2] == (4 * GIB, 1011 * GIB)
    assert ram(1012 * GIB)[2] == (TIB, TIB + 1010 * GIB)


def test_slots_lie_apart_and_use_each_byte_of_their_file_once() -> None:
    board = plan_board(5 * GIB, 2 * MIB, 43)
    used = sorted((r.offset, r.offset + r.size) for r in board.ram)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))
    assert used[-1][1] == board.memory_bytes
    gpas = sorted((r.gpa, r.end) for r in (*board.ram, board.firmware))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(gpas))


def test_firmware_ends_at_4_gib() -> None:
    assert plan_board(GIB, 4 * MIB, 43).firmware.end == 4 * GIB


@pytest.mark.parametrize(
    "memory", [0, 4096, MIB, GIB + 1, 1 << 43, 1 << 60], ids=lambda value: f"{value:#x}"
)
def test_absurd_sizes_are_refused(memory: int) -> None:
    with pytest.raises(BoardError):
        plan_board(memory, 64 << 10, 43)
