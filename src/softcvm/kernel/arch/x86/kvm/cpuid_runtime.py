"""CPUID bits of a guest that follow its registers (__kvm_update_cpuid_runtime(), arch/x86/kvm/cpuid.c, v6.12).

User space gives the table (regs.py), control registers and capabilities change it afterwards; what the guest
and KVM_GET_CPUID2 see is the changed one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmCpuidEntry2
from softcvm.hw.cpu.cpuid import cpuid
from softcvm.kernel.arch.x86.kvm.cpuid import KVM_CPUID_FEATURES, KVM_CPUID_SIGNATURE

if TYPE_CHECKING:
    from softcvm.hw.profile import CpuProfile
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("KVM_X86_DISABLE_EXITS_HLT", "kvm_update_cpuid_runtime", "update_cpuid_entries")

KVM_X86_DISABLE_EXITS_HLT = 1 << 1
_SIGNATURE = tuple(int.from_bytes(word, "little") for word in (b"KVMK", b"VMKV", b"M\0\0\0"))
_SIGNATURES = range(KVM_CPUID_SIGNATURE, 0x4001_0000, 0x100)
_CR4_OSXSAVE, _CR4_PKE, _APIC_ENABLE = 1 << 18, 1 << 22, 1 << 11
_OSXSAVE, _APIC, _OSPKE, _PV_UNHALT, _MWAIT = 1 << 27, 1 << 9, 1 << 4, 1 << 7, 1 << 3
_XSAVEC, _XSAVES = 1 << 1, 1 << 3
_MISC_ENABLE, _MISC_ENABLE_MWAIT, _MISC_ENABLE_RESET = 0x1A0, 1 << 18, 0x1800
_QUIRK_MISC_ENABLE_NO_MWAIT = 1 << 4
_LEGACY_AND_HEADER = 576
_ALIGNED = 1 << 1


def kvm_update_cpuid_runtime(vcpu: "KvmVcpu") -> None:
    update_cpuid_entries(vcpu, vcpu.arch.cpuid_entries)


def update_cpuid_entries(vcpu: "KvmVcpu", entries: Sequence[KvmCpuidEntry2]) -> None:
    """Change the entries in place to what the vCPU's registers are now."""
    arch, profile = vcpu.arch, vcpu.kvm.linux.soc.profile
    cr4 = arch.sregs.cr4
    if (entry := _find(entries, 1)) is not None:
        _change(entry, "ecx", _OSXSAVE, bool(cr4 & _CR4_OSXSAVE))
        _change(entry, "edx", _APIC, bool(arch.sregs.apic_base & _APIC_ENABLE))
        if vcpu.kvm.arch.disabled_quirks & _QUIRK_MISC_ENABLE_NO_MWAIT:
            misc = arch.msrs.get(_MISC_ENABLE, _MISC_ENABLE_RESET)
            _change(entry, "ecx", _MWAIT, bool(misc & _MISC_ENABLE_MWAIT))
    if (entry := _find(entries, 7, 0)) is not None:
        _change(entry, "ecx", _OSPKE, bool(cr4 & _CR4_PKE))
    if (entry := _find(entries, 0xD, 0)) is not None:
        entry.ebx = _xstate_required_size(profile, arch.xcr0, compacted=False)
    if (entry := _find(entries, 0xD, 1)) is not None and entry.eax & (_XSAVES | _XSAVEC):
        entry.ebx = _xstate_required_size(profile, arch.xcr0, compacted=True)
    if vcpu.kvm.arch.disabled_exits & KVM_X86_DISABLE_EXITS_HLT:
        entry = _kvm_features(entries)
        if entry is not None:
            _change(entry, "eax", _PV_UNHALT, False)


def _find(
    entries: Sequence[KvmCpuidEntry2], leaf: int, index: int | None = None
) -> KvmCpuidEntry2 | None:
    for entry in entries:
        if entry.function == leaf and (
            index is None or not entry.flags & 1 or entry.index == index
        ):
            return entry
    return None


def _kvm_features(entries: Sequence[KvmCpuidEntry2]) -> KvmCpuidEntry2 | None:
    """Leaf of KVM's features behind the leaf with its signature, wherever user space put that."""
    for entry in entries:
        signature = entry.ebx, entry.ecx, entry.edx
        if entry.function in _SIGNATURES and signature == _SIGNATURE:
            return _find(entries, entry.function | KVM_CPUID_FEATURES & 0xFF)
    return None


def _change(entry: KvmCpuidEntry2, register: str, bit: int, on: bool) -> None:
    held = getattr(entry, register)
    setattr(entry, register, held | bit if on else held & ~bit)


def _xstate_required_size(profile: "CpuProfile", features: int, *, compacted: bool) -> int:
    """Bytes of an XSAVE area with these features, as the processor lays it out."""
    size = _LEGACY_AND_HEADER
    for number in range(2, 64):
        if not features >> number & 1:
            continue
        place = cpuid(profile, 0xD, number)
        if compacted:
            at = size + 63 & ~63 if place.ecx & _ALIGNED else size
            size = at + place.eax
        else:
            size = max(size, place.ebx + place.eax)
    return size
