"""SNP_INIT and its RMP, SHUTDOWN, status, configuration, the legacy commands around them."""

import pytest

from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import SevCmd, SnpAddr, SnpCmd, SnpStatus
from softcvm.abi.snp_platform import (
    SNP_TMR_SIZE,
    SevInit,
    SevPlatformStatus,
    SnpCommit,
    SnpConfig,
    SnpFeatureInfo,
    SnpFeatureInfoBuffer,
    SnpInitEx,
    SnpPlatformStatusBuffer,
    SnpRange,
    SnpRangeListHeader,
    SnpShutdownEx,
    TcbVersion,
)
from softcvm.hw.psp.events import FirmwareCommand
from softcvm.sim.errors import Unmodelled
from softcvm.sim.events import Event
from softcvm.sim.state import fingerprint, unlisted
from tests.hw.psp.host import MEMORY, OK, RMP_BASE, Host, filled


def range_list(host: Host, *ranges: tuple[int, int]) -> int:
    """A RANGE_LIST page of (base, pages)."""
    spa = host.page()
    data = bytes(SnpRangeListHeader(num_elements=len(ranges)))
    data += b"".join(bytes(SnpRange(base=b, page_count=n)) for b, n in ranges)
    host.soc.host_write(spa, data)
    return spa


def shutdown(host: Host, **fields: int) -> SnpStatus:
    return host.run(SnpCmd.SHUTDOWN_EX, filled(SnpShutdownEx(len=8), fields))


def test_init_fills_the_rmp() -> None:
    host = Host()
    listed = range_list(host, (0x40_0000, 3), (RMP_BASE - 4096, 300))
    cmd = SnpInitEx(init_rmp=1, list_paddr_en=1, list_paddr=listed)
    assert host.run(SnpCmd.INIT_EX, cmd) is OK
    state = host.state
    assert state(0) is PageState.HYPERVISOR
    assert [state(spa) for spa in (0x9_F000, 0xA_0000, 0xB_F000, 0xC_0000)] == [
        PageState.HYPERVISOR,
        PageState.HV_FIXED,
        PageState.HV_FIXED,
        PageState.HYPERVISOR,
    ]
    assert [state(0x3F_F000), state(0x40_0000), state(0x40_2000), state(0x40_3000)] == [
        PageState.HYPERVISOR,
        PageState.HV_FIXED,
        PageState.HV_FIXED,
        PageState.HYPERVISOR,
    ]
    assert state(RMP_BASE - 4096) is PageState.HV_FIXED
    assert state(RMP_BASE) is state(0x2F_F000) is PageState.FIRMWARE
    assert state(RMP_BASE + (298 << 12)) is PageState.HV_FIXED
    assert state((MEMORY - 1) << 12) is PageState.HYPERVISOR
    assert state(MEMORY << 12) is PageState.HV_FIXED
    assert state(1 << 40) is PageState.DEFAULT


def test_the_rmps_own_entries_read_as_on_a_real_host(host: Host) -> None:
    """AMDSEV issue 245 dumps the head of a region with 256 firmware pages, and a neighbour."""
    head, neighbour = (host.soc.rmp.raw((RMP_BASE >> 12) + i)[:8] for i in (0, 1))
    assert int.from_bytes(head, "little") == 0x80000000_000007FD
    assert int.from_bytes(neighbour, "little") == 0x80000000_00000005


def test_init_checks_in_order() -> None:
    host = Host()
    cmd = SnpInitEx(init_rmp=0, list_paddr_en=1)
    assert host.run(SnpCmd.INIT_EX, cmd) is SnpStatus.RMP_INIT_REQUIRED
    cmd.max_snp_asid = 10
    assert host.run(SnpCmd.INIT_EX, cmd) is SnpStatus.INVALID_PARAM
    host.soc.sysregs.set_hsave_pa(3, 0x5000)
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1)) is SnpStatus.INVALID_CONFIG
    host.soc.sysregs.set_hsave_pa(3, 0)
    host.soc.rmp.end -= 4096
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1)) is SnpStatus.INVALID_CONFIG
    host.soc.rmp.end += 4096
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1)) is OK
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1)) is SnpStatus.INVALID_PLATFORM_STATE


def test_init_refuses_an_rmp_that_lies_on_fixed_memory() -> None:
    host = Host()
    host.soc.rmp.base, host.soc.rmp.end = 0, 0xF_FFFF  # over ASEG
    status = host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1))
    assert status is SnpStatus.RMP_INITIALIZATION_FAILED


@pytest.mark.parametrize("bad", ["reserved", "count", "base"])
def test_a_bad_range_list_is_refused_before_anything_changes(bad: str) -> None:
    host = Host()
    spa = range_list(host, (0x40_0001 if bad == "base" else 0x40_0000, 1))
    if bad == "reserved":
        host.soc.host_write(spa + 4, b"\1")
    if bad == "count":
        host.soc.host_write(spa, (256).to_bytes(4, "little"))
    cmd = SnpInitEx(init_rmp=1, list_paddr_en=1, list_paddr=spa)
    assert host.run(SnpCmd.INIT_EX, cmd) is SnpStatus.INVALID_PARAM
    assert host.state(RMP_BASE) is PageState.HYPERVISOR


def test_a_second_init_may_keep_the_rmp(host: Host) -> None:
    spa = host.guest_page(3, 0)
    assert shutdown(host) is OK
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=0, list_paddr_en=1)) is (
        SnpStatus.INVALID_PARAM
    )
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=0)) is OK
    assert host.state(spa) is PageState.GUEST_INVALID
    host.flush()
    assert shutdown(host, iommu_snp_shutdown=1) is OK
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=0)) is SnpStatus.RMP_INIT_REQUIRED
    assert host.run(SnpCmd.INIT_EX, SnpInitEx(init_rmp=1)) is OK
    assert host.state(spa) is PageState.HYPERVISOR
    assert host.soc.rmp.asid_pages == {}


def test_shutdown_checks_in_order(host: Host) -> None:
    gctx = host.running(asid=1)
    assert host.psp.command(SevCmd.INIT, SevInit()) is OK
    assert shutdown(host) is SnpStatus.INVALID_PLATFORM_STATE
    assert host.psp.command(SevCmd.SHUTDOWN) is OK
    assert shutdown(host, x86_snp_shutdown=1) is SnpStatus.DFFLUSH_REQUIRED
    assert host.run(SnpCmd.DECOMMISSION, SnpAddr(address=gctx)) is OK
    assert shutdown(host) is SnpStatus.DFFLUSH_REQUIRED
    host.flush()
    assert shutdown(host, x86_snp_shutdown=1) is SnpStatus.INVALID_PARAM
    assert host.run(SnpCmd.SHUTDOWN_EX, SnpShutdownEx(len=4)) is SnpStatus.INVALID_PARAM
    assert host.soc.keys
    assert shutdown(host, x86_snp_shutdown=1, iommu_snp_shutdown=1) is OK
    assert not host.soc.keys
    assert not host.soc.rmp.enabled
    assert shutdown(host) is OK  # already down


def test_platform_status_reports_versions_and_guests(host: Host) -> None:
    host.launching(asid=1)
    host.gctx()  # not counted before LAUNCH_START
    out = host.firmware()
    assert host.run(SnpCmd.PLATFORM_STATUS, SnpAddr(address=out)) is OK
    status = SnpPlatformStatusBuffer(host.raw(out, 32))
    assert (status.api_major, status.api_minor, status.build_id) == (1, 55, 38)
    assert (status.state, status.is_rmp_initialized, status.guest_count) == (1, 1, 1)
    assert status.alias_check_complete == 1
    assert status.current_tcb_version == status.reported_tcb_version != bytes(8)
    shared = host.page()
    cmd = SnpAddr(address=shared)
    assert host.run(SnpCmd.PLATFORM_STATUS, cmd) is SnpStatus.INVALID_PAGE_STATE
    cmd.address = out + 4096 - 16
    assert host.run(SnpCmd.PLATFORM_STATUS, cmd) is SnpStatus.INVALID_PARAM


def test_platform_status_works_before_init_into_any_page() -> None:
    host = Host()
    out = host.page()
    assert host.run(SnpCmd.PLATFORM_STATUS, SnpAddr(address=out)) is OK
    assert SnpPlatformStatusBuffer(host.raw(out, 32)).state == 0


def test_config_lowers_the_reported_tcb_but_never_raises_it(host: Host) -> None:
    tcb = TcbVersion(host.psp.tcb)
    newer = TcbVersion(bytes(tcb))
    newer.snp += 1
    cmd = SnpConfig(reported_tcb=bytes(newer))
    assert host.run(SnpCmd.CONFIG, cmd) is SnpStatus.INVALID_PARAM
    older = TcbVersion(bytes(tcb))
    older.snp -= 1
    assert host.run(SnpCmd.CONFIG, SnpConfig(reported_tcb=bytes(older))) is OK
    assert host.psp.reported_tcb == bytes(older)
    assert host.run(SnpCmd.CONFIG, SnpConfig(mask_chip_id=1)) is OK
    assert host.psp.reported_tcb == host.psp.tcb


def test_commit_and_feature_info_check_their_lengths(host: Host) -> None:
    assert host.run(SnpCmd.COMMIT, SnpCommit(len=4)) is OK
    assert host.run(SnpCmd.COMMIT, SnpCommit()) is SnpStatus.INVALID_PARAM
    out = host.firmware()
    cmd = SnpFeatureInfo(length=16, feature_info_paddr=out)
    assert host.run(SnpCmd.FEATURE_INFO, cmd) is OK
    info = SnpFeatureInfoBuffer(host.raw(out, 16))
    assert (info.eax, info.ecx) == (1, 3)
    cmd.feature_info_paddr = out + 2
    assert host.run(SnpCmd.FEATURE_INFO, cmd) is SnpStatus.INVALID_ADDRESS
    cmd.feature_info_paddr = host.page()
    assert host.run(SnpCmd.FEATURE_INFO, cmd) is SnpStatus.INVALID_PAGE_STATE
    cmd.feature_info_paddr, cmd.ecx_in = out, 2
    assert host.run(SnpCmd.FEATURE_INFO, cmd) is SnpStatus.INVALID_PARAM
    cmd.length = 8
    assert host.run(SnpCmd.FEATURE_INFO, cmd) is SnpStatus.INVALID_PARAM


def test_legacy_init_needs_an_initialised_rmp_and_firmware_pages_for_its_region() -> None:
    host = Host()
    region = 0x80_0000
    cmd = SevInit(flags=1, tmr_address=region, tmr_len=SNP_TMR_SIZE)
    assert host.psp.command(SevCmd.INIT, cmd) is SnpStatus.INVALID_PLATFORM_STATE
    host.init()
    assert host.psp.command(SevCmd.INIT, cmd) is SnpStatus.INVALID_PAGE_STATE
    host.rmp(region, assigned=1, immutable=1, pagesize=1)
    cmd.tmr_address = region + 4096
    assert host.psp.command(SevCmd.INIT, cmd) is SnpStatus.INVALID_CONFIG
    cmd.tmr_address = region
    assert host.psp.command(SevCmd.INIT, cmd) is OK
    inside = SnpAddr(address=region)
    assert host.run(SnpCmd.PLATFORM_STATUS, inside) is SnpStatus.INVALID_ADDRESS
    assert host.psp.command(SevCmd.INIT, cmd) is SnpStatus.INVALID_PLATFORM_STATE


def test_a_buffer_that_firmware_writes_back_becomes_reclaim(host: Host) -> None:
    status = SevPlatformStatus()
    shared = host.page()
    result = host.psp.command(SevCmd.PLATFORM_STATUS, status, paddr=shared)
    assert result is SnpStatus.INVALID_PAGE_STATE
    page = host.firmware()
    assert host.psp.command(SevCmd.PLATFORM_STATUS, status, paddr=page) is OK
    assert (status.api_major, status.api_minor, status.build) == (1, 55, 38)
    assert host.state(page) is PageState.RECLAIM


def test_an_unknown_command_is_refused_and_an_unmodelled_one_stops_the_run(host: Host) -> None:
    assert host.psp.command(0x0FF) is SnpStatus.INVALID_COMMAND
    with pytest.raises(Unmodelled, match="ACTIVATE_EX"):
        host.psp.command(SnpCmd.ACTIVATE_EX)
    with pytest.raises(Unmodelled, match=r"SevCmd\.SEND_START"):
        host.psp.command(SevCmd.SEND_START)


def test_every_command_is_an_event(host: Host) -> None:
    seen: list[Event] = []
    host.soc.tp.attach(seen.append)
    host.psp.command(SnpCmd.DF_FLUSH)
    host.activate(0, 1)
    commands = [event for event in seen if isinstance(event, FirmwareCommand)]
    assert [(event.command, event.status) for event in commands] == [
        ("SNP_DF_FLUSH", "SUCCESS"),
        ("SNP_ACTIVATE", "INVALID_GUEST"),
    ]


def test_firmware_state_is_in_snapshot_and_fingerprint(host: Host) -> None:
    from copy import deepcopy

    for part in (host.psp, host.psp.asids, host.psp.trng):
        assert unlisted(part) == set()
    before = fingerprint(host.soc)
    copy = deepcopy(host.soc)
    host.gctx()
    assert fingerprint(copy) == before != fingerprint(host.soc)
