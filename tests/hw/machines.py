"""Bare machines for tests: SNP initialised, guests launched by firmware alone, no kernel and no VMM.

Memory is 16 MiB.  The first 2M hold what firmware and the hypervisor need, guests live from 2 to 12 MiB,
the RMP lies there and covers everything.
"""

from collections.abc import Sequence
from typing import Any

from softcvm.abi.insn import GuestOp, Program
from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.layout import Layout
from softcvm.abi.rmp import RmpState, RmpupdateStatus
from softcvm.abi.snp_firmware import (
    SnpActivate,
    SnpAddr,
    SnpCmd,
    SnpLaunchFinish,
    SnpLaunchStart,
    SnpLaunchUpdate,
    SnpStatus,
)
from softcvm.abi.snp_platform import SnpInitEx
from softcvm.abi.svm import ExitCode, NestedCtl, SevFeatures
from softcvm.abi.vmsa import Vmsa
from softcvm.hw.cpu.scripted import ScriptedCore
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.hw.npt import Npt
from softcvm.hw.profile import GENOA, CpuProfile
from softcvm.hw.soc import Soc
from softcvm.sim.addr import PgLevel
from softcvm.sim.choice import Choices
from softcvm.sim.events import Collector
from softcvm.sim.steps import run

PAGE = 4096
MEMORY_PAGES = 8 * 512
RMP_BASE = 12 << 20
RMP_SIZE = 1 << 20
POLICY = 0x3_0000
EFER_SVME = 1 << 12


class Exited(Exception):
    """The guest left for the hypervisor instead of finishing its operation."""

    def __init__(self, code: int, info_1: int, info_2: int) -> None:
        super().__init__(f"#VMEXIT {code:#x} {info_1:#x} {info_2:#x}")
        self.code = code
        self.info_1 = info_1
        self.info_2 = info_2


def snp_machine(
    profile: CpuProfile = GENOA,
    choices: Choices | None = None,
    seed: int = 0,
    collector: Collector | None = None,
) -> Soc:
    """A machine as Linux leaves it after SNP_INIT_EX: caches written back, every ASID clean."""
    soc = Soc(profile, MEMORY_PAGES, seed, choices)
    if collector:
        soc.tp.attach(collector)
    soc.rmp.base, soc.rmp.end = RMP_BASE, RMP_BASE + RMP_SIZE - 1
    soc.set_mfdm()
    soc.set_snp_enable()
    soc.caches.wbinvd_on_all_cpus()
    command(soc, SnpCmd.INIT_EX, SnpInitEx(init_rmp=1))
    soc.caches.wbinvd_on_all_cpus()
    command(soc, SnpCmd.DF_FLUSH)
    return soc


def command(soc: Soc, cmd: SnpCmd, buffer: Layout | None = None) -> None:
    """A firmware command that must succeed."""
    status = soc.psp.command(cmd, buffer)
    assert status is SnpStatus.SUCCESS, f"{cmd.name}: {status.name}"


def update(soc: Soc, pfn: int, new: RmpState, count: int = 1) -> None:
    """An RMPUPDATE that must succeed."""
    status, _ = rmpupdate(soc, pfn * PAGE, new, count)
    assert status is RmpupdateStatus.SUCCESS, f"pfn {pfn:#x}: {status.name}"


class BareGuest:
    """A guest with one vCPU at VMPL0, run one operation at a time.

    Its pages lie at first_pfn and up, guest frame n at first_pfn + n; frame 0 is its VMSA.
    """

    def __init__(self, soc: Soc, asid: int, gctx_pfn: int, first_pfn: int) -> None:
        self.soc = soc
        self.asid = asid
        self.gctx = gctx_pfn * PAGE
        self.first_pfn = first_pfn
        self.npt = Npt()
        self.vmcb = Vmcb(asid, self.npt)
        self.vmcb.nested_ctl |= NestedCtl.SEV_ENABLE | NestedCtl.SEV_ES_ENABLE
        self.pages = 0

    def spa(self, gfn: int) -> int:
        return (self.first_pfn + gfn) * PAGE

    def launch(self, contents: Sequence[bytes] = (), vmpl: int = 0) -> None:
        """GCTX_CREATE to LAUNCH_FINISH: a VMSA at guest frame 0, then one NORMAL page for each item."""
        soc = self.soc
        update(soc, self.gctx // PAGE, RmpState(assigned=1, immutable=1))
        command(soc, SnpCmd.GCTX_CREATE, SnpAddr(address=self.gctx))
        command(soc, SnpCmd.LAUNCH_START, SnpLaunchStart(gctx_paddr=self.gctx, policy=POLICY))
        command(soc, SnpCmd.ACTIVATE, SnpActivate(gctx_paddr=self.gctx, asid=self.asid))
        vmsa = Vmsa(vmpl=vmpl, efer=EFER_SVME, sev_features=int(SevFeatures.SNP_ACTIVE))
        self.add(bytes(vmsa), LaunchPageType.VMSA)
        for page in contents:
            self.add(page, LaunchPageType.NORMAL)
        command(soc, SnpCmd.LAUNCH_FINISH, SnpLaunchFinish(gctx_paddr=self.gctx))
        self.vmcb.vmsa_pa = self.spa(0)

    def add(self, page: bytes, page_type: LaunchPageType) -> int:
        """One LAUNCH_UPDATE of the next guest frame, mapped at 4K."""
        gfn = self.pages
        self.pages += 1
        self.soc.host_write(self.spa(gfn), page)
        pre_guest = RmpState(assigned=1, immutable=1, gpa=gfn * PAGE, asid=self.asid)
        update(self.soc, self.first_pfn + gfn, pre_guest)
        buffer = SnpLaunchUpdate(
            gctx_paddr=self.gctx, page_type=int(page_type), address=self.spa(gfn)
        )
        command(self.soc, SnpCmd.LAUNCH_UPDATE, buffer)
        self.map(gfn, self.first_pfn + gfn)
        return gfn

    def assign(self, gfn: int, npages: int = 1, *, large: bool = False) -> None:
        """Give frames to the guest as the hypervisor does at run time: Guest-Invalid, and mapped."""
        new = RmpState(assigned=1, pagesize=int(large), gpa=gfn * PAGE, asid=self.asid)
        update(self.soc, self.first_pfn + gfn, new, npages // (512 if large else 1))
        self.map(gfn, self.first_pfn + gfn, npages, large=large)

    def map(self, gfn: int, pfn: int, npages: int = 1, *, large: bool = False) -> None:
        self.npt.zap(gfn, gfn + npages)
        self.npt.set(gfn, pfn, npages, PgLevel.PG_2M if large else PgLevel.PG_4K)

    def does(self, op: GuestOp, vmcb: Vmcb | None = None) -> Any:
        """Run one operation to its end: its result, GuestException, or Exited."""

        def program() -> Program:
            yield op

        core = ScriptedCore(self.soc, program)
        vmcb = vmcb or self.vmcb
        run(core.vmrun(vmcb))
        if not core.seen:
            raise Exited(vmcb.exit_code, vmcb.exit_info_1, vmcb.exit_info_2)
        assert vmcb.exit_code in (ExitCode.HLT, ExitCode.SHUTDOWN)
        if isinstance(core.seen[0], Exception):
            raise core.seen[0]
        return core.seen[0]
