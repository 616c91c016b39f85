"""The guest's own page table as KVM walks it: from a linear address to a guest physical one (arch/x86/kvm/mmu/
paging_tmpl.h, x86.c; v6.12).

For instructions that KVM emulates and for KVM_TRANSLATE.  Owns the walk in long mode with its permission checks,
accessed and dirty bits; without paging, an address is its own.  Tables are read through the VMM's mapping, so that
those of a guest with SEV are out of reach.
"""

from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.svm import PfErr
from softcvm.kernel.arch.x86.kvm.cpuid import cpuid_maxphyaddr
from softcvm.kernel.arch.x86.kvm.svm.ghcb_page import kvm_read_guest, kvm_vcpu_write_guest
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_guest
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.sim.addr import Gpa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("GuestPageFault", "kvm_gva_to_gpa", "kvm_translate")

_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY, _LARGE = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
_NX = 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000
_CR0_PG, _CR0_WP = 1 << 31, 1 << 16
_CR4_LA57, _CR4_SMAP = 1 << 12, 1 << 21
_EFER_LMA, _EFER_NX = 1 << 10, 1 << 11
_RFLAGS_AC = 1 << 18
_U64 = (1 << 64) - 1


class GuestPageFault(NamedTuple):
    error_code: int
    address: int


class _Access(NamedTuple):
    write: bool
    user: bool

    def fault(self, address: int, code: PfErr) -> GuestPageFault:
        code |= (PfErr.WRITE if self.write else PfErr(0)) | (
            PfErr.USER if self.user else PfErr(0)
        )
        return GuestPageFault(int(code), address)


def kvm_translate(vcpu: "KvmVcpu", address: int) -> Steps[bytes]:
    """KVM_TRANSLATE, as the guest's kernel would read the address: struct kvm_translation."""
    found = yield from kvm_gva_to_gpa(vcpu, address, write=False, user=False)
    gpa = _U64 if isinstance(found, GuestPageFault) else found
    flags = bytes([gpa != _U64, 1, 0]).ljust(8, b"\0")  # valid, writeable, usermode
    return address.to_bytes(8, "little") + gpa.to_bytes(8, "little") + flags


def kvm_gva_to_gpa(
    vcpu: "KvmVcpu", address: int, *, write: bool, user: bool
) -> Steps[Gpa | GuestPageFault]:
    """A data access of the guest."""
    sregs = vcpu.arch.sregs
    if not sregs.cr0 & _CR0_PG:
        return Gpa(address)
    if sev_guest(vcpu.kvm):
        raise Unmodelled("KVM's walk of a page table that is encrypted")
    if not sregs.efer & _EFER_LMA:
        raise Unmodelled("KVM's walk of a page table outside of long mode")
    access = _Access(write, user)
    shifts = (48, 39, 30, 21, 12) if sregs.cr4 & _CR4_LA57 else (39, 30, 21, 12)
    entry, rights = sregs.cr3, _WRITABLE | _USER
    for shift in shifts:
        at = Gpa((entry & _ADDRESS) + (address >> shift & 511) * 8)
        try:
            entry = int.from_bytes((yield from kvm_read_guest(vcpu.kvm, at, 8)), "little")
        except KernelError:
            return access.fault(address, PfErr(0))
        if not entry & _PRESENT:
            return access.fault(address, PfErr(0))
        leaf = shift == 12 or (shift in (30, 21) and bool(entry & _LARGE))
        if _reserved(vcpu, entry, shift, leaf):
            return access.fault(address, PfErr.PRESENT | PfErr.RSVD)
        rights &= entry
        if leaf:
            break
        yield from _mark(vcpu, at, entry, _ACCESSED)
    if not _allowed(vcpu, rights, access):
        return access.fault(address, PfErr.PRESENT)
    yield from _mark(vcpu, at, entry, _ACCESSED | (_DIRTY if write else 0))
    offset = (1 << shift) - 1
    return Gpa(entry & _ADDRESS & ~offset | address & offset)


def _mark(vcpu: "KvmVcpu", at: Gpa, entry: int, bits: int) -> Steps[None]:
    if entry & bits != bits:
        yield from kvm_vcpu_write_guest(vcpu, at, (entry | bits).to_bytes(8, "little"))


def _reserved(vcpu: "KvmVcpu", entry: int, shift: int, leaf: bool) -> bool:
    """Bits of a present entry that must be zero."""
    if entry & _NX and not vcpu.arch.sregs.efer & _EFER_NX:
        return True
    if (entry & _ADDRESS) >> cpuid_maxphyaddr(vcpu) or (shift >= 39 and entry & _LARGE):
        return True
    below = (1 << shift) - 1 & ~(1 << 12)
    return leaf and shift > 12 and bool(entry & _ADDRESS & below)


def _allowed(vcpu: "KvmVcpu", rights: int, access: _Access) -> bool:
    """[APM2-24593 §5.6]"""
    sregs = vcpu.arch.sregs
    if access.user:
        return bool(rights & _USER) and (not access.write or bool(rights & _WRITABLE))
    if access.write and not rights & _WRITABLE and sregs.cr0 & _CR0_WP:
        return False
    smap = rights & _USER and sregs.cr4 & _CR4_SMAP
    return not smap or bool(vcpu.arch.regs.rflags & _RFLAGS_AC)
