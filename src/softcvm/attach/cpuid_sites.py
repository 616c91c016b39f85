"""Where the CPUID instruction stands in an ELF file: decoded, not guessed from two bytes.

The bytes 0F A2 may lie inside of another instruction, or among constants.  A place counts when decoding from
the beginning of its function, as the file's unwind tables (.eh_frame_hdr, .eh_frame) have it, comes to it;
without such tables, from the beginning of the code.
"""

import struct
from bisect import bisect_right
from functools import cache
from io import BytesIO
from typing import Any

__all__ = ("cpuid_sites",)

_CPUID = b"\x0f\xa2"
_SORTED_TABLE = b"\x01\x1b\x03\x3b"
"""Version 1; eh_frame_ptr pcrel sdata4; count udata4; table datarel sdata4: what every linker writes."""
_PF_X = 1
_LONGEST = 15
"""Bytes of an instruction at most."""


def cpuid_sites(path: str) -> tuple[int, ...]:
    """File offsets of CPUID instructions in the code of an ELF file; none in what is no ELF file.  OSError."""
    with open(path, "rb") as file:
        data = file.read()
    return _sites(data) if data.startswith(b"\x7fELF") and _CPUID in data else ()


@cache
def _sites(data: bytes) -> tuple[int, ...]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(BytesIO(data))
        segments = list(elf.iter_segments())
    except ELFError:
        return ()
    functions = _functions(data, segments)
    found: list[int] = []
    for segment in segments:
        if segment["p_type"] == "PT_LOAD" and segment["p_flags"] & _PF_X:
            found += _in_code(
                data, segment["p_offset"], segment["p_filesz"], segment["p_vaddr"], functions
            )
    return tuple(found)


def _functions(data: bytes, segments: list[Any]) -> list[tuple[int, int]]:
    """Address and end of functions, ascending.  [LSB Core 5.0, 10.6 Exception Frames]"""
    for segment in segments:
        if segment["p_type"] != "PT_GNU_EH_FRAME":
            continue
        at, base = segment["p_offset"], segment["p_vaddr"]
        if data[at : at + 4] != _SORTED_TABLE:
            return []
        (count,) = struct.unpack_from("<I", data, at + 8)
        table = data[at + 12 : at + 12 + 8 * count]
        found = []
        for location, entry in struct.iter_unpack("<ii", table):
            # The entry lies in the segment of the table: length, CIE, place and size of the function.
            (size,) = struct.unpack_from("<I", data, at + entry + 12)
            found.append((base + location, base + location + size))
        return found
    return []


def _in_code(
    data: bytes, offset: int, size: int, vaddr: int, functions: list[tuple[int, int]]
) -> list[int]:
    found: list[int] = []
    at = data.find(_CPUID, offset, offset + size)
    while at >= 0:
        address = vaddr + at - offset
        begin, end = vaddr, vaddr + size
        if functions:
            begin, end = functions[max(0, bisect_right(functions, (address, 1 << 64)) - 1)]
        if begin <= address < end:
            code = data[begin - vaddr + offset : min(at + _LONGEST, end - vaddr + offset)]
            if _decodes_to(code, address - begin):
                found.append(at)
        at = data.find(_CPUID, at + 1, offset + size)
    return found


def _decodes_to(code: bytes, place: int) -> bool:
    """Whether an instruction begins at this place; data between instructions is stepped over."""
    from capstone import CS_ARCH_X86, CS_MODE_64, Cs

    decoder = Cs(CS_ARCH_X86, CS_MODE_64)
    decoder.skipdata = True
    for address, _, mnemonic, _ in decoder.disasm_lite(code, 0):
        if address >= place:
            return bool(address == place and mnemonic == "cpuid")
    return False
