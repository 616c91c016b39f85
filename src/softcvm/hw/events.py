"""Events of the silicon.  Addresses are page numbers unless a name says otherwise."""

from typing import NamedTuple

__all__ = ("GuestVc", "HostRmpPf", "NestedPageFault", "RmpTransition", "VmExit")


class RmpTransition(NamedTuple):
    """An agent changed, or was refused to change, `npages` neighbouring RMP entries (4K units).

    old and new are raw quadwords of the first entry without subpage_count; in the rest of the run the
    gpa field grows with the page, everything else is equal.  On a refusal new is old.
    """

    agent: str
    pfn: int
    npages: int
    old_lo: int
    old_hi: int
    new_lo: int
    new_hi: int
    status: str


class NestedPageFault(NamedTuple):
    """#VMEXIT(NPF): EXITINFO1, the faulting GPA in bytes, and the RMP check that failed, if one did."""

    asid: int
    gpa: int
    error_code: int
    pfn: int
    check: str


class GuestVc(NamedTuple):
    """#VC 0x404: the guest used a page that is its own but not validated."""

    asid: int
    gpa: int
    pfn: int


class HostRmpPf(NamedTuple):
    """A host write met an assigned page: #PF with the RMP bit."""

    spa: int
    error_code: int
    pfn: int


class VmExit(NamedTuple):
    """A vCPU left the guest."""

    asid: int
    exit_code: int
    exit_info_1: int
    exit_info_2: int
