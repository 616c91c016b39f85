"""The seccomp filter, run by a second reading of classic BPF: what stops, and what goes by."""

import struct

import pytest

from softcvm.attach.filter import FD_BASE, OURS, build_filter

ALLOW, NOTIFY, KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
MINUS_ONE = (1 << 64) - 1


def verdict(nr: int, *args: int, arch: int = 0xC000003E) -> int:
    """Documentation/networking/filter.rst: LD ABS, JEQ, JGE, JSET, RET."""
    padded = [*args, *[0] * (6 - len(args))]
    data = struct.pack("<iIQ6Q", nr, arch, 0, *padded)
    program, accumulator, at = build_filter(), 0, 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x15:
                at += jt if accumulator == k else jf
            case 0x35:
                at += jt if accumulator >= k else jf
            case 0x45:
                at += jt if accumulator & k else jf
            case 0x06:
                return k
            case _:
                raise AssertionError(f"BPF code {code:#x}")


@pytest.mark.parametrize("nr", [0, 1, 3, 5, 8, 16, 17, 18, 19, 20, 32, 33, 72, 77, 285, 292])
def test_calls_on_descriptors_stop_for_emulated_files_only(nr: int) -> None:
    assert {verdict(nr, fd) for fd in (0, 1, 4, FD_BASE - 1, MINUS_ONE)} == {ALLOW}
    assert {verdict(nr, fd) for fd in (FD_BASE, FD_BASE + 1, 4000)} == {NOTIFY}


def test_duplicating_onto_an_emulated_file_stops() -> None:
    assert verdict(33, 4, FD_BASE) == verdict(292, 4, FD_BASE, 0) == NOTIFY
    assert verdict(33, 4, 5) == ALLOW


@pytest.mark.parametrize("nr", [2, 4, 6, 11, 21, 25, 28, 257, 262, 269, 332, 437, 439])
def test_calls_with_paths_and_those_that_take_memory_away_stop(nr: int) -> None:
    assert verdict(nr, 4, 4096, 4) == NOTIFY


def test_mmap_stops_for_emulated_files_replaced_memory_and_code() -> None:
    anonymous, private, fixed, rx = 0x20, 2, 0x10, 5
    assert verdict(9, 0, 4096, 3, anonymous | private, MINUS_ONE) == ALLOW
    assert verdict(9, 0, 4096, 3, anonymous | private | fixed, MINUS_ONE) == NOTIFY
    assert verdict(9, 0, 4096, 1, private, 4) == ALLOW
    assert verdict(9, 0, 4096, rx, private, 4) == NOTIFY
    assert verdict(9, 0, 4096, rx, private | anonymous, MINUS_ONE) == ALLOW
    assert verdict(9, 0, 4096, 3, 1, FD_BASE) == NOTIFY
    assert verdict(9, 0, 4096, 3, private | fixed, OURS << 32 | 4) == ALLOW


@pytest.mark.parametrize("nr", [7, 13, 23, 39, 56, 60, 202, 231, 500])
def test_nothing_else_stops(nr: int) -> None:
    for first in range(0, 600, 3):
        assert verdict(nr, first, first) == ALLOW


def test_other_architectures_are_killed() -> None:
    assert verdict(0, 0, arch=0x40000003) == KILL
    assert verdict(0x40000010, FD_BASE) == KILL
