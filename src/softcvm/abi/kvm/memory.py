"""Structures of the ioctls on a VM's memory.  [include/uapi/linux/kvm.h v6.12]

Offsets are checked against a C compiler by tests/abi/test_kvm_sizes.py.
"""

from enum import IntEnum, IntFlag

from softcvm.abi.layout import U32, U64, Bytes, Layout

__all__ = (
    "KVM_DIRTY_GFN_F_DIRTY",
    "KVM_DIRTY_GFN_F_RESET",
    "KVM_DIRTY_LOG_INITIALLY_SET",
    "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE",
    "KVM_DIRTY_LOG_PAGE_OFFSET",
    "KVM_HC_MAP_GPA_RANGE",
    "KVM_LINK_GUEST_MEMFD",
    "KVM_MEMORY_ATTRIBUTE_PRIVATE",
    "GmemFlag",
    "KvmClearDirtyLog",
    "KvmCreateGuestMemfd",
    "KvmDirtyGfn",
    "KvmDirtyLog",
    "KvmEncRegion",
    "KvmLinkGuestMemfd",
    "KvmMemoryAttributes",
    "KvmPreFaultMemory",
    "KvmUserspaceMemoryRegion",
    "KvmUserspaceMemoryRegion2",
    "MapGpaRange",
    "MemFlag",
    "VmType",
)

KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3
KVM_HC_MAP_GPA_RANGE = 12
KVM_LINK_GUEST_MEMFD = 0xC040_AED6
"""Proposed, in no release: "New KVM ioctl to link a gmem inode to a new gmem file", RFC v2, May 2025."""


class VmType(IntEnum):
    """Argument of KVM_CREATE_VM on x86."""

    DEFAULT = 0
    SW_PROTECTED = 1
    SEV = 2
    SEV_ES = 3
    SNP = 4
    TDX = 5  # 6.16


class MemFlag(IntFlag):
    """kvm_userspace_memory_region2.flags."""

    LOG_DIRTY_PAGES = 1 << 0
    READONLY = 1 << 1
    GUEST_MEMFD = 1 << 2


class GmemFlag(IntFlag):
    """kvm_create_guest_memfd.flags, Linux 6.18."""

    MMAP = 1 << 0
    INIT_SHARED = 1 << 1


class MapGpaRange(IntFlag):
    """args[2] of KVM_HC_MAP_GPA_RANGE.  [include/uapi/linux/kvm_para.h]"""

    PAGE_SZ_4K = 0
    PAGE_SZ_2M = 1 << 0
    PAGE_SZ_1G = 1 << 1
    ENCRYPTED = 1 << 4


class KvmUserspaceMemoryRegion(Layout, size=32):
    slot = U32(0)
    flags = U32(4)
    guest_phys_addr = U64(8)
    memory_size = U64(16)
    userspace_addr = U64(24)


class KvmUserspaceMemoryRegion2(Layout, size=160):
    slot = U32(0)
    flags = U32(4)
    guest_phys_addr = U64(8)
    memory_size = U64(16)
    userspace_addr = U64(24)
    guest_memfd_offset = U64(32)
    guest_memfd = U32(40)
    pad1 = U32(44)
    pad2 = Bytes(48, 112)


class KvmCreateGuestMemfd(Layout, size=64):
    size = U64(0)
    flags = U64(8)
    reserved = Bytes(16, 48)


class KvmLinkGuestMemfd(Layout, size=64):
    """Proposed, as the ioctl."""

    fd = U64(0)
    flags = U64(8)
    reserved = Bytes(16, 48)


class KvmMemoryAttributes(Layout, size=32):
    address = U64(0)
    size = U64(8)
    attributes = U64(16)
    flags = U64(24)


class KvmPreFaultMemory(Layout, size=64):
    gpa = U64(0)
    size = U64(8)
    flags = U64(16)
    padding = Bytes(24, 40)


class KvmEncRegion(Layout, size=16):
    addr = U64(0)
    size = U64(8)


KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
"""Arguments of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""


KVM_DIRTY_LOG_PAGE_OFFSET = 64
"""Page of the vCPU's fd at which its dirty ring begins, on x86."""
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1


class KvmDirtyGfn(Layout, size=16):
    """One entry of a dirty ring."""

    flags = U32(0)
    slot = U32(4)
    offset = U64(8)


class KvmDirtyLog(Layout, size=16):
    slot = U32(0)
    padding1 = U32(4)
    dirty_bitmap = U64(8)


class KvmClearDirtyLog(Layout, size=24):
    slot = U32(0)
    num_pages = U32(4)
    first_page = U64(8)
    dirty_bitmap = U64(16)
