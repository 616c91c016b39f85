"""Reading an OVMF image: its footer table and its SEV metadata, strictly.

QEMU's hw/i386/pc_sysfw_ovmf.c and target/i386/sev.c read the same (and stop later, or not at all, at a
broken image).  What cannot be read one way only is refused with an OvmfError that names the fault; what
an image merely lacks (a table, metadata, a hash table area) is a query of OvmfImage, and whoever needs it
asks.  What is launched where is launch_plan.py.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple, TypeVar

from softcvm.abi import ovmf as abi
from softcvm.abi.layout import Layout

__all__ = ("FOUR_GIB", "MAX_IMAGE_SIZE", "OvmfError", "OvmfImage", "Section", "parse", "read")

FOUR_GIB = 1 << 32
MAX_IMAGE_SIZE = 16 << 20
"""QEMU's upper bound of max-fw-size (hw/i386/pc.c): flash below 4 GiB must not meet the IOAPIC."""
_PAGE = 4096

_Block = TypeVar("_Block", bound=Layout)


class OvmfError(ValueError):
    """The image is not what it should be; one line says where."""


class Section(NamedTuple):
    """A range of guest memory that the SEV metadata asks the VMM to launch."""

    gpa: int
    size: int
    type: int

    @property
    def name(self) -> str:
        try:
            return abi.SectionType(self.type).name
        except ValueError:
            return f"type {self.type:#x}"

    def __str__(self) -> str:
        return f"{self.name} section {self.gpa:#x}..{self.gpa + self.size:#x}"


class OvmfImage:
    """A firmware image and what it says of itself.  `gpa` is where its first byte is mapped."""

    def __init__(
        self,
        data: bytes,
        gpa: int,
        table: Mapping[bytes, bytes] | None,
        sections: tuple[Section, ...] | None,
    ) -> None:
        self.data = data
        self.gpa = gpa
        self._table = table
        self._sections = sections

    @property
    def has_table(self) -> bool:
        return self._table is not None

    @property
    def has_metadata(self) -> bool:
        """Whether it describes itself to an SNP launch: an SNP guest cannot boot without."""
        return self._sections is not None

    @property
    def sections(self) -> tuple[Section, ...]:
        """In the order of the metadata, which is the order of the launch."""
        return self._sections or ()

    def section(self, section_type: abi.SectionType) -> Section | None:
        """The first section of this type."""
        return next((s for s in self.sections if s.type == section_type), None)

    @property
    def ap_reset_eip(self) -> int:
        """Where vCPUs but the first start under SEV-ES and SNP."""
        if (block := self._block(abi.RESET_BLOCK_GUID, abi.ResetBlock)) is None:
            raise OvmfError(self._lacks("SEV-ES reset block"))
        return block.ap_eip

    @property
    def hash_table_area(self) -> abi.Area | None:
        """Where it takes the hashes of a kernel from; None if it takes none."""
        area = self._block(abi.HASH_TABLE_AREA_GUID, abi.Area)
        return area if area is not None and area.base else None

    @property
    def secret_block(self) -> abi.Area | None:
        """Where it takes a launch secret from (SEV, SEV-ES); None if it takes none."""
        area = self._block(abi.SECRET_BLOCK_GUID, abi.Area)
        return area if area is not None and area.base else None

    @property
    def svsm_entry(self) -> int:
        """Where the vCPUs of an SVSM image start."""
        if (info := self._block(abi.SVSM_INFO_GUID, abi.SvsmInfo)) is None:
            raise OvmfError(self._lacks("SVSM info block"))
        return self.gpa + info.launch_offset

    def _block(self, guid: bytes, layout: type[_Block]) -> _Block | None:
        payload = (self._table or {}).get(guid)
        if payload is None:
            return None
        if len(payload) < layout.SIZE:
            raise OvmfError(
                f"footer table entry {abi.guid_text(guid)} has {len(payload)} bytes of payload, "
                f"fewer than the {layout.SIZE} of its kind"
            )
        return layout(payload[: layout.SIZE])

    def _lacks(self, what: str) -> str:
        if self._table is not None:
            return f"no {what} in the footer table"
        return "not an OVMF image, or a truncated one: no footer table at its end"


def read(path: str, *, end: int = FOUR_GIB) -> OvmfImage:
    """The image in a file.  OSError if it cannot be read; never reads more than an image can be."""
    with open(path, "rb", buffering=0) as file:
        chunks, room = [], MAX_IMAGE_SIZE + 1
        while chunk := file.read(min(room, 4 << 20)):
            chunks.append(chunk)
            room -= len(chunk)
    return parse(b"".join(chunks), end=end)


def parse(data: bytes, *, end: int = FOUR_GIB) -> OvmfImage:
    """The image that `data` is, mapped so that it ends at guest physical address `end`."""
    if not data:
        raise OvmfError("the image is empty")
    if len(data) > MAX_IMAGE_SIZE:
        raise OvmfError(f"the image is larger than {MAX_IMAGE_SIZE >> 20} MiB: not firmware")
    if len(data) % _PAGE:
        raise OvmfError(
            f"the image has {len(data)} bytes, not a multiple of {_PAGE}: truncated?"
        )
    if end % _PAGE or end < len(data):
        raise OvmfError(f"an image of {len(data):#x} bytes cannot end at {end:#x}")
    gpa = end - len(data)
    table = _parse_table(data)
    offset = (table or {}).get(abi.SEV_METADATA_GUID)
    if offset is None:
        return OvmfImage(data, gpa, table, None)
    if len(offset) < abi.MetadataOffset.SIZE:
        raise OvmfError(f"SEV metadata entry has {len(offset)} bytes of payload, fewer than 4")
    sections = _parse_metadata(data, int.from_bytes(offset[:4], "little"))
    _check_sections(sections, gpa, end)
    return OvmfImage(data, gpa, table, sections)


def _parse_table(data: bytes) -> dict[bytes, bytes] | None:
    """GUID -> payload; None without a table."""
    header = abi.FooterEntry.SIZE
    at = len(data) - abi.FOOTER_END - header
    footer = abi.FooterEntry(data[at : at + header])
    if footer.guid != abi.TABLE_FOOTER_GUID:
        return None
    start = at + header - footer.length
    if footer.length < header or start < 0:
        raise OvmfError(f"footer table of {footer.length} bytes does not fit into the image")
    table: dict[bytes, bytes] = {}
    while at > start:
        if at - start < header:
            raise OvmfError(f"footer table begins with {at - start} bytes that are no entry")
        entry = abi.FooterEntry(data[at - header : at])
        if not header <= entry.length <= at - start:
            raise OvmfError(
                f"footer table entry {abi.guid_text(entry.guid)} says it has {entry.length} bytes, "
                f"which is not between {header} and the {at - start} left in the table"
            )
        if entry.guid in table:
            raise OvmfError(f"footer table has two entries {abi.guid_text(entry.guid)}")
        table[entry.guid] = data[at - entry.length : at - header]
        at -= entry.length
    return table


def _parse_metadata(data: bytes, from_end: int) -> tuple[Section, ...]:
    start = len(data) - from_end
    at = start + abi.SevMetadataHeader.SIZE
    if start < 0 or at > len(data):
        raise OvmfError(f"SEV metadata {from_end:#x} bytes before the end is outside the image")
    header = abi.SevMetadataHeader(data[start:at])
    if header.signature != abi.SEV_METADATA_SIGNATURE:
        raise OvmfError(f"SEV metadata has signature {header.signature!r}, not b'ASEV'")
    if header.version != abi.SEV_METADATA_VERSION:
        raise OvmfError(f"SEV metadata has version {header.version}, not 1")
    if start + header.length > len(data):
        raise OvmfError(f"SEV metadata of {header.length} bytes ends outside the image")
    size = abi.SevMetadataDesc.SIZE
    if header.count * size > header.length - abi.SevMetadataHeader.SIZE:
        raise OvmfError(
            f"SEV metadata of {header.length} bytes has no room for its {header.count} sections"
        )
    sections = []
    for _ in range(header.count):
        desc = abi.SevMetadataDesc(data[at : at + size])
        sections.append(Section(desc.gpa, desc.length, desc.type))
        at += size
    return tuple(sections)


def _check_sections(sections: tuple[Section, ...], gpa: int, end: int) -> None:
    """Every page is launched once: no empty, unaligned or overlapping sections."""
    for section in sections:
        if section.size == 0:
            raise OvmfError(f"{section.name} section at {section.gpa:#x} is empty")
        if section.gpa % _PAGE or section.size % _PAGE:
            raise OvmfError(f"{section} is not made of 4K pages")
        if section.gpa + section.size > FOUR_GIB:
            raise OvmfError(f"{section} ends above 4 GiB")
        if section.gpa < end and gpa < section.gpa + section.size:
            raise OvmfError(f"{section} overlaps the image at {gpa:#x}..{end:#x}")
    ordered = sorted(sections)
    for below, above in pairwise(ordered):
        if below.gpa + below.size > above.gpa:
            raise OvmfError(f"{above} overlaps {below}")
