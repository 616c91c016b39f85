"""ioctls on /dev/kvm (kvm_dev_ioctl(), virt/kvm/kvm_main.c; kvm_arch_dev_ioctl(),
arch/x86/kvm/x86.c; v7.2)."""

from errno import E2BIG, EINVAL, ENXIO
from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE
from softcvm.abi.kvm.vcpu import KvmDeviceAttr
from softcvm.kernel.arch.x86.kvm.caps import kvm_vm_ioctl_check_extension
from softcvm.kernel.arch.x86.kvm.cpuid import kvm_get_supported_cpuid
from softcvm.kernel.arch.x86.kvm.msr_table import ADVERTISED, FEATURES
from softcvm.kernel.arch.x86.kvm.msrs import KVM_MCE_CAP_SUPPORTED, kvm_get_feature_msr
from softcvm.kernel.arch.x86.kvm.xsave import kvm_supported_xcr0
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.mm.uaccess import UserPtr, copy_to_user
from softcvm.kernel.virt.kvm.kvm_main import kvm_create_vm
from softcvm.sim.addr import Hva
from softcvm.sim.steps import Steps
from softcvm.uapi.msrs import msr_io
from softcvm.uapi.numbers import IOCTL_NAMES, ioctl_name
from softcvm.uapi.unmodelled import UNMODELLED_ON_KVM

if TYPE_CHECKING:
    from softcvm.kernel.task import Process

__all__ = ("kvm_dev_ioctl",)


def kvm_dev_ioctl(proc: "Process", request: int, arg: int, argp: UserPtr) -> Steps[int]:
    """EINVAL for what is no /dev/kvm ioctl."""
    linux = proc.linux
    match request:
        case k.KVM_GET_API_VERSION:
            if arg:
                raise KernelError(EINVAL, "KVM_GET_API_VERSION takes no argument")
            return k.KVM_API_VERSION
        case k.KVM_CREATE_VM:
            return (yield from kvm_create_vm(proc, arg))
        case k.KVM_CHECK_EXTENSION:
            return kvm_vm_ioctl_check_extension(linux, None, arg)
        case k.KVM_GET_VCPU_MMAP_SIZE:
            if arg:
                raise KernelError(EINVAL, "KVM_GET_VCPU_MMAP_SIZE takes no argument")
            return KVM_RUN_MMAP_SIZE
        case k.KVM_GET_DEVICE_ATTR | k.KVM_HAS_DEVICE_ATTR:
            attr = KvmDeviceAttr((yield from argp.read(KvmDeviceAttr.SIZE)))
            value = _get_attr(proc, attr)
            if request == k.KVM_GET_DEVICE_ATTR:
                yield from copy_to_user(proc.mm, Hva(attr.addr), value.to_bytes(8, "little"))
            return 0
        case k.KVM_GET_SUPPORTED_CPUID:
            yield from _get_supported_cpuid(proc, argp)
            return 0
        case k.KVM_GET_MSRS:
            return (yield from msr_io(argp, lambda index, _: kvm_get_feature_msr(linux, index)))
        case k.KVM_GET_MSR_INDEX_LIST | k.KVM_GET_MSR_FEATURE_INDEX_LIST:
            if linux.profile.x86_one_reg:
                raise Unmodelled(f"{IOCTL_NAMES[request]}: which MSRs of CET there are")
            features = request == k.KVM_GET_MSR_FEATURE_INDEX_LIST
            yield from _msr_list(argp, FEATURES if features else ADVERTISED)
            return 0
        case k.KVM_X86_GET_MCE_CAP_SUPPORTED:
            yield from argp.write(KVM_MCE_CAP_SUPPORTED.to_bytes(8, "little"))
            return 0
        case _ if request in UNMODELLED_ON_KVM:
            yield from argp.read(UNMODELLED_ON_KVM[request])
            raise Unmodelled(f"{IOCTL_NAMES[request]} on /dev/kvm")
        case _:
            raise KernelError(EINVAL, f"{ioctl_name(request)} on /dev/kvm")


def _msr_list(argp: UserPtr, indices: tuple[int, ...]) -> Steps[None]:
    """struct kvm_msr_list: how many there are is written in any case.  E2BIG."""
    room = int.from_bytes((yield from argp.read(4)), "little")
    yield from argp.write(len(indices).to_bytes(4, "little"))
    if room < len(indices):
        raise KernelError(E2BIG, f"room for {room} of {len(indices)} MSRs")
    yield from argp.write(b"".join(index.to_bytes(4, "little") for index in indices), 4)


def _get_supported_cpuid(proc: "Process", argp: UserPtr) -> Steps[None]:
    """kvm_dev_ioctl_get_cpuid(): E2BIG where the caller has too little room, else how many
    there are."""
    room = int.from_bytes((yield from argp.read(4)), "little")
    entries = kvm_get_supported_cpuid(proc.linux)
    if room < 1 or room < len(entries):
        raise KernelError(E2BIG, f"room for {room} of {len(entries)} CPUID entries")
    records = b"".join(map(bytes, entries))
    yield from argp.write(len(entries).to_bytes(8, "little") + records)


def _get_attr(proc: "Process", attr: KvmDeviceAttr) -> int:
    """__kvm_x86_dev_get_attr(); group 0 is generic x86, the others the vendor's."""
    if attr.group:
        return proc.linux.kvm_x86_ops.dev_get_attr(attr.group, attr.attr)
    if attr.attr == 0:
        return kvm_supported_xcr0(proc.linux)
    raise KernelError(ENXIO, f"attribute {attr.attr} of group 0")
