"""ioctls on a vCPU's fd (kvm_vcpu_ioctl(), virt/kvm/kvm_main.c; kvm_arch_vcpu_ioctl(), x86.c;
v7.2).

Every one holds vcpu->mutex: while a vCPU is inside KVM_RUN, another thread's ioctl on it waits.
"""

from collections.abc import Callable
from errno import E2BIG, EINVAL
from functools import partial
from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmPreFaultMemory
from softcvm.abi.kvm.vcpu import (
    KvmCpuidEntry2,
    KvmDebugregs,
    KvmDeviceAttr,
    KvmEnableCap,
    KvmFpu,
    KvmGuestDebug,
    KvmMpState,
    KvmRegs,
    KvmSregs,
    KvmSregs2,
    KvmVcpuEvents,
    KvmXcrs,
)
from softcvm.abi.layout import Layout
from softcvm.kernel.arch.x86.kvm import regs
from softcvm.kernel.arch.x86.kvm.enable_cap import kvm_vcpu_ioctl_enable_cap
from softcvm.kernel.arch.x86.kvm.events import get_vcpu_events, set_vcpu_events
from softcvm.kernel.arch.x86.kvm.gva import kvm_translate
from softcvm.kernel.arch.x86.kvm.lapic import kvm_apic_accept_events
from softcvm.kernel.arch.x86.kvm.lapic_state import (
    KVM_APIC_REG_SIZE,
    kvm_apic_get_state,
    kvm_apic_set_state,
    refuse_without_lapic,
)
from softcvm.kernel.arch.x86.kvm.mmu.mmu import kvm_arch_vcpu_pre_fault_memory
from softcvm.kernel.arch.x86.kvm.msrs import kvm_get_msr, kvm_set_msr, kvm_x86_setup_mce
from softcvm.kernel.arch.x86.kvm.sregs import get_sregs, get_sregs2, set_sregs, set_sregs2
from softcvm.kernel.arch.x86.kvm.svm.nested import (
    svm_get_nested_state,
    svm_set_nested_state,
)
from softcvm.kernel.arch.x86.kvm.tsc import kvm_set_tsc_khz, kvm_vcpu_ioctl_device_attr
from softcvm.kernel.arch.x86.kvm.x86 import kvm_arch_vcpu_ioctl_run
from softcvm.kernel.arch.x86.kvm.xsave import XSAVE_SIZE, get_xsave, set_xsave
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.kernel.virt.kvm.stats import kvm_get_stats_fd
from softcvm.sim.steps import Steps
from softcvm.uapi.msrs import msr_io
from softcvm.uapi.numbers import IOCTL_NAMES, ioctl_name, is_kvm_ioctl
from softcvm.uapi.unmodelled import UNMODELLED_ON_VCPU, unmodelled_vcpu_ioctl
from softcvm.uapi.vm import check_usable

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("kvm_vcpu_ioctl",)

_GET: dict[int, Callable[["KvmVcpu"], Layout]] = {
    k.KVM_GET_REGS: regs.get_regs,
    k.KVM_GET_SREGS: get_sregs,
    k.KVM_GET_SREGS2: get_sregs2,
    k.KVM_GET_VCPU_EVENTS: get_vcpu_events,
    k.KVM_GET_FPU: regs.get_fpu,
    k.KVM_GET_XCRS: regs.get_xcrs,
    k.KVM_GET_DEBUGREGS: regs.get_debugregs,
    k.KVM_GET_MP_STATE: regs.get_mpstate,
}
_SIZES = {
    k.KVM_SET_REGS: KvmRegs.SIZE,
    k.KVM_SET_SREGS: KvmSregs.SIZE,
    k.KVM_SET_SREGS2: KvmSregs2.SIZE,
    k.KVM_SET_VCPU_EVENTS: KvmVcpuEvents.SIZE,
    k.KVM_SET_FPU: KvmFpu.SIZE,
    k.KVM_SET_XCRS: KvmXcrs.SIZE,
    k.KVM_SET_DEBUGREGS: KvmDebugregs.SIZE,
    k.KVM_SET_MP_STATE: KvmMpState.SIZE,
    k.KVM_SET_GUEST_DEBUG: KvmGuestDebug.SIZE,
}
_SIGSET_SIZE, _SIGKILL, _SIGSTOP = 8, 9, 19


def kvm_vcpu_ioctl(
    vcpu: "KvmVcpu", proc: "Process", request: int, arg: int, argp: UserPtr
) -> Steps[int]:
    """EINVAL for what is no vCPU ioctl."""
    check_usable(vcpu.kvm, proc)
    if not is_kvm_ioctl(request):
        raise KernelError(EINVAL, f"{ioctl_name(request)} on a vCPU")
    yield from vcpu.mutex.acquire()
    try:
        return (yield from _locked(vcpu, proc, request, arg, argp))
    finally:
        vcpu.mutex.release()


def _locked(
    vcpu: "KvmVcpu", proc: "Process", request: int, arg: int, argp: UserPtr
) -> Steps[int]:
    if request == k.KVM_GET_MP_STATE:
        yield from kvm_apic_accept_events(vcpu)
    if request in _GET:
        yield from argp.write(_GET[request](vcpu).data)
        return 0
    if request in _SIZES:
        _set(vcpu, request, (yield from argp.read(_SIZES[request])))
        return 0
    match request:
        case k.KVM_RUN:
            if arg:
                raise KernelError(EINVAL, "KVM_RUN takes no argument")
            return (yield from kvm_arch_vcpu_ioctl_run(vcpu, proc))
        case k.KVM_PRE_FAULT_MEMORY:
            range_ = KvmPreFaultMemory((yield from argp.read(KvmPreFaultMemory.SIZE)))
            try:
                yield from kvm_arch_vcpu_pre_fault_memory(vcpu, proc, range_)
            finally:
                yield from argp.write(range_.data)
            return 0
        case k.KVM_GET_XSAVE | k.KVM_GET_XSAVE2:
            yield from argp.write(get_xsave(vcpu, XSAVE_SIZE))
            return 0
        case k.KVM_SET_XSAVE:
            set_xsave(vcpu, (yield from argp.read(XSAVE_SIZE)))
            return 0
        case k.KVM_GET_TSC_KHZ:
            return vcpu.arch.virtual_tsc_khz
        case k.KVM_SET_TSC_KHZ:
            kvm_set_tsc_khz(vcpu, arg)
            return 0
        case k.KVM_SET_CPUID2:
            regs.set_cpuid2(vcpu, (yield from _cpuid_entries(argp)))
            return 0
        case k.KVM_GET_CPUID2:
            return (yield from _get_cpuid2(vcpu, argp))
        case k.KVM_GET_MSRS:
            return (yield from msr_io(argp, lambda i, _: kvm_get_msr(vcpu, i, host=True)))
        case k.KVM_SET_MSRS:
            return (yield from msr_io(argp, partial(_set_msr, vcpu), writeback=False))
        case k.KVM_GET_STATS_FD:
            return kvm_get_stats_fd(vcpu.kvm, vcpu, proc)
        case k.KVM_GET_LAPIC:
            yield from argp.write(kvm_apic_get_state(vcpu))
            return 0
        case k.KVM_SET_LAPIC:
            refuse_without_lapic(vcpu)
            kvm_apic_set_state(vcpu, (yield from argp.read(KVM_APIC_REG_SIZE)))
            return 0
        case k.KVM_SET_SIGNAL_MASK:
            vcpu.sigset = yield from _signal_mask(argp)
            return 0
        case k.KVM_ENABLE_CAP:
            cap = KvmEnableCap((yield from argp.read(KvmEnableCap.SIZE)))
            kvm_vcpu_ioctl_enable_cap(vcpu, cap)
            return 0
        case k.KVM_X86_SETUP_MCE:
            kvm_x86_setup_mce(vcpu, int.from_bytes((yield from argp.read(8)), "little"))
            return 0
        case k.KVM_TRANSLATE:
            address = int.from_bytes((yield from argp.read(24))[:8], "little")
            yield from vcpu.kvm.srcu.acquire_read()
            try:
                found = yield from kvm_translate(vcpu, address)
            finally:
                vcpu.kvm.srcu.release_read()
            yield from argp.write(found)
            return 0
        case k.KVM_GET_NESTED_STATE:
            yield from svm_get_nested_state(argp)
            return 0
        case k.KVM_SET_NESTED_STATE:
            yield from svm_set_nested_state(argp)
            return 0
        case k.KVM_SET_DEVICE_ATTR | k.KVM_GET_DEVICE_ATTR | k.KVM_HAS_DEVICE_ATTR:
            attr = KvmDeviceAttr((yield from argp.read(KvmDeviceAttr.SIZE)))
            yield from kvm_vcpu_ioctl_device_attr(vcpu, proc, request, attr)
            return 0
        case k.KVM_GET_ONE_REG | k.KVM_SET_ONE_REG | k.KVM_GET_REG_LIST if (
            vcpu.kvm.linux.profile.x86_one_reg
        ):
            raise Unmodelled(f"{IOCTL_NAMES[request]} on a vCPU")
        case _ if request in UNMODELLED_ON_VCPU:
            return (yield from unmodelled_vcpu_ioctl(vcpu.kvm, request, argp))
        case _:
            raise KernelError(EINVAL, f"{ioctl_name(request)} on a vCPU")


def _set(vcpu: "KvmVcpu", request: int, data: bytes) -> None:
    match request:
        case k.KVM_SET_REGS:
            regs.set_regs(vcpu, KvmRegs(data))
        case k.KVM_SET_SREGS:
            set_sregs(vcpu, KvmSregs(data))
        case k.KVM_SET_SREGS2:
            set_sregs2(vcpu, KvmSregs2(data))
        case k.KVM_SET_VCPU_EVENTS:
            set_vcpu_events(vcpu, KvmVcpuEvents(data))
        case k.KVM_SET_FPU:
            regs.set_fpu(vcpu, KvmFpu(data))
        case k.KVM_SET_XCRS:
            regs.set_xcrs(vcpu, KvmXcrs(data))
        case k.KVM_SET_DEBUGREGS:
            regs.set_debugregs(vcpu, KvmDebugregs(data))
        case k.KVM_SET_MP_STATE:
            regs.set_mpstate(vcpu, KvmMpState(data))
        case k.KVM_SET_GUEST_DEBUG:
            regs.set_guest_debug(vcpu, KvmGuestDebug(data))
        case _:
            raise ValueError(f"{ioctl_name(request)} sets no registers")


def _set_msr(vcpu: "KvmVcpu", index: int, value: int) -> int | None:
    return value if kvm_set_msr(vcpu, index, value, host=True) else None


def _signal_mask(argp: UserPtr) -> Steps[int | None]:
    """struct kvm_signal_mask, or no argument at all: the thread's own.  EINVAL; KILL and STOP are never blocked."""
    if argp.is_null:
        return None
    length = int.from_bytes((yield from argp.read(4)), "little")
    if length != _SIGSET_SIZE:
        raise KernelError(EINVAL, f"a signal set of {length} bytes")
    mask = int.from_bytes((yield from argp.read(_SIGSET_SIZE, 4)), "little")
    return mask & ~(1 << _SIGKILL - 1 | 1 << _SIGSTOP - 1)


def _cpuid_entries(argp: UserPtr) -> Steps[list[KvmCpuidEntry2]]:
    """struct kvm_cpuid2: nent u32, padding u32, entries."""
    count = int.from_bytes((yield from argp.read(8))[:4], "little")
    if count > regs.KVM_MAX_CPUID_ENTRIES:
        raise KernelError(E2BIG, f"{count} CPUID entries")
    size = KvmCpuidEntry2.SIZE
    data = yield from argp.read(count * size, 8)
    return [KvmCpuidEntry2(data[i : i + size]) for i in range(0, count * size, size)]


def _get_cpuid2(vcpu: "KvmVcpu", argp: UserPtr) -> Steps[int]:
    """nent is written back in any case: how many there are, or how many fit."""
    count = int.from_bytes((yield from argp.read(8))[:4], "little")
    entries = vcpu.arch.cpuid_entries
    if count < len(entries):
        raise KernelError(E2BIG, f"room for {count} CPUID entries of {len(entries)}")
    yield from argp.write(b"".join(map(bytes, entries)), 8)
    yield from argp.write(len(entries).to_bytes(4, "little"))
    return 0
