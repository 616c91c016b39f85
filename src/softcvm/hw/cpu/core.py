"""What every kind of core does at VMRUN and at #VMEXIT, whatever executes in between.

[APM2-24593 §15.34, §15.36.8].  Owns the in-use mark of the VMSA page and the guest's memory accesses; what
VMRUN refuses is vmrun.py, the instruction stream is the core's that uses this.

A guest without SNP has no RMP entries of its own: what it writes must be the hypervisor's.  [§15.36.10]
"""

from typing import Protocol

from softcvm.abi.insn import Fetch, Load, Store, Touch
from softcvm.abi.rmp import VmplPerm
from softcvm.abi.svm import NestedCtl, PfErr, SevFeatures, SevStatus
from softcvm.hw.access import Translated, check_private, check_shared_write, walk
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.hw.cpu.vmrun import guest_state
from softcvm.hw.events import VmExit
from softcvm.hw.memenc import Key
from softcvm.hw.soc import Soc
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT
from softcvm.sim.errors import Unmodelled
from softcvm.sim.steps import Steps

__all__ = ("Core", "GuestCpu", "record_exit")


_NESTED_WALK = int(PfErr.USER | PfErr.GUEST_FINAL)
_TABLE_WALK = int(PfErr.USER | PfErr.GUEST_PAGE)
_WRITE, _FETCH, _GUEST_ENC = int(PfErr.WRITE), int(PfErr.FETCH), int(PfErr.GUEST_ENC)


class Core(Protocol):
    """A processor that can run one vCPU."""

    def vmrun(self, vmcb: Vmcb) -> Steps[None]:
        """Enter the guest and run until #VMEXIT; vmcb.exit_* then say why."""
        ...

    def interrupt(self) -> None:
        """Come to the next point soon.  Any thread may call it."""
        ...


class GuestCpu:
    """The state of one entry into a guest: its ASID, key, VMPL, and how it reaches memory."""

    def __init__(self, soc: Soc, vmcb: Vmcb) -> None:
        """VMRUN.  Raises VmExitRaised when it refuses."""
        self.soc = soc
        self.npt = vmcb.npt
        self.asid = vmcb.asid
        self.vmsa = guest_state(soc, vmcb)
        self.sev = bool(vmcb.nested_ctl & NestedCtl.SEV_ENABLE)
        self.sev_es = bool(vmcb.nested_ctl & NestedCtl.SEV_ES_ENABLE)
        self.sev_features = self.vmsa.sev_features if self.sev_es else 0
        self.snp = bool(self.sev_features & SevFeatures.SNP_ACTIVE)
        self.vmpl = self.vmsa.vmpl if self.snp else 0
        self.vmsa_pa = vmcb.vmsa_pa if self.sev_es else None
        if self.vmsa_pa is not None:
            soc.rmp.in_use.add(self.vmsa_pa >> PAGE_SHIFT)
        soc.counters.vmrun += 1

    def leave(self, vmcb: Vmcb, code: int, info_1: int = 0, info_2: int = 0) -> None:
        """#VMEXIT: release the VMSA page and report."""
        if self.vmsa_pa is not None:
            self.soc.rmp.in_use.discard(self.vmsa_pa >> PAGE_SHIFT)
        record_exit(self.soc, vmcb, code, info_1, info_2)

    def key(self, c: bool) -> Key | None:
        """What an access with this C-bit is encrypted with."""
        if not c or not self.sev:
            return None
        key = self.soc.key(self.asid)
        if key is None:
            raise Unmodelled(
                f"an encrypted access under ASID {self.asid}, which has no guest's key"
            )
        return key

    @property
    def sev_status(self) -> int:
        """The SEV_STATUS MSR.  [APM2-24593 §15.34.10]"""
        status = SevStatus.SEV * self.sev | SevStatus.SEV_ES * self.sev_es
        return status | self.sev_features << 2

    def load(self, op: Load, done: bytearray, *, table: bool = False) -> bytes:
        """Read; `done` keeps what was read before a fault, so that the access can go on after it.

        table: by a walk of the guest's page table, which faults say.
        """
        error_code = self._error_code(op.c, table=table)
        while len(done) < op.length:
            at = op.gpa + len(done)
            where, length = self._reach(at, op.length - len(done), error_code, op.c)
            spa = (where.pfn << PAGE_SHIFT) + (at & PAGE_MASK)
            key = self.key(op.c)
            if key is not None:
                done += self.soc.dram.read(spa, length, key)
            else:  # the plain view, the RMP's memory included
                done += self.soc.host_read(spa, length)
        return bytes(done)

    def store(self, op: Store, done: int, *, table: bool = False) -> int:
        """Write from byte `done` on up to the end of a page run; how far it came."""
        error_code = self._error_code(op.c, write=True, table=table)
        at = op.gpa + done
        where, length = self._reach(at, len(op.data) - done, error_code, op.c)
        spa = (where.pfn << PAGE_SHIFT) + (at & PAGE_MASK)
        self.soc.dram.write(spa, op.data[done : done + length], self.key(op.c))
        return done + length

    def touch(self, op: Touch, done: int) -> int:
        """Access pages from `done` on; how many are done now.

        A read of a page changes nothing.  Writing a byte back re-encrypts the page under this guest's
        key when it was last written under another.
        """
        error_code = self._error_code(op.c, write=op.write)
        at = op.gpa + (done << PAGE_SHIFT)
        where, length = self._reach(
            at & ~PAGE_MASK, (op.count - done) << PAGE_SHIFT, error_code, op.c
        )
        if op.write:
            key = self.key(op.c)
            for pfn in range(where.pfn, where.pfn + (length >> PAGE_SHIFT)):
                spa = (pfn << PAGE_SHIFT) + (at & PAGE_MASK)
                self.soc.dram.write(spa, self.soc.dram.read(spa, 1, key), key)
        return done + (length >> PAGE_SHIFT)

    def fetch(self, op: Fetch) -> None:
        """Execute from a page."""
        self._fetch_page(op.gpa, c=True, user=op.user)

    def reach_page(self, gpa: int, *, c: bool, write: bool, fetch: bool) -> int:
        """The frame behind a guest physical address, for an access of this kind.  NptFault, GuestException."""
        if fetch:
            return self._fetch_page(gpa, c=c, user=False).pfn
        error_code = self._error_code(c, write=write)
        where, _ = self._reach(gpa, 1, error_code, c)
        return where.pfn

    def _fetch_page(self, gpa: int, *, c: bool, user: bool) -> Translated:
        """An SNP guest executes private pages only."""
        error_code = self._error_code(c or self.snp, fetch=True)
        needs = VmplPerm.EXECUTE_USER if user else VmplPerm.EXECUTE_SUPERVISOR
        where = walk(
            self.soc, self.npt, self.asid, gpa >> PAGE_SHIFT, 1, error_code, gpa & PAGE_MASK
        )
        if self.snp:
            self._private(where, error_code, gpa & PAGE_MASK, needs)
        return where

    def _reach(self, gpa: int, length: int, error_code: int, c: bool) -> tuple[Translated, int]:
        """Translate and check; the run of pages at gpa, and how many bytes of the access it serves."""
        offset = gpa & PAGE_MASK
        npages = (offset + length + PAGE_MASK) >> PAGE_SHIFT
        where = walk(
            self.soc, self.npt, self.asid, gpa >> PAGE_SHIFT, npages, error_code, offset
        )
        write = bool(error_code & _WRITE)
        if c and self.snp:
            needs = VmplPerm.WRITE if write else VmplPerm.READ
            npages = self._private(where, error_code, offset, needs)
        elif write:
            npages = check_shared_write(self.soc, self.asid, where, error_code, offset)
        else:
            npages = where.npages
        return where, min(length, (npages << PAGE_SHIFT) - offset)

    def _error_code(
        self, c: bool, *, write: bool = False, fetch: bool = False, table: bool = False
    ) -> int:
        """What an access contributes to EXITINFO1; nested walks are always user accesses."""
        code = _TABLE_WALK if table else _NESTED_WALK
        if write:
            code |= _WRITE
        if fetch:
            code |= _FETCH
        if c and self.sev:
            code |= _GUEST_ENC
        return code

    def _private(self, where: Translated, error_code: int, offset: int, needs: VmplPerm) -> int:
        return check_private(
            self.soc, self.asid, where, error_code, offset, perms=int(needs), vmpl=self.vmpl
        )


def record_exit(soc: Soc, vmcb: Vmcb, code: int, info_1: int = 0, info_2: int = 0) -> None:
    """Write an exit into the VMCB and tell the tracepoint."""
    vmcb.exit_code, vmcb.exit_info_1, vmcb.exit_info_2 = code, info_1, info_2
    soc.counters.vmexit += 1
    if soc.tp.emit:
        soc.tp.emit(VmExit(vmcb.asid, code, info_1, info_2))
