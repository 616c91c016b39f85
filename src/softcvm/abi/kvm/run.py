"""struct kvm_run: what a vCPU shares with its VMM.  [include/uapi/linux/kvm.h v6.12; newer
exits as marked]

The union at byte 32 is written out by exit, `<exit>_<field>`.  Offsets are checked against a C
compiler by tests/abi/test_kvm_sizes.py.
"""

from enum import IntEnum, IntFlag

from softcvm.abi.layout import U8, U16, U32, U64, Bytes, Layout

__all__ = (
    "KVM_RUN_MMAP_SIZE",
    "KVM_RUN_SIZE",
    "KvmExit",
    "KvmRun",
    "MemoryExitFlag",
    "SystemEvent",
)

KVM_RUN_SIZE = 2352
"""sizeof(struct kvm_run)."""
KVM_RUN_MMAP_SIZE = 3 * 4096
"""KVM_GET_VCPU_MMAP_SIZE on x86: kvm_run, the port I/O data page, the coalesced MMIO ring."""


class KvmExit(IntEnum):
    """exit_reason."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    NOTIFY = 37
    MEMORY_FAULT = 39
    TDX = 40  # 6.16
    SNP_REQ_CERTS = 43  # 7.0


class SystemEvent(IntEnum):
    """system_event.type."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    WAKEUP = 4
    SUSPEND = 5
    SEV_TERM = 6


class MemoryExitFlag(IntFlag):
    """memory_fault.flags: the access that was attempted, not what the page is."""

    PRIVATE = 1 << 3


class KvmRun(Layout, size=4096):
    """One page; struct kvm_run is its first 2352 bytes."""

    request_interrupt_window = U8(0)
    immediate_exit = U8(1)
    exit_reason = U32(8)
    ready_for_interrupt_injection = U8(12)
    if_flag = U8(13)
    flags = U16(14)
    cr8 = U64(16)
    apic_base = U64(24)

    union = Bytes(32, 256)
    hw_hardware_exit_reason = U64(32)
    fail_entry_hardware_entry_failure_reason = U64(32)
    fail_entry_cpu = U32(40)
    io_direction = U8(32)
    io_size = U8(33)
    io_port = U16(34)
    io_count = U32(36)
    io_data_offset = U64(40)
    mmio_phys_addr = U64(32)
    mmio_data = Bytes(40, 8)
    mmio_len = U32(48)
    mmio_is_write = U8(52)
    hypercall_nr = U64(32)
    hypercall_args = Bytes(40, 48)
    hypercall_ret = U64(88)
    hypercall_flags = U64(96)
    internal_suberror = U32(32)
    internal_ndata = U32(36)
    internal_data = Bytes(40, 128)
    system_event_type = U32(32)
    system_event_ndata = U32(36)
    system_event_data = Bytes(40, 128)
    msr_error = U8(32)
    msr_reason = U32(40)
    msr_index = U32(44)
    msr_data = U64(48)
    memory_fault_flags = U64(32)
    memory_fault_gpa = U64(40)
    memory_fault_size = U64(48)
    snp_req_certs_gpa = U64(32)  # 7.0
    snp_req_certs_npages = U64(40)
    snp_req_certs_ret = U64(48)

    kvm_valid_regs = U64(288)
    kvm_dirty_regs = U64(296)
    sync_regs = Bytes(304, 2048)
