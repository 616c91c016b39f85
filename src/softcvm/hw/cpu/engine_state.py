"""What the engine's interface does not give: hidden parts of segment registers, processor mode, pending exception.

Owns where these lie in a saved context of unicorn, which is found by experiment and checked; what they mean is
tcg_registers.py's.  A mode is the mode that code is executed in: 16, 32 or 64 bits.
"""

import ctypes
import struct
from functools import cache
from typing import Any, NamedTuple

__all__ = ("SEGMENTS", "HiddenState", "unpack")

SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
"""In the order of the engine's table; each takes 24 bytes."""
_CACHE = struct.Struct(
    "<IIQII"
)  # selector, padding, base, limit, descriptor bits 63:32 less the limit's and base's
_CS, _SS = SEGMENTS.index("cs"), SEGMENTS.index("ss")
_CPL, _CS32, _SS32, _ADDSEG, _LMA, _CS64 = 3, 1 << 4, 1 << 5, 1 << 6, 1 << 14, 1 << 15
_PE = 1 << 7
_MODE = _CPL | _CS32 | _SS32 | _ADDSEG | _CS64
_L, _DB = 1 << 21, 1 << 22  # of a descriptor's upper half


class _Places(NamedTuple):
    """Offsets in a saved context."""

    segments: int
    flags: int
    """What the translator goes by: privilege level, sizes of code and stack, long mode."""
    exception: int
    """Vector of the exception under delivery; -1 is none."""


class HiddenState:
    """That of one engine."""

    def __init__(self, uc: Any) -> None:
        self._uc = uc
        self._places = _places()
        self._context = uc.context_save()
        self._base = ctypes.cast(self._context._context, ctypes.c_void_p).value or 0

    def read(self) -> tuple[bytes, int]:
        """Segments as the engine keeps them, for unpack(); privilege level."""
        self._uc.context_update(self._context)
        raw = ctypes.string_at(self._base + self._places.segments, 24 * len(SEGMENTS))
        return raw, self._flags().value & _CPL

    def write(self, segments: list[tuple[int, int, int, int]], cpl: int) -> None:
        """As unpack() gives them.  Control registers must be in the engine: they say what the attributes mean."""
        self._uc.context_update(self._context)
        raw = b"".join(
            _CACHE.pack(selector, 0, base, limit, (attrib & 0xFF) << 8 | (attrib & 0xF00) << 12)
            for selector, base, limit, attrib in segments
        )
        ctypes.memmove(self._base + self._places.segments, raw, len(raw))
        flags = self._flags()
        flags.value = flags.value & ~_MODE | cpl | _sizes(segments, flags.value)
        self._uc.context_restore(self._context)

    def mode(self) -> int:
        """In which the engine executes now: 16, 32 or 64."""
        self._uc.context_update(self._context)
        flags = self._flags().value
        return 64 if flags & _CS64 else 32 if flags & _CS32 else 16

    def forget_exception(self) -> None:
        """The engine never delivers one, and would make the next a #DF."""
        self._uc.context_update(self._context)
        ctypes.c_int32.from_address(self._base + self._places.exception).value = -1
        self._uc.context_restore(self._context)

    def _flags(self) -> ctypes.c_uint32:
        return ctypes.c_uint32.from_address(self._base + self._places.flags)


def unpack(raw: bytes) -> list[tuple[int, int, int, int]]:
    """(selector, base, limit, attributes as a save area packs them) of each of SEGMENTS."""
    return [
        (selector, base, limit, flags >> 8 & 0xFF | flags >> 12 & 0xF00)
        for selector, _, base, limit, flags in _CACHE.iter_unpack(raw)
    ]


def _sizes(segments: list[tuple[int, int, int, int]], flags: int) -> int:
    """Sizes of code and stack, and whether segments' bases count.  [APM2-24593 §4.8.1]"""
    code, stack = segments[_CS][3] << 12, segments[_SS][3] << 12
    if flags & _LMA and code & _L:
        return _CS64 | _CS32 | _SS32
    found = (_CS32 if code & _DB else 0) | (_SS32 if stack & _DB else 0)
    flat = not any(base for _, base, _, _ in (segments[0], segments[2], segments[3]))
    protected = flags & _PE and found & _CS32
    return found if protected and flat else found | _ADDSEG


@cache
def _places() -> _Places:
    import unicorn
    from unicorn import unicorn_const, x86_const

    uc = unicorn.Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64)
    size = uc.context_save().size

    def words() -> bytes:
        context = uc.context_save()
        return ctypes.string_at(ctypes.cast(context._context, ctypes.c_void_p).value or 0, size)

    mark = 0x1122_3344_5566_7788
    uc.reg_write(x86_const.UC_X86_REG_FS_BASE, mark)
    before = words()
    segments = before.index(mark.to_bytes(8, "little")) - 8 - 24 * SEGMENTS.index("fs")
    flags = segments - 8
    (value,) = struct.unpack_from("<I", before, flags)
    if not value & _CS64 or not value & _LMA or not value & _PE:
        raise RuntimeError(f"unicorn's mode was not found ({value:#x})")
    uc.mem_map(0x1000, 0x1000)
    uc.hook_add(unicorn_const.UC_HOOK_INTR, lambda uc, _, __: uc.emu_stop())
    uc.mem_write(0x1010, b"\x31\xdb\xf7\xf3")  # xor ebx, ebx; div ebx: #DE, vector 0
    uc.reg_write(x86_const.UC_X86_REG_RSP, 0x1800)
    uc.emu_start(0x1010, 0x1014)
    after = words()
    minus, zero = (-1).to_bytes(4, "little", signed=True), bytes(4)
    places = [
        at
        for at in range(0, size - 3, 4)
        if before[at : at + 4] == minus and after[at : at + 4] == zero
    ]
    if len(places) != 1:
        raise RuntimeError(f"unicorn's record of exceptions was not found ({places})")
    return _Places(segments, flags, places[0])
