"""Reading firmware images: what is found in good ones, how each fault of a bad one is named."""

import struct
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from sevsnpmeasure.guest import snp_calc_launch_digest
from sevsnpmeasure.ovmf import OVMF

from softcvm.abi.ovmf import SectionType
from softcvm.guest import firmware
from softcvm.vmm import measure
from softcvm.vmm.kernel_hashes import hash_table_of_files
from softcvm.vmm.ovmf import MAX_IMAGE_SIZE, OvmfError, Section, parse, read
from tests.vmm import images
from tests.vmm.conftest import Write
from tests.vmm.images import AMD_SEV_SECTIONS, CPUID, HASHES, METADATA, RESET, SEC_MEM


def test_real_images_say_what_sev_snp_measure_reads_in_them(ovmf_images: list[Path]) -> None:
    for path in ovmf_images:
        check_against_outsider(path)


def test_made_up_images_say_what_sev_snp_measure_reads_in_them(synthetic: Path) -> None:
    check_against_outsider(synthetic)


def check_against_outsider(path: Path) -> None:
    ours, theirs = read(str(path)), OVMF(str(path))
    assert ours.gpa == theirs.gpa()
    assert [tuple(s) for s in ours.sections] == [
        (d.gpa, d.size, d.section_type_int) for d in theirs.metadata_items()
    ]
    assert ours.ap_reset_eip == theirs.sev_es_reset_eip()
    area = ours.hash_table_area
    assert (area is not None) == theirs.is_sev_hashes_table_supported()
    assert area is None or area.base == theirs.sev_hashes_table_gpa()


def test_an_edk2_amd_sev_build_is_read() -> None:
    image = parse(images.amd_sev())
    assert image.gpa == 0xFFFF_F000
    assert image.sections == tuple(Section(*desc) for desc in AMD_SEV_SECTIONS)
    assert image.section(SectionType.CPUID) == (0x80_E000, 0x1000, CPUID)
    assert image.ap_reset_eip == 0x80_B004
    assert image.hash_table_area is not None
    assert (image.hash_table_area.base, image.hash_table_area.size) == (0x81_0C00, 0x400)
    assert image.secret_block is not None
    assert (image.secret_block.base, image.secret_block.size) == (0x81_0000, 0xC00)


def test_an_image_without_metadata_is_no_error_and_says_so() -> None:
    image = parse(images.image([images.reset()]))
    assert image.has_table
    assert not image.has_metadata
    assert image.sections == ()
    assert image.hash_table_area is None
    assert image.secret_block is None


def test_an_image_without_a_table_is_read_until_something_of_the_table_is_needed() -> None:
    image = parse(bytes(0x8000))
    assert not image.has_table
    with pytest.raises(OvmfError, match="not an OVMF image, or a truncated one"):
        _ = image.ap_reset_eip
    with pytest.raises(OvmfError, match="not an OVMF image"):
        measure.launch_digest(image, 1, 1)


def test_a_table_without_what_is_needed_is_named() -> None:
    image = parse(images.image())
    with pytest.raises(OvmfError, match="no SEV-ES reset block in the footer table"):
        _ = image.ap_reset_eip
    with pytest.raises(OvmfError, match="no SVSM info block in the footer table"):
        _ = image.svsm_entry


def with_sections(*sections: tuple[int, int, int]) -> bytes:
    return images.amd_sev(sections=images.metadata(sections))


BAD = {
    "is empty": b"",
    "larger than 16 MiB": bytes(MAX_IMAGE_SIZE + 4096),
    "has 4095 bytes, not a multiple of 4096": images.amd_sev()[1:],
    "footer table of 17 bytes does not fit": images.image(table_length=17),
    "footer table of 65535 bytes does not fit": images.image(table_length=0xFFFF),
    "footer table begins with 5 bytes that are no entry": images.image([bytes(5)]),
    "entry 00f771de-1a7e-4fcb-890e-68c77e2fb44e says it has 17 bytes": images.image(
        [images.entry(RESET, b"1234", length=17)]
    ),
    "which is not between 18 and the 22 left in the table": images.image(
        [images.entry(RESET, b"1234", length=23)]
    ),
    "two entries 00f771de": images.image([images.reset(1), images.reset(2)]),
    "SEV metadata entry has 3 bytes": images.image([images.entry(METADATA, b"123")]),
    "SEV metadata 0x1001 bytes before the end is outside": images.image(
        sections=images.metadata(()), metadata_offset=0x1001
    ),
    "SEV metadata 0xf bytes before the end is outside": images.image(
        sections=images.metadata(()), metadata_offset=0xF
    ),
    "SEV metadata 0xffffffff bytes before the end": images.image(
        sections=images.metadata(()), metadata_offset=0xFFFF_FFFF
    ),
    "has signature b'ASEW'": images.image(sections=images.metadata((), signature=b"ASEW")),
    "has version 2, not 1": images.image(sections=images.metadata((), version=2)),
    "of 2049 bytes ends outside the image": images.image(
        sections=images.metadata((), length=0x801)
    ),
    "of 15 bytes has no room for its 0 sections": images.image(
        sections=images.metadata((), length=15)
    ),
    "of 100 bytes has no room for its 8 sections": images.amd_sev(
        sections=images.metadata(AMD_SEV_SECTIONS, count=8)
    ),
    "no room for its 4294967295 sections": images.amd_sev(
        sections=images.metadata(AMD_SEV_SECTIONS, count=0xFFFF_FFFF)
    ),
    "SEC_MEM section at 0x800000 is empty": with_sections((0x80_0000, 0, SEC_MEM)),
    "CPUID section 0x800800..0x801800 is not made of 4K pages": with_sections(
        (0x80_0800, 0x1000, CPUID)
    ),
    "SEC_MEM section 0x800000..0x800800 is not made of": with_sections(
        (0x80_0000, 0x800, SEC_MEM)
    ),
    "0xfffff000..0x100001000 ends above 4 GiB": with_sections((0xFFFF_F000, 0x2000, SEC_MEM)),
    "0xffffe000..0x100000000 overlaps the image at 0xfffff000..0x100000000": with_sections(
        (0xFFFF_E000, 0x2000, SEC_MEM)
    ),
    "CPUID section 0x801000..0x802000 overlaps SEC_MEM section 0x800000..0x802000": with_sections(
        (0x80_1000, 0x1000, CPUID), (0x80_0000, 0x2000, SEC_MEM)
    ),
    "0x800000..0x801000 overlaps SEC_MEM section 0x800000..0x801000": with_sections(
        (0x80_0000, 0x1000, CPUID), (0x80_0000, 0x1000, SEC_MEM)
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_of_an_image_is_named_in_one_line(fault: str) -> None:
    with pytest.raises(OvmfError) as raised:
        parse(BAD[fault])
    assert fault in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_truncated_image_is_refused_wherever_it_is_cut(ovmf_image: Path) -> None:
    data = ovmf_image.read_bytes()
    for keep in (1, 49, 4095, 4096, 8192, len(data) // 2, len(data) - 4096, len(data) - 1):
        with pytest.raises(OvmfError):
            measure.launch_digest(parse(data[:keep]), 1, 1)


def test_a_short_payload_is_refused_when_it_is_used() -> None:
    image = parse(images.image([images.entry(RESET, b"123"), images.entry(HASHES, b"1234567")]))
    with pytest.raises(OvmfError, match=r"00f771de.* has 3 bytes of payload, fewer than the 4"):
        _ = image.ap_reset_eip
    with pytest.raises(OvmfError, match=r"7255371f.* has 7 bytes of payload, fewer than the 8"):
        _ = image.hash_table_area


@pytest.mark.parametrize("end", [0, 0x1000 - 1, 0x1001])
def test_an_image_cannot_end_below_its_size_or_inside_a_page(end: int) -> None:
    with pytest.raises(OvmfError, match="cannot end at"):
        parse(images.amd_sev(), end=end)


def test_reading_stops_where_no_image_can_go_on() -> None:
    with pytest.raises(OvmfError, match="larger than 16 MiB"):
        read("/dev/zero")


words = st.one_of(
    st.sampled_from([0, 1, 17, 18, 19, 0x7F, 0xFF, 0x800, 0x1000, 0x8000, 0xFFFF, 0x80_0000]),
    st.sampled_from([0x8000_0000, 0xFFFF_F000, 0xFFFF_FFFF]),
    st.integers(0, 0xFFFF_FFFF),
)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A good image with a few words changed where it matters, and perhaps cut or lengthened."""
    data = bytearray(
        draw(st.sampled_from([images.amd_sev(), images.ovmf_x64(), firmware.build()]))
    )
    for _ in range(draw(st.integers(0, 3))):
        top = draw(st.sampled_from([0x120, 0x800, 0x1000, 0x30, 0x1000 - 0x30]))
        at = len(data) - draw(st.integers(max(4, top - 0x80), top))
        width = draw(st.sampled_from([1, 2, 4]))
        data[at : at + width] = (draw(words) & (1 << 8 * width) - 1).to_bytes(width, "little")
    keep = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    cut = draw(st.sampled_from(["nothing", "nothing", "end", "beginning", "pages"]))
    if cut == "end":
        return bytes(data[:keep])
    if cut == "beginning":
        return bytes(data[len(data) - keep :])
    if cut == "pages":
        return bytes(data[keep & ~0xFFF :]) + bytes(draw(st.sampled_from([0, 1, 4096])))
    return bytes(data)


@st.composite
def described(draw: st.DrawFn) -> bytes:
    """An image of sections in any order, which may overlap, one of them perhaps with a wild word."""
    kinds = st.sampled_from([1, 2, 3, 4, 0x10])
    gfns = st.integers(0x80C, 0x812)
    cells = st.tuples(
        gfns.map(lambda gfn: gfn << 12), st.sampled_from([0x1000, 0x1000, 0x2000]), kinds
    )
    sections = [
        list(cell) for cell in draw(st.lists(cells, max_size=4, unique_by=lambda c: c[0]))
    ]
    if sections and draw(st.integers(0, 3)) == 0:
        sections[0][draw(st.integers(0, 2))] = draw(words)
    descs = [(gpa, size, kind) for gpa, size, kind in sections]
    eip = draw(st.sampled_from([0, 0x80_B004, 0xFFFF_FFF0, 0xFFFF_FFFF]))
    return images.amd_sev(sections=images.metadata(descs), eip=eip)


@settings(max_examples=400)
@given(
    data=st.one_of(broken(), described(), st.binary(max_size=200)),
    vcpus=st.sampled_from([1, 3]),
    hashes=st.booleans(),
)
def test_a_broken_image_is_refused_or_measured_as_sev_snp_measure_does(
    data: bytes, vcpus: int, hashes: bool, write: Write
) -> None:
    kernel = "/dev/null" if hashes else ""
    table = hash_table_of_files(kernel, None, None) if hashes else None
    try:
        image = parse(data)
        if sum(section.size for section in image.sections) > 64 << 20:
            return  # right or wrong, it takes too long
        ours = measure.launch_digest(image, vcpus, 0x800F12, hashes=table)
    except OvmfError:
        event("refused")
        return
    event("measured")
    path = str(write(data))
    hash_section = image.section(SectionType.KERNEL_HASHES)
    if hashes and hash_section is not None and hash_section.size > 4096:
        return  # QEMU fills the section; sev-snp-measure asserts that it is one page
    assert ours == snp_calc_launch_digest(vcpus, 0x800F12, path, kernel, "", "", 1, "")


@settings(max_examples=200)
@given(data=st.one_of(broken(), described()))
def test_what_is_asked_of_a_broken_image_is_answered_or_refused(data: bytes) -> None:
    try:
        image = parse(data)
    except OvmfError:
        return
    for question in ("ap_reset_eip", "hash_table_area", "secret_block", "svsm_entry"):
        with suppress(OvmfError):
            getattr(image, question)
    ordered = sorted(image.sections)
    assert all(s.size and not (s.gpa | s.size) & 0xFFF for s in ordered)
    assert all(a.gpa + a.size <= b.gpa for a, b in pairwise(ordered))


def test_a_table_is_found_by_its_guid_only() -> None:
    other = images.image([images.reset()], footer="96b582de-1fb2-45f7-baea-a366c55a082e")
    assert not parse(other).has_table
    assert struct.unpack_from("<H", other, len(other) - 50) == (40,)
