"""Numbers as people write them: sizes such as 4096, 0x1000, 64K, 512M, 64G, 1T; counts; register values.

The parsers are types of argparse arguments.
"""

import argparse
import re

__all__ = ("format_size", "parse_number", "parse_size", "parse_u64")

_SIZE = re.compile(
    r"(?:(0x[0-9a-f]{1,16})|([0-9]{1,20}) ?(?:([kmgtp])(?:i?b)?|b)?)", re.I | re.A
)
_UNITS = "KMGTP"


def parse_size(text: str) -> int:
    """Bytes.  Units are powers of 1024, written K, KB or KiB, in either case."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (such as 4096, 512M or 64G)")
    hexadecimal, decimal, unit = found.groups()
    if hexadecimal:
        return int(hexadecimal, 16)
    return int(decimal) << 10 * (1 + _UNITS.index(unit.upper()) if unit else 0)


def parse_number(text: str) -> int:
    """Any integer, in any base that Python writes: 33, 0x21, 0b100001."""
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def parse_u64(text: str) -> int:
    """The value of a 64-bit register."""
    value = parse_number(text)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{value:#x} does not fit into 64 bits")
    return value


def format_size(size: int) -> str:
    """The shortest exact form: 64G, 1536M, 4097."""
    unit = ""
    for candidate in _UNITS:
        if size == 0 or size % 1024:
            break
        size, unit = size >> 10, candidate
    return f"{size}{unit}"
