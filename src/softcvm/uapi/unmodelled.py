"""ioctls of KVM on x86 that are not modelled, and what Linux refuses before it gets to what is not
(kvm_vm_ioctl() and kvm_vcpu_ioctl(), virt/kvm/kvm_main.c; kvm_arch_vm_ioctl() and
kvm_arch_vcpu_ioctl(), arch/x86/kvm/x86.c; v6.12).

A call that no VM could have answered ends with Linux's errno; Unmodelled is only for the rest.
"""

from errno import EINVAL, ENODEV, ENOENT, ENXIO
from types import MappingProxyType
from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.sim.steps import Steps
from softcvm.uapi.numbers import ioctl_name

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = (
    "UNMODELLED_ON_KVM",
    "UNMODELLED_ON_VCPU",
    "UNMODELLED_ON_VM",
    "unmodelled_vcpu_ioctl",
    "unmodelled_vm_ioctl",
)

UNMODELLED_ON_VM = MappingProxyType(
    {
        k.KVM_IRQFD: 32,
        k.KVM_IOEVENTFD: 64,
        k.KVM_SIGNAL_MSI: 32,
        k.KVM_IRQ_LINE: 8,
        k.KVM_IRQ_LINE_STATUS: 8,
        k.KVM_SET_GSI_ROUTING: 8,
        k.KVM_CREATE_DEVICE: 12,
        k.KVM_CREATE_PIT: 0,
        k.KVM_CREATE_PIT2: 64,
        k.KVM_GET_IRQCHIP: 520,
        k.KVM_SET_IRQCHIP: 520,
        k.KVM_GET_PIT: 72,
        k.KVM_SET_PIT: 72,
        k.KVM_GET_PIT2: 0,
        k.KVM_SET_PIT2: 112,
        k.KVM_REINJECT_CONTROL: 32,
        k.KVM_XEN_HVM_CONFIG: 56,
        k.KVM_XEN_HVM_GET_ATTR: 72,
        k.KVM_XEN_HVM_SET_ATTR: 72,
        k.KVM_XEN_HVM_EVTCHN_SEND: 12,
        k.KVM_SET_CLOCK: 48,
        k.KVM_GET_CLOCK: 0,
        k.KVM_HYPERV_EVENTFD: 16,
        k.KVM_SET_PMU_EVENT_FILTER: 32,
        k.KVM_SET_DEVICE_ATTR: 0,
        k.KVM_GET_DEVICE_ATTR: 0,
        k.KVM_HAS_DEVICE_ATTR: 0,
    }
)
"""Request -> bytes that are copied from user space before anything else is looked at."""
UNMODELLED_ON_VCPU = MappingProxyType(
    {
        k.KVM_INTERRUPT: 4,
        k.KVM_NMI: 0,
        k.KVM_SMI: 0,
        k.KVM_SET_CPUID: 8,
        k.KVM_TPR_ACCESS_REPORTING: 40,
        k.KVM_SET_VAPIC_ADDR: 0,
        k.KVM_X86_SET_MCE: 64,
        k.KVM_KVMCLOCK_CTRL: 0,
        k.KVM_GET_SUPPORTED_HV_CPUID: 8,
        k.KVM_XEN_VCPU_GET_ATTR: 72,
        k.KVM_XEN_VCPU_SET_ATTR: 72,
    }
)
UNMODELLED_ON_KVM = MappingProxyType(
    {k.KVM_GET_EMULATED_CPUID: 8, k.KVM_GET_SUPPORTED_HV_CPUID: 8}
)
_WITHOUT_IRQCHIP = {
    k.KVM_IRQ_LINE: ENXIO,
    k.KVM_IRQ_LINE_STATUS: ENXIO,
    k.KVM_SIGNAL_MSI: EINVAL,
    k.KVM_SET_GSI_ROUTING: EINVAL,
}
_WITHOUT_PIC = {
    k.KVM_GET_IRQCHIP: ENXIO,
    k.KVM_SET_IRQCHIP: ENXIO,
    k.KVM_CREATE_PIT: ENOENT,
    k.KVM_CREATE_PIT2: ENOENT,
}
_NEEDS_PIT = frozenset(
    {k.KVM_GET_PIT, k.KVM_SET_PIT, k.KVM_GET_PIT2, k.KVM_SET_PIT2, k.KVM_REINJECT_CONTROL}
)
_KVM_DEV_TYPE_VFIO = 4
"""The one type of device that x86 has."""
_NR_INTERRUPTS = 256


def unmodelled_vm_ioctl(kvm: "Kvm", request: int, argp: UserPtr) -> Steps[int]:
    """EFAULT; ENXIO, EINVAL, ENOENT: what it is about has not been made.  ENODEV."""
    data = yield from argp.read(UNMODELLED_ON_VM[request])
    arch = kvm.arch
    if not arch.irqchip and request in _WITHOUT_IRQCHIP:
        raise KernelError(_WITHOUT_IRQCHIP[request], "there is no in-kernel irqchip")
    if (not arch.irqchip or arch.irqchip_split) and request in _WITHOUT_PIC:
        raise KernelError(_WITHOUT_PIC[request], "there is no PIC in the kernel")
    if request in _NEEDS_PIT:
        raise KernelError(ENXIO, "there is no PIT in the kernel")
    if request == k.KVM_CREATE_DEVICE:
        type_ = int.from_bytes(data[:4], "little")
        if type_ != _KVM_DEV_TYPE_VFIO:
            raise KernelError(ENODEV, f"no device of type {type_}")
    raise Unmodelled(f"{ioctl_name(request)} on a VM")


def unmodelled_vcpu_ioctl(kvm: "Kvm", request: int, argp: UserPtr) -> Steps[int]:
    """EFAULT; EINVAL: no such interrupt, or there is no local APIC.  ENXIO: the PIC raises interrupts."""
    data = yield from argp.read(UNMODELLED_ON_VCPU[request])
    if request == k.KVM_SET_VAPIC_ADDR and not kvm.arch.irqchip:
        raise KernelError(EINVAL, "there is no local APIC in the kernel")
    if request == k.KVM_INTERRUPT:
        if int.from_bytes(data, "little") >= _NR_INTERRUPTS:
            raise KernelError(EINVAL, "no such interrupt")
        if kvm.arch.irqchip and not kvm.arch.irqchip_split:
            raise KernelError(ENXIO, "the PIC in the kernel raises interrupts")
    raise Unmodelled(f"{ioctl_name(request)} on a vCPU")
