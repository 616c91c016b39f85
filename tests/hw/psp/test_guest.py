"""A guest's hold on its context page and its ASID, from GCTX_CREATE to the next guest."""

import pytest

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import (
    Gstate,
    SnpAddr,
    SnpCmd,
    SnpGuestStatus,
    SnpGuestStatusBuffer,
    SnpLaunchFinish,
    SnpStatus,
)
from softcvm.abi.snp_platform import SnpInitEx
from softcvm.hw.profile import GENOA, MILAN, CpuProfile
from softcvm.hw.psp.gctx import TRANSITIONS
from tests.hw.psp.host import OK, POLICY, Host


def decommission(host: Host, gctx: int) -> SnpStatus:
    return host.run(SnpCmd.DECOMMISSION, SnpAddr(address=gctx))


def test_gctx_create_takes_a_4k_firmware_page(host: Host) -> None:
    create = SnpCmd.GCTX_CREATE
    assert host.run(create, SnpAddr(address=host.page())) is SnpStatus.INVALID_PAGE_STATE
    large = host.rmp(host.page(512), assigned=1, immutable=1, pagesize=1)
    assert host.run(create, SnpAddr(address=large)) is SnpStatus.INVALID_PAGE_SIZE
    spa = host.firmware()
    assert host.run(create, SnpAddr(address=spa + 1)) is SnpStatus.INVALID_PARAM
    assert host.run(create, SnpAddr(address=spa)) is OK
    assert host.state(spa) is PageState.CONTEXT
    assert host.run(create, SnpAddr(address=spa)) is SnpStatus.INVALID_PAGE_STATE
    assert host.psp.gctx(spa).state == Gstate.INIT


def test_an_address_with_the_c_bit_names_the_same_page(host: Host) -> None:
    spa = host.firmware()
    assert host.run(SnpCmd.GCTX_CREATE, SnpAddr(address=spa | 1 << 51)) is OK
    assert host.state(spa) is PageState.CONTEXT


def test_guest_status_tells_policy_asid_and_state(host: Host) -> None:
    gctx = host.launching(asid=7)
    out = host.firmware()
    cmd = SnpGuestStatus(gctx_paddr=gctx, address=out + 0x40)
    assert host.run(SnpCmd.GUEST_STATUS, cmd) is OK
    status = SnpGuestStatusBuffer(host.raw(out + 0x40, 32))
    assert (status.policy, status.asid, status.state) == (POLICY, 7, Gstate.LAUNCH)
    cmd.address = out + 4096 - 31
    assert host.run(SnpCmd.GUEST_STATUS, cmd) is SnpStatus.INVALID_PARAM
    cmd.address = host.page()
    assert host.run(SnpCmd.GUEST_STATUS, cmd) is SnpStatus.INVALID_PAGE_STATE
    cmd.gctx_paddr = out
    assert host.run(SnpCmd.GUEST_STATUS, cmd) is SnpStatus.INVALID_GUEST


def test_a_guest_may_run_only_after_launch_finish(host: Host) -> None:
    gctx = host.launching(asid=4)
    assert not host.psp.asid_runnable(4)
    assert host.run(SnpCmd.LAUNCH_FINISH, SnpLaunchFinish(gctx_paddr=gctx)) is OK
    assert host.psp.asid_runnable(4)
    assert decommission(host, gctx) is OK
    assert not host.psp.asid_runnable(4)


def test_an_asid_is_recycled_by_wbinvd_and_df_flush(host: Host) -> None:
    """ACTIVATE of a used ASID: DFFLUSH_REQUIRED; DF_FLUSH without WBINVD: WBINVD_REQUIRED; then
    both.
    """
    first = host.running(asid=5)
    assert decommission(host, first) is OK
    second = host.launching(asid=None)
    assert host.activate(second, 5) is SnpStatus.DFFLUSH_REQUIRED
    assert host.psp.command(SnpCmd.DF_FLUSH) is SnpStatus.WBINVD_REQUIRED
    assert host.activate(second, 5) is SnpStatus.DFFLUSH_REQUIRED
    host.soc.caches.wbinvd_on_all_cpus()
    assert host.activate(second, 5) is SnpStatus.DFFLUSH_REQUIRED
    assert host.psp.command(SnpCmd.DF_FLUSH) is OK
    assert host.activate(second, 5) is OK


def test_wbinvd_on_one_core_complex_cleans_only_that_one(host: Host) -> None:
    assert decommission(host, host.running(asid=5)) is OK
    profile = host.soc.profile
    for cpu in range(profile.cpus_per_ccx):
        host.soc.caches.wbinvd(cpu)
    assert host.psp.command(SnpCmd.DF_FLUSH) is SnpStatus.WBINVD_REQUIRED
    assert host.psp.asids.dirty == {5: 0b10}
    for cpu in range(profile.cpus_per_ccx, profile.cpus):
        host.soc.caches.wbinvd(cpu)
    assert host.psp.command(SnpCmd.DF_FLUSH) is OK
    assert host.psp.asids.dirty == {}


def test_an_asid_that_never_ran_stays_clean(host: Host) -> None:
    assert decommission(host, host.launching(asid=5)) is OK
    assert host.activate(host.launching(asid=None), 5) is OK


def test_every_asid_is_dirty_after_init() -> None:
    host = Host()
    host.soc.caches.wbinvd_on_all_cpus()  # before init: does not count
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1)) is OK
    gctx = host.launching(asid=None)
    assert host.activate(gctx, 99) is SnpStatus.DFFLUSH_REQUIRED
    assert host.psp.command(SnpCmd.DF_FLUSH) is SnpStatus.WBINVD_REQUIRED
    host.flush()
    assert host.activate(gctx, 99) is OK


@pytest.mark.parametrize("profile", [GENOA, MILAN], ids=lambda p: p.name)
def test_snp_guests_get_the_lower_asids(profile: CpuProfile) -> None:
    host = Host(profile).init()
    gctx = host.launching(asid=None)
    for asid in (0, profile.min_sev_asid, profile.max_asid, profile.max_asid + 1, 4096):
        assert host.activate(gctx, asid) is SnpStatus.INVALID_ASID
    assert host.activate(gctx, profile.min_sev_asid - 1) is OK


def test_activate_checks_in_order(host: Host) -> None:
    first = host.launching(asid=1)
    second = host.launching(asid=None)
    assert host.activate(host.gctx(), 2) is SnpStatus.INVALID_GUEST_STATE
    assert host.activate(host.firmware(), 2) is SnpStatus.INVALID_GUEST
    host.guest_page(1, 0)
    assert host.activate(second, 1) is SnpStatus.INVALID_CONFIG  # before ASID_OWNED
    host.guest_page(2, 0)
    assert host.activate(first, 2) is SnpStatus.INVALID_CONFIG  # before ACTIVE
    third = host.running(asid=3)
    assert host.activate(third, 3) is SnpStatus.ASID_OWNED  # before ACTIVE
    assert host.activate(third, 4) is SnpStatus.ACTIVE
    assert decommission(host, third) is OK
    assert host.activate(first, 3) is SnpStatus.ACTIVE  # before DFFLUSH_REQUIRED


def test_decommission_leaves_key_and_pages_until_the_next_activate(host: Host) -> None:
    gctx = host.launching(asid=1)
    spa = host.pre_guest(1, 0, b"\x5a" * 4096)
    assert host.update(gctx, spa) is OK
    assert decommission(host, gctx) is OK
    assert host.state(gctx) is PageState.FIRMWARE
    assert host.state(spa) is PageState.GUEST_VALID
    assert host.plain(spa, 1) == b"\x5a" * 4096
    second = host.launching(asid=None)
    assert host.activate(second, 1) is SnpStatus.INVALID_CONFIG  # the page is still assigned
    host.rmp(spa)
    assert host.activate(second, 1) is OK
    assert host.plain(spa, 1) != b"\x5a" * 4096


def test_decommission_takes_a_guest_in_any_state(host: Host) -> None:
    for gctx in (host.gctx(), host.launching(asid=None), host.launching(2), host.running(3)):
        assert decommission(host, gctx) is OK
        assert decommission(host, gctx) is SnpStatus.INVALID_GUEST
    assert host.psp.guest_count == 0


def test_the_table_of_transitions_is_what_commands_do(host: Host) -> None:
    """ACTIVATE, LAUNCH_UPDATE and LAUNCH_FINISH in each state: refused exactly where the table
    says.
    """
    for state in Gstate:
        for cmd in (SnpCmd.LAUNCH_UPDATE, SnpCmd.LAUNCH_FINISH, SnpCmd.ACTIVATE):
            asid = 10 + 10 * state + cmd % 10
            match state:
                case Gstate.INIT:
                    gctx = host.gctx()
                case Gstate.LAUNCH:
                    gctx = host.launching(asid)
                case Gstate.RUNNING:
                    gctx = host.running(asid)
            if cmd is SnpCmd.LAUNCH_UPDATE:
                status = host.update(gctx, host.pre_guest(asid, 0))
            elif cmd is SnpCmd.LAUNCH_FINISH:
                status = host.run(cmd, SnpLaunchFinish(gctx_paddr=gctx))
            else:
                status = host.activate(gctx, 90)
            refused = status is SnpStatus.INVALID_GUEST_STATE
            assert refused == ((state, cmd) not in TRANSITIONS)
