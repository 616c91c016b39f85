"""Layout: bit and byte fields of little-endian records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcvm.abi.layout import U8, U16, U32, U64, Bits, Bytes, Layout


class Record(Layout, size=16):
    low = Bits(0)
    middle = Bits(50, 12)  # crosses byte boundaries on both sides
    byte = U8(8)
    word = U16(9)
    rest = Bytes(11, 5)


class Longer(Record, size=32):
    quad = U64(16)
    dword = U32(24)


@given(data=st.binary(min_size=16, max_size=16))
def test_fields_read_as_shifts_of_one_little_endian_integer(data: bytes) -> None:
    record = Record(data)
    whole = int.from_bytes(data, "little")
    assert record.low == whole & 1
    assert record.middle == whole >> 12 & (1 << 39) - 1
    assert record.byte == data[8]
    assert record.word == data[9] | data[10] << 8
    assert record.rest == data[11:]
    assert bytes(record) == data


@given(data=st.binary(min_size=16, max_size=16), value=st.integers(0, (1 << 39) - 1))
def test_writing_a_field_changes_its_bits_only(data: bytes, value: int) -> None:
    record = Record(data)
    record.middle = value
    mask = ((1 << 39) - 1) << 12
    whole = int.from_bytes(data, "little")
    assert int.from_bytes(bytes(record), "little") == whole & ~mask | value << 12


@pytest.mark.parametrize("value", [-1, 1 << 39])
def test_a_value_that_does_not_fit_is_refused(value: int) -> None:
    record = Record()
    with pytest.raises(ValueError, match="middle takes 39 bits"):
        record.middle = value
    with pytest.raises(ValueError, match="rest takes 5 bytes, not 4"):
        record.rest = b"1234"
    assert bytes(record) == bytes(16)


def test_a_record_is_made_from_bytes_fields_or_nothing() -> None:
    assert bytes(Record()) == bytes(16)
    assert bytes(Record(byte=0x41)) == bytes(8) + b"A" + bytes(7)
    assert Record(bytes(16)) == Record()
    with pytest.raises(ValueError, match="Record takes 16 bytes, not 15"):
        Record(bytes(15))
    with pytest.raises(TypeError, match="Record has no field spare"):
        Record(spare=1)


def test_a_record_owns_its_bytes() -> None:
    source = bytearray(16)
    record = Record(source)
    source[0] = 1
    assert record.low == 0


def test_a_derived_table_keeps_the_fields_of_its_base() -> None:
    assert list(Longer.fields()) == ["low", "middle", "byte", "word", "rest", "quad", "dword"]
    assert Longer.SIZE == 32
    record = Longer(quad=0x0102030405060708)
    assert bytes(record)[16:24] == bytes([8, 7, 6, 5, 4, 3, 2, 1])


def test_records_of_different_types_are_never_equal() -> None:
    class Twin(Layout, size=16):
        low = Bits(0)

    assert Record() != Twin()


def test_a_field_beyond_the_size_is_refused_where_the_class_is_written() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.tail ends at byte 17 of 16"):

        class Wrong(Layout, size=16):
            tail = Bytes(15, 2)


def test_only_what_is_set_is_shown() -> None:
    assert repr(Record(low=1, rest=b"abcde")) == "Record(low=0x1, rest=6162636465)"
