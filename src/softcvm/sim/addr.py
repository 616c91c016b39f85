"""Kinds of address, each its own type, and the page arithmetic between them.

Named as KVM names them (include/linux/kvm_types.h, v7.2): a gpa is a guest physical address in bytes
and a gfn its page number; a pfn is a host page frame; an hva is an address in a process.  A C-bit is
never part of any of them: it travels beside the address.
"""

from enum import IntEnum
from typing import NewType

__all__ = (
    "PAGE_MASK",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PTRS_PER_PMD",
    "Asid",
    "Gfn",
    "Gpa",
    "Hva",
    "Pfn",
    "PgLevel",
    "Pgoff",
    "Spa",
    "gfn_to_gpa",
    "gpa_to_gfn",
    "pages_per_level",
    "pfn_to_spa",
)

Gpa = NewType("Gpa", int)
"""Guest physical address, bytes, without the C-bit."""
Gfn = NewType("Gfn", int)
"""Guest frame number: gpa >> 12."""
Spa = NewType("Spa", int)
"""System physical address, bytes, without the C-bit."""
Pfn = NewType("Pfn", int)
"""Host page frame number: spa >> 12."""
Hva = NewType("Hva", int)
"""Virtual address in a host process, bytes."""
Pgoff = NewType("Pgoff", int)
"""Page index inside a file."""
Asid = NewType("Asid", int)
"""Address space identifier; 0 is the hypervisor."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_SIZE - 1
PTRS_PER_PMD = 512
"""4K pages in a 2M page."""


class PgLevel(IntEnum):
    """Level of a mapping (enum pg_level, arch/x86/include/asm/pgtable_types.h, v7.2)."""

    PG_4K = 1
    PG_2M = 2
    PG_1G = 3


def pages_per_level(level: PgLevel) -> int:
    """4K pages that one mapping of this level covers: 1, 512 or 262,144."""
    return 1 << (9 * (level - 1))


def gfn_to_gpa(gfn: Gfn) -> Gpa:
    return Gpa(gfn << PAGE_SHIFT)


def gpa_to_gfn(gpa: Gpa) -> Gfn:
    return Gfn(gpa >> PAGE_SHIFT)


def pfn_to_spa(pfn: Pfn) -> Spa:
    return Spa(pfn << PAGE_SHIFT)
