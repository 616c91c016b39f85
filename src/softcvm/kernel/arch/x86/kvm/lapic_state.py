"""The register page of an in-kernel local APIC, as KVM_GET_LAPIC and KVM_SET_LAPIC see it (arch/x86/kvm/lapic.c, v6.12).

Kept for user space: INIT, SIPI and who gets them are lapic.py, which asks nothing here; the task priority is CR8's.
No timer runs and no interrupt is delivered, so that a page which asks for either is Unmodelled.
"""

from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.kernel.arch.x86.kvm.cpuid import guest_cpuid_has
from softcvm.kernel.arch.x86.kvm.lapic import x2apic_mode
from softcvm.kernel.arch.x86.kvm.msr_table import Feature
from softcvm.kernel.errors import KernelError, Unmodelled

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "KVM_APIC_REG_SIZE",
    "kvm_apic_get_state",
    "kvm_apic_set_state",
    "refuse_without_lapic",
)

KVM_APIC_REG_SIZE = 0x400
_ID, _LVR, _TASKPRI, _PROCPRI, _LDR, _DFR, _SPIV = 0x20, 0x30, 0x80, 0xA0, 0xD0, 0xE0, 0xF0
_ISR, _IRR, _TMICT, _TMCCT, _LVT0 = 0x100, 0x200, 0x380, 0x390, 0x350
_LVTS = (0x320, 0x330, 0x340, 0x350, 0x360, 0x370)
_VERSION, _DIRECTED_EOI, _LVT_MASKED, _EXTINT = 0x14, 1 << 24, 1 << 16, 7 << 8
_QUIRK_LINT0_REENABLED = 1 << 0


def kvm_apic_get_state(vcpu: "KvmVcpu") -> bytes:
    """EINVAL without an in-kernel APIC."""
    refuse_without_lapic(vcpu)
    page = bytearray(vcpu.arch.apic_page or _reset_page(vcpu))
    if x2apic_mode(vcpu):
        id_ = vcpu.vcpu_id if vcpu.kvm.arch.x2apic_format else vcpu.vcpu_id << 24
        _put(page, _ID, id_)
        _put(page, _LDR, _x2apic_ldr(vcpu.vcpu_id))
    _put(page, _LVR, _version(vcpu))
    if vcpu.arch.sregs.cr8 != _get(page, _TASKPRI) >> 4:
        _put(page, _TASKPRI, vcpu.arch.sregs.cr8 << 4)
        _put(page, _PROCPRI, _priority(page, serves=True))
    return bytes(page)


def kvm_apic_set_state(vcpu: "KvmVcpu", data: bytes) -> None:
    """EINVAL without an in-kernel APIC, or for another x2APIC ID where those are in use."""
    page = bytearray(data)
    if x2apic_mode(vcpu):
        if vcpu.kvm.arch.x2apic_format and _get(page, _ID) != vcpu.vcpu_id:
            raise KernelError(EINVAL, f"x2APIC ID {_get(page, _ID)} of vCPU {vcpu.vcpu_id}")
        _put(page, _ID, vcpu.vcpu_id)
        _put(page, _LDR, _x2apic_ldr(vcpu.vcpu_id))
    if _get(page, _TMICT):
        raise Unmodelled("KVM_SET_LAPIC with a timer that runs")
    if any(_get(page, _IRR + 16 * n) for n in range(8)):
        raise Unmodelled("KVM_SET_LAPIC with an interrupt to deliver")
    _put(page, _TMCCT, 0)
    # The priority is computed before KVM counts the interrupts in service anew.
    before = vcpu.arch.apic_page or bytes(KVM_APIC_REG_SIZE)
    _put(page, _PROCPRI, _priority(page, serves=any(_in_service(bytearray(before)))))
    vcpu.arch.sregs.cr8 = _get(page, _TASKPRI) >> 4 & 0xF
    vcpu.arch.apic_page = bytes(page)


def refuse_without_lapic(vcpu: "KvmVcpu") -> None:
    """EINVAL, before the argument is read."""
    if not vcpu.kvm.arch.irqchip:
        raise KernelError(EINVAL, "no local APIC in the kernel")


def _reset_page(vcpu: "KvmVcpu") -> bytes:
    """kvm_lapic_reset()"""
    page = bytearray(KVM_APIC_REG_SIZE)
    _put(page, _ID, vcpu.vcpu_id << 24 & 0xFFFF_FFFF)
    for lvt in _LVTS:
        _put(page, lvt, _LVT_MASKED)
    if vcpu.is_bsp and not vcpu.kvm.arch.disabled_quirks & _QUIRK_LINT0_REENABLED:
        _put(page, _LVT0, _EXTINT)
    _put(page, _DFR, 0xFFFF_FFFF)
    _put(page, _SPIV, 0xFF)
    return bytes(page)


def _version(vcpu: "KvmVcpu") -> int:
    """kvm_apic_set_version(): the last LVT entry, and directed EOI where the I/O APIC is in user space."""
    version = _VERSION | len(_LVTS) - 1 << 16
    if guest_cpuid_has(vcpu, *Feature.X2APIC.value) and vcpu.kvm.arch.irqchip_split:
        version |= _DIRECTED_EOI
    return version


def _priority(page: bytearray, *, serves: bool) -> int:
    """__apic_update_ppr(): the task's, or that of the highest interrupt in service."""
    task = _get(page, _TASKPRI)
    words = _in_service(page) if serves else []
    served = max((32 * n + w.bit_length() - 1 for n, w in enumerate(words) if w), default=0)
    return task & 0xFF if (task & 0xF0) >= (served & 0xF0) else served & 0xF0


def _in_service(page: bytearray) -> list[int]:
    return [_get(page, _ISR + 16 * n) for n in range(8)]


def _x2apic_ldr(id_: int) -> int:
    """kvm_apic_calc_x2apic_ldr()"""
    return id_ >> 4 << 16 | 1 << (id_ & 0xF)


def _get(page: bytearray, at: int) -> int:
    return int.from_bytes(page[at : at + 4], "little")


def _put(page: bytearray, at: int, value: int) -> None:
    page[at : at + 4] = (value & 0xFFFF_FFFF).to_bytes(4, "little")
