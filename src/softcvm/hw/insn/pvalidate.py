"""PVALIDATE: the guest accepts a page, or gives up its acceptance.  [APM3-24594 PVALIDATE]

Order: VMPL0 only (#GP); size 0 or 1 and the address aligned to it (FAIL_INPUT); the nested walk; covered,
own, gpa, not immutable (#VMEXIT(NPF) with the RMP bit); a 4K request on a 2M entry (NPF with SIZEM); a 2M
request on a 4K entry (FAIL_SIZEMISMATCH); nothing to change (CF=1).  The page is taken as private whatever
the C-bit says.  Contents are not touched.
"""

from typing import TYPE_CHECKING

from softcvm.abi.insn import Pvalidate, PvalidateOut
from softcvm.abi.rmp import PvalidateStatus
from softcvm.abi.svm import GuestException, PfErr, Vector
from softcvm.hw.access import mismatch, rmp_violation, walk
from softcvm.hw.rmp import PAGESIZE, VALIDATED
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD

if TYPE_CHECKING:
    from softcvm.hw.npt import Npt
    from softcvm.hw.soc import Soc

__all__ = ("pvalidate",)

_ERROR_CODE = int(PfErr.WRITE | PfErr.USER | PfErr.GUEST_FINAL | PfErr.GUEST_ENC)


def pvalidate(soc: "Soc", npt: "Npt", asid: int, vmpl: int, op: Pvalidate) -> PvalidateOut:
    """Execute op.count PVALIDATEs, or as many of the first as end alike.

    Raises NptFault when the first of them exits, GuestException(#GP) at a VMPL other than 0.
    """
    if vmpl:
        raise GuestException(Vector.GP)
    size = PTRS_PER_PMD if op.size else 1
    if op.size not in (0, 1) or op.gpa & ((size << PAGE_SHIFT) - 1):
        soc.counters.pvalidate += 1
        return PvalidateOut(PvalidateStatus.FAIL_INPUT, False, 0)
    gfn = op.gpa >> PAGE_SHIFT
    want = VALIDATED if op.validate else 0
    done = 0
    unchanged = False
    while done < op.count:
        at = gfn + done * size
        found = npt.translate(at, (op.count - done) * size)
        if found is None or not found.writable:
            if done:
                break
            walk(soc, npt, asid, at, 1, _ERROR_CODE)
            raise AssertionError("an absent or read-only mapping faults")
        _, e, value = soc.rmp.map.run(found.pfn)
        failed = mismatch(soc, value, found.pfn, at, asid)
        if failed is None and bool(value[0] & PAGESIZE) != bool(op.size):
            failed = "SZ"
        if failed:
            if done:
                break
            soc.counters.pvalidate += 1
            if failed == "SZ" and op.size:
                return PvalidateOut(PvalidateStatus.FAIL_SIZEMISMATCH, False, 0)
            sizem = PfErr.GUEST_SIZEM if failed == "SZ" else PfErr(0)
            rmp_violation(soc, asid, at, found.pfn, _ERROR_CODE | sizem, 0, failed)
        same = value[0] & VALIDATED == want
        if done and same != unchanged:
            break
        unchanged = same
        pages = max(size, min(found.npages, e - found.pfn) // size * size)
        if not same:
            attrs = value[0] & ~VALIDATED | want
            soc.rmp.store("PVALIDATE", found.pfn, found.pfn + pages, (attrs, value[1]))
        done += pages // size
    soc.counters.pvalidate += done
    return PvalidateOut(PvalidateStatus.SUCCESS, unchanged, done)
