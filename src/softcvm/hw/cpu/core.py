"""What every kind of core does at VMRUN and at #VMEXIT, whatever executes in between.

[APM2-24593 §15.36.8, §15.36.12].  Owns the entry checks on the VMSA page, its in-use mark, and the guest's
memory accesses; the instruction stream is a subclass's.
"""

from typing import Protocol

from softcvm.abi.insn import Fetch, Load, Store, Touch
from softcvm.abi.rmp import VmplPerm
from softcvm.abi.svm import ExitCode, PfErr
from softcvm.abi.vmsa import Vmsa
from softcvm.hw.access import Translated, check_private, check_shared_write, walk
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.hw.events import VmExit
from softcvm.hw.memenc import Key
from softcvm.hw.rmp import ASID_MASK, ASID_SHIFT, ASSIGNED, IMMUTABLE, VMSA
from softcvm.hw.soc import Soc
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.steps import Steps

__all__ = ("Core", "GuestCpu", "VmExitRaised")


_NESTED_WALK = int(PfErr.USER | PfErr.GUEST_FINAL)
_WRITE, _FETCH, _GUEST_ENC = int(PfErr.WRITE), int(PfErr.FETCH), int(PfErr.GUEST_ENC)


class Core(Protocol):
    """A processor that can run one vCPU."""

    def vmrun(self, vmcb: Vmcb) -> Steps[None]:
        """Enter the guest and run until #VMEXIT; vmcb.exit_* then say why."""
        ...


class VmExitRaised(Exception):
    """Ends the guest's run with this exit."""

    def __init__(self, code: ExitCode, info_1: int = 0, info_2: int = 0) -> None:
        super().__init__(f"#VMEXIT({code.name}) {info_1:#x} {info_2:#x}")
        self.code = code
        self.info_1 = info_1
        self.info_2 = info_2


class GuestCpu:
    """The state of one entry into a guest: its ASID, key, VMPL, and how it reaches memory."""

    def __init__(self, soc: Soc, vmcb: Vmcb) -> None:
        self.soc = soc
        self.npt = vmcb.npt
        self.asid = vmcb.asid
        self.vmsa_pa = self._vmrun_checks(soc, vmcb)
        key = soc.key(vmcb.asid)
        assert key is not None, "an ASID is runnable only while it has a key"
        self.key: Key = key
        vmsa = Vmsa(soc.dram.read(self.vmsa_pa, PAGE_SIZE, key))
        self.vmsa = vmsa
        self.vmpl = vmsa.vmpl
        self.sev_features = vmsa.sev_features
        soc.rmp.in_use.add(self.vmsa_pa >> PAGE_SHIFT)
        soc.counters.vmrun += 1

    def leave(self, vmcb: Vmcb, code: int, info_1: int = 0, info_2: int = 0) -> None:
        """#VMEXIT: release the VMSA page and report."""
        self.soc.rmp.in_use.discard(self.vmsa_pa >> PAGE_SHIFT)
        record_exit(self.soc, vmcb, code, info_1, info_2)

    @staticmethod
    def _vmrun_checks(soc: Soc, vmcb: Vmcb) -> int:
        """sPA of a VMSA that may be run; VmExitRaised(INVALID) for any other."""
        if vmcb.vmsa_pa is None or vmcb.vmsa_pa & PAGE_MASK or not vmcb.asid:
            raise VmExitRaised(ExitCode.INVALID)
        if not soc.psp.asid_runnable(vmcb.asid):
            raise VmExitRaised(ExitCode.INVALID)
        pfn = vmcb.vmsa_pa >> PAGE_SHIFT
        attrs = soc.rmp.map[pfn][0]
        owned = attrs & ASSIGNED and (attrs & ASID_MASK) >> ASID_SHIFT == vmcb.asid
        if not soc.rmp.covered(pfn) or not owned or attrs & IMMUTABLE or not attrs & VMSA:
            raise VmExitRaised(ExitCode.INVALID)
        if pfn in soc.rmp.in_use:
            raise VmExitRaised(ExitCode.INVALID)
        return vmcb.vmsa_pa

    def load(self, op: Load, done: bytearray) -> bytes:
        """Read; `done` keeps what was read before a fault, so that the access can go on after it."""
        error_code = _error_code(op.c)
        while len(done) < op.length:
            at = op.gpa + len(done)
            where, length = self._reach(at, op.length - len(done), error_code, op.c)
            spa = (where.pfn << PAGE_SHIFT) + (at & PAGE_MASK)
            if op.c:
                done += self.soc.dram.read(spa, length, self.key)
            else:  # the plain view, the RMP's memory included
                done += self.soc.host_read(spa, length)
        return bytes(done)

    def store(self, op: Store, done: int) -> int:
        """Write from byte `done` on up to the end of a page run; how far it came."""
        error_code = _error_code(op.c, write=True)
        at = op.gpa + done
        where, length = self._reach(at, len(op.data) - done, error_code, op.c)
        spa = (where.pfn << PAGE_SHIFT) + (at & PAGE_MASK)
        self.soc.dram.write(spa, op.data[done : done + length], self.key if op.c else None)
        return done + length

    def touch(self, op: Touch, done: int) -> int:
        """Access pages from `done` on; how many are done now.

        A read of a page changes nothing.  Writing a byte back re-encrypts the page under this guest's
        key when it was last written under another.
        """
        error_code = _error_code(op.c, write=op.write)
        at = op.gpa + (done << PAGE_SHIFT)
        where, length = self._reach(
            at & ~PAGE_MASK, (op.count - done) << PAGE_SHIFT, error_code, op.c
        )
        if op.write:
            key = self.key if op.c else None
            for pfn in range(where.pfn, where.pfn + (length >> PAGE_SHIFT)):
                spa = (pfn << PAGE_SHIFT) + (at & PAGE_MASK)
                self.soc.dram.write(spa, self.soc.dram.read(spa, 1, key), key)
        return done + (length >> PAGE_SHIFT)

    def fetch(self, op: Fetch) -> None:
        """Execute from a page: always private."""
        error_code = _error_code(True, fetch=True)
        needs = VmplPerm.EXECUTE_USER if op.user else VmplPerm.EXECUTE_SUPERVISOR
        where = walk(self.soc, self.npt, self.asid, op.gpa >> PAGE_SHIFT, 1, error_code)
        self._private(where, error_code, op.gpa & PAGE_MASK, needs)

    def _reach(self, gpa: int, length: int, error_code: int, c: bool) -> tuple[Translated, int]:
        """Translate and check; the run of pages at gpa, and how many bytes of the access it serves."""
        offset = gpa & PAGE_MASK
        npages = (offset + length + PAGE_MASK) >> PAGE_SHIFT
        where = walk(
            self.soc, self.npt, self.asid, gpa >> PAGE_SHIFT, npages, error_code, offset
        )
        write = bool(error_code & _WRITE)
        if c:
            needs = VmplPerm.WRITE if write else VmplPerm.READ
            npages = self._private(where, error_code, offset, needs)
        elif write:
            npages = check_shared_write(self.soc, self.asid, where, error_code, offset)
        else:
            npages = where.npages
        return where, min(length, (npages << PAGE_SHIFT) - offset)

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


def _error_code(c: bool, *, write: bool = False, fetch: bool = False) -> int:
    """What an access contributes to EXITINFO1; nested walks are always user accesses."""
    code = _NESTED_WALK
    if write:
        code |= _WRITE
    if fetch:
        code |= _FETCH
    if c:
        code |= _GUEST_ENC
    return code
