"""Firmware images for tests, put together with struct and uuid and nothing of softcvm's.

AMD_SEV, OVMF_X64 and SVSM have the sections of the images that sev-snp-measure is tested with (edk2's AmdSev and
OvmfX64 builds and a COCONUT-SVSM); the code in them is noise.
"""

import random
import struct
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial

FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
HASHES = "7255371f-3a3b-4b04-927b-1da6efa8d454"
SECRET = "4c2eb361-7d9b-4cc3-8081-127c90d3d294"
METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
SVSM_INFO = "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"

SEC_MEM, SECRETS, CPUID, CAA, KERNEL_HASHES = 1, 2, 3, 4, 0x10

Desc = tuple[int, int, int]
AMD_SEV_SECTIONS: tuple[Desc, ...] = (
    (0x80_0000, 0x9000, SEC_MEM),
    (0x80_A000, 0x3000, SEC_MEM),
    (0x80_D000, 0x1000, SECRETS),
    (0x80_E000, 0x1000, CPUID),
    (0x80_F000, 0x1000, CAA),
    (0x81_0000, 0x1000, KERNEL_HASHES),
    (0x81_1000, 0xF000, SEC_MEM),
)
OVMF_X64_SECTIONS: tuple[Desc, ...] = (*AMD_SEV_SECTIONS[:5], (0x81_0000, 0x1_0000, SEC_MEM))
SVSM_SECTIONS: tuple[Desc, ...] = (
    (0, 0x9_E000, SEC_MEM),
    (0x9_E000, 0x1000, SECRETS),
    (0x9_F000, 0x1000, CPUID),
)


def metadata(
    sections: Iterable[Desc],
    *,
    signature: bytes = b"ASEV",
    version: int = 1,
    count: int | None = None,
    length: int | None = None,
) -> bytes:
    descs = b"".join(struct.pack("<3I", *desc) for desc in sections)
    count = len(descs) // 12 if count is None else count
    length = 16 + len(descs) if length is None else length
    return struct.pack("<4s3I", signature, length, version, count) + descs


def entry(guid: str, payload: bytes, length: int | None = None) -> bytes:
    length = len(payload) + 18 if length is None else length
    return payload + struct.pack("<H", length) + uuid.UUID(guid).bytes_le


def image(
    entries: Sequence[bytes] = (),
    *,
    sections: bytes | None = None,
    size: int = 0x1000,
    metadata_offset: int | None = None,
    footer: str = FOOTER,
    table_length: int | None = None,
    seed: int = 0,
) -> bytes:
    """Noise, a page of erased flash and one of zeros where there is room, metadata and a footer table."""
    data = bytearray(random.Random(seed).randbytes(size))
    if size >= 0x4000:
        data[0x1000:0x3000] = bytes(0x1000) + b"\xff" * 0x1000
    entries = list(entries)
    if sections is not None:
        offset = 0x800
        data[size - offset : size - offset + len(sections)] = sections
        at = offset if metadata_offset is None else metadata_offset
        entries.append(entry(METADATA, struct.pack("<I", at)))
    table = b"".join(entries)
    table += entry(footer, b"", len(table) + 18 if table_length is None else table_length)
    data[size - 32 - len(table) : size - 32] = table
    return bytes(data)


def area(guid: str, base: int, size: int) -> bytes:
    return entry(guid, struct.pack("<II", base, size))


def reset(eip: int = 0x80_B004) -> bytes:
    return entry(RESET, struct.pack("<I", eip))


def amd_sev(size: int = 0x1000, sections: bytes | None = None, eip: int = 0x80_B004) -> bytes:
    """As edk2's AmdSev build: takes a kernel's hashes."""
    return image(
        [reset(eip), area(HASHES, 0x81_0C00, 0x400), area(SECRET, 0x81_0000, 0xC00)],
        sections=metadata(AMD_SEV_SECTIONS) if sections is None else sections,
        size=size,
    )


def ovmf_x64(size: int = 0x1000) -> bytes:
    """As edk2's OvmfX64 build: has the entries for hashes and secrets, but no room for them."""
    return image(
        [reset(), area(HASHES, 0, 0), area(SECRET, 0, 0)],
        sections=metadata(OVMF_X64_SECTIONS),
        size=size,
    )


def svsm(size: int = 0x11_6000, launch_offset: int = 0) -> bytes:
    """As a COCONUT-SVSM image of the same size."""
    return image(
        [reset(0xFFFF_FFF0), entry(SVSM_INFO, struct.pack("<I", launch_offset))],
        sections=metadata(SVSM_SECTIONS),
        size=size,
    )


IMAGES: dict[str, Callable[[], bytes]] = {
    "AmdSev suffix": amd_sev,
    "AmdSev": partial(amd_sev, 0x2_0000),
    "OvmfX64 suffix": ovmf_x64,
    "OvmfX64": partial(ovmf_x64, 0x2_0000),
    "no metadata": partial(image, [reset(), area(HASHES, 0x81_0C00, 0x400)], size=0x4000),
}
"""Images that an SNP digest can be computed of."""
