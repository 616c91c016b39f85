"""The built-in firmware image: the smallest image that a VMM can launch an SNP guest from.

It has what edk2's AmdSev build has where a VMM looks (footer table, SEV metadata with all section types,
hash table area, secret block) and, in place of UEFI, the payload (payload/payload.S), to which the reset vector
leads; other processors start at a `cli` and halt.  The bytes depend on nothing.
"""

from softcvm.abi import ovmf as abi
from softcvm.abi.layout import Layout
from softcvm.guest.payload._generated_payload import CODE

__all__ = ("AP_RESET_EIP", "IMAGE_BASE", "IMAGE_SIZE", "PAYLOAD_MEMORY", "SECTIONS", "build")

IMAGE_SIZE = 64 << 10
"""One real-mode segment: CS:IP reaches all of it from the reset vector, and from the AP's EIP."""
_TOP = 1 << 32
IMAGE_BASE = _TOP - IMAGE_SIZE
PAYLOAD_MEMORY = 32 << 20
"""Bytes of RAM, at least, that the payload accepts some of."""

_S = abi.SectionType
SECTIONS = (
    (0x80_0000, 0x9000, _S.SEC_MEM),  # page tables, early stack
    (0x80_A000, 0x3000, _S.SEC_MEM),
    (0x80_D000, 0x1000, _S.SECRETS),
    (0x80_E000, 0x1000, _S.CPUID),
    (0x80_F000, 0x1000, _S.SVSM_CAA),
    (0x81_0000, 0x1000, _S.KERNEL_HASHES),
    (0x81_1000, 0xF000, _S.SEC_MEM),
)
"""(gpa, size, type) in the order of the metadata, which is where and what edk2's AmdSev build has."""

_SECRET_BLOCK = (0x81_0000, 0xC00)
_HASH_TABLE_AREA = (0x81_0C00, 0x400)

# cli; 1: hlt; jmp 1b -- the same in real and in protected mode
_STOP = bytes.fromhex("fa f4 eb fd")
# jmp to the image's first byte: IP wraps at the end of its 64 KiB
_TO_PAYLOAD = bytes.fromhex("e9 0d 00")
_RESET_OFFSET = IMAGE_SIZE - 0x10
_AP_OFFSET = IMAGE_SIZE - abi.FOOTER_END
AP_RESET_EIP = IMAGE_BASE + _AP_OFFSET
"""Between the footer table and the reset vector, where edk2 has its AP entry, too."""


def build() -> bytes:
    """The image.  Unused bytes are erased flash."""
    image = bytearray(b"\xff" * IMAGE_SIZE)
    _place(image, 0, CODE)
    _place(image, _RESET_OFFSET, _TO_PAYLOAD)
    _place(image, _AP_OFFSET, _STOP)
    metadata = _metadata()
    metadata_offset = IMAGE_SIZE - 0x1000
    _place(image, metadata_offset, metadata)
    table = _footer_table(IMAGE_SIZE - metadata_offset)
    _place(image, IMAGE_SIZE - abi.FOOTER_END - len(table), table)
    return bytes(image)


def _metadata() -> bytes:
    descs = b"".join(
        bytes(abi.SevMetadataDesc(gpa=gpa, length=size, type=kind))
        for gpa, size, kind in SECTIONS
    )
    header = abi.SevMetadataHeader(
        signature=abi.SEV_METADATA_SIGNATURE,
        length=abi.SevMetadataHeader.SIZE + len(descs),
        version=abi.SEV_METADATA_VERSION,
        count=len(SECTIONS),
    )
    return bytes(header) + descs


def _footer_table(metadata_from_end: int) -> bytes:
    """Entries, then the footer, whose length is that of the whole table."""
    entries = b"".join(
        (
            _entry(abi.SEV_METADATA_GUID, abi.MetadataOffset(offset=metadata_from_end)),
            _entry(abi.HASH_TABLE_AREA_GUID, _area(*_HASH_TABLE_AREA)),
            _entry(abi.SECRET_BLOCK_GUID, _area(*_SECRET_BLOCK)),
            _entry(abi.RESET_BLOCK_GUID, abi.ResetBlock(ap_eip=AP_RESET_EIP)),
        )
    )
    length = len(entries) + abi.FooterEntry.SIZE
    return entries + bytes(abi.FooterEntry(length=length, guid=abi.TABLE_FOOTER_GUID))


def _area(base: int, size: int) -> abi.Area:
    return abi.Area(base=base, size=size)


def _entry(guid: bytes, payload: Layout) -> bytes:
    length = payload.SIZE + abi.FooterEntry.SIZE
    return bytes(payload) + bytes(abi.FooterEntry(length=length, guid=guid))


def _place(image: bytearray, offset: int, data: bytes) -> None:
    image[offset : offset + len(data)] = data
