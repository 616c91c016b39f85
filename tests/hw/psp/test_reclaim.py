"""PAGE_RECLAIM for every page state, PAGE_UNSMASH against PSMASH, PAGE_SET_STATE."""

from collections.abc import Callable

import pytest

from softcvm.abi.rmp import PageState, PsmashStatus, RmpState, RmpupdateStatus
from softcvm.abi.snp_firmware import (
    SnpCmd,
    SnpPageMdInit,
    SnpPageReclaim,
    SnpPageSetState,
    SnpPageUnsmash,
    SnpStatus,
)
from softcvm.abi.snp_platform import PlatformState, SnpRange, SnpRangeListHeader
from softcvm.hw.insn.psmash import psmash
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.hw.rmp import RmpEntry
from tests.hw.psp.host import OK, Host

S = PageState


def reclaim(host: Host, spa: int) -> SnpStatus:
    return host.run(SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=spa))


def unsmash(host: Host, spa: int) -> SnpStatus:
    return host.run(SnpCmd.PAGE_UNSMASH, SnpPageUnsmash(paddr=spa))


def metadata(host: Host) -> int:
    spa = host.firmware()
    cmd = SnpPageMdInit(gctx_paddr=host.launching(asid=9), page_paddr=spa)
    assert host.run(SnpCmd.PAGE_MD_INIT, cmd) is OK
    return spa


def pre_swap(host: Host) -> int:
    spa = host.page()
    entry = RmpEntry(
        assigned=1, immutable=1, asid=4, validated=1, gpa=0x5000, perms=(31, 0, 0, 0)
    )
    host.soc.rmp.firmware_write("test", spa >> 12, 1, entry)
    return spa


def guest_valid(host: Host) -> int:
    gctx = host.launching(asid=9)
    spa = host.pre_guest(9, 0)
    assert host.update(gctx, spa) is OK
    return spa


RECLAIMED: list[tuple[PageState, Callable[[Host], int], SnpStatus, PageState]] = [
    (S.HYPERVISOR, lambda h: h.page(), OK, S.HYPERVISOR),
    (S.HV_FIXED, lambda h: 0xA_0000, SnpStatus.INVALID_PAGE_STATE, S.HV_FIXED),
    (S.FIRMWARE, lambda h: h.firmware(), OK, S.RECLAIM),
    (S.RECLAIM, lambda h: h.rmp(h.page(), assigned=1), OK, S.RECLAIM),
    (S.CONTEXT, lambda h: h.gctx(), SnpStatus.INVALID_PAGE_STATE, S.CONTEXT),
    (S.METADATA, metadata, OK, S.RECLAIM),
    (S.PRE_GUEST, lambda h: h.pre_guest(3, 0), OK, S.GUEST_INVALID),
    (S.PRE_SWAP, pre_swap, OK, S.GUEST_VALID),
    (S.GUEST_INVALID, lambda h: h.guest_page(3, 0), OK, S.GUEST_INVALID),
    (S.GUEST_VALID, guest_valid, OK, S.GUEST_VALID),
]


@pytest.mark.parametrize(("before", "make", "status", "after"), RECLAIMED)
def test_reclaim_of_each_page_state(
    host: Host,
    before: PageState,
    make: Callable[[Host], int],
    status: SnpStatus,
    after: PageState,
) -> None:
    spa = make(host)
    assert host.state(spa) is before
    contents = host.raw(spa)
    assert reclaim(host, spa) is status
    assert host.state(spa) is after
    assert host.raw(spa) == contents  # never scrubbed
    if status is OK:
        assert rmpupdate(host.soc, spa, RmpState())[0] is RmpupdateStatus.SUCCESS
        assert host.state(spa) is S.HYPERVISOR


def test_reclaim_checks_in_order(host: Host) -> None:
    large = host.rmp(host.page(512), assigned=1, immutable=1, pagesize=1)
    assert reclaim(host, large | 2) is SnpStatus.INVALID_PARAM
    assert reclaim(host, 0x20_0000) is SnpStatus.INVALID_ADDRESS  # the RMP
    assert reclaim(host, 1 << 60) is SnpStatus.INVALID_ADDRESS
    assert reclaim(host, large) is SnpStatus.INVALID_PAGE_SIZE
    assert reclaim(host, host.firmware() | 1) is SnpStatus.INVALID_PAGE_SIZE
    assert reclaim(host, large + 4096) is OK  # a covered entry is not immutable
    assert host.state(large) is S.FIRMWARE
    assert reclaim(host, large | 1) is OK
    assert host.state(large) is host.state(large + 511 * 4096) is S.RECLAIM
    host.psp.snp_state = PlatformState.UNINIT
    assert reclaim(host, large | 1) is SnpStatus.INVALID_PLATFORM_STATE


def test_unsmash_undoes_psmash(host: Host) -> None:
    spa = host.pre_guest(3, 0x40_0000, large=True)
    assert reclaim(host, spa | 1) is OK  # PSMASH wants it mutable
    before = host.soc.rmp.head(spa >> 12)
    assert psmash(host.soc, spa)[0] is PsmashStatus.SUCCESS
    assert unsmash(host, spa) is SnpStatus.INVALID_PAGE_STATE  # not immutable
    for i in range(512):
        host.rmp(spa + i * 4096, assigned=1, immutable=1, asid=3, gpa=0x40_0000 + i * 4096)
    assert unsmash(host, spa) is OK
    assert reclaim(host, spa | 1) is OK
    assert host.soc.rmp.head(spa >> 12) == before
    assert host.soc.rmp.asid_pages[3] == 512


def test_unsmash_leaves_gpa_behind_in_covered_entries(host: Host) -> None:
    spa = host.page(512)
    for i in range(512):
        host.rmp(spa + i * 4096, assigned=1, immutable=1, asid=3, gpa=0x40_0000 + i * 4096)
    assert unsmash(host, spa) is OK
    covered = int.from_bytes(host.soc.rmp.raw((spa >> 12) + 5)[:8], "little")
    assert covered == 1 | 0x40_5000


@pytest.mark.parametrize(
    "fault", ["mutable", "asid", "gpa", "state", "unaligned", "hypervisor"]
)
def test_unsmash_wants_512_like_pages(host: Host, fault: str) -> None:
    spa = host.page(512)
    base = 0x40_1000 if fault == "unaligned" else 0x40_0000
    for i in range(512):
        fields = {"assigned": 1, "immutable": 1, "asid": 3, "gpa": base + i * 4096}
        if i == 300:
            changes = {
                "mutable": {"immutable": 0},
                "asid": {"asid": 4},
                "gpa": {"gpa": 0},
                "hypervisor": {"assigned": 0, "immutable": 0, "asid": 0, "gpa": 0},
            }
            fields.update(changes.get(fault, {}))
        host.rmp(spa + i * 4096, **fields)
    if fault == "state":
        entry = host.soc.rmp.entry((spa >> 12) + 7)
        host.soc.rmp.firmware_write("test", (spa >> 12) + 7, 1, entry._replace(validated=1))
    runs = host.soc.rmp.map.runs(spa >> 12, (spa >> 12) + 512)
    assert unsmash(host, spa) is SnpStatus.INVALID_PAGE_STATE
    assert host.soc.rmp.map.runs(spa >> 12, (spa >> 12) + 512) == runs


def test_unsmash_checks_its_address(host: Host) -> None:
    assert unsmash(host, 0x40_1000) is SnpStatus.INVALID_PARAM
    assert unsmash(host, 1 << 40) is SnpStatus.INVALID_PAGE_STATE
    assert unsmash(host, 0x20_0000) is SnpStatus.INVALID_PARAM


def test_set_state_fixes_firmware_pages_in_2m_steps(host: Host) -> None:
    large = host.rmp(host.page(512), assigned=1, immutable=1, pagesize=1)
    listing = host.page()

    def set_state(*ranges: tuple[int, int], length: int = 16) -> SnpStatus:
        data = bytes(SnpRangeListHeader(num_elements=len(ranges)))
        data += b"".join(bytes(SnpRange(base=b, page_count=n)) for b, n in ranges)
        host.soc.host_write(listing, data)
        cmd = SnpPageSetState(length=length, list_paddr=listing)
        return host.run(SnpCmd.PAGE_SET_STATE, cmd)

    assert set_state(length=8) is SnpStatus.INVALID_LENGTH
    assert set_state((large + 4096, 1)) is SnpStatus.INVALID_PARAM
    assert set_state((large, 512), (0x80_0000, 512)) is SnpStatus.INVALID_PAGE_STATE
    assert host.state(large) is S.FIRMWARE
    assert set_state((large, 512)) is OK
    assert host.state(large) is host.state(large + 511 * 4096) is S.HV_FIXED
    assert rmpupdate(host.soc, large, RmpState())[0] is RmpupdateStatus.FAIL_PERMISSION
