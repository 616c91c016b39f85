"""Where memory lies on the board: QEMU's q35 with an SNP guest (hw/i386/pc_q35.c, hw/i386/x86-common.c).

RAM fills up to 2.75 GiB below 4 GiB, or 2 GiB when there is more, and goes on at 4 GiB; on a guest that
would meet AMD's HyperTransport hole below 1 TiB it goes on at 1 TiB.  The firmware is RAM of its own that
ends at 4 GiB; confidential guests have no copy of it below 1 MiB.  0xA0000..0xC0000 belongs to video memory.

Which of it a guest may use (E820) is part of the same decision; making it exist is memory.py.
"""

from typing import NamedTuple

from softcvm.sim.addr import PAGE_SIZE

__all__ = ("Board", "BoardError", "Region", "plan_board")

_MIB, _GIB, _TIB = 1 << 20, 1 << 30, 1 << 40
_FOUR_GIB = 4 * _GIB
_LOW_MAX = 0xB000_0000  # above it PCI Express configuration space begins
_LOW_SPLIT = 0x8000_0000
_VIDEO = (0xA_0000, 0xC_0000)
_BIOS_AREA_END = _MIB
_AMD_HT_START = 0xFD_0000_0000
_MEMSLOT_MAX = (
    ((1 << 31) - 1) * PAGE_SIZE // _GIB * _GIB
)  # KVM_MEM_MAX_NR_PAGES, on a GiB boundary
MEMORY_MIN = _MIB


class BoardError(ValueError):
    """The guest that was asked for cannot be built."""


class Region(NamedTuple):
    """One memslot's worth of guest memory; `offset` is where it begins in its guest_memfd."""

    name: str
    gpa: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        return self.gpa + self.size


class Board(NamedTuple):
    memory_bytes: int
    ram: tuple[Region, ...]
    """Of one guest_memfd, whose size is memory_bytes."""
    firmware: Region
    """Of its own guest_memfd."""
    e820: tuple[tuple[int, int], ...]
    """[start, end) of RAM that the guest may use."""


def plan_board(memory_bytes: int, firmware_size: int, phys_bits: int) -> Board:
    """The layout for this much RAM and a firmware image of this size."""
    if memory_bytes % PAGE_SIZE:
        raise BoardError(f"memory of {memory_bytes} bytes is not made of 4K pages")
    if memory_bytes <= MEMORY_MIN:
        raise BoardError(
            f"memory of {memory_bytes} bytes is too small: a PC has more than 1 MiB"
        )
    low = _LOW_SPLIT if memory_bytes >= _LOW_MAX else memory_bytes
    high_start, high = _FOUR_GIB, memory_bytes - low
    if high_start + high > _AMD_HT_START:
        high_start = _TIB
    if high_start + high > 1 << phys_bits:
        raise BoardError(
            f"memory of {memory_bytes:#x} bytes ends at {high_start + high:#x}, "
            f"beyond the {phys_bits} bits of a physical address"
        )
    ram = [
        Region("ram-low", 0, _VIDEO[0], 0),
        Region("ram-below-4g", _VIDEO[1], low - _VIDEO[1], _VIDEO[1]),
    ]
    for start in range(0, high, _MEMSLOT_MAX):
        size = min(_MEMSLOT_MAX, high - start)
        ram.append(Region("ram-above-4g", high_start + start, size, low + start))
    firmware = Region("firmware", _FOUR_GIB - firmware_size, firmware_size, 0)
    e820 = [(0, _VIDEO[0]), (_BIOS_AREA_END, low)]
    if high:
        e820.append((high_start, high_start + high))
    return Board(memory_bytes, tuple(ram), firmware, tuple(e820))
