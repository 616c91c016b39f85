"""What a guest knows of its machine when it starts.

A real guest reads its memory map from fw_cfg (etc/e820) and finds the launched sections, the secrets page
and the CPUID page at addresses built into its firmware; a scripted guest has no firmware to read, so the
one that starts it passes the same facts as a value.
"""

from typing import NamedTuple

from softcvm.sim.addr import PAGE_SIZE

__all__ = ("BootInfo", "Extent", "free_of", "subtract")


class Extent(NamedTuple):
    """Guest physical bytes [start, end), both on page boundaries."""

    start: int
    end: int

    @property
    def pages(self) -> int:
        return (self.end - self.start) // PAGE_SIZE


class BootInfo(NamedTuple):
    """The memory map and the pages that firmware measured or filled in."""

    ram: tuple[Extent, ...]
    """RAM that the guest may use (E820 type 1), ascending and apart."""
    launched: tuple[Extent, ...]
    """Pages that LAUNCH_UPDATE made Guest-Valid, ascending and apart: never validated again."""
    secrets_gpa: int | None
    cpuid_gpa: int | None
    vcpus: int = 1

    def unaccepted(self) -> tuple[Extent, ...]:
        """RAM that nobody validated yet."""
        return subtract(self.ram, self.launched)


def subtract(extents: tuple[Extent, ...], holes: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """What of `extents` lies outside every hole."""
    left: list[Extent] = []
    for extent in extents:
        at = extent.start
        for hole in sorted(holes):
            if hole.end <= at or hole.start >= extent.end:
                continue
            if hole.start > at:
                left.append(Extent(at, hole.start))
            at = max(at, hole.end)
        if at < extent.end:
            left.append(Extent(at, extent.end))
    return tuple(left)


def free_of(
    extents: tuple[Extent, ...], size: int, align: int, above: int = 0
) -> Extent | None:
    """The lowest aligned piece of `size` bytes inside one extent, at or above an address."""
    for extent in extents:
        at = -(-max(extent.start, above) // align) * align
        if at + size <= extent.end:
            return Extent(at, at + size)
    return None
