"""The frequency of a guest's TSC, as user space asks and sets it (arch/x86/kvm/x86.c, v6.12).

No clock runs here: the frequency is kept and told, and nothing follows from it.  The offset counts for RDTSC of guests
that run machine code, whose processor has a TSC; before user space sets one it is zero, where Linux has the guest's
TSC begin at zero.
"""

from errno import EINVAL, ENXIO
from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.vcpu import KvmDeviceAttr
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import copy_from_user, copy_to_user
from softcvm.sim.addr import Hva
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = ("kvm_set_default_tsc_khz", "kvm_set_tsc_khz", "kvm_vcpu_ioctl_device_attr")

_RATIO_MAX, _RATIO_FRAC_BITS = 0xFF_FFFF_FFFF, 32  # SVM_TSC_RATIO_MAX and TscRateMsr's fraction
_VCPU_TSC_CTRL = _VCPU_TSC_OFFSET = 0
_U32 = (1 << 32) - 1


def _checked(linux: "Linux", khz: int) -> int:
    """EINVAL: more than the processor can scale to.  0 stands for the host's own."""
    khz &= _U32
    host = linux.soc.profile.tsc_khz
    if khz >= min(0x7FFF_FFFF, _RATIO_MAX * host >> _RATIO_FRAC_BITS):
        raise KernelError(EINVAL, f"TSC of {khz} kHz")
    return khz or host


def kvm_set_default_tsc_khz(kvm: "Kvm", khz: int) -> None:
    """KVM_SET_TSC_KHZ on a VM: for vCPUs created from now on."""
    kvm.arch.default_tsc_khz = _checked(kvm.linux, khz)


def kvm_set_tsc_khz(vcpu: "KvmVcpu", khz: int) -> None:
    """KVM_SET_TSC_KHZ on a vCPU."""
    vcpu.arch.virtual_tsc_khz = _checked(vcpu.kvm.linux, khz)


def kvm_vcpu_ioctl_device_attr(
    vcpu: "KvmVcpu", proc: "Process", request: int, attr: KvmDeviceAttr
) -> Steps[None]:
    """The only attribute of a vCPU: KVM_VCPU_TSC_OFFSET.  ENXIO, EFAULT."""
    if attr.group != _VCPU_TSC_CTRL or attr.attr != _VCPU_TSC_OFFSET:
        raise KernelError(ENXIO, f"attribute {attr.attr} of group {attr.group} of a vCPU")
    if request == k.KVM_GET_DEVICE_ATTR:
        offset = vcpu.arch.tsc_offset.to_bytes(8, "little")
        yield from copy_to_user(proc.mm, Hva(attr.addr), offset)
    elif request == k.KVM_SET_DEVICE_ATTR:
        data = yield from copy_from_user(proc.mm, Hva(attr.addr), 8)
        vcpu.arch.tsc_offset = int.from_bytes(data, "little")
        vcpu.arch.svm.vmcb.tsc_offset = vcpu.arch.tsc_offset
