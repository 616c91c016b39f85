"""RMPADJUST: one VMPL sets what a less privileged one may do with a page.  [APM3-24594 RMPADJUST]

Order: the target VMPL must be less privileged (FAIL_PERMISSION); size and alignment (FAIL_INPUT); the
nested walk and covered, own, gpa, not immutable (#VMEXIT(NPF)); a 4K request on a 2M entry (NPF with
SIZEM); a 2M request on a 4K entry (FAIL_SIZEMISMATCH); validated (#VC); the mask within the caller's own
(FAIL_PERMISSION).  The VMSA attribute changes at VMPL0 only.
"""

from typing import TYPE_CHECKING

from softcvm.abi.insn import Rmpadjust, Rmpquery, RmpqueryOut
from softcvm.abi.rmp import RmpadjustStatus, RmpqueryStatus, VmplPerm
from softcvm.abi.svm import VC_NOT_VALIDATED, GuestException, PfErr, Vector
from softcvm.hw.access import Translated, mismatch, rmp_violation, walk
from softcvm.hw.events import GuestVc
from softcvm.hw.rmp import PAGESIZE, PERMS_SHIFT, VALIDATED, VMSA, RmpVal
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD

if TYPE_CHECKING:
    from softcvm.hw.npt import Npt
    from softcvm.hw.soc import Soc

__all__ = ("rmpadjust", "rmpquery")

_WRITE = int(PfErr.WRITE | PfErr.USER | PfErr.GUEST_FINAL | PfErr.GUEST_ENC)
_READ = int(PfErr.USER | PfErr.GUEST_FINAL | PfErr.GUEST_ENC)


def rmpadjust(soc: "Soc", npt: "Npt", asid: int, vmpl: int, op: Rmpadjust) -> RmpadjustStatus:
    """Execute one RMPADJUST at `vmpl`.

    Raises NptFault, or GuestException(#VC 0x404) on a page that is not validated.
    """
    soc.counters.rmpadjust += 1
    if op.target_vmpl <= vmpl or op.target_vmpl >= soc.profile.vmpls:
        return RmpadjustStatus.FAIL_PERMISSION
    size = PTRS_PER_PMD if op.size else 1
    if op.size not in (0, 1) or op.gpa & ((size << PAGE_SHIFT) - 1):
        return RmpadjustStatus.FAIL_INPUT
    gfn = op.gpa >> PAGE_SHIFT
    where, value = _own_page(soc, npt, asid, gfn, _WRITE)
    attrs, bound = value
    if attrs & PAGESIZE and not op.size:
        code = _WRITE | PfErr.GUEST_SIZEM
        rmp_violation(soc, asid, gfn, where.pfn, code, 0, "SZ")
    if op.size and not attrs & PAGESIZE:
        return RmpadjustStatus.FAIL_SIZEMISMATCH
    _need_validated(soc, asid, gfn, where.pfn, attrs)
    own = attrs >> (PERMS_SHIFT + 8 * vmpl) & 0xFF
    if op.perms & ~own & 0xFF or op.perms & ~int(VmplPerm.ALL):
        return RmpadjustStatus.FAIL_PERMISSION
    shift = PERMS_SHIFT + 8 * op.target_vmpl
    attrs = attrs & ~(0xFF << shift) | op.perms << shift
    if vmpl == 0:
        attrs = attrs & ~VMSA | (VMSA if op.vmsa else 0)
    soc.rmp.store("RMPADJUST", where.pfn, where.pfn + size, (attrs, bound))
    return RmpadjustStatus.SUCCESS


def rmpquery(soc: "Soc", npt: "Npt", asid: int, vmpl: int, op: Rmpquery) -> RmpqueryOut:
    """Execute one RMPQUERY: the page's size and what the target VMPL may do with it."""
    soc.counters.rmpquery += 1
    if op.target_vmpl <= vmpl or op.target_vmpl >= soc.profile.vmpls:
        return RmpqueryOut(RmpqueryStatus.FAIL_PERMISSION, 0, 0, False)
    gfn = op.gpa >> PAGE_SHIFT
    where, (attrs, _) = _own_page(soc, npt, asid, gfn, _READ)
    _need_validated(soc, asid, gfn, where.pfn, attrs)
    perms = attrs >> (PERMS_SHIFT + 8 * op.target_vmpl) & 0xFF
    size = attrs >> 1 & 1
    return RmpqueryOut(RmpqueryStatus.SUCCESS, size, perms, bool(attrs & VMSA))


def _own_page(
    soc: "Soc", npt: "Npt", asid: int, gfn: int, error_code: int
) -> tuple[Translated, RmpVal]:
    where = walk(soc, npt, asid, gfn, 1, error_code)
    value = soc.rmp.map[where.pfn]
    failed = mismatch(soc, value, where.pfn, gfn, asid)
    if failed:
        rmp_violation(soc, asid, gfn, where.pfn, error_code, 0, failed)
    return where, value


def _need_validated(soc: "Soc", asid: int, gfn: int, pfn: int, attrs: int) -> None:
    if attrs & VALIDATED:
        return
    soc.counters.vc_unvalidated += 1
    gpa = gfn << PAGE_SHIFT
    if soc.tp.emit:
        soc.tp.emit(GuestVc(asid, gpa, pfn))
    raise GuestException(Vector.VC, VC_NOT_VALIDATED, gpa)
