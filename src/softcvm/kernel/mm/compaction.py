"""Requests to move or write out memory, and who refuses them (mm/compaction.c, mm/vmscan.c, v7.2).

guest_memfd folios are not pinned: nobody holds a reference for that.  Their mapping is inaccessible
and unevictable, so that compaction passes over them before it asks for a migration
(isolate_migratepages_block()) and reclaim never finds them on a list that it scans.  Both are
counted here as one refusal for each page; migration itself, where somebody insists, is refused by
the file (kvm_gmem_migrate_folio()).

Nothing else moves either: frames of the model stay where they were allocated, and there is no swap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux

__all__ = ("compact_memory", "reclaim_memory")


def compact_memory(linux: "Linux") -> int:
    """/proc/sys/vm/compact_memory: every frame of the host; how many could not be isolated."""
    refused = sum(_resident(linux))
    linux.counters.migration_refused += refused
    return refused


def reclaim_memory(linux: "Linux", npages: int) -> int:
    """memory.reclaim of a cgroup that holds every guest: up to npages; how many were refused."""
    refused = min(npages, sum(_resident(linux)))
    linux.counters.migration_refused += refused
    return refused


def _resident(linux: "Linux") -> list[int]:
    """Pages in the page cache of every guest_memfd."""
    return [end - start for inode in linux.gmem_inodes for start, end, _ in inode.folios.held()]
