"""Cache maintenance, counted, and which processors have written back since firmware last asked.

Lines themselves are not modelled: accesses are coherent.  What firmware checks is modelled: DF_FLUSH
wants a WBINVD on every core first [ABI-56860 §8.5], and Linux's flushes are counted where it makes them.
"""

from softcvm.hw.counters import HwCounters
from softcvm.sim.state import State

__all__ = ("Caches",)


class Caches(State):
    saved = ("cpus", "wbinvd_done")
    derived = {"counters": "statistics"}

    def __init__(self, cpus: int, counters: HwCounters) -> None:
        self.cpus = cpus
        self.counters = counters
        self.wbinvd_done: set[int] = set()
        """Processors that executed WBINVD since the set was last cleared by firmware."""

    def wbinvd(self, cpu: int) -> None:
        """WBINVD on one processor."""
        if not 0 <= cpu < self.cpus:
            raise ValueError(f"no processor {cpu}")
        self.counters.wbinvd += 1
        self.wbinvd_done.add(cpu)

    def wbinvd_on_all_cpus(self) -> None:
        self.counters.wbinvd += self.cpus
        self.wbinvd_done = set(range(self.cpus))

    def clflush(self, npages: int = 1) -> None:
        """CLFLUSH of every line of `npages` pages."""
        self.counters.clflush_pages += npages

    def vm_page_flush(self, npages: int = 1) -> None:
        """VM_PAGE_FLUSH: write back and invalidate a page in an ASID's view."""
        self.counters.page_flushes += npages
