"""Which accesses the RMP lets through, and the exact fault when it does not.

[APM2-24593 §15.36.10, Table 15-39].  Owns the order of the checks on an address that is already
translated; the walk is npt.py, the effect of an instruction on the RMP is insn/.

Checks of a private access, first failure wins:
  COV covered, OWN assigned to this ASID, GPAM bound to this gpa, MUT not immutable, SZ page size
  (all #VMEXIT(NPF)), then VAL validated (#VC), then VMPL (NPF with the VMPL bit).
A shared write, and any host write, must find every 4K entry under the mapping hypervisor-owned (HVO).
Reads through a shared or host mapping are not checked.
"""

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from softcvm.abi.svm import VC_NOT_VALIDATED, GuestException, PfErr, Vector
from softcvm.hw.events import GuestVc, HostRmpPf, NestedPageFault
from softcvm.hw.rmp import (
    ASID_MASK,
    ASID_SHIFT,
    ASSIGNED,
    IMMUTABLE,
    LINEAR,
    PAGESIZE,
    PERMS_SHIFT,
    VALIDATED,
    RmpVal,
)
from softcvm.sim.addr import PAGE_SHIFT, PgLevel, pages_per_level

if TYPE_CHECKING:
    from softcvm.hw.npt import Npt
    from softcvm.hw.soc import Soc

__all__ = (
    "HostRmpFault",
    "NptFault",
    "Translated",
    "check_host_write",
    "check_hypervisor_owned",
    "check_private",
    "check_shared_write",
    "mismatch",
    "rmp_violation",
    "walk",
)


_WRITE = int(PfErr.WRITE)


class HostRmpFault(Exception):
    """#PF in the host: a write met an assigned page.  The model's caller decides who dies of it."""

    def __init__(self, error_code: int, spa: int) -> None:
        super().__init__(
            f"RMP violation: host write to {spa:#x}, #PF error code {error_code:#x}"
        )
        self.error_code = error_code
        self.spa = spa


class NptFault(Exception):
    """#VMEXIT(NPF): EXITINFO1 and EXITINFO2."""

    def __init__(self, error_code: int, gpa: int) -> None:
        super().__init__(f"#VMEXIT(NPF) {error_code:#x} at GPA {gpa:#x}")
        self.error_code = error_code
        self.gpa = gpa


class Translated(NamedTuple):
    """Where a run of guest pages lies after both walks."""

    gfn: int
    npages: int
    pfn: int
    level: PgLevel


def walk(
    soc: "Soc", npt: "Npt", asid: int, gfn: int, npages: int, error_code: int, offset: int = 0
) -> Translated:
    """Translate up to npages from gfn.

    error_code: what the access itself contributes to EXITINFO1.  Raises NptFault when the first page is
    not present, or is read-only and the access writes.
    """
    found = npt.translate(gfn, npages)
    if found is None:
        _npf(soc, asid, gfn, error_code, offset, -1, "not present")
    if error_code & _WRITE and not found.writable:
        _npf(soc, asid, gfn, error_code | PfErr.PRESENT, offset, found.pfn, "read-only")
    return Translated(found.gfn, found.npages, found.pfn, found.level)


def check_hypervisor_owned(soc: "Soc", pfn: int, npages: int, level: PgLevel) -> int:
    """How many pages from pfn a host or shared write may touch through mappings of this level.

    A 1G mapping is checked by its 2M pieces.
    """
    rmp = soc.rmp
    if not rmp.enabled:
        return npages
    size = min(pages_per_level(level), pages_per_level(PgLevel.PG_2M))
    first = pfn - pfn % size
    for s, _, (attrs, _) in rmp.map.runs(first, -(-(pfn + npages) // size) * size):
        if attrs & ASSIGNED and rmp.covered(s):
            return max(0, s - s % size - pfn)
    return npages


def check_host_write(soc: "Soc", spa: int, length: int, level: PgLevel) -> None:
    """Raise HostRmpFault at the first byte that a host write may not reach."""
    first, last = spa >> PAGE_SHIFT, (spa + length - 1) >> PAGE_SHIFT
    allowed = check_hypervisor_owned(soc, first, last + 1 - first, level)
    held = _first_in_use(soc, first, last + 1)
    if allowed > last - first and held is None:
        return
    pfn = first + allowed
    if held is not None:
        pfn = min(pfn, held)
    at = max(spa, pfn << PAGE_SHIFT)
    error_code = int(PfErr.PRESENT | PfErr.WRITE | PfErr.RMP)
    soc.counters.rmp_violations += 1
    if soc.tp.emit:
        soc.tp.emit(HostRmpPf(at, error_code, pfn))
    raise HostRmpFault(error_code, at)


def check_shared_write(
    soc: "Soc", asid: int, where: Translated, error_code: int, offset: int
) -> int:
    """Pages of a shared guest write that pass; raises NptFault when the first does not."""
    allowed = check_hypervisor_owned(soc, where.pfn, where.npages, where.level)
    if not allowed:
        rmp_violation(soc, asid, where.gfn, where.pfn, error_code, offset, "HVO")
    return allowed


def check_private(
    soc: "Soc",
    asid: int,
    where: Translated,
    error_code: int,
    offset: int = 0,
    *,
    perms: int,
    vmpl: int,
) -> int:
    """Pages of a private access that pass every check; at least one, or a fault is raised.

    perms: the VmplPerm bits that the access needs at this vmpl.
    Raises NptFault, or GuestException(#VC 0x404) for a page that is the guest's own but not validated.
    """
    passed = 0
    for s, e, value in soc.rmp.map.runs(where.pfn, where.pfn + where.npages):
        attrs = value[0]
        gfn = where.gfn + s - where.pfn
        failed = mismatch(soc, value, s, gfn, asid)
        if failed is None:
            if bool(attrs & PAGESIZE) != (where.level >= PgLevel.PG_2M):
                failed = "SZ"
            elif not attrs & VALIDATED:
                failed = "VAL"
            elif perms & ~(attrs >> (PERMS_SHIFT + 8 * vmpl)):
                failed = "VMPL"
        if failed is None:
            passed += e - s
            continue
        if passed:
            return passed
        if failed == "VAL":
            soc.counters.vc_unvalidated += 1
            gpa = (gfn << PAGE_SHIFT) + offset
            if soc.tp.emit:
                soc.tp.emit(GuestVc(asid, gpa, s))
            raise GuestException(Vector.VC, VC_NOT_VALIDATED, gpa)
        extra = PfErr.GUEST_VMPL if failed == "VMPL" else PfErr(0)
        rmp_violation(soc, asid, gfn, s, error_code | extra, offset, failed)
    return passed


def mismatch(soc: "Soc", value: RmpVal, pfn: int, gfn: int, asid: int) -> str | None:
    """The first of COV, OWN, GPAM, MUT that a page fails for this guest."""
    if not soc.rmp.covered(pfn):
        return "COV"
    attrs, bound = value
    if not attrs & ASSIGNED or (attrs & ASID_MASK) >> ASID_SHIFT != asid:
        return "OWN"
    if (bound + pfn if attrs & LINEAR else bound) != gfn:
        return "GPAM"
    return "MUT" if attrs & IMMUTABLE else None


def rmp_violation(
    soc: "Soc", asid: int, gfn: int, pfn: int, error_code: int, offset: int, check: str
) -> NoReturn:
    """#VMEXIT(NPF) because an RMP check failed on a page that is mapped."""
    soc.counters.rmp_violations += 1
    _npf(soc, asid, gfn, error_code | PfErr.PRESENT | PfErr.RMP, offset, pfn, check)


def _npf(
    soc: "Soc", asid: int, gfn: int, error_code: int, offset: int, pfn: int, check: str
) -> NoReturn:
    gpa = (gfn << PAGE_SHIFT) + offset
    if soc.tp.emit:
        soc.tp.emit(NestedPageFault(asid, gpa, int(error_code), pfn, check))
    raise NptFault(int(error_code), gpa)


def _first_in_use(soc: "Soc", start: int, end: int) -> int | None:
    in_use = soc.rmp.in_use
    return min((pfn for pfn in in_use if start <= pfn < end), default=None) if in_use else None
