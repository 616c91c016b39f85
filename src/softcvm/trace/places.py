"""Which pages an event is about: host frames and guest addresses, as runs of 4K pages.

The one place that knows which field of an event is a frame, an address in bytes or a range of guest
frames; filters and histories ask here.  Events that this version does not know have no place.
"""

from collections.abc import Callable

from softcvm.abi.rmp import RmpEntryRaw
from softcvm.sim.addr import PAGE_SHIFT
from softcvm.trace.reader import Record

__all__ = ("Run", "frames", "guest_frames", "rmp_entry")

Run = tuple[int, int]
"""Pages [start, end)."""


def rmp_entry(lo: int, hi: int) -> RmpEntryRaw:
    """The two quadwords of an RmpTransition as an entry."""
    return RmpEntryRaw((lo | hi << 64).to_bytes(16, "little"))


def frames(record: Record) -> list[Run]:
    """Host frames (pfn) that an event names."""
    find = _FRAMES.get(record["event"])
    return find(record) if find is not None else []


def guest_frames(record: Record) -> list[Run]:
    """Guest frames (gfn) that an event names."""
    find = _GUEST_FRAMES.get(record["event"])
    return find(record) if find is not None else []


def _run(field: str) -> Callable[[Record], list[Run]]:
    return lambda record: [(record[field], record[field] + record["npages"])]


def _page(field: str) -> Callable[[Record], list[Run]]:
    """A page number, negative for none."""
    return lambda record: [(record[field], record[field] + 1)] if record[field] >= 0 else []


def _address(field: str) -> Callable[[Record], list[Run]]:
    return lambda record: [(record[field] >> PAGE_SHIFT, (record[field] >> PAGE_SHIFT) + 1)]


def _start_to_end(record: Record) -> list[Run]:
    return [(record["start"], record["end"])]


def _gpa_of_entries(record: Record) -> list[Run]:
    """Where the entries before and after bind the frames to, if a guest owns them."""
    found: list[Run] = []
    for side in ("old", "new"):
        entry = rmp_entry(record[f"{side}_lo"], record[f"{side}_hi"])
        run = entry.gpa, entry.gpa + record["npages"]
        if entry.asid and run not in found:
            found.append(run)
    return found


_FRAMES: dict[str, Callable[[Record], list[Run]]] = {
    "RmpTransition": _run("pfn"),
    "NestedPageFault": _page("pfn"),
    "GuestVc": _page("pfn"),
    "HostRmpPf": _page("pfn"),
    "RmpFault": _page("pfn"),
    "SnpVmsaReloaded": _page("pfn"),
    "GmemAllocate": _run("pfn"),
    "GmemFree": _run("pfn"),
    "SpteInstalled": _run("pfn"),
    "PagesAllocated": _run("pfn"),
    "PagesFreed": _run("pfn"),
    "PagesLeaked": _run("pfn"),
}

_GUEST_FRAMES: dict[str, Callable[[Record], list[Run]]] = {
    "RmpTransition": _gpa_of_entries,
    "NestedPageFault": _address("gpa"),
    "GuestVc": _address("gpa"),
    "RmpFault": _address("gpa"),
    "SnpVmsaReloaded": _address("gpa"),
    "SnpApCreation": _address("vmsa_gpa"),
    "KvmPageFault": _run("gfn"),
    "SpteInstalled": _run("gfn"),
    "SptesZapped": _start_to_end,
    "SetMemoryAttributes": _start_to_end,
    "MemslotChange": _run("gfn"),
    "PagesDirtied": _run("gfn"),
    "DirtyLogCleared": _run("gfn"),
}
