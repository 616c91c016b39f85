"""A bare host for firmware tests: registers as Linux sets them, pages, commands."""

from collections.abc import Mapping
from typing import TypeVar

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.layout import Layout
from softcvm.abi.rmp import PageState, RmpState, RmpupdateStatus
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
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.hw.profile import GENOA, CpuProfile
from softcvm.hw.soc import Soc

MEMORY = 8192
RMP_BASE = 0x20_0000
RMP_END = 0x2F_FFFF
FIRST_FREE = 1024
POLICY = 0x3_0000
OK = SnpStatus.SUCCESS


L = TypeVar("L", bound=Layout)


def filled(buffer: L, fields: Mapping[str, int]) -> L:
    """A buffer with more of its fields set."""
    for name, value in fields.items():
        setattr(buffer, name, value)
    return buffer


class Host:
    """Soc plus a page counter; methods assert that what they set up succeeded."""

    def __init__(self, profile: CpuProfile = GENOA, seed: int = 0) -> None:
        self.soc = Soc(profile, MEMORY, seed=seed)
        self.psp = self.soc.psp
        self.soc.rmp.base, self.soc.rmp.end = RMP_BASE, RMP_END
        for cpu in range(profile.cpus):
            self.soc.sysregs.set_mfdm(cpu)
            self.soc.sysregs.set_snp_enable(cpu)
        self._next = FIRST_FREE

    def init(self) -> "Host":
        assert self.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1)) is OK
        self.flush()
        return self

    def flush(self) -> None:
        self.soc.caches.wbinvd_on_all_cpus()
        assert self.psp.command(SnpCmd.DF_FLUSH) is OK

    def run(self, cmd: SnpCmd, buffer: Layout | None = None) -> SnpStatus:
        return self.psp.command(cmd, buffer)

    def page(self, npages: int = 1) -> int:
        """The address of fresh pages; 512 of them lie 2M-aligned."""
        if npages == 512:
            self._next = -(-self._next // 512) * 512
        pfn = self._next
        self._next += npages
        return pfn << 12

    def rmp(self, spa: int, **fields: int) -> int:
        """RMPUPDATE; gives the address back."""
        assert rmpupdate(self.soc, spa, RmpState(**fields))[0] is RmpupdateStatus.SUCCESS
        return spa

    def firmware(self, spa: int | None = None) -> int:
        """A Firmware page."""
        return self.rmp(self.page() if spa is None else spa, assigned=1, immutable=1)

    def pre_guest(self, asid: int, gpa: int, data: bytes = b"", *, large: bool = False) -> int:
        """A Pre-Guest page that holds what the host wrote before."""
        spa = self.page(512 if large else 1)
        if data:
            self.soc.host_write(spa, data)
        return self.rmp(spa, assigned=1, immutable=1, asid=asid, gpa=gpa, pagesize=int(large))

    def guest_page(self, asid: int, gpa: int) -> int:
        """A Guest-Invalid page."""
        return self.rmp(self.page(), assigned=1, asid=asid, gpa=gpa)

    def state(self, spa: int) -> PageState:
        return self.soc.rmp.state(spa >> 12)

    def gctx(self) -> int:
        """A guest in INIT."""
        gctx = self.firmware()
        assert self.run(SnpCmd.GCTX_CREATE, SnpAddr(address=gctx)) is OK
        return gctx

    def launching(self, asid: int | None = 1, policy: int = POLICY) -> int:
        """A guest in LAUNCH, activated unless asid is None."""
        gctx = self.gctx()
        start = SnpLaunchStart(gctx_paddr=gctx, policy=policy)
        assert self.run(SnpCmd.LAUNCH_START, start) is OK
        if asid is not None:
            assert self.activate(gctx, asid) is OK
        return gctx

    def activate(self, gctx: int, asid: int) -> SnpStatus:
        return self.run(SnpCmd.ACTIVATE, SnpActivate(gctx_paddr=gctx, asid=asid))

    def running(self, asid: int = 1, policy: int = POLICY) -> int:
        gctx = self.launching(asid, policy)
        assert self.run(SnpCmd.LAUNCH_FINISH, SnpLaunchFinish(gctx_paddr=gctx)) is OK
        return gctx

    def update(
        self,
        gctx: int,
        spa: int,
        page_type: int = LaunchPageType.NORMAL,
        **fields: int,
    ) -> SnpStatus:
        cmd = SnpLaunchUpdate(gctx_paddr=gctx, address=spa, page_type=page_type)
        return self.run(SnpCmd.LAUNCH_UPDATE, filled(cmd, fields))

    def raw(self, spa: int, length: int = 4096) -> bytes:
        return self.soc.host_read(spa, length)

    def plain(self, spa: int, asid: int, length: int = 4096) -> bytes:
        """What the guest would read."""
        return self.soc.dram.read(spa, length, self.soc.keys[asid])
