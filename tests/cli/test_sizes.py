"""Sizes as people write them."""

from argparse import ArgumentTypeError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcvm.cli.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0", 0),
        ("010", 10),
        ("0x1000", 4096),
        ("0xB", 11),
        ("64K", 64 << 10),
        ("512M", 512 << 20),
        ("64G", 64 << 30),
        ("64g", 64 << 30),
        ("64GiB", 64 << 30),
        ("64gb", 64 << 30),
        ("64 G", 64 << 30),
        (" 1T ", 1 << 40),
        ("1P", 1 << 50),
        ("7B", 7),
    ],
)
def test_a_size_is_a_number_and_perhaps_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "-1",
        "+1",
        "1.5G",
        "1_000",
        "4iB",
        "0x1000K",
        "1KK",
        "1e3",
        "64X",
        "٣",
        "9" * 30,
        "1 2",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is not a size"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_a_formatted_size_is_parsed_to_itself(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_a_formatted_size_is_the_shortest_exact_one() -> None:
    assert [format_size(n) for n in (0, 1, 4096, 3 << 29, 64 << 30, 1 << 40)] == [
        "0",
        "1",
        "4K",
        "1536M",
        "64G",
        "1T",
    ]
