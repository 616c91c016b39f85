"""Legacy SEV guests at the firmware's door: states, statuses in the specification's order, ASIDs, page states."""

from copy import deepcopy
from hashlib import sha256
from typing import Any

import pytest

from softcvm.abi.layout import Layout
from softcvm.abi.rmp import PageState
from softcvm.abi.sev_firmware import (
    SevActivate,
    SevDbg,
    SevDeactivate,
    SevDecommission,
    SevGuestStatus,
    SevLaunchFinish,
    SevLaunchMeasure,
    SevLaunchSecret,
    SevLaunchStart,
    SevLaunchUpdateData,
    SevLaunchUpdateVmsa,
)
from softcvm.abi.snp_firmware import SevCmd, SnpStatus
from softcvm.abi.snp_platform import SEV_TMR_SIZE, PlatformState, SevInit, SevPlatformStatus
from softcvm.sim.errors import Unmodelled
from softcvm.sim.state import fingerprint
from tests.hw.psp.host import OK, Host

ES = 1 << 2
MIN_SEV = 100
COMMANDS: dict[SevCmd, type[Layout]] = {
    SevCmd.ACTIVATE: SevActivate,
    SevCmd.DEACTIVATE: SevDeactivate,
    SevCmd.DECOMMISSION: SevDecommission,
    SevCmd.LAUNCH_UPDATE_DATA: SevLaunchUpdateData,
    SevCmd.LAUNCH_MEASURE: SevLaunchMeasure,
    SevCmd.LAUNCH_SECRET: SevLaunchSecret,
    SevCmd.LAUNCH_FINISH: SevLaunchFinish,
    SevCmd.DBG_DECRYPT: SevDbg,
    SevCmd.DBG_ENCRYPT: SevDbg,
}


class SevHost(Host):
    """SNP and SEV initialised, SEV-ES unless said otherwise."""

    def __init__(self, *, es: bool = True) -> None:
        super().__init__()
        self.init()
        start = self.page(512)
        for spa in range(start, start + SEV_TMR_SIZE, 4096):
            self.firmware(spa)
        tmr = SevInit(flags=1, tmr_address=start, tmr_len=SEV_TMR_SIZE) if es else SevInit()
        assert self.sev(SevCmd.INIT, tmr) is OK

    def sev(self, cmd: SevCmd, buffer: Layout | None = None) -> SnpStatus:
        return self.psp.command(cmd, buffer)

    def start(self, policy: int = 0, asid: int | None = MIN_SEV) -> int:
        start = SevLaunchStart(policy=policy)
        assert self.sev(SevCmd.LAUNCH_START, start) is OK
        if asid is not None:
            assert self.activate_sev(start.handle, asid) is OK
        return start.handle

    def activate_sev(self, handle: int, asid: int) -> SnpStatus:
        return self.sev(SevCmd.ACTIVATE, SevActivate(handle=handle, asid=asid))

    def data(self, handle: int, address: int, length: int = 4096) -> SnpStatus:
        update = SevLaunchUpdateData(handle=handle, address=address, len=length)
        return self.sev(SevCmd.LAUNCH_UPDATE_DATA, update)

    def run_to_end(self, handle: int) -> None:
        out = self.firmware()
        measure = SevLaunchMeasure(handle=handle, address=out, len=48)
        assert self.sev(SevCmd.LAUNCH_MEASURE, measure) is OK
        assert self.sev(SevCmd.LAUNCH_FINISH, SevLaunchFinish(handle=handle)) is OK

    def gone(self, handle: int) -> None:
        assert self.sev(SevCmd.DEACTIVATE, SevDeactivate(handle=handle)) is OK
        assert self.sev(SevCmd.DECOMMISSION, SevDecommission(handle=handle)) is OK


@pytest.fixture
def host() -> SevHost:
    return SevHost()


def test_the_platform_works_while_it_has_a_guest(host: SevHost) -> None:
    status = SevPlatformStatus()
    handles = [host.start(asid=MIN_SEV + i) for i in range(2)]
    assert handles == [1, 2]
    assert host.sev(SevCmd.PLATFORM_STATUS, status) is OK
    assert (status.state, status.guest_count) == (PlatformState.WORKING, 2)
    host.gone(1)
    assert host.start(asid=None) == 1  # the lowest free handle
    assert host.sev(SevCmd.DECOMMISSION, SevDecommission(handle=1)) is OK
    host.gone(2)
    assert host.sev(SevCmd.PLATFORM_STATUS, status) is OK
    assert (status.state, status.guest_count) == (PlatformState.INIT, 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_guest_commands_want_a_working_platform_then_a_guest(
    host: SevHost, command: SevCmd
) -> None:
    assert host.sev(command, COMMANDS[command]()) is SnpStatus.INVALID_PLATFORM_STATE
    host.start()
    nobody: Any = COMMANDS[command]()
    nobody.handle = 77
    assert host.sev(command, nobody) is SnpStatus.INVALID_GUEST


def test_activate_refuses_in_order(host: SevHost) -> None:
    plain, es = host.start(asid=None), host.start(ES, asid=None)
    top = host.soc.profile.max_asid
    for handle, asid, status in (
        (plain, 0, SnpStatus.INVALID_ASID),
        (plain, top + 1, SnpStatus.INVALID_ASID),
        (plain, 1, SnpStatus.INVALID_ASID),  # below the range of plain SEV
        (es, MIN_SEV, SnpStatus.INVALID_ASID),
        (plain, top, OK),
        (es, top, SnpStatus.ASID_OWNED),
        (plain, top - 1, SnpStatus.ACTIVE),
        (es, 1, OK),
    ):
        assert host.activate_sev(handle, asid) is status, (handle, asid)
    assert host.sev(SevCmd.DECOMMISSION, SevDecommission(handle=es)) is SnpStatus.ACTIVE
    snp = host.launching(asid=None)
    assert host.activate(snp, 1) is SnpStatus.ASID_OWNED  # one table for both kinds of guests


def test_an_asid_is_dirty_only_after_its_guest_could_run(host: SevHost) -> None:
    host.gone(host.start(asid=200))
    handle = host.start(asid=200)  # never ran: clean at once
    host.run_to_end(handle)
    assert host.psp.asid_runnable(200)
    host.gone(handle)
    second = host.start(asid=None)
    assert host.activate_sev(second, 200) is SnpStatus.DFFLUSH_REQUIRED
    assert host.sev(SevCmd.DF_FLUSH) is SnpStatus.WBINVD_REQUIRED
    host.soc.caches.wbinvd_on_all_cpus()
    assert host.sev(SevCmd.DF_FLUSH) is OK
    assert host.activate_sev(second, 200) is OK


def test_deactivate_takes_back_the_wbinvd_of_a_flush_under_way(host: SevHost) -> None:
    """Why Linux keeps the two apart with sev_deactivate_lock."""
    handle = host.start()
    host.run_to_end(handle)
    host.soc.caches.wbinvd_on_all_cpus()
    host.gone(handle)
    assert host.sev(SevCmd.DF_FLUSH) is SnpStatus.WBINVD_REQUIRED


def test_updates_refuse_in_order(host: SevHost) -> None:
    handle, page = host.start(asid=None), host.page()
    assert host.data(handle, page) is SnpStatus.INACTIVE
    assert host.activate_sev(handle, MIN_SEV) is OK
    assert host.data(handle, page + 8, 8) is SnpStatus.INVALID_ADDRESS
    assert host.data(handle, page, 8) is SnpStatus.INVALID_LENGTH
    assert host.data(handle, page, 0) is SnpStatus.INVALID_LENGTH
    assert host.data(handle, page) is SnpStatus.INVALID_PAGE_STATE  # the hypervisor's
    assert host.data(handle, host.guest_page(1, 0)) is SnpStatus.INVALID_PAGE_STATE
    vmsa = SevLaunchUpdateVmsa(handle=handle, address=page, len=2048)
    assert host.sev(SevCmd.LAUNCH_UPDATE_VMSA, vmsa) is SnpStatus.INVALID_LENGTH
    vmsa.len = 4096
    assert host.sev(SevCmd.LAUNCH_UPDATE_VMSA, vmsa) is SnpStatus.UNSUPPORTED  # not SEV-ES
    host.firmware(page)
    assert host.data(handle, page) is OK
    assert host.state(page) is PageState.FIRMWARE


def test_page_states_are_looked_at_for_as_many_pages_as_the_length_fills(host: SevHost) -> None:
    """A range that starts inside a page may end in a page that nobody looks at."""
    handle, pages = host.start(), host.page(3)
    host.firmware(pages)
    assert host.data(handle, pages + 2048, 4096) is OK
    assert host.data(handle, pages, 4096 + 16) is SnpStatus.INVALID_PAGE_STATE


def test_an_update_measures_what_lies_there_and_encrypts_it(host: SevHost) -> None:
    handle, page = host.start(), host.page()
    text = bytes(range(256)) * 16
    host.soc.host_write(page, text)
    host.firmware(page)
    assert host.data(handle, page + 1024, 2048) is OK
    assert host.raw(page)[:1024] == text[:1024]
    assert host.raw(page)[1024:3072] != text[1024:3072]
    assert host.raw(page)[3072:] == text[3072:]
    assert host.plain(page + 1024, MIN_SEV, 2048) == text[1024:3072]
    digest = host.psp.sev_guests[handle].launch_digest.digest()
    assert digest == sha256(text[1024:3072]).digest()


def test_sev_es_needs_a_platform_that_was_initialised_for_it() -> None:
    host = SevHost(es=False)
    start = SevLaunchStart(policy=ES)
    assert host.sev(SevCmd.LAUNCH_START, start) is SnpStatus.UNSUPPORTED
    assert host.psp.sev_state is PlatformState.INIT


def test_an_owners_session_is_unmodelled_and_its_lengths_are_checked_first(
    host: SevHost,
) -> None:
    for lengths in ((127, 0x824), (128, 0x823)):
        start = SevLaunchStart(
            dh_cert_address=4096, session_len=lengths[0], dh_cert_len=lengths[1]
        )
        assert host.sev(SevCmd.LAUNCH_START, start) is SnpStatus.INVALID_LENGTH
    start = SevLaunchStart(dh_cert_address=4096, session_len=128, dh_cert_len=0x824)
    with pytest.raises(Unmodelled, match="session"):
        host.sev(SevCmd.LAUNCH_START, start)


def test_firmware_has_1024_guests_at_most(host: SevHost) -> None:
    for handle in range(1, 1025):
        assert host.start(asid=None) == handle
    assert host.sev(SevCmd.LAUNCH_START, SevLaunchStart()) is SnpStatus.RESOURCE_LIMIT


def test_guest_status_of_nobody_is_no_failure(host: SevHost) -> None:
    status = SevGuestStatus(handle=5, policy=7, asid=9, state=3)
    assert host.sev(SevCmd.GUEST_STATUS, status) is OK
    assert (status.policy, status.asid, status.state) == (7, 9, 0)
    handle = host.start(policy=0x11)
    status = SevGuestStatus(handle=handle)
    assert host.sev(SevCmd.GUEST_STATUS, status) is OK
    assert (status.policy, status.asid, status.state) == (0x11, MIN_SEV, 1)


def test_answers_go_into_a_command_buffer_that_is_a_firmware_page(host: SevHost) -> None:
    status, page = SevGuestStatus(), host.page()
    command = SevCmd.GUEST_STATUS
    assert host.psp.command(command, status, paddr=page) is SnpStatus.INVALID_PAGE_STATE
    host.firmware(page)
    assert host.psp.command(command, status, paddr=page) is OK
    assert host.state(page) is PageState.RECLAIM


def test_shutdown_forgets_every_guest_and_releases_its_asid(host: SevHost) -> None:
    ran, launching = host.start(asid=MIN_SEV), host.start(asid=MIN_SEV + 1)
    host.run_to_end(ran)
    del launching
    assert host.sev(SevCmd.SHUTDOWN) is OK
    assert host.psp.sev_guests == {}
    assert set(host.psp.asids.dirty) == {MIN_SEV}
    assert not host.psp.asids.allocated
    assert not host.psp.asids.in_use


def test_a_copy_of_the_machine_goes_on_measuring_on_its_own(host: SevHost) -> None:
    handle, page = host.start(), host.firmware()
    assert host.data(handle, page) is OK
    copy = deepcopy(host.soc)
    assert fingerprint(copy) == fingerprint(host.soc)
    assert host.data(handle, page) is OK
    assert fingerprint(copy) != fingerprint(host.soc)
    update = SevLaunchUpdateData(handle=handle, address=page, len=4096)
    assert copy.psp.command(SevCmd.LAUNCH_UPDATE_DATA, update) is OK
    assert fingerprint(copy) == fingerprint(host.soc)
