"""Guest memory of two pools, and moving ranges of it from one to the other.

Private pages lie in guest_memfds, shared ones in anonymous memory of this process; every memslot has both,
and KVM's memory attributes say which one a page is.  A conversion sets the attribute first and then frees
the side that is no longer used (kvm_convert_memory(), QEMU accel/kvm/kvm-all.c): its contents are lost.
"""

from bisect import bisect_right
from collections.abc import Iterator
from mmap import (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
)
from typing import NamedTuple

from softcvm.abi.kvm.memory import KvmUserspaceMemoryRegion2, MemFlag
from softcvm.abi.sys import Sys
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD
from softcvm.vmm.board import Board, Region
from softcvm.vmm.errors import VmmError, call_failed
from softcvm.vmm.kvm import Vm

__all__ = ("GuestMemory", "Slot")

MAP_NORESERVE = 0x4000  # not in Python's mmap
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
_ALIGN = PTRS_PER_PMD << PAGE_SHIFT


class Slot(NamedTuple):
    """A memslot: where the shared side is mapped, and where in which guest_memfd the private side lies."""

    number: int
    region: Region
    hva: int
    gmem_fd: int


class Mapping(NamedTuple):
    addr: int
    length: int


class GuestMemory:
    """All memslots of a VM; none until add_board()."""

    def __init__(self, sys: Sys, vm: Vm) -> None:
        self._sys = sys
        self._vm = vm
        self._gmem_fds: list[int] = []
        self._mappings: list[Mapping] = []
        self.slots: list[Slot] = []
        self.conversions = {"to private": 0, "to shared": 0}
        self._starts: list[int] = []

    def add_board(self, board: Board) -> None:
        """Make the board's memory exist, all of it private."""
        self._add(board.ram, board.memory_bytes)
        self._add((board.firmware,), board.firmware.size)
        self.slots.sort(key=lambda slot: slot.region.gpa)
        self._starts = [slot.region.gpa for slot in self.slots]

    def close(self) -> None:
        for mapping in self._mappings:
            self._sys.munmap(mapping.addr, mapping.length)
        for fd in self._gmem_fds:
            self._sys.close(fd)
        self._mappings, self._gmem_fds = [], []

    def pieces(self, gpa: int, size: int) -> Iterator[tuple[Slot, int, int]]:
        """The parts of [gpa, gpa + size) that are memory: slot, offset in it, length."""
        end = gpa + size
        first = max(bisect_right(self._starts, gpa) - 1, 0)
        for slot in self.slots[first:]:
            if slot.region.gpa >= end:
                break
            lo, hi = max(gpa, slot.region.gpa), min(end, slot.region.end)
            if lo < hi:
                yield slot, lo - slot.region.gpa, hi - lo

    def convert(self, gpa: int, size: int, private: bool) -> bool:
        """Make a range private or shared; False when part of it is no memory (nothing is changed)."""
        pieces = list(self.pieces(gpa, size))
        if sum(length for _, _, length in pieces) != size:
            return False
        self._vm.set_private(gpa, size, private)
        for slot, offset, length in pieces:
            if private:
                self._discard_shared(slot, offset, length)
            else:
                self._discard_private(slot, offset, length)
        self.conversions["to private" if private else "to shared"] += size >> PAGE_SHIFT
        return True

    def hva(self, gpa: int, size: int) -> int:
        """Address of the shared side of a range that lies in one slot."""
        for slot, offset, length in self.pieces(gpa, size):
            if length == size:
                return slot.hva + offset
        raise VmmError(f"guest memory {gpa:#x}..{gpa + size:#x} is not in one memslot")

    def read(self, gpa: int, size: int) -> bytes:
        """What the VMM finds on the shared side."""
        return self._sys.load(self.hva(gpa, size), size)

    def write(self, gpa: int, data: bytes) -> None:
        self._sys.store(self.hva(gpa, len(data)), data)

    def discard_shared(self, gpa: int, size: int) -> None:
        """Free the shared side of memory that is private."""
        for slot, offset, length in self.pieces(gpa, size):
            self._discard_shared(slot, offset, length)

    def _add(self, regions: tuple[Region, ...], gmem_size: int) -> None:
        gmem_fd = self._vm.create_guest_memfd(gmem_size)
        self._gmem_fds.append(gmem_fd)
        for region in regions:
            slot = Slot(len(self.slots), region, self._map(region), gmem_fd)
            self._vm.set_user_memory_region2(
                KvmUserspaceMemoryRegion2(
                    slot=slot.number,
                    flags=MemFlag.GUEST_MEMFD,
                    guest_phys_addr=region.gpa,
                    memory_size=region.size,
                    userspace_addr=slot.hva,
                    guest_memfd_offset=region.offset,
                    guest_memfd=gmem_fd,
                )
            )
            self._vm.set_private(region.gpa, region.size, True)
            self.slots.append(slot)

    def _map(self, region: Region) -> int:
        """Anonymous memory whose addresses are as far from a 2M boundary as the guest's.

        KVM maps no large page, private ones neither, where the two differ (kvm_alloc_memslot_metadata()).
        """
        length = region.size + _ALIGN
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        try:
            addr = self._sys.mmap(length, PROT_READ | PROT_WRITE, flags)
        except OSError as error:
            raise call_failed(
                f"mmap of {region.size:#x} bytes for {region.name}", error
            ) from error
        self._mappings.append(Mapping(addr, length))
        return addr + (region.gpa - addr) % _ALIGN

    def _discard_shared(self, slot: Slot, offset: int, length: int) -> None:
        try:
            self._sys.madvise(slot.hva + offset, length, MADV_DONTNEED)
        except OSError as error:
            raise call_failed("madvise(MADV_DONTNEED)", error) from error

    def _discard_private(self, slot: Slot, offset: int, length: int) -> None:
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        try:
            self._sys.fallocate(slot.gmem_fd, mode, slot.region.offset + offset, length)
        except OSError as error:
            raise call_failed("fallocate(PUNCH_HOLE) of a guest_memfd", error) from error
