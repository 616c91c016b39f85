"""What the memory chips hold, against XTS computed block by block in the test."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcvm.hw.counters import HwCounters
from softcvm.hw.dram import Dram
from softcvm.hw.memenc import Key
from tests.hw.xts import UNIT, xts

KEYS = [Key(bytes(range(n, n + size))) for n, size in ((1, 32), (64, 32), (7, 64))]
blocks = st.integers(0, 2 * UNIT // 16 - 8).map(lambda block: block * 16)


@settings(max_examples=25)
@given(spa=blocks, data=st.binary(min_size=16, max_size=64), which=st.integers(0, 2))
def test_ciphertext_is_xts_with_a_64k_tweak_unit(spa: int, data: bytes, which: int) -> None:
    data = data[: len(data) // 16 * 16]
    key = KEYS[which]
    assert key.encrypt(spa, data) == xts(key.material, spa, data)
    assert key.decrypt(spa, data) == xts(key.material, spa, data, decrypt=True)


def test_a_run_over_a_unit_boundary_is_two_units() -> None:
    data = bytes(range(64))
    key = KEYS[2]
    assert key.encrypt(UNIT - 32, data) == xts(key.material, UNIT - 32, data)


def test_data_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="whole 16-byte blocks"):
        KEYS[0].encrypt(0, b"x" * 15)
    with pytest.raises(ValueError, match="has 32 or 64 bytes"):
        Key(b"x" * 16)


@settings(max_examples=20)
@given(data=st.binary(min_size=1, max_size=40), offset=st.integers(0, 4096 - 40))
def test_the_host_reads_ciphertext_and_another_key_reads_noise(
    data: bytes, offset: int
) -> None:
    dram = Dram(4, HwCounters())
    spa = 4096 + offset
    dram.write(spa, data, KEYS[0])
    first, last = spa & ~15, (spa + len(data) + 15) & ~15
    # The blocks around: what was there (raw zeroes) read through the key, changed, written back.
    before = xts(KEYS[0].material, first, bytes(last - first), decrypt=True)
    plain = before[: spa - first] + data + before[spa - first + len(data) :]
    raw = xts(KEYS[0].material, first, plain)
    assert dram.read(first, last - first) == raw
    noise = xts(KEYS[1].material, first, raw, decrypt=True)
    assert dram.read(first, last - first, KEYS[1]) == noise
    assert dram.read(spa, len(data), KEYS[0]) == data


def test_equal_plaintext_is_equal_ciphertext_at_one_address_only() -> None:
    dram = Dram(4, HwCounters())
    page = b"secret! " * 512
    dram.write(0, page, KEYS[0])
    dram.write(4096, page, KEYS[0])
    first = dram.raw(0)
    assert first != dram.raw(1)
    dram.write(0, bytes(4096), KEYS[0])
    dram.write(0, page, KEYS[0])
    assert dram.raw(0) == first


def test_an_untouched_page_is_raw_zeroes_whoever_looks() -> None:
    dram = Dram(2, HwCounters())
    assert dram.read(4096, 32) == bytes(32)
    assert dram.read(4096, 32, KEYS[0]) == xts(KEYS[0].material, 4096, bytes(32), decrypt=True)
    dram.write(4096, b"x" * 4096, KEYS[0])
    dram.zero(1)
    assert dram.read(4096, 32) == bytes(32)


def test_an_access_outside_dram_is_an_error_of_the_caller() -> None:
    dram = Dram(2, HwCounters())
    for spa, length in ((8192, 1), (8191, 2), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="not in DRAM"):
            dram.read(spa, length)
