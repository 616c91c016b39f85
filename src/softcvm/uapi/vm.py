"""ioctls on a VM's fd (kvm_vm_ioctl(), virt/kvm/kvm_main.c; kvm_arch_vm_ioctl(),
arch/x86/kvm/x86.c; v7.2).

Before anything else: only the process whose address space created the VM may use it, and a dead
VM answers EIO.
"""

from errno import EBUSY, EEXIST, EINVAL, EIO, ENOTTY
from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KVM_LINK_GUEST_MEMFD,
    KvmClearDirtyLog,
    KvmCreateGuestMemfd,
    KvmDirtyLog,
    KvmEncRegion,
    KvmLinkGuestMemfd,
    KvmMemoryAttributes,
    KvmUserspaceMemoryRegion,
    KvmUserspaceMemoryRegion2,
    MemFlag,
)
from softcvm.abi.kvm.vcpu import KvmEnableCap, KvmMsrFilter
from softcvm.kernel.arch.x86.kvm.caps import kvm_vm_ioctl_check_extension
from softcvm.kernel.arch.x86.kvm.enable_cap import kvm_vm_ioctl_enable_cap
from softcvm.kernel.arch.x86.kvm.msr_filter import kvm_set_msr_filter
from softcvm.kernel.arch.x86.kvm.tsc import kvm_set_default_tsc_khz
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.kernel.virt.kvm.coalesced_mmio import (
    kvm_vm_ioctl_register_coalesced_mmio,
    kvm_vm_ioctl_unregister_coalesced_mmio,
)
from softcvm.kernel.virt.kvm.dirty_log import (
    kvm_vm_ioctl_clear_dirty_log,
    kvm_vm_ioctl_get_dirty_log,
    kvm_vm_ioctl_reset_dirty_pages,
)
from softcvm.kernel.virt.kvm.guest_memfd import kvm_gmem_create, kvm_gmem_link
from softcvm.kernel.virt.kvm.kvm_main import KVM_MAX_VCPU_IDS, Kvm, kvm_create_vcpu
from softcvm.kernel.virt.kvm.mem_attributes import kvm_vm_ioctl_set_mem_attributes
from softcvm.kernel.virt.kvm.memslots import (
    kvm_vm_ioctl_set_memory_region,
)
from softcvm.kernel.virt.kvm.stats import kvm_get_stats_fd
from softcvm.sim.steps import Steps
from softcvm.uapi.numbers import ioctl_name
from softcvm.uapi.unmodelled import UNMODELLED_ON_VM, unmodelled_vm_ioctl

if TYPE_CHECKING:
    from softcvm.kernel.task import Process

__all__ = ("check_usable", "kvm_vm_ioctl")

_TSS_ADDR_MAX = (1 << 32) - 3 * 4096
_MIN_ALLOC_MMU_PAGES = 64
_V1_FLAGS = int(MemFlag.LOG_DIRTY_PAGES | MemFlag.READONLY)


def check_usable(kvm: Kvm, proc: "Process") -> None:
    """The blanket rule before every ioctl on a VM or vCPU.  EIO."""
    if kvm.mm is not proc.mm:
        raise KernelError(EIO, f"VM {kvm.id} belongs to another address space")
    if kvm.vm_dead:
        raise KernelError(EIO, f"VM {kvm.id} is dead")


def kvm_vm_ioctl(
    kvm: Kvm, proc: "Process", request: int, arg: int, argp: UserPtr
) -> Steps[int]:
    """ENOTTY for what is no VM ioctl."""
    check_usable(kvm, proc)
    match request:
        case k.KVM_CREATE_VCPU:
            return (yield from kvm_create_vcpu(kvm, proc, arg))
        case k.KVM_CHECK_EXTENSION:
            return kvm_vm_ioctl_check_extension(kvm.linux, kvm, arg)
        case k.KVM_ENABLE_CAP:
            cap = KvmEnableCap((yield from argp.read(KvmEnableCap.SIZE)))
            return (yield from kvm_vm_ioctl_enable_cap(kvm, proc, cap))
        case k.KVM_SET_USER_MEMORY_REGION | k.KVM_SET_USER_MEMORY_REGION2:
            yield from _set_user_memory_region(kvm, proc, request, argp)
        case k.KVM_GET_DIRTY_LOG:
            log = KvmDirtyLog((yield from argp.read(KvmDirtyLog.SIZE)))
            yield from kvm_vm_ioctl_get_dirty_log(kvm, proc.mm, log)
        case k.KVM_CLEAR_DIRTY_LOG:
            clear = KvmClearDirtyLog((yield from argp.read(KvmClearDirtyLog.SIZE)))
            yield from kvm_vm_ioctl_clear_dirty_log(kvm, proc.mm, clear)
        case k.KVM_RESET_DIRTY_RINGS:
            return (yield from kvm_vm_ioctl_reset_dirty_pages(kvm))
        case k.KVM_SET_MEMORY_ATTRIBUTES:
            attrs = KvmMemoryAttributes((yield from argp.read(KvmMemoryAttributes.SIZE)))
            yield from kvm_vm_ioctl_set_mem_attributes(kvm, attrs)
        case k.KVM_CREATE_GUEST_MEMFD:
            gmem = KvmCreateGuestMemfd((yield from argp.read(KvmCreateGuestMemfd.SIZE)))
            return kvm_gmem_create(kvm, proc, gmem.size, gmem.flags)
        case _ if request == KVM_LINK_GUEST_MEMFD and kvm.linux.profile.gmem_link:
            link = KvmLinkGuestMemfd((yield from argp.read(KvmLinkGuestMemfd.SIZE)))
            return kvm_gmem_link(kvm, proc, link.fd, link.flags)
        case k.KVM_MEMORY_ENCRYPT_OP:
            return (yield from kvm.ops.mem_enc_ioctl(kvm, proc, argp))
        case k.KVM_MEMORY_ENCRYPT_REG_REGION:
            region = KvmEncRegion((yield from argp.read(KvmEncRegion.SIZE)))
            return (
                yield from kvm.ops.mem_enc_register_region(kvm, proc, region.addr, region.size)
            )
        case k.KVM_MEMORY_ENCRYPT_UNREG_REGION:
            region = KvmEncRegion((yield from argp.read(KvmEncRegion.SIZE)))
            return (
                yield from kvm.ops.mem_enc_unregister_region(
                    kvm, proc, region.addr, region.size
                )
            )
        case k.KVM_CREATE_IRQCHIP:
            yield from _create_irqchip(kvm)
        case k.KVM_GET_TSC_KHZ:
            return kvm.arch.default_tsc_khz
        case k.KVM_SET_TSC_KHZ:
            kvm_set_default_tsc_khz(kvm, arg)
        case k.KVM_GET_STATS_FD:
            return kvm_get_stats_fd(kvm, None, proc)
        case k.KVM_X86_SET_MSR_FILTER:
            filter_ = KvmMsrFilter((yield from argp.read(KvmMsrFilter.SIZE)))
            yield from kvm_set_msr_filter(kvm, proc, filter_)
        case k.KVM_REGISTER_COALESCED_MMIO:
            yield from kvm_vm_ioctl_register_coalesced_mmio(kvm, (yield from argp.read(16)))
        case k.KVM_UNREGISTER_COALESCED_MMIO:
            yield from kvm_vm_ioctl_unregister_coalesced_mmio(kvm, (yield from argp.read(16)))
        case k.KVM_SET_BOOT_CPU_ID:
            yield from _set_boot_cpu_id(kvm, arg)
        case k.KVM_SET_TSS_ADDR:
            if arg > _TSS_ADDR_MAX:
                raise KernelError(EINVAL, f"TSS at {arg:#x}")
        case k.KVM_SET_IDENTITY_MAP_ADDR:
            yield from argp.read(8)
            if kvm.created_vcpus:
                raise KernelError(EINVAL, "vCPUs exist already")
        case k.KVM_SET_NR_MMU_PAGES:
            yield from _set_nr_mmu_pages(kvm, arg)
        case _ if request in UNMODELLED_ON_VM:
            return (yield from unmodelled_vm_ioctl(kvm, request, argp))
        case _:
            raise KernelError(ENOTTY, f"{ioctl_name(request)} on a VM")
    return 0


def _set_user_memory_region(
    kvm: Kvm, proc: "Process", request: int, argp: UserPtr
) -> Steps[None]:
    """The first version reads 32 bytes and knows two flags; the rest is the same call."""
    if request == k.KVM_SET_USER_MEMORY_REGION:
        size = KvmUserspaceMemoryRegion.SIZE
    else:
        size = KvmUserspaceMemoryRegion2.SIZE
    data = yield from argp.read(size)
    mem = KvmUserspaceMemoryRegion2(data.ljust(KvmUserspaceMemoryRegion2.SIZE, b"\0"))
    if request == k.KVM_SET_USER_MEMORY_REGION and mem.flags & ~_V1_FLAGS:
        raise KernelError(EINVAL, f"flags {mem.flags:#x} in KVM_SET_USER_MEMORY_REGION")
    yield from kvm_vm_ioctl_set_memory_region(kvm, proc, mem)


def _set_nr_mmu_pages(kvm: Kvm, pages: int) -> Steps[None]:
    """kvm_vm_ioctl_set_nr_mmu_pages().  EINVAL: fewer than KVM_MIN_ALLOC_MMU_PAGES."""
    if pages & (1 << 32) - 1 < _MIN_ALLOC_MMU_PAGES:
        raise KernelError(EINVAL, f"{pages} MMU pages")
    yield from kvm.slots_lock.acquire()
    kvm.arch.n_requested_mmu_pages = pages & (1 << 32) - 1
    kvm.slots_lock.release()


def _set_boot_cpu_id(kvm: Kvm, vcpu_id: int) -> Steps[None]:
    """EBUSY: vCPUs exist already.  EINVAL: above what their ids may be."""
    yield from kvm.lock.acquire()
    try:
        if kvm.created_vcpus:
            raise KernelError(EBUSY, "vCPUs exist already")
        if vcpu_id > (kvm.arch.max_vcpu_ids or KVM_MAX_VCPU_IDS):
            raise KernelError(EINVAL, f"boot processor {vcpu_id}")
        kvm.arch.bsp_vcpu_id = vcpu_id
    finally:
        kvm.lock.release()


def _create_irqchip(kvm: Kvm) -> Steps[None]:
    """KVM_CREATE_IRQCHIP.  # stored, no effect but on the first state of APs"""
    yield from kvm.lock.acquire()
    try:
        if kvm.arch.irqchip:
            raise KernelError(EEXIST, "there is an in-kernel irqchip")
        if kvm.created_vcpus:
            raise KernelError(EINVAL, "vCPUs exist already")
        kvm.arch.irqchip = True
    finally:
        kvm.lock.release()
