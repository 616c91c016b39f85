"""KVM_ENABLE_CAP on a VM and on a vCPU (arch/x86/kvm/x86.c, v6.12).

A capability that is a switch only is a row of a table; the rest has locks or conditions of its own.
"""

from errno import EEXIST, EINVAL, ENXIO, EPERM
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_HC_MAP_GPA_RANGE,
)
from softcvm.abi.kvm.vcpu import KvmEnableCap
from softcvm.kernel.arch.x86.kvm.caps import QUIRKS, kvm_vm_ioctl_check_extension
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.virt.kvm.dirty_log import kvm_vm_ioctl_enable_dirty_log_ring
from softcvm.kernel.virt.kvm.kvm_main import KVM_MAX_VCPU_IDS
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = ("kvm_vcpu_ioctl_enable_cap", "kvm_vm_ioctl_enable_cap")

_U64 = (1 << 64) - 1
_X2APIC_32BIT_IDS, _X2APIC_NO_BROADCAST_QUIRK = 1, 2


class _Switch(NamedTuple):
    """Where in kvm.arch the value goes, and which bits it may have."""

    field: str
    valid: int = _U64


_SWITCHES = {
    k.KVM_CAP_MSR_PLATFORM_INFO: _Switch("guest_can_read_msr_platform_info"),
    k.KVM_CAP_EXCEPTION_PAYLOAD: _Switch("exception_payload_enabled"),
    k.KVM_CAP_X86_TRIPLE_FAULT_EVENT: _Switch("triple_fault_event"),
    k.KVM_CAP_X86_USER_SPACE_MSR: _Switch("user_space_msr_mask", 7),  # INVAL, UNKNOWN, FILTER
    k.KVM_CAP_EXIT_ON_EMULATION_FAILURE: _Switch("exit_on_emulation_error", 1),
    k.KVM_CAP_X86_DISABLE_EXITS: _Switch("disabled_exits", 0xF),
}
_NOT_MODELLED = frozenset(
    {
        k.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
        k.KVM_CAP_HALT_POLL,
        k.KVM_CAP_PMU_CAPABILITY,
        k.KVM_CAP_SGX_ATTRIBUTE,
        k.KVM_CAP_X86_BUS_LOCK_EXIT,
        k.KVM_CAP_X86_NOTIFY_VMEXIT,
    }
)
"""What else Linux can enable on a VM (v6.12); other capabilities only tell something."""


def kvm_vm_ioctl_enable_cap(kvm: "Kvm", proc: "Process", cap: KvmEnableCap) -> Steps[int]:
    """KVM_ENABLE_CAP on a VM, after the copy-in.  Who enables dirty rings may set any flag."""
    if cap.cap in (k.KVM_CAP_DIRTY_LOG_RING, k.KVM_CAP_DIRTY_LOG_RING_ACQ_REL):
        yield from kvm_vm_ioctl_enable_dirty_log_ring(kvm, cap.arg0)
        return 0
    if cap.flags:
        raise KernelError(EINVAL, f"KVM_ENABLE_CAP flags {cap.flags:#x}")
    match cap.cap:
        case k.KVM_CAP_EXIT_HYPERCALL:
            if cap.arg0 & ~(1 << KVM_HC_MAP_GPA_RANGE):
                raise KernelError(EINVAL, f"hypercalls {cap.arg0:#x}")
            kvm.arch.hypercall_exit_enabled = cap.arg0
        case k.KVM_CAP_DISABLE_QUIRKS | k.KVM_CAP_DISABLE_QUIRKS2:
            if cap.cap == k.KVM_CAP_DISABLE_QUIRKS2 and cap.arg0 & ~QUIRKS:
                raise KernelError(EINVAL, f"quirks {cap.arg0:#x} of {QUIRKS:#x}")
            kvm.arch.disabled_quirks |= cap.arg0 & QUIRKS
        case k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
            allowed = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
            if cap.arg0 & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
                allowed |= KVM_DIRTY_LOG_INITIALLY_SET
            if cap.arg0 & ~allowed:
                raise KernelError(EINVAL, f"dirty log options {cap.arg0:#x}")
            kvm.manual_dirty_log_protect = cap.arg0
        case k.KVM_CAP_MAX_VCPU_ID:
            yield from _max_vcpu_id(kvm, cap.arg0)
        case k.KVM_CAP_SPLIT_IRQCHIP:
            yield from _split_irqchip(kvm, cap.arg0)
        case k.KVM_CAP_X2APIC_API:
            _x2apic_api(kvm, cap.arg0)
        case k.KVM_CAP_X86_APIC_BUS_CYCLES_NS:
            yield from _apic_bus_cycles(kvm, cap.arg0)
        case k.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES:
            yield from _disable_nx_huge_pages(kvm, proc, cap.arg0)
        case k.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM:
            return (yield from kvm.ops.vm_copy_enc_context_from(kvm, proc, cap.arg0))
        case k.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM:
            return (yield from kvm.ops.vm_move_enc_context_from(kvm, proc, cap.arg0))
        case _ if cap.cap in _SWITCHES:
            _switch(kvm, _SWITCHES[cap.cap], cap.arg0)
        case _ if cap.cap in _NOT_MODELLED or cap.cap > k.KVM_CAP_X86_GUEST_MODE:
            if kvm_vm_ioctl_check_extension(kvm.linux, kvm, cap.cap):
                raise Unmodelled(f"KVM_ENABLE_CAP of capability {cap.cap}")
            raise KernelError(EINVAL, f"capability {cap.cap} cannot be enabled on this host")
        case _:
            raise KernelError(EINVAL, f"capability {cap.cap} cannot be enabled on a VM")
    return 0


def _max_vcpu_id(kvm: "Kvm", limit: int) -> Steps[None]:
    """Set once, or to the same again.  EINVAL."""
    if limit > KVM_MAX_VCPU_IDS:
        raise KernelError(EINVAL, f"vCPU ids up to {limit}")
    yield from kvm.lock.acquire()
    try:
        if kvm.arch.bsp_vcpu_id > limit or kvm.arch.max_vcpu_ids not in (0, limit):
            raise KernelError(EINVAL, f"vCPU ids are limited to {kvm.arch.max_vcpu_ids}")
        kvm.arch.max_vcpu_ids = limit
    finally:
        kvm.lock.release()


def _split_irqchip(kvm: "Kvm", pins: int) -> Steps[None]:
    yield from kvm.lock.acquire()
    try:
        if pins > 4096:
            raise KernelError(EINVAL, f"{pins} reserved I/O APIC pins")
        if kvm.arch.irqchip:
            raise KernelError(EEXIST, "there is an in-kernel irqchip")
        if kvm.created_vcpus:
            raise KernelError(EEXIST, "vCPUs exist already")
        kvm.arch.irqchip = kvm.arch.irqchip_split = True
    finally:
        kvm.lock.release()


def _switch(kvm: "Kvm", switch: _Switch, value: int) -> None:
    if value & ~switch.valid:
        raise KernelError(EINVAL, f"{switch.field}: {value:#x} of {switch.valid:#x}")
    old = getattr(kvm.arch, switch.field)
    if switch.field == "disabled_exits":  # what was handed to the guest stays with it
        value |= old
    setattr(kvm.arch, switch.field, bool(value) if isinstance(old, bool) else value)


def _x2apic_api(kvm: "Kvm", flags: int) -> None:
    if flags & ~kvm_vm_ioctl_check_extension(kvm.linux, kvm, k.KVM_CAP_X2APIC_API):
        raise KernelError(EINVAL, f"KVM_CAP_X2APIC_API {flags:#x}")
    if flags & ~(_X2APIC_32BIT_IDS | _X2APIC_NO_BROADCAST_QUIRK):
        raise Unmodelled("KVM_CAP_X2APIC_API: suppressing EOI broadcasts")
    kvm.arch.x2apic_format |= bool(flags & _X2APIC_32BIT_IDS)
    kvm.arch.x2apic_broadcast_quirk_disabled |= bool(flags & _X2APIC_NO_BROADCAST_QUIRK)


def _apic_bus_cycles(kvm: "Kvm", ns: int) -> Steps[None]:
    """EINVAL, ENXIO: no local APIC in the kernel."""
    if not ns or ns * 0xFFFF_FFFF * 128 > _U64:
        raise KernelError(EINVAL, f"{ns} ns")
    yield from kvm.lock.acquire()
    try:
        if not kvm.arch.irqchip:
            raise KernelError(ENXIO, "no in-kernel irqchip")
        if kvm.created_vcpus:
            raise KernelError(EINVAL, "vCPUs exist already")
        kvm.arch.apic_bus_cycle_ns = ns
    finally:
        kvm.lock.release()


def _disable_nx_huge_pages(kvm: "Kvm", proc: "Process", arg: int) -> Steps[None]:
    """EPERM without CAP_SYS_BOOT; EINVAL."""
    if not proc.rlimits.cap_sys_boot:
        raise KernelError(EPERM, "CAP_SYS_BOOT")
    if arg:
        raise KernelError(EINVAL, f"argument {arg:#x}")
    yield from kvm.lock.acquire()
    try:
        if kvm.created_vcpus:
            raise KernelError(EINVAL, "vCPUs exist already")
        kvm.arch.disable_nx_huge_pages = True
    finally:
        kvm.lock.release()


def kvm_vcpu_ioctl_enable_cap(vcpu: "KvmVcpu", cap: KvmEnableCap) -> None:
    """KVM_ENABLE_CAP on a vCPU, after the copy-in.  EINVAL.  There is no Hyper-V here."""
    if cap.flags or cap.cap != k.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
        raise KernelError(EINVAL, f"capability {cap.cap} of a vCPU, flags {cap.flags:#x}")
    vcpu.arch.pv_enforce = bool(cap.arg0)
