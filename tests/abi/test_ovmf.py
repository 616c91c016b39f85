"""GUIDs as uuid writes them, tables as struct packs them."""

import struct
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st
from sevsnpmeasure import ovmf as outsider
from sevsnpmeasure.sev_hashes import PaddedSevHashTable, SevHashes

from softcvm.abi import ovmf as abi


@given(st.uuids())
def test_a_guid_has_the_bytes_that_uuid_gives_it(value: UUID) -> None:
    assert abi.guid(str(value)) == value.bytes_le
    assert abi.guid_text(value.bytes_le) == str(value)


def test_guids_are_those_of_sev_snp_measure() -> None:
    pairs = {
        abi.TABLE_FOOTER_GUID: outsider.OVMF.OVMF_TABLE_FOOTER_GUID,
        abi.HASH_TABLE_AREA_GUID: outsider.OVMF.SEV_HASH_TABLE_RV_GUID,
        abi.RESET_BLOCK_GUID: outsider.OVMF.SEV_ES_RESET_BLOCK_GUID,
        abi.SEV_METADATA_GUID: outsider.OVMF.OVMF_SEV_META_DATA_GUID,
        abi.SVSM_INFO_GUID: outsider.SVSM.SVSM_INFO_GUID,
        abi.HASH_TABLE_GUID: SevHashes.SEV_HASH_TABLE_HEADER_GUID,
        abi.KERNEL_ENTRY_GUID: SevHashes.SEV_KERNEL_ENTRY_GUID,
        abi.INITRD_ENTRY_GUID: SevHashes.SEV_INITRD_ENTRY_GUID,
        abi.CMDLINE_ENTRY_GUID: SevHashes.SEV_CMDLINE_ENTRY_GUID,
    }
    assert {guid: abi.guid_text(guid) for guid in pairs} == pairs


def test_section_types_are_those_of_sev_snp_measure() -> None:
    assert {t.value for t in abi.SectionType} == {t.value for t in outsider.SectionType}


def test_tables_lie_as_struct_packs_them() -> None:
    guid = bytes(range(16))
    assert bytes(abi.FooterEntry(length=0x1234, guid=guid)) == struct.pack(
        "<H16s", 0x1234, guid
    )
    header = abi.SevMetadataHeader(signature=b"ASEV", length=28, version=1, count=2)
    assert bytes(header) == struct.pack("<4s3I", b"ASEV", 28, 1, 2)
    desc = abi.SevMetadataDesc(gpa=0x80_0000, length=0x1000, type=3)
    assert bytes(desc) == struct.pack("<3I", 0x80_0000, 0x1000, 3)
    assert bytes(abi.Area(base=1, size=2)) == struct.pack("<2I", 1, 2)


def test_the_hash_table_has_the_size_and_offsets_of_sev_snp_measures() -> None:
    inner = PaddedSevHashTable.ht.offset
    table = dict(PaddedSevHashTable._fields_)["ht"]
    for name in ("guid", "length", "cmdline", "initrd", "kernel"):
        field = abi.HashTable.fields()[name]
        offset = field.offset if hasattr(field, "offset") else -1
        assert (name, offset) == (name, inner + getattr(table, name).offset)
    entry = dict(table._fields_)["cmdline"]
    for name in ("guid", "length", "hash"):
        field = abi.HashTableEntry.fields()[name]
        offset = field.offset if hasattr(field, "offset") else -1
        assert (name, offset) == (name, getattr(entry, name).offset)
