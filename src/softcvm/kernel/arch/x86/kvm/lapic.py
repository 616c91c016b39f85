"""The local APIC as far as it starts and stops processors: INIT and SIPI (arch/x86/kvm/lapic.c, v7.2).

Owns the pending INIT and SIPI of a vCPU, how another vCPU sends them (ICR in x2APIC mode), and what taking
them does.  No interrupt is delivered here: an IPI of any other kind is Unmodelled.
"""

from enum import IntEnum
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmRegs, MpState
from softcvm.kernel.arch.x86.kvm.cpuid import cpuid_maxphyaddr, guest_cpuid_has
from softcvm.kernel.arch.x86.kvm.cpuid_runtime import kvm_update_cpuid_runtime
from softcvm.kernel.arch.x86.kvm.msr_table import Feature
from softcvm.kernel.arch.x86.kvm.vcpu import reset_sregs
from softcvm.kernel.errors import Unmodelled
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "APIC_BASE_ENABLE",
    "APIC_BASE_EXTD",
    "X2APIC_ICR",
    "X2APIC_ID",
    "kvm_apic_accept_events",
    "kvm_apic_has_pending_init_or_sipi",
    "kvm_set_apic_base",
    "kvm_vcpu_reset",
    "kvm_x2apic_icr_write",
    "x2apic_mode",
)

APIC_BASE_EXTD, APIC_BASE_ENABLE = 1 << 10, 1 << 11
_ID = 0x20
_APIC_BASE_RESERVED = 0x2FF
X2APIC_ID, X2APIC_ICR = 0x802, 0x830
_ICR_RESERVED = 0xFFF << 20 | 3 << 16 | 1 << 13
_ICR_LEVEL, _ICR_ASSERT = 1 << 15, 1 << 14
_ICR_LOGICAL = 1 << 11
_BROADCAST = 0xFFFF_FFFF
_CR0_NW_CD, _CR0_ET = 3 << 29, 1 << 4
_DR6_ACTIVE_LOW, _DR7_FIXED_1 = 0xFFFF_0FF0, 0x400


class _Delivery(IntEnum):
    """Delivery mode, ICR bits 10:8."""

    INIT = 5
    STARTUP = 6


class _Shorthand(IntEnum):
    """Destination shorthand, ICR bits 19:18."""

    NONE = 0
    SELF = 1
    ALL = 2
    OTHERS = 3


def x2apic_mode(vcpu: "KvmVcpu") -> bool:
    both = APIC_BASE_EXTD | APIC_BASE_ENABLE
    return vcpu.kvm.arch.irqchip and vcpu.arch.sregs.apic_base & both == both


def kvm_apic_has_pending_init_or_sipi(vcpu: "KvmVcpu") -> bool:
    return vcpu.kvm.arch.irqchip and (vcpu.arch.apic_init or vcpu.arch.apic_sipi)


def kvm_set_apic_base(vcpu: "KvmVcpu", value: int, *, host: bool) -> bool:
    """A guest gets no way from x2APIC back to xAPIC, nor from off straight to x2APIC; user space does."""
    arch, sregs = vcpu.arch, vcpu.arch.sregs
    mode = APIC_BASE_EXTD | APIC_BASE_ENABLE
    has_x2apic = guest_cpuid_has(vcpu, *Feature.X2APIC.value)
    reserved = _APIC_BASE_RESERVED | (0 if has_x2apic else APIC_BASE_EXTD)
    if value & reserved or value >> cpuid_maxphyaddr(vcpu) or value & mode == APIC_BASE_EXTD:
        return False
    old, new = sregs.apic_base & mode, value & mode
    if not host and ((old == mode and new == APIC_BASE_ENABLE) or (old == 0 and new == mode)):
        return False
    sregs.apic_base = value
    kvm_update_cpuid_runtime(vcpu)
    if (old ^ new) and new and arch.apic_page is not None:  # its ID is that of the new mode
        id_ = vcpu.vcpu_id if new == mode else vcpu.vcpu_id << 24 & 0xFFFF_FFFF
        arch.apic_page = (
            arch.apic_page[:_ID] + id_.to_bytes(4, "little") + arch.apic_page[_ID + 4 :]
        )
    return True


def kvm_x2apic_icr_write(vcpu: "KvmVcpu", icr: int) -> bool:
    """Send an IPI; False where the guest gets #GP: outside x2APIC mode, reserved bits."""
    if not x2apic_mode(vcpu) or icr & _ICR_RESERVED:
        return False
    mode = icr >> 8 & 7
    if mode not in _Delivery.__members__.values():
        raise Unmodelled(
            f"IPI with delivery mode {mode}: the local APIC delivers no interrupts"
        )
    for target in _targets(vcpu, icr):
        _accept(target, _Delivery(mode), icr)
    return True


def _targets(sender: "KvmVcpu", icr: int) -> list["KvmVcpu"]:
    """kvm_apic_match_dest() for physical destinations and shorthands."""
    vcpus = sender.kvm.vcpus
    match _Shorthand(icr >> 18 & 3):
        case _Shorthand.SELF:
            return [sender]
        case _Shorthand.ALL:
            return list(vcpus)
        case _Shorthand.OTHERS:
            return [vcpu for vcpu in vcpus if vcpu is not sender]
        case _Shorthand.NONE:
            destination = icr >> 32
            if icr & _ICR_LOGICAL:
                raise Unmodelled(f"IPI to the logical destination {destination:#x}")
            return [v for v in vcpus if destination in (v.vcpu_id, _BROADCAST)]


def _accept(vcpu: "KvmVcpu", mode: _Delivery, icr: int) -> None:
    """__apic_accept_irq(): an INIT takes back a SIPI that is still waiting."""
    if mode is _Delivery.STARTUP:
        vcpu.arch.apic_sipi = True
    elif not icr & _ICR_LEVEL or icr & _ICR_ASSERT:
        vcpu.arch.apic_init, vcpu.arch.apic_sipi = True, False
    else:
        return  # de-assert: nothing to do since the Pentium 4
    vcpu.kvm.ops.vcpu_kick(vcpu)


def kvm_apic_accept_events(vcpu: "KvmVcpu") -> Steps[None]:
    """Take a pending INIT, then a SIPI; a SIPI to a vCPU that is not waiting for one is lost."""
    arch = vcpu.arch
    if not kvm_apic_has_pending_init_or_sipi(vcpu):
        return
    if arch.apic_init:
        arch.apic_init = False
        yield from kvm_vcpu_reset(vcpu)
        arch.mp_state = MpState.RUNNABLE if vcpu.is_bsp else MpState.INIT_RECEIVED
    if arch.apic_sipi:
        arch.apic_sipi = False
        if arch.mp_state is MpState.INIT_RECEIVED:
            vcpu.kvm.ops.vcpu_deliver_sipi_vector(vcpu)
            arch.mp_state = MpState.RUNNABLE


def kvm_vcpu_reset(vcpu: "KvmVcpu") -> Steps[None]:
    """kvm_vcpu_reset(vcpu, init_event=true): INIT.  What KVM keeps of the registers, then the vendor's.

    The APIC stays where and in which mode it is; CR0.CD and NW stay too.
    """
    arch = vcpu.arch
    eax = next((e.eax for e in arch.cpuid_entries if e.function == 1), 0x600)
    arch.debugregs.data[:] = bytes(arch.debugregs.SIZE)
    arch.debugregs.dr6, arch.debugregs.dr7 = _DR6_ACTIVE_LOW, _DR7_FIXED_1
    arch.regs = KvmRegs(rdx=eax)
    arch.apic_page = None
    yield from vcpu.kvm.ops.vcpu_reset(vcpu)
    arch.regs.rflags, arch.regs.rip = 2, 0xFFF0
    sregs = reset_sregs()
    sregs.apic_base = arch.sregs.apic_base
    sregs.cr0 = _CR0_ET | arch.sregs.cr0 & _CR0_NW_CD
    arch.sregs = sregs
    kvm_update_cpuid_runtime(vcpu)
