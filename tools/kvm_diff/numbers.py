"""Numbers worth passing: the edges of every check, and what kernels must refuse.

None of them makes a kernel allocate much: sizes that pass every check are small, large ones are
refused before anything is allocated, or closed at once.
"""

from softcvm.abi.kvm import _generated_kvm as k

__all__ = (
    "BAD_GMEM_OFFSETS",
    "BAD_GPAS",
    "BAD_HVAS",
    "BAD_SLOTS",
    "BAD_SLOT_FLAGS",
    "BAD_SLOT_SIZES",
    "CAPS",
    "ENABLE_CAPS",
    "FALLOC_MODES",
    "GMEM_SIZES",
    "HOST_DECIDES",
    "LENGTHS",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_OFFSETS",
    "NO_CAPS",
    "OFFSETS",
    "U32",
    "U64",
    "VCPU_IDS",
    "WRONG_IOCTLS",
)

PAGE = 4096
S64 = 1 << 63
U32 = (1, 2, 1 << 31, (1 << 32) - 1)
U64 = (0, 1, 0xFFFF, 1 << 31, 1 << 32, S64 - 1, S64, 2 * S64 - 1)
MAP_FIXED, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x10, 0x20, 0x100000

GMEM_SIZES = (0, 1, PAGE - 1, PAGE + 1, 1 << 40, S64 - PAGE, S64, S64 + PAGE, 2 * S64 - PAGE)
FALLOC_MODES = (
    *(0, 2, 4, 5, 6, 8, 9, 0xB, 0x10, 0x11, 0x13, 0x20, 0x21, 0x40, 0x41, 0x80, 0x81),
    *(0x100, 0x103, 1 << 30, -1),
)
OFFSETS = (-PAGE, -1, 1, PAGE - 1, S64 - PAGE, S64 - 1, -S64)
LENGTHS = (-PAGE, -1, 0, 1, PAGE + 1, 1 << 40, S64 - PAGE, S64 - 1, -S64)
MAP_OFFSETS = (1, -PAGE, 1 << 40, S64 - PAGE, S64 - 2 * PAGE, -S64)

VCPU_IDS = (4095, 4096, 1 << 31, 1 << 32, (1 << 64) - 1)
BAD_SLOTS = (32764, 32766, 32767, 0xFFFF, 2 << 16, 0xFFFF_0000, 0xFFFF_FFFF)
BAD_SLOT_FLAGS = (5, 6, 7, 8, 16, 1 << 15, 1 << 16, 1 << 17, 1 << 31, 0xFFFF_FFFF)
BAD_GPAS = (1, PAGE - 1, PAGE + 1, S64, 2 * S64 - PAGE, 1 << 52, 1 << 60)
BAD_SLOT_SIZES = (1, PAGE - 1, PAGE + 1, 1 << 43, 1 << 46, 1 << 47, S64, 2 * S64 - PAGE)
BAD_HVAS = (1, (1 << 47) - PAGE, 1 << 47, S64, 2 * S64 - PAGE, 1 << 57)
BAD_GMEM_OFFSETS = (1, PAGE + 1, 32 * PAGE, 1 << 40, S64 - PAGE, S64, 2 * S64 - PAGE)

CAPS = tuple(
    sorted(
        {
            value
            for name, value in vars(k).items()
            if name.startswith("KVM_CAP_") and isinstance(value, int)
        }
    )
)
HOST_DECIDES = (
    k.KVM_CAP_ADJUST_CLOCK,
    k.KVM_CAP_NESTED_STATE,
    k.KVM_CAP_NR_VCPUS,
    k.KVM_CAP_PMU_CAPABILITY,
    k.KVM_CAP_SMALLER_MAXPHYADDR,
    k.KVM_CAP_STEAL_TIME,
    k.KVM_CAP_TSC_CONTROL,
    k.KVM_CAP_VM_TSC_CONTROL,
    k.KVM_CAP_VM_TYPES,
    k.KVM_CAP_X86_APIC_BUS_CYCLES_NS,
    k.KVM_CAP_X86_BUS_LOCK_EXIT,
    k.KVM_CAP_X86_DISABLE_EXITS,
    k.KVM_CAP_X86_SMM,
    k.KVM_CAP_XEN_HVM,
)
"""Answers that follow from hardware, module parameters or the kernel's configuration."""
NO_CAPS = (0, 8, 13, 99999, 1 << 31, 1 << 32, (1 << 64) - 1)

ENABLE_CAPS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (k.KVM_CAP_EXIT_HYPERCALL, (0, 1 << 12, 1, 1 << 13, (1 << 64) - 1)),
    (k.KVM_CAP_DISABLE_QUIRKS2, (0, 1, 1 << 7, 1 << 40)),
    (k.KVM_CAP_DISABLE_QUIRKS, (0, 1, 1 << 7)),
    (k.KVM_CAP_SPLIT_IRQCHIP, (0, 24, 4096, 4097, 1 << 40)),
    (k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, (0, 1, 3, 3, 2, 4, 1 << 32)),
    (k.KVM_CAP_DIRTY_LOG_RING, (PAGE, 0, 16, 3 * PAGE, 1 << 21)),
    (k.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, (2 * PAGE, 2 * PAGE, 1 << 40, 1 << 31)),
    (12345, (0, 1)),
)

# (request, argument); None: whatever.  A vCPU given KVM_RUN with an argument does not run.
WRONG_IOCTLS: tuple[tuple[str, int | None], ...] = (
    ("RUN", 1),
    ("GET_API_VERSION", None),
    ("CREATE_VM", 99),
    ("SET_USER_MEMORY_REGION", None),
    ("SET_USER_MEMORY_REGION2", None),
    ("SET_REGS", None),
)
