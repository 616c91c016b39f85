"""PAGE_MOVE, PAGE_MD_INIT, PAGE_SWAP_OUT, PAGE_SWAP_IN: where a page goes, what comes back."""

import pytest

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import (
    SnpCmd,
    SnpMdEntry,
    SnpPageMdInit,
    SnpPageMove,
    SnpPageReclaim,
    SnpPageSwapIn,
    SnpPageSwapOut,
    SnpStatus,
    SwapPageType,
)
from tests.hw.psp.host import OK, Host, filled

S = PageState
DATA = bytes(range(256)) * 16


def move(host: Host, gctx: int, src: int, dst: int, size: int = 0) -> SnpStatus:
    cmd = SnpPageMove(gctx_paddr=gctx, src_paddr=src, dst_paddr=dst, page_size=size)
    return host.run(SnpCmd.PAGE_MOVE, cmd)


def md_init(host: Host, gctx: int, spa: int) -> SnpStatus:
    return host.run(SnpCmd.PAGE_MD_INIT, SnpPageMdInit(gctx_paddr=gctx, page_paddr=spa))


def swap_out(host: Host, gctx: int, src: int, dst: int, **fields: int) -> SnpStatus:
    cmd = SnpPageSwapOut(gctx_paddr=gctx, src_paddr=src, dst_paddr=dst)
    return host.run(SnpCmd.PAGE_SWAP_OUT, filled(cmd, fields))


def swap_in(host: Host, gctx: int, src: int, dst: int, **fields: int) -> SnpStatus:
    cmd = SnpPageSwapIn(gctx_paddr=gctx, src_paddr=src, dst_paddr=dst)
    return host.run(SnpCmd.PAGE_SWAP_IN, filled(cmd, fields))


def pre_swap(host: Host, gctx: int, gpa: int = 0x7000) -> int:
    """A validated page with DATA in it, made immutable by the host."""
    spa = host.pre_guest(1, gpa, DATA)
    assert host.update(gctx, spa, vmpl1_perms=5) is OK
    host.rmp(spa, assigned=1, immutable=1, asid=1, gpa=gpa)
    assert host.state(spa) is S.PRE_SWAP
    return spa


def test_a_moved_page_keeps_contents_gpa_and_permissions(host: Host) -> None:
    gctx = host.launching()
    src = pre_swap(host, gctx)
    dst = host.pre_guest(1, 0)
    assert move(host, gctx, src, dst) is OK
    assert (host.state(src), host.state(dst)) == (S.GUEST_INVALID, S.GUEST_VALID)
    entry = host.soc.rmp.entry(dst >> 12)
    assert (entry.gpa, entry.perms) == (0x7000, (31, 5, 0, 0))
    assert host.soc.rmp.entry(src >> 12).gpa == 0x7000
    assert host.plain(dst, 1) == DATA
    assert host.raw(dst) != host.raw(src)


def test_a_page_that_was_not_validated_moves_unvalidated(host: Host) -> None:
    gctx = host.running()
    src, dst = host.pre_guest(1, 0x3000), host.pre_guest(1, 0)
    assert move(host, gctx, src, dst) is OK
    assert host.state(src) is host.state(dst) is S.GUEST_INVALID


def test_move_checks_in_order(host: Host) -> None:
    gctx = host.launching()
    mine, other = host.pre_guest(1, 0), host.pre_guest(2, 0)
    assert move(host, gctx | 8, mine, other) is SnpStatus.INVALID_PARAM
    assert move(host, mine, mine, other) is SnpStatus.INVALID_GUEST
    assert move(host, gctx, mine, other, size=1) is SnpStatus.INVALID_PAGE_SIZE
    assert move(host, host.gctx(), mine, other) is SnpStatus.INVALID_GUEST_STATE
    assert move(host, host.launching(None), mine, other) is SnpStatus.INACTIVE
    assert move(host, gctx, mine, host.page()) is SnpStatus.INVALID_PAGE_STATE
    assert move(host, gctx, mine, other) is SnpStatus.INVALID_PAGE_OWNER


def test_metadata_belongs_to_one_guest(host: Host) -> None:
    gctx, stranger = host.launching(1), host.launching(2)
    page = host.firmware()
    assert md_init(host, host.gctx(), page) is SnpStatus.INVALID_GUEST_STATE
    assert md_init(host, gctx, host.page()) is SnpStatus.INVALID_PAGE_STATE
    assert md_init(host, gctx, page) is OK
    assert host.state(page) is S.METADATA
    target = host.firmware()
    assert move(host, stranger, page, target) is SnpStatus.INVALID_PAGE_OWNER
    assert move(host, gctx, page, target) is OK
    assert (host.state(page), host.state(target)) == (S.FIRMWARE, S.METADATA)


def test_a_page_swaps_out_and_back_once(host: Host) -> None:
    gctx = host.launching()
    src, out, md = pre_swap(host, gctx), host.firmware(), host.firmware()
    assert md_init(host, gctx, md) is OK
    slot = {"mdata_paddr": md + 64}
    assert swap_out(host, gctx, src, out, software_data=99, **slot) is OK
    assert host.state(src) is S.PRE_GUEST
    entry = SnpMdEntry(host.raw(md + 64, 64))
    assert (entry.valid, entry.page_validated, entry.gfn, entry.software_data) == (1, 1, 7, 99)
    assert host.raw(out) not in (DATA, host.raw(src))

    back = host.pre_guest(1, 0)
    assert swap_in(host, gctx, out, back, **slot) is OK
    assert host.state(back) is S.PRE_SWAP
    assert host.plain(back, 1) == DATA
    restored = host.soc.rmp.entry(back >> 12)
    assert (restored.gpa, restored.perms) == (0x7000, (31, 5, 0, 0))
    again = host.pre_guest(1, 0)
    assert swap_in(host, gctx, out, again, **slot) is SnpStatus.INVALID_MDATA_ENTRY
    reclaim = SnpPageReclaim(paddr=back)
    assert host.run(SnpCmd.PAGE_RECLAIM, reclaim) is OK
    assert host.state(back) is S.GUEST_VALID


def test_a_changed_page_does_not_come_back(host: Host) -> None:
    gctx = host.launching()
    src, out, md = pre_swap(host, gctx), host.firmware(), host.firmware()
    assert md_init(host, gctx, md) is OK
    assert swap_out(host, gctx, src, out, mdata_paddr=md) is OK
    assert host.run(SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=out)) is OK
    host.rmp(out)
    host.soc.host_write(out, b"\xff")
    back = host.pre_guest(1, 0)
    assert swap_in(host, gctx, out, back, mdata_paddr=md) is SnpStatus.BAD_MEASUREMENT
    assert host.state(back) is S.PRE_GUEST


def test_metadata_swaps_out_to_a_root_in_the_context(host: Host) -> None:
    gctx = host.launching()
    src, out, md = pre_swap(host, gctx), host.firmware(), host.firmware()
    assert md_init(host, gctx, md) is OK
    assert swap_out(host, gctx, src, out, mdata_paddr=md) is OK
    sealed = host.firmware()
    kind = {"page_type": SwapPageType.METADATA, "root_mdata_en": 1}
    assert swap_out(host, gctx, md, sealed, **kind) is OK
    assert host.state(md) is S.FIRMWARE
    home = host.firmware()
    assert swap_in(host, gctx, sealed, home, **kind) is OK
    assert host.state(home) is S.METADATA
    back = host.pre_guest(1, 0)
    assert swap_in(host, gctx, out, back, mdata_paddr=home) is OK
    assert host.plain(back, 1) == DATA


def test_a_vmsa_swaps_as_a_vmsa(host: Host) -> None:
    gctx = host.launching()
    spa = host.pre_guest(1, 0x9000, DATA[:0x3B0] + bytes(0x1000 - 0x3B0))
    assert host.update(gctx, spa, LaunchPageType.VMSA) is OK
    host.rmp(spa, assigned=1, immutable=1, asid=1, gpa=0x9000)
    out = host.firmware()
    kind = {"page_type": SwapPageType.VMSA, "root_mdata_en": 1}
    assert swap_out(host, gctx, spa, out, **kind) is OK
    back = host.pre_guest(1, 0)
    wrong = {"page_type": SwapPageType.DATA, "root_mdata_en": 1}
    assert swap_in(host, gctx, out, back, **wrong) is SnpStatus.INVALID_MDATA_ENTRY
    assert swap_in(host, gctx, out, back, **kind) is OK
    assert host.soc.rmp.entry(back >> 12).vmsa == 1


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("unaligned", SnpStatus.INVALID_PARAM),
        ("overlap", SnpStatus.INVALID_PARAM),
        ("not_metadata", SnpStatus.INVALID_PAGE_STATE),
        ("stranger", SnpStatus.INVALID_PAGE_OWNER),
    ],
)
def test_a_swap_needs_a_metadata_slot_of_its_own_guest(
    host: Host, fault: str, status: SnpStatus
) -> None:
    gctx = host.launching()
    src, out, md = pre_swap(host, gctx), host.firmware(), host.firmware()
    owner = host.launching(2) if fault == "stranger" else gctx
    if fault != "not_metadata":
        assert md_init(host, owner, md) is OK
    slot = {"unaligned": md + 8, "overlap": out + 64}.get(fault, md)
    assert swap_out(host, gctx, src, out, mdata_paddr=slot) is status
