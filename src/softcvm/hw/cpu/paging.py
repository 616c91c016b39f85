"""The guest's own page table: from a linear address to a guest physical one, or #PF.  [APM2-24593 §5.3, §5.6, §15.34.5]

Owns the walk in long mode (4K, 2M and 1G pages), its permission checks, accessed and dirty bits, and the
exact error code.  What lies behind a guest physical address is core.py's to reach.
"""

from typing import NamedTuple, NoReturn, Protocol

from softcvm.abi.control_registers import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LME,
    EFER_NXE,
)
from softcvm.abi.svm import GuestException, PfErr, Vector
from softcvm.abi.vmsa import Vmsa
from softcvm.sim.errors import Unmodelled

__all__ = ("Access", "Linear", "PageTable", "walk_guest")

_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY, _LARGE = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
_NX = 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000
_RFLAGS_AC = 1 << 18


class PageTable(Protocol):
    """Access to the guest's page table in guest physical memory."""

    def read_entry(self, gpa: int, c: bool) -> int: ...

    def write_entry(self, gpa: int, c: bool, value: int) -> None: ...


class Access(NamedTuple):
    """What is done to a linear address, and at which privilege.  `implicit`: by the processor itself."""

    write: bool = False
    fetch: bool = False
    user: bool = False
    implicit: bool = False


class Linear(NamedTuple):
    """A translated address: where it leads, its C-bit, and what else its page allows at this privilege."""

    gpa: int
    c: bool
    writable: bool
    """It may be written without another walk: allowed, and dirty already."""
    executable: bool


def walk_guest(
    table: PageTable, state: Vmsa, address: int, access: Access, c_bit: int | None
) -> Linear:
    """Translate: in four-level long mode, or not at all.  GuestException(#PF), and what reaching the table raises.

    c_bit: mask of the C-bit in entries and CR3; None without SEV, where that bit is reserved.  Without paging all
    memory of a SEV guest is encrypted.  [APM2-24593 §15.34.5]
    """
    if not state.cr0 & CR0_PG:
        return Linear(address & 0xFFFF_FFFF, c_bit is not None, writable=True, executable=True)
    if not (state.efer & EFER_LME and state.cr4 & CR4_PAE):
        raise Unmodelled("paging in a guest outside of long mode")
    if address + (1 << 47) & (1 << 64) - 1 >= 1 << 48:
        raise GuestException(Vector.GP)
    mask = c_bit or 0
    entry = state.cr3
    rights = _WRITABLE | _USER
    nx = False
    for shift in (39, 30, 21, 12):
        at = (entry & _ADDRESS & ~mask) + (address >> shift & 511) * 8
        c = bool(entry & mask)
        entry = table.read_entry(at, c)
        if not entry & _PRESENT:
            _fault(state, address, access, PfErr(0))
        leaf = shift == 12 or bool(entry & _LARGE)
        if _reserved(entry, shift, mask, leaf, nxe=bool(state.efer & EFER_NXE)):
            _fault(state, address, access, PfErr.PRESENT | PfErr.RSVD)
        rights &= entry
        nx |= bool(entry & _NX)
        if leaf:
            break
        if not entry & _ACCESSED:
            table.write_entry(at, c, entry | _ACCESSED)
    if not _allowed(state, rights, nx=nx, access=access):
        _fault(state, address, access, PfErr.PRESENT)
    wanted = entry | _ACCESSED | (_DIRTY if access.write else 0)
    if wanted != entry:
        table.write_entry(at, c, wanted)
    offset = (1 << shift) - 1
    gpa = entry & _ADDRESS & ~mask & ~offset | address & offset
    can_write = _allowed(state, rights, nx=nx, access=access._replace(write=True, fetch=False))
    can_fetch = _allowed(state, rights, nx=nx, access=access._replace(write=False, fetch=True))
    return Linear(gpa, bool(entry & mask), can_write and bool(wanted & _DIRTY), can_fetch)


def _reserved(entry: int, shift: int, c_bit: int, leaf: bool, *, nxe: bool) -> bool:
    """Bits of a present entry that must be zero."""
    if entry & _NX and not nxe:
        return True
    if shift == 39 and entry & _LARGE:
        return True
    below = (1 << shift) - 1 & ~(1 << 12) & ~c_bit
    return leaf and shift > 12 and bool(entry & _ADDRESS & below)


def _allowed(state: Vmsa, rights: int, *, nx: bool, access: Access) -> bool:
    """[APM2-24593 §5.6]"""
    user_page = bool(rights & _USER)
    if access.user and not access.implicit:
        if not user_page:
            return False
        if access.write and not rights & _WRITABLE:
            return False
    else:
        if access.write and not rights & _WRITABLE and state.cr0 & CR0_WP:
            return False
        if access.fetch and user_page and state.cr4 & CR4_SMEP:
            return False
        smap = user_page and not access.fetch and state.cr4 & CR4_SMAP
        if smap and (access.implicit or not state.rflags & _RFLAGS_AC):
            return False
    return not (access.fetch and nx)


def _fault(state: Vmsa, address: int, access: Access, code: PfErr) -> NoReturn:
    if access.write:
        code |= PfErr.WRITE
    if access.user and not access.implicit:
        code |= PfErr.USER
    if access.fetch and (state.efer & EFER_NXE or state.cr4 & CR4_SMEP):
        code |= PfErr.FETCH
    raise GuestException(Vector.PF, int(code), address)
