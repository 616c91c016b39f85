"""What an OVMF image tells a VMM: the GUIDed footer table and the SEV metadata.

Written by edk2 (OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm, X64/OvmfSevMetadata.asm), read by QEMU
(hw/i386/pc_sysfw_ovmf.c, target/i386/sev.c).  The table ends 32 bytes before the end of the image and is
read backwards: an entry is its payload, then a FooterEntry.

Reading an image and refusing a bad one is vmm/ovmf.py.
"""

from enum import IntEnum

from softcvm.abi.layout import U16, U32, Bytes, Layout

__all__ = (
    "CMDLINE_ENTRY_GUID",
    "FOOTER_END",
    "HASH_TABLE_AREA_GUID",
    "HASH_TABLE_GUID",
    "INITRD_ENTRY_GUID",
    "KERNEL_ENTRY_GUID",
    "RESET_BLOCK_GUID",
    "SECRET_BLOCK_GUID",
    "SEV_METADATA_GUID",
    "SEV_METADATA_SIGNATURE",
    "SEV_METADATA_VERSION",
    "SVSM_INFO_GUID",
    "TABLE_FOOTER_GUID",
    "TDX_METADATA_GUID",
    "Area",
    "FooterEntry",
    "HashTable",
    "HashTableEntry",
    "MetadataOffset",
    "ResetBlock",
    "SectionType",
    "SevMetadataDesc",
    "SevMetadataHeader",
    "SvsmInfo",
    "guid",
    "guid_text",
)

FOOTER_END = 32
"""Bytes of the image after the table: the last of them are the reset vector at 0xFFFFFFF0."""
SEV_METADATA_SIGNATURE = b"ASEV"
SEV_METADATA_VERSION = 1


def guid(text: str) -> bytes:
    """The 16 bytes of a GUID in memory: its first three fields are little-endian."""
    a, b, c, d, e = (bytes.fromhex(part) for part in text.split("-"))
    return a[::-1] + b[::-1] + c[::-1] + d + e


def guid_text(raw: bytes) -> str:
    parts = (raw[3::-1], raw[5:3:-1], raw[7:5:-1], raw[8:10], raw[10:16])
    return "-".join(part.hex() for part in parts)


TABLE_FOOTER_GUID = guid("96b582de-1fb2-45f7-baea-a366c55a082d")
RESET_BLOCK_GUID = guid("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
HASH_TABLE_AREA_GUID = guid("7255371f-3a3b-4b04-927b-1da6efa8d454")
SECRET_BLOCK_GUID = guid("4c2eb361-7d9b-4cc3-8081-127c90d3d294")
SEV_METADATA_GUID = guid("dc886566-984a-4798-a75e-5585a7bf67cc")
TDX_METADATA_GUID = guid("e47a6535-984a-4798-865e-4685a7bf8ec2")
SVSM_INFO_GUID = guid("a789a612-0597-4c4b-a49f-cbb1fe9d1ddd")

HASH_TABLE_GUID = guid("9438d606-4f22-4cc9-b479-a793d411fd21")
CMDLINE_ENTRY_GUID = guid("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
INITRD_ENTRY_GUID = guid("44baf731-3a2f-4bd7-9af1-41e29169781d")
KERNEL_ENTRY_GUID = guid("4de79437-abd2-427f-b835-d5b172d2045b")


class FooterEntry(Layout, size=18):
    """Follows the payload of each entry; `length` counts both.  The last one counts the whole table."""

    length = U16(0)
    guid = Bytes(2, 16)


class ResetBlock(Layout, size=4):
    """Where a SEV-ES or SNP guest's other vCPUs start."""

    ap_eip = U32(0)


class Area(Layout, size=8):
    """A guest physical range: of the hash table, or of the secret block.  Base 0: none."""

    base = U32(0)
    size = U32(4)


class MetadataOffset(Layout, size=4):
    """Where a metadata header is, in bytes back from the end of the image."""

    offset = U32(0)


class SvsmInfo(Layout, size=4):
    """Where an SVSM image is entered, in bytes from its start (coconut-svsm)."""

    launch_offset = U32(0)


class SevMetadataHeader(Layout, size=16):
    signature = Bytes(0, 4)
    length = U32(4)  # with the descriptors that follow
    version = U32(8)
    count = U32(12)


class SevMetadataDesc(Layout, size=12):
    gpa = U32(0)
    length = U32(4)
    type = U32(8)


class SectionType(IntEnum):
    """Types of a SevMetadataDesc."""

    SEC_MEM = 1
    SECRETS = 2
    CPUID = 3
    SVSM_CAA = 4
    KERNEL_HASHES = 0x10


class HashTableEntry(Layout, size=50):
    guid = Bytes(0, 16)
    length = U16(16)
    hash = Bytes(18, 32)


class HashTable(Layout, size=176):
    """QEMU's table of SHA-256 hashes for direct kernel boot, padded to 16 (PaddedSevHashTable)."""

    guid = Bytes(0, 16)
    length = U16(16)  # 168: without the padding
    cmdline = Bytes(18, 50)
    initrd = Bytes(68, 50)
    kernel = Bytes(118, 50)
