"""The model and the reference side by side: each call does one thing to both and compares the answers."""

from collections.abc import Callable

from softcvm.abi.insn import Pvalidate, Rmpadjust, Rmpquery
from softcvm.abi.rmp import RMPTABLE_CPU_BOOKKEEPING_SZ, RmpState
from softcvm.abi.svm import VC_NOT_VALIDATED, GuestException, Vector
from softcvm.hw.access import (
    HostRmpFault,
    NptFault,
    check_host_write,
    check_private,
    check_shared_write,
    walk,
)
from softcvm.hw.insn.psmash import psmash
from softcvm.hw.insn.pvalidate import pvalidate
from softcvm.hw.insn.rmpadjust import rmpadjust, rmpquery
from softcvm.hw.insn.rmpread import rmpread
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.hw.npt import Npt
from softcvm.hw.profile import GENOA
from softcvm.hw.rmp import RmpEntry
from softcvm.hw.soc import Soc
from softcvm.sim.addr import PgLevel
from tests.hw import reference as ref

# The last 2M region is cut by the end of the table, and the table itself lies where nothing is covered.
COVERED = 3 * 512 + 100
MEMORY = 5 * 512
RMP_BASE = 4 * 512 * 4096
ASIDS = (1, 2, 1006)

# [APM2-24593 §15.25.6]: what an access says of itself in EXITINFO1.  A nested walk is a user access.
_READ = ref.ERR_U | ref.ERR_FINAL
_WRITE = _READ | ref.ERR_W
_FETCH = _READ | ref.ERR_ID


class Both:
    """One Soc with a nested table for each ASID, and one ReferenceRmp."""

    def __init__(self) -> None:
        self.soc = Soc(GENOA, MEMORY)
        rmp = self.soc.rmp
        rmp.base = RMP_BASE
        rmp.end = RMP_BASE + RMPTABLE_CPU_BOOKKEEPING_SZ + 16 * COVERED - 1
        rmp.enabled = True
        self.npts = {asid: Npt() for asid in ASIDS}
        self.ref = ref.ReferenceRmp(MEMORY, COVERED)

    # -- host -------------------------------------------------------------------------------------

    def rmpupdate(self, pfn: int, new: RmpState, count: int = 1, misalign: int = 0) -> int:
        spa = pfn * 4096 + misalign
        status, done = rmpupdate(self.soc, spa, new, count)
        step = 4096 * (512 if new.pagesize else 1)
        expected, expected_done = ref.SUCCESS, 0
        for i in range(count):
            gpa = new.gpa + i * step if new.assigned and new.asid else new.gpa
            expected = self.ref.rmpupdate(
                spa + i * step, new.assigned, new.pagesize, new.immutable, gpa, new.asid
            )
            if expected:
                break
            expected_done += 1
        assert (int(status), done) == (expected, expected_done)
        return expected

    def psmash(self, pfn: int, count: int = 1, misalign: int = 0) -> int:
        status, done = psmash(self.soc, pfn * 4096 + misalign, count)
        expected, expected_done = ref.SUCCESS, 0
        for i in range(count):
            expected = self.ref.psmash((pfn + i * 512) * 4096 + misalign)
            if expected:
                break
            expected_done += 1
        assert (int(status), done) == (expected, expected_done)
        return expected

    def rmpread(self, pfn: int) -> None:
        status, out = rmpread(self.soc, pfn * 4096)
        if pfn >= COVERED:
            assert status == ref.FAIL_INPUT
            return
        assert out is not None
        page = self.ref.pages[pfn]
        others = self.ref.pages[pfn + 1 : min(pfn + 512, COVERED)] if pfn % 512 == 0 else []
        region = int(any(other.assigned for other in others))
        expected = (page.gfn * 4096).to_bytes(8, "little")
        expected += bytes([page.assigned, page.pagesize | region << 1, page.immutable, 0])
        expected += page.asid.to_bytes(4, "little")
        assert bytes(out) == expected

    def host_write(self, pfn: int, npages: int = 1, *, large: bool) -> bool:
        """A host store that ends 8 bytes into its last page: whether it went through."""
        npages = min(npages, MEMORY - pfn)
        refused = [
            page
            for page in range(pfn, pfn + npages)
            if self.ref.pages[page].in_use or not self.ref.host_may_write(page, large=large)
        ]
        level = PgLevel.PG_2M if large else PgLevel.PG_4K
        got: list[tuple[int, int]] = []
        try:
            check_host_write(self.soc, pfn * 4096, (npages - 1) * 4096 + 8, level)
        except HostRmpFault as fault:
            got.append((fault.error_code, fault.spa))
        assert got == [(0x8000_0003, page * 4096) for page in refused[:1]]
        return not refused

    def set_in_use(self, pfn: int, held: bool) -> None:
        self.ref.pages[pfn].in_use = held
        if held:
            self.soc.rmp.in_use.add(pfn)
        else:
            self.soc.rmp.in_use.discard(pfn)

    def map_nested(self, asid: int, gfn: int, pfn: int, *, large: bool, writable: bool) -> None:
        npages, level = (512, PgLevel.PG_2M) if large else (1, PgLevel.PG_4K)
        start, end = gfn - gfn % npages, gfn - gfn % npages + npages
        pfn -= pfn % npages
        # A leaf replaces what lay there, a large one as a whole.
        for mapping in self.npts[asid].mappings(start, end):
            whole = 512 if mapping.level == PgLevel.PG_2M else 1
            first = mapping.gfn - mapping.gfn % whole
            last = -(-(mapping.gfn + mapping.npages) // whole) * whole
            for gone in range(first, last):
                self.ref.nested.get(asid, {}).pop(gone, None)
        self.npts[asid].zap(start, end)
        self.npts[asid].set(start, pfn, npages, level, writable=writable)
        for i in range(npages):
            leaf = ref.Leaf(pfn + i, large, writable)
            self.ref.nested.setdefault(asid, {})[start + i] = leaf

    # -- firmware ---------------------------------------------------------------------------------

    def firmware(self, pfn: int, entry: RmpEntry) -> None:
        """Firmware stores a 4K entry; inside a 2M page it has no business."""
        if self.ref.head_of(pfn).pagesize:
            return
        self.soc.rmp.firmware_write("firmware", pfn, 1, entry)
        page = self.ref.pages[pfn]
        page.assigned, page.immutable, page.asid = entry.assigned, entry.immutable, entry.asid
        page.gfn, page.vmsa, page.validated = entry.gpa // 4096, entry.vmsa, entry.validated
        page.lock, page.perms, page.pagesize = entry.lock, list(entry.perms), 0

    # -- guest ------------------------------------------------------------------------------------

    def data(self, asid: int, vmpl: int, gpa: int, *, write: bool, c: bool) -> ref.Outcome:
        code = _WRITE if write else _READ
        if c:
            code |= ref.ERR_ENC
            need = ref.WRITE if write else ref.READ
            return self._private(asid, vmpl, gpa, code, need, write=write)
        expected = self.ref.shared(asid, gpa, code, write=write)

        def model() -> None:
            where = walk(self.soc, self.npts[asid], asid, gpa >> 12, 1, code, gpa & 0xFFF)
            if write:
                check_shared_write(self.soc, asid, where, code, gpa & 0xFFF)

        self._same(model, expected)
        return expected

    def fetch(self, asid: int, vmpl: int, gpa: int, *, user: bool) -> ref.Outcome:
        need = ref.EXEC_USER if user else ref.EXEC_SUPERVISOR
        return self._private(asid, vmpl, gpa, _FETCH | ref.ERR_ENC, need, write=False)

    def _private(
        self, asid: int, vmpl: int, gpa: int, code: int, need: int, *, write: bool
    ) -> ref.Outcome:
        expected = self.ref.private(asid, vmpl, gpa, need, code, walk_writes=write)

        def model() -> None:
            offset = gpa & 0xFFF
            where = walk(self.soc, self.npts[asid], asid, gpa >> 12, 1, code, offset)
            check_private(self.soc, asid, where, code, offset, perms=need, vmpl=vmpl)

        self._same(model, expected)
        return expected

    def pvalidate(
        self, asid: int, gpa: int, size: int, validate: bool, count: int
    ) -> ref.Outcome:
        code = _WRITE | ref.ERR_ENC
        step = 4096 * (512 if size else 1)
        first = self.ref.pvalidate(asid, 0, gpa, size, int(validate), code)
        expected = first
        if isinstance(first, ref.Done):
            done = int(first.value[0] == ref.SUCCESS)
            while (
                done
                and done < count
                and self._pvalidates_alike(asid, gpa + done * step, size, validate, first)
            ):
                done += 1
            expected = ref.Done((*first.value, done))

        def model() -> tuple[int, ...]:
            out = pvalidate(
                self.soc, self.npts[asid], asid, 0, Pvalidate(gpa, size, validate, count)
            )
            return int(out.code), int(out.cf), out.done

        self._same(model, expected)
        return expected

    def _pvalidates_alike(
        self, asid: int, gpa: int, size: int, validate: bool, first: ref.Done
    ) -> bool:
        """Execute one more PVALIDATE on the reference if it ends as the first did; else nothing."""
        where = self.ref.leaf(asid, gpa // 4096)
        page = self.ref.head_of(where.pfn) if where else ref.Page()
        before = page.validated
        if self.ref.pvalidate(asid, 0, gpa, size, int(validate), 0) == first:
            return True
        page.validated = before
        return False

    def rmpadjust(self, asid: int, vmpl: int, op: Rmpadjust) -> ref.Outcome:
        expected = self.ref.rmpadjust(
            asid,
            vmpl,
            op.gpa,
            op.size,
            op.target_vmpl,
            op.perms,
            int(op.vmsa),
            _WRITE | ref.ERR_ENC,
        )
        self._same(
            lambda: (int(rmpadjust(self.soc, self.npts[asid], asid, vmpl, op)),), expected
        )
        return expected

    def rmpquery(self, asid: int, vmpl: int, op: Rmpquery) -> ref.Outcome:
        expected = self.ref.rmpquery(asid, vmpl, op.gpa, op.target_vmpl, _READ | ref.ERR_ENC)

        def model() -> tuple[int, ...]:
            out = rmpquery(self.soc, self.npts[asid], asid, vmpl, op)
            if out.code:
                return (int(out.code),)
            return int(out.code), out.size, out.perms, int(out.vmsa)

        self._same(model, expected)
        return expected

    @staticmethod
    def _same(model: Callable[[], tuple[int, ...] | None], expected: ref.Outcome) -> None:
        try:
            got: ref.Outcome = ref.Done(model() or ())
        except NptFault as fault:
            got = ref.Npf(fault.error_code, fault.gpa)
        except GuestException as exception:
            if (exception.vector, exception.error_code) != (Vector.VC, VC_NOT_VALIDATED):
                raise
            got = ref.Vc(exception.cr2)
        assert got == expected

    # -- the whole table --------------------------------------------------------------------------

    def compare_table(self) -> None:
        """Every raw entry, read as the host reads it from memory, and the counter of every ASID."""
        table = self.soc.host_read(RMP_BASE + RMPTABLE_CPU_BOOKKEEPING_SZ, 16 * COVERED)
        for pfn in range(COVERED):
            raw = table[16 * pfn : 16 * pfn + 16]
            assert raw == self.ref.raw(pfn), f"pfn {pfn:#x}: {raw.hex()} {self.ref.pages[pfn]}"
        counts = self.soc.host_read(RMP_BASE, RMPTABLE_CPU_BOOKKEEPING_SZ)
        owners = [self.ref.head_of(pfn).asid for pfn in range(COVERED)]
        for asid in ASIDS:
            counted = int.from_bytes(counts[8 * asid : 8 * asid + 8], "little")
            assert counted == owners.count(asid)
