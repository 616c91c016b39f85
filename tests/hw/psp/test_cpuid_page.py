"""CPUID pages: what passes, what is corrected, and that a refused page changes nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcvm.abi.cpuid import CpuidEntry, CpuidFunction, CpuidPage, read_page, write_page
from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import SnpStatus
from softcvm.hw.profile import GENOA, MILAN, CpuProfile
from softcvm.hw.psp.cpuid_rules import rules, sanitize, sanitize_page
from tests.hw.psp.host import OK, Host, filled

# CPUID of an EPYC 7763 (Milan): leaves 1 and 7 as InstLatx64 archives them, the others from public dumps of Zen 3
# processors, not checked against that one; XSAVE sizes for XCR0 = 7.
MILAN_DUMP = [
    CpuidEntry(0x0, 0, 0, 0, 0x10, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(0x1, 0, 0, 0, 0xA00F11, 0x00800800, 0x7EF8320B, 0x178BFBFF),
    CpuidEntry(0x7, 0, 0, 0, 0x0, 0x219C97A9, 0x0040069C, 0x00000010),
    CpuidEntry(0xD, 0, 7, 0, 0x207, 0x340, 0x988, 0x0),
    CpuidEntry(0xD, 1, 7, 0, 0xF, 0x340, 0x1800, 0x0),
    CpuidEntry(0xD, 2, 0, 0, 0x100, 0x240, 0x0, 0x0),
    CpuidEntry(0x80000000, 0, 0, 0, 0x80000023, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(0x80000001, 0, 0, 0, 0xA00F11, 0x40000000, 0x75C237FF, 0x2FD3FBFF),
    CpuidEntry(0x80000008, 0, 0, 0, 0x3030, 0x111EF657, 0x707F, 0x10007),
    CpuidEntry(0x80000021, 0, 0, 0, 0x204D),
    CpuidEntry(0x8000001F, 0, 0, 0, 0x0101FD3F, 0x4173, 0x1FD, 0x1),
]


def launch(host: Host, page: bytes) -> tuple[SnpStatus, int, int]:
    """Status, context address and page address of a CPUID launch update."""
    gctx = host.launching()
    spa = host.pre_guest(1, 0x80_E000, page)
    return host.update(gctx, spa, LaunchPageType.CPUID), gctx, spa


def test_what_a_milan_host_reports_passes_on_milan() -> None:
    host = Host(MILAN).init()
    page = write_page(MILAN_DUMP)
    status, _, spa = launch(host, page)
    assert status is OK
    assert host.plain(spa, 1) == page


def test_a_refused_page_is_corrected_in_the_clear_and_nothing_else_changes(host: Host) -> None:
    wrong = CpuidEntry(0x1, 0, 0, 0, 0xA10F10, 0x800, 0xFFFFFFFF, 0xFFFFFFFF)
    fine = CpuidEntry(0xD, 0, 3, 0, 0x3, 0x240, 0x240, 0)
    page = write_page([wrong, fine])[:-8] + b"trailing"
    status, gctx, spa = launch(host, page)
    assert status is SnpStatus.INVALID_PARAM
    assert host.psp.gctx(gctx).ld == bytes(48)
    assert host.state(spa) is PageState.PRE_GUEST
    back = host.raw(spa)
    assert read_page(back) == [wrong._replace(ecx=0xFEFA320B, edx=0x178BFBFF), fine]
    assert back[16 + 48 :] == page[16 + 48 :]
    assert host.update(gctx, spa, LaunchPageType.CPUID) is OK  # the corrected table passes


@pytest.mark.parametrize("field", ["reserved1", "reserved2", "count"])
def test_a_bad_header_is_refused_unchanged(host: Host, field: str) -> None:
    page = filled(CpuidPage(), {field: 65})
    status, _, spa = launch(host, bytes(page))
    assert status is SnpStatus.INVALID_PARAM
    assert host.raw(spa) == bytes(page)


def test_a_leaf_nobody_knows_must_be_zero(host: Host) -> None:
    unknown = CpuidEntry(0x0000_0014, 0, 0, 0, 1, 2, 3, 4)
    assert sanitize(GENOA, unknown) == CpuidEntry(0x0000_0014)
    assert sanitize(GENOA, CpuidEntry(0x0000_0014)) == CpuidEntry(0x0000_0014)
    hypervisor = CpuidEntry(0x4000_0000, 0, 0, 0, 1, 2, 3, 4)
    assert sanitize(GENOA, hypervisor) == hypervisor


@pytest.mark.parametrize(
    ("xcr0", "xss", "standard", "compact"),
    [
        (0x3, 0, 0x240, 0x240),
        (0x7, 0, 0x340, 0x340),
        (0x7, 0x1800, 0x340, 0x368),
        (0xE7, 0, 0x980, 0x980),
        (0x2E7, 0, 0x988, 0x988),
        (0x207, 0, 0x988, 0x348),
    ],
)
def test_xsave_sizes_follow_what_the_guest_enables(
    xcr0: int, xss: int, standard: int, compact: int
) -> None:
    """Sizes of the components: [APM2-24593 §11.5.4]; 576 bytes for x87, SSE and the header."""
    plain = CpuidEntry(0xD, 0, xcr0, xss, 0x3)
    packed = CpuidEntry(0xD, 1, xcr0, xss)
    assert sanitize(GENOA, plain).ebx == standard
    assert sanitize(GENOA, packed).ebx == compact


def test_a_guest_may_see_an_older_processor_but_no_newer_one() -> None:
    older, newer = 0x00A00F11, 0x00B00F00
    assert sanitize(GENOA, CpuidEntry(1, eax=older, ebx=0x800)).eax == older
    assert sanitize(GENOA, CpuidEntry(1, eax=newer, ebx=0x800)).eax == 0xA10F11


def test_the_c_bit_may_not_be_lied_about() -> None:
    entry = CpuidEntry(0x8000_001F, eax=0x1A, ebx=0x416F)
    assert sanitize(GENOA, entry).ebx & 0x3F == 51


ENTRIES = st.builds(
    CpuidEntry,
    st.sampled_from([leaf for leaf, _ in rules(GENOA)] + [0x14, 0x4000_0001, 0x8000_0FFF]),
    st.integers(0, 12),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    *[st.integers(0, (1 << 32) - 1)] * 4,
    st.sampled_from([0, 0, 0, 5]),
)


@given(st.lists(ENTRIES, max_size=64), st.sampled_from([GENOA, MILAN]))
def test_a_corrected_page_always_passes(entries: list[CpuidEntry], profile: CpuProfile) -> None:
    corrected = sanitize_page(profile, write_page(entries))
    if corrected is not None:
        assert sanitize_page(profile, corrected) is None
        assert len(read_page(corrected)) == len(entries)


def test_a_page_of_64_entries_fits() -> None:
    page = write_page([CpuidEntry(0x4000_0000 + i) for i in range(64)])
    assert len(page) == 4096
    assert len(read_page(page)) == 64
    assert 16 + 64 * CpuidFunction.SIZE <= 4096
    with pytest.raises(ValueError, match="65 CPUID entries"):
        write_page([CpuidEntry(0)] * 65)
