"""The GHCB page and its scratch area, as KVM maps them (arch/x86/kvm/svm/sev.c, v7.2).

The GHCB is shared guest memory: gfn -> memslot -> user address -> the process's page, which the guest
writes at any time.  Owns the mapping and every access through it; what the fields mean is ghcb.py.
"""

from errno import EFAULT
from typing import TYPE_CHECKING

from softcvm.abi.ghcb import GHCB_SHARED_BUFFER, GHCB_SHARED_BUFFER_SIZE, Ghcb, valid_mask
from softcvm.abi.kvm.memory import MemFlag
from softcvm.abi.layout import Bits
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.memory import get_user_pages
from softcvm.kernel.mm.uaccess import copy_from_user, copy_to_user
from softcvm.kernel.virt.kvm.dirty_log import mark_page_dirty_in_slot
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Gfn, Gpa, Hva, Pfn, pfn_to_spa
from softcvm.sim.state import State
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = ("GhcbPage", "Scratch", "kvm_read_guest", "kvm_vcpu_map", "kvm_vcpu_write_guest")

_VALID_BITMAP = Ghcb.valid_bitmap


class GhcbPage(State):
    """A mapped GHCB; holds a reference to the page until unmap()."""

    saved = ("gpa", "pfn")
    derived = {"linux": "the host"}

    def __init__(self, linux: "Linux", gpa: Gpa, pfn: Pfn) -> None:
        self.linux = linux
        self.gpa = gpa
        self.pfn = pfn
        linux.page_alloc.get_pages(pfn, 1)

    def unmap(self) -> None:
        self.linux.page_alloc.put_pages(self.pfn, 1)

    def read(self, offset: int, length: int) -> bytes:
        return self.linux.soc.host_read(pfn_to_spa(self.pfn) + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        level = self.linux.snp.direct_map.level(self.pfn)
        self.linux.soc.host_write(pfn_to_spa(self.pfn) + offset, data, level)

    def snapshot(self) -> Ghcb:
        """Every field read once."""
        return Ghcb(self.read(0, PAGE_SIZE))

    def clear_valid_bitmap(self) -> None:
        self.write(_VALID_BITMAP.offset, bytes(_VALID_BITMAP.length))

    def set(self, **fields: int) -> None:
        """ghcb_set_*(): write quadwords and mark each as valid."""
        for name, value in fields.items():
            place = Ghcb.fields()[name]
            assert isinstance(place, Bits)
            self.write(place.lo >> 3, value.to_bytes((place.hi + 1 - place.lo) >> 3, "little"))
        bitmap = int.from_bytes(self.read(_VALID_BITMAP.offset, _VALID_BITMAP.length), "little")
        bitmap |= valid_mask(*fields)
        self.write(_VALID_BITMAP.offset, bitmap.to_bytes(_VALID_BITMAP.length, "little"))


class Scratch(State):
    """The scratch area of one exit (ghcb_sa): a place in the GHCB, or a copy of guest memory elsewhere.

    sync: the copy is written back to the guest before it runs again.
    """

    saved = ("offset", "length", "copy", "sync")

    def __init__(
        self, offset: int, length: int, copy: bytearray | None = None, *, sync: bool = False
    ) -> None:
        self.offset = offset
        self.length = length
        self.copy = copy
        self.sync = sync

    @classmethod
    def inside(cls, gpa: Gpa, ghcb_gpa: Gpa, min_len: int) -> "Scratch | None":
        """The area from gpa to the end of the GHCB's shared buffer; None if min_len bytes do not fit."""
        offset = gpa - ghcb_gpa
        end = GHCB_SHARED_BUFFER + GHCB_SHARED_BUFFER_SIZE
        if offset < GHCB_SHARED_BUFFER or offset + min_len > end:
            return None
        return cls(offset, end - offset)

    def read(self, page: GhcbPage, at: int, length: int) -> bytes:
        if self.copy is not None:
            return bytes(self.copy[at : at + length])
        return page.read(self.offset + at, length)

    def write(self, page: GhcbPage, at: int, data: bytes) -> None:
        if self.copy is not None:
            self.copy[at : at + len(data)] = data
        else:
            page.write(self.offset + at, data)


def kvm_vcpu_map(kvm: "Kvm", gpa: Gpa) -> Steps[GhcbPage]:
    """Map the shared page at a GPA for writing.  EFAULT: no memslot, read-only, or nothing behind it."""
    slot = kvm.gfn_to_memslot(Gfn(gpa >> PAGE_SHIFT))
    if slot is None or slot.invalid or slot.flags & MemFlag.READONLY:
        raise KernelError(EFAULT, f"no memory to map at GPA {gpa:#x}")
    hva = slot.hva(gpa >> PAGE_SHIFT)
    [(pfn, _)] = yield from get_user_pages(kvm.mm, hva, 1, write=True)
    return GhcbPage(kvm.linux, Gpa(gpa & ~PAGE_MASK), pfn)


def kvm_read_guest(kvm: "Kvm", gpa: Gpa, length: int) -> Steps[bytes]:
    """Read shared guest memory through the VMM's mapping.  EFAULT."""
    out = b""
    for hva, size in _pieces(kvm, gpa, length):
        out += yield from copy_from_user(kvm.mm, hva, size)
    return out


def kvm_vcpu_write_guest(vcpu: "KvmVcpu", gpa: Gpa, data: bytes) -> Steps[None]:
    """Write shared guest memory through the VMM's mapping, on behalf of a vCPU.  EFAULT."""
    kvm = vcpu.kvm
    done = 0
    for hva, size in _pieces(kvm, gpa, len(data)):
        yield from copy_to_user(kvm.mm, hva, data[done : done + size])
        gfn = Gfn(gpa + done >> PAGE_SHIFT)
        mark_page_dirty_in_slot(vcpu, kvm.gfn_to_memslot(gfn), gfn)
        done += size


def _pieces(kvm: "Kvm", gpa: int, length: int) -> list[tuple[Hva, int]]:
    pieces = []
    while length:
        slot = kvm.gfn_to_memslot(Gfn(gpa >> PAGE_SHIFT))
        if slot is None or slot.invalid:
            raise KernelError(EFAULT, f"no memslot at GPA {gpa:#x}")
        size = min(length, PAGE_SIZE - (gpa & PAGE_MASK))
        pieces.append((Hva(slot.hva(gpa >> PAGE_SHIFT) + (gpa & PAGE_MASK)), size))
        gpa += size
        length -= size
    return pieces
