"""MSRs of a vCPU, as user space and the guest read and write them (arch/x86/kvm/x86.c, mtrr.c, svm/svm.c; v6.12).

Owns the rules; which MSRs there are is msr_table.py.  A refusal is no errno: it is #GP to the guest, and ends the
list of KVM_GET_MSRS and KVM_SET_MSRS.  Values are kept in VcpuArch.msrs from their first write on, except those that
are a part of other registers.
"""

from enum import Enum
from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.kernel.arch.x86.kvm.cpuid import (
    amd_compatible,
    cpuid_maxphyaddr,
    guest_cpuid_has,
    guest_pv_has,
    kvm_cpu_cap_has,
)
from softcvm.kernel.arch.x86.kvm.cpuid_runtime import kvm_update_cpuid_runtime
from softcvm.kernel.arch.x86.kvm.lapic import kvm_set_apic_base
from softcvm.kernel.arch.x86.kvm.msr_table import ADVERTISED, MSRS, Feature, Msr, Writer
from softcvm.kernel.errors import KernelError, Unmodelled

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "KVM_MCE_CAP_SUPPORTED",
    "MsrFault",
    "guest_get_msr",
    "guest_set_msr",
    "kvm_get_feature_msr",
    "kvm_get_msr",
    "kvm_set_msr",
    "kvm_x86_setup_mce",
)

_U64, _U32 = (1 << 64) - 1, (1 << 32) - 1
_TSC, _TSC_ADJUST, _APIC_BASE = 0x10, 0x3B, 0x1B
_PAT, _SPEC_CTRL, _PRED_CMD, _FLUSH_CMD = 0x277, 0x48, 0x49, 0x10B
_PLATFORM_INFO, _MISC_FEATURES, _MISC_ENABLE = 0xCE, 0x140, 0x1A0
_EMON = 1 << 7
_UCODE_REV, _TSC_RATIO, _VM_CR, _HSAVE = 0x8B, 0xC000_0104, 0xC001_0114, 0xC001_0117
_EFER, _HWCR, _SYSENTER = 0xC000_0080, 0xC001_0015, (0x175, 0x176)
_BASES = {0xC000_0100: "fs", 0xC000_0101: "gs"}
_CANONICAL = frozenset({*_BASES, 0xC000_0102, 0xC000_0083, 0xC000_0082})
_PV_ENABLES = frozenset({0x12, *range(0x4B56_4D01, 0x4B56_4D05)})
"""Bit 0 asks KVM to keep a record in guest memory up to date."""
_PV_WALL_CLOCK = frozenset({0x11, 0x4B56_4D00})
_X2APIC, _CET = range(0x800, 0x900), range(0x6A0, 0x6A9)
_MTRR_CAP, _MTRR_DEF = 0xFE, 0x2FF
_MTRR_VAR = range(0x200, 0x210)
_MTRR_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
_MTRR_RANGE = range(0x200, 0x270)
_BANKS = 32
_MCG_CAP, _MCG_STATUS, _MCG_CTL = 0x179, 0x17A, 0x17B
_MC_BANKS, _MC_CTL2 = range(0x400, 0x400 + 4 * _BANKS), range(0x280, 0x280 + _BANKS)
_MCG_CTL_P, _MCG_CMCI_P, _MC_STATUS_WR_EN = 1 << 8, 1 << 10, 1 << 18
KVM_MCE_CAP_SUPPORTED = _MCG_CTL_P | 1 << 24  # MCG_CTL_P, MCG_SER_P
_MEMORY_TYPES = frozenset({0, 1, 4, 5, 6})
_EFER_SCE, _EFER_LME, _EFER_LMA, _EFER_NX, _EFER_SVME = 1, 1 << 8, 1 << 10, 1 << 11, 1 << 12
_EFER_FFXSR, _EFER_AUTOIBRS, _CR0_PG = 1 << 14, 1 << 21, 1 << 31
_EFER_FEATURES = (
    (_EFER_AUTOIBRS, (0x8000_0021, "eax", 8)),
    (_EFER_FFXSR, (0x8000_0001, "edx", 25)),
    (_EFER_SVME, (0x8000_0001, "ecx", 2)),
    (_EFER_LME | _EFER_LMA, (0x8000_0001, "edx", 29)),
    (_EFER_NX, (0x8000_0001, "edx", 20)),
)
_SPEC_FEATURES = (
    (0x7, "edx", 26),
    *((0x8000_0008, "ebx", bit) for bit in (14, 15, 24)),  # IBRS, STIBP, SSBD
)
_IBPB = (0x8000_0008, "ebx", 12)


class MsrFault(Enum):
    """Why there is no value, or no write."""

    UNSUPPORTED = 0
    """KVM_MSR_RET_UNSUPPORTED: KVM does not have it."""
    REFUSED = 1


def kvm_get_msr(vcpu: "KvmVcpu", index: int, *, host: bool) -> int | None:
    """The value, or None where it is refused; `host`: user space asks.  EINVAL: a protected guest's."""
    value = vcpu.kvm.ops.get_msr(vcpu, index)
    if value is not None:
        return value
    _refuse_protected(vcpu, host)
    got = _get(vcpu, index, host)
    if got is MsrFault.UNSUPPORTED and host and index in ADVERTISED:
        return 0
    return None if isinstance(got, MsrFault) else got


def kvm_set_msr(vcpu: "KvmVcpu", index: int, value: int, *, host: bool) -> bool:
    """False where it is refused; `host`: user space writes.  EINVAL: a protected guest's."""
    if vcpu.kvm.ops.set_msr(vcpu, index, value):
        return True
    _refuse_protected(vcpu, host)
    missing = _set(vcpu, index, value, host)
    if missing is MsrFault.UNSUPPORTED and host and not value and index in ADVERTISED:
        return True
    return missing is None


def guest_get_msr(vcpu: "KvmVcpu", index: int) -> "int | MsrFault":
    """RDMSR of a guest that KVM emulates."""
    return _get(vcpu, index, False)


def guest_set_msr(vcpu: "KvmVcpu", index: int, value: int) -> "MsrFault | None":
    """WRMSR of a guest that KVM emulates."""
    return _set(vcpu, index, value, False)


def kvm_get_feature_msr(linux: "Linux", index: int) -> int | None:
    """KVM_GET_MSRS on /dev/kvm: an MSR that says what the processor can do."""
    match index:
        case 0x10A:
            return MSRS[index].reset
        case 0x345:
            return 0
        case _ if index == _UCODE_REV:
            return linux.soc.profile.microcode
        case 0xC001_1029:
            return 2
        case _:
            return 0 if index in ADVERTISED else None


def _refuse_protected(vcpu: "KvmVcpu", host: bool) -> None:
    if host and vcpu.kvm.arch.has_protected_state and vcpu.arch.guest_state_protected:
        raise KernelError(
            EINVAL, f"MSRs of vCPU {vcpu.vcpu_id}: the guest's state is protected"
        )


def _unmodelled_in(vcpu: "KvmVcpu", index: int) -> None:
    if index in _X2APIC and vcpu.kvm.arch.irqchip:
        raise Unmodelled(f"MSR {index:#x} of the local APIC")
    if index in _CET and vcpu.kvm.linux.profile.x86_one_reg:
        raise Unmodelled(f"MSR {index:#x}, of CET")


def _get(vcpu: "KvmVcpu", index: int, host: bool) -> "int | MsrFault":
    arch = vcpu.arch
    _unmodelled_in(vcpu, index)
    if index in _BASES:
        return arch.sregs.segment(_BASES[index]).base
    if index in _MTRR_RANGE or index in (_MTRR_CAP, _MTRR_DEF):
        return _get_mtrr(vcpu, index)
    if (
        index in _MC_BANKS
        or index in _MC_CTL2
        or index in (0, 1, _MCG_CAP, _MCG_STATUS, _MCG_CTL)
    ):
        return _get_mce(vcpu, index, host)
    match index:
        case _ if index == _EFER:
            return arch.sregs.efer
        case _ if index == _APIC_BASE:
            return arch.sregs.apic_base
        case _ if index in _X2APIC:
            return MsrFault.REFUSED
        case _ if index == _PLATFORM_INFO and not host:
            if not vcpu.kvm.arch.guest_can_read_msr_platform_info:
                return MsrFault.REFUSED
    row = MSRS.get(index)
    if row is None or not row.readable or (row.pv and not guest_pv_has(vcpu, row.pv.value)):
        return MsrFault.UNSUPPORTED
    if not _guest_may(vcpu, index, row, host):
        return MsrFault.REFUSED
    return arch.msrs.get(index, row.reset)


def _guest_may(vcpu: "KvmVcpu", index: int, row: Msr, host: bool) -> bool:
    """Whether the guest's CPUID has what the MSR belongs to; user space need not care."""
    if host:
        return True
    if index == _SPEC_CTRL:
        return any(guest_cpuid_has(vcpu, *feature) for feature in _SPEC_FEATURES)
    return not row.feature or any(guest_cpuid_has(vcpu, *f.value) for f in row.feature)


def _set(vcpu: "KvmVcpu", index: int, value: int, host: bool) -> MsrFault | None:
    """None: done."""
    arch = vcpu.arch
    _unmodelled_in(vcpu, index)
    if index in _CANONICAL and not _canonical(vcpu, value):
        return MsrFault.REFUSED
    if index in _BASES:
        name = _BASES[index]
        segment = arch.sregs.segment(name)
        segment.base = value
        setattr(arch.sregs, name, bytes(segment))
        return None
    if index in _MTRR_RANGE or index == _MTRR_DEF:
        return _kept(vcpu, index, value, ok=_mtrr_valid(vcpu, index, value))
    if index in _MC_BANKS or index in _MC_CTL2 or index in (_MCG_STATUS, _MCG_CTL):
        return _kept(vcpu, index, value, ok=_mce_valid(vcpu, index, value, host))
    match index:
        case _ if index == _EFER:
            return _set_efer(vcpu, value, host)
        case _ if index == _APIC_BASE:
            return None if kvm_set_apic_base(vcpu, value, host=host) else MsrFault.REFUSED
        case _ if index in _X2APIC or index == _FLUSH_CMD:
            return MsrFault.REFUSED
        case _ if index == _PAT:
            types = {value >> shift & 0xFF for shift in range(0, 64, 8)}
            return _kept(vcpu, index, value, ok=types <= _MEMORY_TYPES | {7})
        case _ if index == _TSC_RATIO and not _can_scale(vcpu):
            ok = host and value in (0, arch.msrs.get(index, MSRS[index].reset))
            return None if ok else MsrFault.REFUSED
        case _ if index == _VM_CR:
            return _set_vm_cr(vcpu, value)
    row = MSRS.get(index)
    if row is None or row.writer is Writer.NOBODY:
        return MsrFault.UNSUPPORTED
    if row.pv and not guest_pv_has(vcpu, row.pv.value):
        return MsrFault.UNSUPPORTED
    if not _guest_may(vcpu, index, row, host) or (row.writer is Writer.HOST and not host):
        return MsrFault.REFUSED
    if value & ~row.allowed or not _more_rules(vcpu, index, value, host):
        return MsrFault.REFUSED
    if row.writer is Writer.DROPPED or (row.writer is Writer.HOST_ONLY_KEPT and not host):
        return None
    _keep(vcpu, index, value, row, host)
    return None


def _keep(vcpu: "KvmVcpu", index: int, value: int, row: Msr, host: bool) -> None:
    arch = vcpu.arch
    if (index in _PV_ENABLES and value & 1) or (index in _PV_WALL_CLOCK and value):
        raise Unmodelled(f"MSR {index:#x}: a record that KVM keeps in the guest's memory")
    if index == _MISC_ENABLE and not host:
        value = value & ~_EMON | arch.msrs.get(index, row.reset) & _EMON
    if index in _SYSENTER:
        if amd_compatible(vcpu):
            value &= _U32
        elif not _canonical(vcpu, value):  # made canonical: bit 47 or 56 is repeated
            bits = _linear_bits(vcpu)
            sign = value >> bits - 1 & 1
            value = value & (1 << bits) - 1 | (_U64 << bits & _U64 if sign else 0)
    if index == _TSC and not host:
        delta = value - arch.msrs.get(_TSC, 0)
        arch.msrs[_TSC_ADJUST] = arch.msrs.get(_TSC_ADJUST, 0) + delta & _U64
    if index == _TSC_ADJUST:
        if not guest_cpuid_has(vcpu, *Feature.TSC_ADJUST.value):
            return
        if not host:
            delta = value - arch.msrs.get(_TSC_ADJUST, 0)
            arch.msrs[_TSC] = arch.msrs.get(_TSC, 0) + delta & _U64
    if row.kept:
        arch.msrs[index] = value & row.kept
    if index == _MISC_ENABLE:
        kvm_update_cpuid_runtime(vcpu)


def _more_rules(vcpu: "KvmVcpu", index: int, value: int, host: bool) -> bool:
    """What a write must satisfy besides its row."""
    old = vcpu.arch.msrs.get(index, MSRS[index].reset)
    match index:
        case _ if index == _HSAVE:
            return host or (not value & 0xFFF and not value >> cpuid_maxphyaddr(vcpu))
        case _ if index == _PRED_CMD:
            has = guest_cpuid_has(vcpu, 0x7, "edx", 26) or guest_cpuid_has(vcpu, *_IBPB)
            return host or has
        case _ if index == _PLATFORM_INFO:
            return bool(value & 1 << 31) or not vcpu.arch.msrs.get(_MISC_FEATURES, 0)
        case _ if index == _MISC_FEATURES:
            info = vcpu.arch.msrs.get(_PLATFORM_INFO, MSRS[_PLATFORM_INFO].reset)
            return not value or bool(info & 1 << 31)
        case _ if index == _MISC_ENABLE and not host:
            return not (old ^ value) & 0x1800  # no PEBS, no BTS: read only
        case 0x4B56_4D02:
            return not value & 0x30 and (vcpu.kvm.arch.irqchip or not value)
        case 0x4B56_4D06:
            return vcpu.kvm.arch.irqchip
        case 0x4B56_4D04:
            return not value & 2
        case _:
            return True


def _kept(vcpu: "KvmVcpu", index: int, value: int, *, ok: bool) -> MsrFault | None:
    if not ok:
        return MsrFault.REFUSED
    vcpu.arch.msrs[index] = value
    return None


def _linear_bits(vcpu: "KvmVcpu") -> int:
    """max_host_virt_addr_bits(): what the processor has, whatever the guest uses."""
    return 57 if kvm_cpu_cap_has(vcpu.kvm.linux, 0x7, "ecx", 16) else 48


def _canonical(vcpu: "KvmVcpu", value: int) -> bool:
    high = value >> _linear_bits(vcpu) - 1
    return high in (0, _U64 >> _linear_bits(vcpu) - 1)


def _can_scale(vcpu: "KvmVcpu") -> bool:
    """guest_can_use(TSCRATEMSR)"""
    return guest_cpuid_has(vcpu, *Feature.TSCRATEMSR.value)


def _set_efer(vcpu: "KvmVcpu", value: int, host: bool) -> MsrFault | None:
    sregs, linux = vcpu.arch.sregs, vcpu.kvm.linux
    known = _EFER_SCE | _EFER_LME | _EFER_LMA
    for bits, feature in _EFER_FEATURES:
        if kvm_cpu_cap_has(linux, *feature):
            known |= bits
    if value & ~known:
        return MsrFault.REFUSED
    if not host:
        if any(value & bits and not guest_cpuid_has(vcpu, *f) for bits, f in _EFER_FEATURES):
            return MsrFault.REFUSED
        if sregs.cr0 & _CR0_PG and (sregs.efer ^ value) & _EFER_LME:
            return MsrFault.REFUSED
    sregs.efer = value & ~_EFER_LMA | sregs.efer & _EFER_LMA
    return None


def _set_vm_cr(vcpu: "KvmVcpu", value: int) -> MsrFault | None:
    """svm_set_vm_cr(): once SVM is disabled, LOCK and SVMDIS stay."""
    old = vcpu.arch.msrs.get(_VM_CR, 0)
    change = 0x1F & ~(0x18 if old & 0x10 else 0)
    if value & ~0x1F:
        return MsrFault.REFUSED
    new = old & ~change | value & change
    vcpu.arch.msrs[_VM_CR] = new
    disabled = new & 0x10 and vcpu.arch.sregs.efer & _EFER_SVME
    return MsrFault.REFUSED if disabled else None


# Memory types


def _get_mtrr(vcpu: "KvmVcpu", index: int) -> "int | MsrFault":
    if index == _MTRR_CAP:
        return 0x500 | len(_MTRR_VAR) // 2  # write combining, fixed ranges
    if index not in _MTRR_VAR and index not in _MTRR_FIXED and index != _MTRR_DEF:
        return MsrFault.REFUSED
    return vcpu.arch.msrs.get(index, 0)


def _mtrr_valid(vcpu: "KvmVcpu", index: int, value: int) -> bool:
    if index == _MTRR_DEF:
        return not value & ~0xCFF and value & 0xFF in _MEMORY_TYPES
    if index in _MTRR_FIXED:
        return all(value >> shift & 0xFF in _MEMORY_TYPES for shift in range(0, 64, 8))
    if index not in _MTRR_VAR:
        return False
    reserved = _U64 << cpuid_maxphyaddr(vcpu) & _U64
    if index & 1:
        return not value & (reserved | 0x7FF)
    return not value & (reserved | 0xF00) and value & 0xFF in _MEMORY_TYPES


# Machine check


def kvm_x86_setup_mce(vcpu: "KvmVcpu", cap: int) -> None:
    """KVM_X86_SETUP_MCE.  EINVAL: no banks or too many, a feature that KVM has not."""
    banks = cap & 0xFF
    if not 0 < banks <= _BANKS or cap & ~(KVM_MCE_CAP_SUPPORTED | 0xFF_00FF):
        raise KernelError(EINVAL, f"MCG_CAP {cap:#x}")
    vcpu.arch.mcg_cap = cap
    if cap & _MCG_CTL_P:
        vcpu.arch.msrs[_MCG_CTL] = _U64
    for bank in range(banks):
        vcpu.arch.msrs[_MC_BANKS.start + 4 * bank] = _U64


def _get_mce(vcpu: "KvmVcpu", index: int, host: bool) -> "int | MsrFault":
    cap = vcpu.arch.mcg_cap
    if index == _MCG_CAP:
        return cap
    if (index in _MC_BANKS and index - 0x400 >= 4 * (cap & 0xFF)) or (
        index in _MC_CTL2 and index - 0x280 >= cap & 0xFF
    ):
        return MsrFault.REFUSED
    if not host and (
        (index == _MCG_CTL and not cap & _MCG_CTL_P)
        or (index in _MC_CTL2 and not cap & _MCG_CMCI_P)
    ):
        return MsrFault.REFUSED
    return vcpu.arch.msrs.get(index, 0)


def _mce_valid(vcpu: "KvmVcpu", index: int, value: int, host: bool) -> bool:
    cap = vcpu.arch.mcg_cap
    if index == _MCG_STATUS:
        return True
    if index == _MCG_CTL:
        return (bool(cap & _MCG_CTL_P) or (not value and host)) and value in (0, _U64)
    if index in _MC_CTL2:
        if index - 0x280 >= cap & 0xFF or (not cap & _MCG_CMCI_P and (value or not host)):
            return False
        return not value & ~(1 << 30 | 0x7FFF)
    if index - 0x400 >= 4 * (cap & 0xFF):
        return False
    if index & 3 == 0:
        return value == 0 or value | 1 << 10 | 1 == _U64
    if index & 3 == 1 and not host and value:
        return amd_compatible(vcpu) and bool(vcpu.arch.msrs.get(_HWCR, 0) & _MC_STATUS_WR_EN)
    return True
