"""Rows 1.5, 1.9 and 2.6 of the requirements on the bare machine: hypervisor, guests, firmware, no kernel."""

import pytest

from softcvm.abi.insn import Load, Pvalidate, PvalidateOut, Rmpquery, Store
from softcvm.abi.rmp import PageState, PsmashStatus, RmpState, RmpupdateStatus
from softcvm.abi.snp_firmware import SnpCmd, SnpPageReclaim, SnpPageUnsmash
from softcvm.abi.svm import ExitCode, GuestException, Vector
from softcvm.hw.access import HostRmpFault
from softcvm.hw.insn.psmash import psmash
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.hw.profile import GENOA, MILAN, CpuProfile
from softcvm.invariants.registry import check_all, watch
from tests.hw.machines import PAGE, BareGuest, Exited, command, snp_machine, update
from tests.hw.xts import xts

SECRET = b"what the first guest wrote there"

# EXITINFO1 of a private read by the guest that fails an RMP check: P, U, RMP, final translation, C=1.
NPF_READ_RMP = 0x5_8000_0005
NPF_PVALIDATE_SIZEM = 0xD_8000_0007


@pytest.fixture(params=[MILAN, GENOA], ids=lambda profile: profile.name)
def guests(request: pytest.FixtureRequest) -> tuple[BareGuest, BareGuest]:
    """Two launched guests on one machine; frame 8 of each is accepted and written."""
    profile: CpuProfile = request.param
    soc = snp_machine(profile)
    both = (BareGuest(soc, 1, 1, 512), BareGuest(soc, 2, 2, 1536))
    for guest in both:
        guest.launch([b"\x11" * PAGE])
        guest.assign(8)
        assert guest.does(Pvalidate(8 * PAGE, 0, True)) == PvalidateOut(0, False, 1)
        guest.does(Store(8 * PAGE, SECRET))
    return both


def fault(guest: BareGuest, gpa: int) -> tuple[int, int, int]:
    """The #VMEXIT(NPF) that a private read ends in."""
    with pytest.raises(Exited) as left:
        guest.does(Load(gpa, 32))
    return left.value.code, left.value.info_1, left.value.info_2


def test_r1_5_a_page_that_was_never_accepted_raises_vc(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    guest, _ = guests
    guest.assign(9)
    with pytest.raises(GuestException) as raised:
        guest.does(Load(9 * PAGE + 40, 1))
    assert raised.value.vector is Vector.VC
    assert (raised.value.error_code, raised.value.cr2) == (0x404, 9 * PAGE + 40)


@pytest.mark.parametrize("change", ["gpa", "asid", "away and back", "size"])
def test_r1_5_any_rmpupdate_that_changes_an_accepted_page_clears_validated(
    guests: tuple[BareGuest, BareGuest], change: str
) -> None:
    guest, other = guests
    pfn = guest.first_pfn + 8
    same = RmpState(assigned=1, gpa=8 * PAGE, asid=guest.asid)
    match change:
        case "gpa":
            update(guest.soc, pfn, same._replace(gpa=9 * PAGE))
        case "asid":
            update(guest.soc, pfn, same._replace(asid=other.asid))
        case "away and back":
            update(guest.soc, pfn, RmpState())
        case _:  # the size
            pfn = guest.first_pfn + 512
            guest.assign(512, 512, large=True)
            assert guest.does(Pvalidate(512 * PAGE, 1, True)).done == 1
            same = RmpState(assigned=1, gpa=512 * PAGE, asid=guest.asid)
            update(guest.soc, pfn, RmpState(pagesize=1))
            update(guest.soc, pfn, same)
            guest.map(512, pfn)
    assert guest.soc.rmp.entry(pfn).validated == 0
    update(guest.soc, pfn, same)
    assert guest.soc.rmp.entry(pfn).validated == 0
    with pytest.raises(GuestException, match="0x404"):
        guest.does(Load(same.gpa, 1))


def test_r1_5_an_rmpupdate_that_says_the_same_again_keeps_validated(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    guest, _ = guests
    same = RmpState(assigned=1, gpa=8 * PAGE, asid=guest.asid)
    update(guest.soc, guest.first_pfn + 8, same)
    assert guest.does(Load(8 * PAGE, len(SECRET))) == SECRET


def test_r1_5_immutable_alone_keeps_validated_but_takes_the_page_out_of_reach(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    guest, _ = guests
    pfn = guest.first_pfn + 8
    same = RmpState(assigned=1, gpa=8 * PAGE, asid=guest.asid)
    update(guest.soc, pfn, same._replace(immutable=1))
    assert guest.soc.rmp.state(pfn) is PageState.PRE_SWAP
    assert fault(guest, 8 * PAGE) == (ExitCode.NPF, NPF_READ_RMP, 8 * PAGE)
    assert rmpupdate(guest.soc, pfn * PAGE, same) == (RmpupdateStatus.FAIL_PERMISSION, 0)
    command(guest.soc, SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=pfn * PAGE))
    assert guest.does(Load(8 * PAGE, len(SECRET))) == SECRET


def test_r1_5_another_page_put_under_an_accepted_address_is_noticed(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    """The remapping attack: the hypervisor swaps the page behind frame 8."""
    guest, _ = guests
    soc, pfn = guest.soc, guest.first_pfn + 20
    update(soc, pfn, RmpState(assigned=1, gpa=8 * PAGE, asid=guest.asid))
    guest.map(8, pfn)
    with pytest.raises(GuestException, match="0x404"):
        guest.does(Load(8 * PAGE, 1))
    guest.map(8, guest.first_pfn + 1)  # its own frame 1, at the wrong address
    assert fault(guest, 8 * PAGE) == (ExitCode.NPF, NPF_READ_RMP, 8 * PAGE)


def test_r1_9_one_page_given_to_two_guests_has_one_owner_at_a_time(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    first, second = guests
    soc = first.soc
    watched = watch(soc)
    pfn = first.first_pfn + 8
    spa = pfn * PAGE
    keys = {guest.asid: soc.keys[guest.asid].material for guest in guests}
    raw = xts(keys[1], spa, SECRET)
    second.map(12, pfn)

    def observed() -> tuple[int, bytes]:
        """Owner in the RMP, and what the host sees; every invariant of the hardware holds."""
        assert [c for c in check_all(soc, watched) if not c.held] == []
        return soc.rmp.entry(pfn).asid, soc.host_read(spa, len(SECRET))

    # The first guest owns it: it reads its bytes, the host their ciphertext, the second nothing.
    assert observed() == (1, raw)
    assert first.does(Load(8 * PAGE, 32)) == SECRET
    assert fault(second, 12 * PAGE) == (ExitCode.NPF, NPF_READ_RMP, 12 * PAGE)
    with pytest.raises(HostRmpFault):
        soc.host_write(spa, b"x")

    # The VMM gives it to the second as well.  The first has lost it, the second does not have it yet.
    update(soc, pfn, RmpState(assigned=1, gpa=12 * PAGE, asid=2))
    assert observed() == (2, raw)
    assert fault(first, 8 * PAGE) == (ExitCode.NPF, NPF_READ_RMP, 8 * PAGE)
    with pytest.raises(GuestException, match="0x404"):
        second.does(Load(12 * PAGE, 1))

    # Only by accepting it does the second get it, and what it finds is noise to it.
    assert second.does(Pvalidate(12 * PAGE, 0, True)) == PvalidateOut(0, False, 1)
    assert second.does(Load(12 * PAGE, 32)) == xts(keys[2], spa, raw, decrypt=True)
    assert observed() == (2, raw)
    second.does(Store(12 * PAGE, b"the second guest's own bytes, 32"))
    raw = xts(keys[2], spa, b"the second guest's own bytes, 32")
    assert observed() == (2, raw)

    # Given back to the first, it is not the page it accepted, and it reads noise in its turn.
    update(soc, pfn, RmpState(assigned=1, gpa=8 * PAGE, asid=1))
    assert observed() == (1, raw)
    assert fault(second, 12 * PAGE) == (ExitCode.NPF, NPF_READ_RMP, 12 * PAGE)
    with pytest.raises(GuestException, match="0x404"):
        first.does(Load(8 * PAGE, 1))
    assert first.does(Pvalidate(8 * PAGE, 0, True)) == PvalidateOut(0, False, 1)
    assert first.does(Load(8 * PAGE, 32)) == xts(keys[1], spa, raw, decrypt=True)


def test_r1_9_both_guests_mapping_one_page_shared_see_the_same_bytes(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    first, second = guests
    pfn = 3000
    first.map(30, pfn)
    second.map(31, pfn)
    first.does(Store(30 * PAGE, b"hello", c=False))
    assert second.does(Load(31 * PAGE, 5, c=False)) == b"hello"
    assert first.soc.host_read(pfn * PAGE, 5) == b"hello"
    assert fault(first, 30 * PAGE)[1] == NPF_READ_RMP  # with C=1 it is nobody's


def test_r2_6_psmash_makes_512_pages_and_the_guest_does_not_notice(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    guest, _ = guests
    soc, pfn = guest.soc, guest.first_pfn + 512
    guest.assign(512, 512, large=True)
    assert guest.does(Pvalidate(512 * PAGE, 1, True)) == PvalidateOut(0, False, 1)
    guest.does(Store(512 * PAGE, b"head"))
    guest.does(Store(1000 * PAGE, b"inside"))
    assert psmash(soc, pfn * PAGE) == (PsmashStatus.SUCCESS, 1)
    # Raw entries, by hand: assigned, validated, gfn, ASID 1, VMPL0 may do everything.
    for i in (0, 1, 488, 511):
        raw = 1 | 1 << 62 | (512 + i) << 12 | 1 << 51 | 0x1F << 64
        if i == 0:
            raw |= 511 << 3
        assert soc.rmp.raw(pfn + i) == raw.to_bytes(16, "little")
    # A 2M leaf over 4K entries is the hypervisor's fault to mend; then everything is as it was.
    assert fault(guest, 1000 * PAGE)[1] == NPF_READ_RMP
    guest.map(512, pfn, 512)
    assert guest.does(Load(512 * PAGE, 4)) == b"head"
    assert guest.does(Load(1000 * PAGE, 6)) == b"inside"
    # What the guest can see: the size.
    assert guest.does(Rmpquery(1000 * PAGE, 1)).size == 0
    assert guest.does(Pvalidate(512 * PAGE, 1, True)) == PvalidateOut(6, False, 0)


def test_r2_6_half_of_a_2m_page_changes_hands_after_psmash_only(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    guest, _ = guests
    soc, pfn = guest.soc, guest.first_pfn + 512
    guest.assign(512, 512, large=True)
    guest.does(Pvalidate(512 * PAGE, 1, True))
    half = (pfn + 256) * PAGE
    assert rmpupdate(soc, half, RmpState(), 256) == (RmpupdateStatus.FAIL_OVERLAP, 0)
    psmash(soc, pfn * PAGE)
    assert rmpupdate(soc, half, RmpState(), 256) == (RmpupdateStatus.SUCCESS, 256)
    states = [soc.rmp.state(pfn + i) for i in (0, 255, 256, 511)]
    assert states == [PageState.GUEST_VALID] * 2 + [PageState.HYPERVISOR] * 2
    soc.host_write(half, b"the host's again")
    with pytest.raises(HostRmpFault):
        soc.host_write(half - 1, b"x")


def test_r2_6_a_4k_pvalidate_inside_a_2m_page_asks_the_hypervisor_to_smash(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    guest, _ = guests
    guest.assign(512, 512, large=True)
    with pytest.raises(Exited) as left:
        guest.does(Pvalidate(513 * PAGE, 0, True))
    assert (left.value.info_1, left.value.info_2) == (NPF_PVALIDATE_SIZEM, 513 * PAGE)
    psmash(guest.soc, guest.spa(512))
    guest.map(512, guest.first_pfn + 512, 512)
    assert guest.does(Pvalidate(513 * PAGE, 0, True)) == PvalidateOut(0, False, 1)


def test_r2_6_only_firmware_joins_what_was_smashed(
    guests: tuple[BareGuest, BareGuest],
) -> None:
    guest, _ = guests
    soc, pfn = guest.soc, guest.first_pfn + 512
    guest.assign(512, 512, large=True)
    guest.does(Pvalidate(512 * PAGE, 1, True))
    guest.does(Store(700 * PAGE, b"kept"))
    psmash(soc, pfn * PAGE)
    whole = RmpState(assigned=1, pagesize=1, gpa=512 * PAGE, asid=guest.asid)
    assert rmpupdate(soc, pfn * PAGE, whole) == (RmpupdateStatus.FAIL_OVERLAP, 0)
    small = RmpState(assigned=1, immutable=1, gpa=512 * PAGE, asid=guest.asid)
    update(soc, pfn, small, 512)
    command(soc, SnpCmd.PAGE_UNSMASH, SnpPageUnsmash(paddr=pfn * PAGE))
    command(soc, SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=pfn * PAGE | 1))
    assert soc.rmp.entry(pfn).pagesize == 1
    guest.map(512, pfn, 512, large=True)
    assert guest.does(Load(700 * PAGE, 4)) == b"kept"
