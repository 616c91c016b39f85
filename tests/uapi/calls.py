"""The KVM calls that tests make, on any softcvm.Sys, with every argument at hand and defaults
that succeed."""

import errno
from collections.abc import Callable
from contextlib import suppress

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KvmCreateGuestMemfd,
    KvmMemoryAttributes,
    KvmPreFaultMemory,
    KvmUserspaceMemoryRegion2,
    VmType,
)
from softcvm.abi.kvm.vcpu import KvmEnableCap
from softcvm.abi.sys import Sys

PAGE = 4096
MIB = 1 << 20
GUEST_MEMFD = 4
_NOT_IN_PYTHON = {133: "EHWPOISON"}
PRIVATE = 8
KEEP_SIZE, PUNCH_HOLE = 1, 2
RW, SHARED, PRIVATE_ANON = 3, 1, 0x22


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno a call fails with, "0" when it succeeds."""
    try:
        call()
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return "EOPNOTSUPP"  # Python knows 95 by its other name
        return errno.errorcode.get(error.errno or 0) or _NOT_IN_PYTHON[error.errno or 0]
    return "0"


def anon(sys: Sys, size: int) -> int:
    """Fresh anonymous memory."""
    return sys.mmap(size, RW, PRIVATE_ANON)


class VmCalls:
    """One VM of a process."""

    def __init__(self, sys: Sys, vm_type: int = VmType.SW_PROTECTED) -> None:
        self.sys = sys
        self.kvm = sys.open("/dev/kvm")
        self.fd = sys.ioctl(self.kvm, k.KVM_CREATE_VM, vm_type)
        self.fds: list[int] = []

    def gmem(self, size: int = 4 * MIB, flags: int = 0) -> int:
        args = bytearray(KvmCreateGuestMemfd.SIZE)
        args[0:8] = (size & (1 << 64) - 1).to_bytes(8, "little")
        args[8:16] = flags.to_bytes(8, "little")
        fd = self.sys.ioctl(self.fd, k.KVM_CREATE_GUEST_MEMFD, args)
        self.fds.append(fd)
        return fd

    def region(
        self,
        slot: int = 0,
        gpa: int = 0,
        size: int = MIB,
        hva: int = 0,
        flags: int = 0,
        gmem: int = 0,
        offset: int = 0,
        *,
        v1: bool = False,
    ) -> None:
        region = KvmUserspaceMemoryRegion2(
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=hva,
            guest_memfd_offset=offset,
            guest_memfd=gmem & 0xFFFF_FFFF,
        )
        if v1:
            self.sys.ioctl(self.fd, k.KVM_SET_USER_MEMORY_REGION, region.data[:32])
        else:
            self.sys.ioctl(self.fd, k.KVM_SET_USER_MEMORY_REGION2, region.data)

    def private_slot(
        self, slot: int = 0, gpa: int = 0, size: int = 4 * MIB, gmem: int | None = None
    ) -> int:
        """A slot with both backings, all of it private; the gmem's fd."""
        fd = self.gmem(size) if gmem is None else gmem
        self.region(slot, gpa, size, anon(self.sys, size), GUEST_MEMFD, fd)
        self.attributes(gpa, size, PRIVATE)
        return fd

    def attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> None:
        args = KvmMemoryAttributes(address=gpa, size=size, attributes=attributes, flags=flags)
        self.sys.ioctl(self.fd, k.KVM_SET_MEMORY_ATTRIBUTES, args.data)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        told = KvmEnableCap(cap=cap, flags=flags)
        for name, value in zip(("arg0", "arg1", "arg2", "arg3"), args, strict=False):
            setattr(told, name, value)
        self.sys.ioctl(self.fd, k.KVM_ENABLE_CAP, told.data)

    def vcpu(self, vcpu_id: int = 0) -> int:
        fd = self.sys.ioctl(self.fd, k.KVM_CREATE_VCPU, vcpu_id)
        self.fds.append(fd)
        return fd

    def prefault(self, vcpu: int, gpa: int, size: int, flags: int = 0) -> tuple[str, int, int]:
        """(errno, gpa and size as they come back)."""
        args = KvmPreFaultMemory(gpa=gpa, size=size, flags=flags)
        buffer = bytearray(args.data)
        failed = errno_of(lambda: self.sys.ioctl(vcpu, k.KVM_PRE_FAULT_MEMORY, buffer))
        back = KvmPreFaultMemory(buffer)
        return failed, back.gpa, back.size

    def close(self) -> None:
        for fd in [*self.fds, self.fd, self.kvm]:
            with suppress(OSError):
                self.sys.close(fd)
