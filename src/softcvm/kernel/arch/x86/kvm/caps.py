"""Capabilities: KVM_CHECK_EXTENSION on x86 (virt/kvm/kvm_main.c,
arch/x86/kvm/x86.c; v7.2).

The answer is the kernel's, also where the model refuses the feature once it is used.  A number that no header knows is 0,
as in Linux.  What KVM_ENABLE_CAP does is enable_cap.py.
"""

from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KVM_HC_MAP_GPA_RANGE, KvmDirtyGfn
from softcvm.kernel.arch.x86.kvm.svm.nested import NESTED_STATE_SIZE
from softcvm.kernel.virt.kvm.dirty_ring import KVM_DIRTY_RING_MAX_ENTRIES
from softcvm.kernel.virt.kvm.guest_memfd import kvm_gmem_supported_flags
from softcvm.kernel.virt.kvm.kvm_main import (
    KVM_MAX_VCPU_IDS,
    KVM_MAX_VCPUS,
    kvm_supported_vm_types,
)
from softcvm.kernel.virt.kvm.mem_attributes import kvm_supported_mem_attributes
from softcvm.kernel.virt.kvm.memslots import KVM_USER_MEM_SLOTS, nr_memslot_as_ids

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = ("QUIRKS", "kvm_vm_ioctl_check_extension")

_ALWAYS_ONE = frozenset(
    {
        k.KVM_CAP_USER_MEMORY,
        k.KVM_CAP_USER_MEMORY2,
        k.KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
        k.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS,
        k.KVM_CAP_INTERNAL_ERROR_DATA,
        k.KVM_CAP_SIGNAL_MSI,
        k.KVM_CAP_IRQFD,
        k.KVM_CAP_IOEVENTFD_ANY_LENGTH,
        k.KVM_CAP_CHECK_EXTENSION_VM,
        k.KVM_CAP_ENABLE_CAP_VM,
        k.KVM_CAP_HALT_POLL,
        k.KVM_CAP_COALESCED_PIO,
        k.KVM_CAP_BINARY_STATS_FD,
        k.KVM_CAP_SYSTEM_EVENT_DATA,
        k.KVM_CAP_DEVICE_CTRL,
        k.KVM_CAP_IRQCHIP,
        k.KVM_CAP_HLT,
        k.KVM_CAP_MMU_SHADOW_CACHE_CONTROL,
        k.KVM_CAP_SET_TSS_ADDR,
        k.KVM_CAP_EXT_CPUID,
        k.KVM_CAP_EXT_EMUL_CPUID,
        k.KVM_CAP_CLOCKSOURCE,
        k.KVM_CAP_PIT,
        k.KVM_CAP_NOP_IO_DELAY,
        k.KVM_CAP_MP_STATE,
        k.KVM_CAP_SYNC_MMU,
        k.KVM_CAP_USER_NMI,
        k.KVM_CAP_REINJECT_CONTROL,
        k.KVM_CAP_IRQ_INJECT_STATUS,
        k.KVM_CAP_IOEVENTFD,
        k.KVM_CAP_IOEVENTFD_NO_LENGTH,
        k.KVM_CAP_PIT2,
        k.KVM_CAP_PIT_STATE2,
        k.KVM_CAP_SET_IDENTITY_MAP_ADDR,
        k.KVM_CAP_VCPU_EVENTS,
        k.KVM_CAP_PCI_SEGMENT,
        k.KVM_CAP_DEBUGREGS,
        k.KVM_CAP_X86_ROBUST_SINGLESTEP,
        k.KVM_CAP_XSAVE,
        k.KVM_CAP_XCRS,
        k.KVM_CAP_ASYNC_PF,
        k.KVM_CAP_ASYNC_PF_INT,
        k.KVM_CAP_GET_TSC_KHZ,
        k.KVM_CAP_KVMCLOCK_CTRL,
        k.KVM_CAP_IOAPIC_POLARITY_IGNORED,
        k.KVM_CAP_TSC_DEADLINE_TIMER,
        k.KVM_CAP_DISABLE_QUIRKS,
        k.KVM_CAP_SET_BOOT_CPU_ID,
        k.KVM_CAP_SPLIT_IRQCHIP,
        k.KVM_CAP_IMMEDIATE_EXIT,
        k.KVM_CAP_PMU_EVENT_FILTER,
        k.KVM_CAP_PMU_EVENT_MASKED_EVENTS,
        k.KVM_CAP_GET_MSR_FEATURES,
        k.KVM_CAP_MSR_PLATFORM_INFO,
        k.KVM_CAP_EXCEPTION_PAYLOAD,
        k.KVM_CAP_X86_TRIPLE_FAULT_EVENT,
        k.KVM_CAP_SET_GUEST_DEBUG,
        k.KVM_CAP_X86_USER_SPACE_MSR,
        k.KVM_CAP_X86_MSR_FILTER,
        k.KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        k.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM,
        k.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM,
        k.KVM_CAP_SREGS2,
        k.KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        k.KVM_CAP_VCPU_ATTRIBUTES,
        k.KVM_CAP_SYS_ATTRIBUTES,
        k.KVM_CAP_VAPIC,
        k.KVM_CAP_ENABLE_CAP,
        k.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES,
        k.KVM_CAP_IRQFD_RESAMPLE,
        k.KVM_CAP_MEMORY_FAULT_INFO,
        k.KVM_CAP_X86_GUEST_MODE,
        k.KVM_CAP_PRE_FAULT_MEMORY,  # tdp_enabled
        k.KVM_CAP_LAST_CPU,
    }
)
_CONSTANT = {
    k.KVM_CAP_COALESCED_MMIO: 2,  # page offset of the ring
    k.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    k.KVM_CAP_IRQ_ROUTING: 4096,
    k.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPUS,
    k.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
    k.KVM_CAP_EXIT_HYPERCALL: 1 << KVM_HC_MAP_GPA_RANGE,
    k.KVM_CAP_MCE: 32,
    k.KVM_CAP_PV_MMU: 0,
    k.KVM_CAP_XSAVE2: 4096,
    k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 3,
    k.KVM_CAP_DIRTY_LOG_RING: KVM_DIRTY_RING_MAX_ENTRIES * KvmDirtyGfn.SIZE,
    k.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: KVM_DIRTY_RING_MAX_ENTRIES * KvmDirtyGfn.SIZE,
    k.KVM_CAP_SET_GUEST_DEBUG2: 0x1F0003,
    k.KVM_CAP_ADJUST_CLOCK: 0xE,  # KVM_CLOCK_VALID_FLAGS
    k.KVM_CAP_X86_APIC_BUS_CYCLES_NS: 1,  # APIC_BUS_CYCLE_NS_DEFAULT
    k.KVM_CAP_TSC_CONTROL: 1,  # TscRateMsr
    k.KVM_CAP_VM_TSC_CONTROL: 1,
    k.KVM_CAP_STEAL_TIME: 1,  # CONFIG_SCHED_INFO
    k.KVM_CAP_X86_BUS_LOCK_EXIT: 0,  # not of AMD's processors before bus lock threshold
    k.KVM_CAP_PMU_CAPABILITY: 0,  # kvm.enable_pmu=N
    k.KVM_CAP_X86_SMM: 0,  # a kernel without CONFIG_KVM_SMM
    k.KVM_CAP_XEN_HVM: 0,  # nor CONFIG_KVM_XEN
    k.KVM_CAP_NESTED_STATE: NESTED_STATE_SIZE,  # with nested=0 too
    k.KVM_CAP_X86_DISABLE_EXITS: 0xF,  # MWAIT, HLT, PAUSE, CSTATE
}
QUIRKS = sum(
    {
        k.KVM_X86_QUIRK_LINT0_REENABLED,
        k.KVM_X86_QUIRK_CD_NW_CLEARED,
        k.KVM_X86_QUIRK_LAPIC_MMIO_HOLE,
        k.KVM_X86_QUIRK_OUT_7E_INC_RIP,
        k.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT,
        k.KVM_X86_QUIRK_FIX_HYPERCALL_INSN,
        k.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS,
        k.KVM_X86_QUIRK_SLOT_ZAP_ALL,
        k.KVM_X86_QUIRK_STUFF_FEATURE_MSRS,
        1 << 10,  # VMCS12_ALLOW_FREEZE_IN_SMM (e2ffe85b6d2b, 2026, in stable kernels too)
    }
)
_SYNC_REGS = 7


def kvm_vm_ioctl_check_extension(linux: "Linux", kvm: "Kvm | None", cap: int) -> int:
    """KVM_CHECK_EXTENSION on /dev/kvm (kvm is None) or on a VM."""
    if cap in _ALWAYS_ONE:
        return 1
    if cap in _CONSTANT:
        return _CONSTANT[cap]
    private = kvm is None or kvm.arch.has_private_mem
    protected = kvm is not None and kvm.arch.has_protected_state
    match cap:
        case k.KVM_CAP_MULTI_ADDRESS_SPACE:
            return 2 if kvm is None else nr_memslot_as_ids(kvm)
        case k.KVM_CAP_MEMORY_ATTRIBUTES:
            return kvm_supported_mem_attributes(kvm)
        case k.KVM_CAP_GUEST_MEMFD:
            return int(private or linux.profile.gmem_mmap)
        case k.KVM_CAP_GUEST_MEMFD_FLAGS:
            return int(kvm_gmem_supported_flags(kvm, linux))
        case k.KVM_CAP_VM_TYPES:
            return kvm_supported_vm_types(linux)
        case k.KVM_CAP_NR_VCPUS:
            return min(linux.soc.profile.cpus, KVM_MAX_VCPUS)
        case k.KVM_CAP_READONLY_MEM:
            return int(not protected)
        case k.KVM_CAP_SYNC_REGS:
            return 0 if protected else _SYNC_REGS
        case k.KVM_CAP_DISABLE_QUIRKS2:
            return QUIRKS
        case k.KVM_CAP_ONE_REG:
            return int(linux.profile.x86_one_reg)
        case k.KVM_CAP_X2APIC_API:
            return _x2apic_api(linux, kvm)
        case _:
            return 0


def _x2apic_api(linux: "Linux", kvm: "Kvm | None") -> int:
    """Flags of KVM_CAP_X2APIC_API; suppressing EOI broadcasts takes an I/O APIC in user
    space."""
    if not linux.profile.x2apic_suppress_eoi:
        return 3
    return 15 if kvm is None or kvm.arch.irqchip_split else 11
