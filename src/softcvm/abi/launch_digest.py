"""The SNP launch digest: what LAUNCH_UPDATE hashes, page after page.  [ABI-56860 r1.58 §8.17.2]

Firmware (hw/psp) extends the digest as it launches; vmm/measure.py extends it to predict one.  Both use
the functions here.  Which pages are launched, in which order, is theirs to say.

sev-snp-measure 0.0.13 lays the permission bytes out as VMPL3, VMPL2, VMPL1, reserved; firmware and
igvmmeasure as reserved, VMPL1, VMPL2, VMPL3.  All known VMMs pass zeros, so only a caller that passes
permissions could see it; this file follows firmware.
"""

from collections.abc import Iterable
from enum import IntEnum
from hashlib import sha384 as _sha384
from struct import Struct

from softcvm.abi.layout import U8, U16, U64, Bits, Bytes, Layout

__all__ = (
    "INITIAL_LD",
    "LD_SIZE",
    "UNMEASURED_CONTENTS",
    "VMSA_GPA",
    "LaunchPageType",
    "PageInfo",
    "extend",
    "extend_run",
    "page_digests",
    "page_info",
    "sha384",
    "vmsa_contents",
)

LD_SIZE = 48
INITIAL_LD = bytes(LD_SIZE)
"""The digest after LAUNCH_START."""
UNMEASURED_CONTENTS = bytes(LD_SIZE)
"""CONTENTS of every page type whose bytes are not hashed: all but NORMAL and VMSA."""
VMSA_GPA = 0xFFFF_FFFF_F000
"""Where KVM puts every VMSA: gfn -1 as the RMP's 36-bit field gives it back (sev.c, v7.2)."""

_PAGE = 4096
_ZERO_PAGE = bytes(_PAGE)
_ERASED_PAGE = b"\xff" * _PAGE


class LaunchPageType(IntEnum):
    """PAGE_TYPE of LAUNCH_UPDATE.  [ABI-56860 §8.17.2]"""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


class PageInfo(Layout, size=0x70):
    """PAGE_INFO, the input of one step of the chain.  [ABI-56860 §8.17.2]"""

    digest_cur = Bytes(0x00, LD_SIZE)
    contents = Bytes(0x30, LD_SIZE)
    length = U16(0x60)
    page_type = U8(0x62)
    imi_page = Bits(0x63 * 8)
    vmpl1_perms = U8(0x65)
    vmpl2_perms = U8(0x66)
    vmpl3_perms = U8(0x67)
    gpa = U64(0x68)


# PAGE_INFO from `length` on: length, page_type, imi_page, reserved, three masks, gpa.
_TAIL = Struct("<HBBBBBBQ")


def sha384(data: bytes) -> bytes:
    return _sha384(data).digest()


def page_info(
    ld: bytes,
    contents: bytes,
    page_type: int,
    gpa: int,
    *,
    imi: bool = False,
    perms: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """The bytes of a PageInfo.  `contents` is a digest; `perms` the masks of VMPL1, VMPL2, VMPL3."""
    if len(ld) != LD_SIZE or len(contents) != LD_SIZE:
        raise ValueError(f"digests of {len(ld)} and {len(contents)} bytes, not {LD_SIZE}")
    return ld + contents + _TAIL.pack(PageInfo.SIZE, page_type, imi, 0, *perms, gpa)


def extend(
    ld: bytes,
    contents: bytes,
    page_type: int,
    gpa: int,
    *,
    imi: bool = False,
    perms: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """The digest after one 4K page; a 2M update is 512 of these, so page size leaves no trace."""
    return _sha384(page_info(ld, contents, page_type, gpa, imi=imi, perms=perms)).digest()


def extend_run(ld: bytes, contents: Iterable[bytes], page_type: int, gpa: int) -> bytes:
    """The digest after consecutive pages from `gpa` on, permissions zero: `extend` in a tight loop."""
    pack, size = _TAIL.pack, PageInfo.SIZE
    for one in contents:
        ld = _sha384(ld + one + pack(size, page_type, 0, 0, 0, 0, 0, gpa)).digest()
        gpa += _PAGE
    return ld


def page_digests(data: bytes) -> list[bytes]:
    """CONTENTS of each 4K page of `data` as NORMAL pages.

    Firmware images are in good part zeros and erased flash: those two digests are taken once.  (A
    dictionary of all pages costs more than it saves: hashing a page for the dictionary is a fifth of
    a SHA-384.)
    """
    zero = erased = b""
    digests = []
    for start in range(0, len(data), _PAGE):
        page = data[start : start + _PAGE]
        if page == _ERASED_PAGE:
            erased = erased or _sha384(page).digest()
            digests.append(erased)
        elif page == _ZERO_PAGE:
            zero = zero or _sha384(page).digest()
            digests.append(zero)
        else:
            digests.append(_sha384(page).digest())
    return digests


def vmsa_contents(page: bytes) -> bytes:
    """CONTENTS of a VMSA page: TSC_SCALE and TSC_OFFSET are taken as zero.  [ABI-56860 §8.17.2]"""
    return _sha384(page[:0x2F0] + bytes(16) + page[0x300:]).digest()
