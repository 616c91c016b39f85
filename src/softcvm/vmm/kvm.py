"""/dev/kvm, a VM and its vCPUs as a VMM sees them: each ioctl that this VMM uses, by its name.

Nothing here decides anything: structures go in, and a failure is a VmmError that names the ioctl.
Structures that a command points at lie in a scratch page of the process, since an address means something
only there.
"""

from errno import E2BIG
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from types import TracebackType
from typing import Self, TypeVar

from softcvm.abi.kvm import _generated_kvm as nr
from softcvm.abi.kvm.memory import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KvmCreateGuestMemfd,
    KvmMemoryAttributes,
    KvmPreFaultMemory,
    KvmUserspaceMemoryRegion2,
    VmType,
)
from softcvm.abi.kvm.run import KvmRun
from softcvm.abi.kvm.vcpu import KvmCpuidEntry2, KvmEnableCap
from softcvm.abi.layout import Layout
from softcvm.abi.sev import KvmSevCmd, SevCmdId
from softcvm.abi.sys import Sys
from softcvm.sim.addr import PAGE_SIZE
from softcvm.vmm.cpuid import entries
from softcvm.vmm.errors import VmmError, call_failed

__all__ = ("Kvm", "Vcpu", "Vm")

_CPUID_ROOM = 64

_L = TypeVar("_L", bound=Layout)


class _Fd:
    """An open file and its ioctls."""

    def __init__(self, sys: Sys, fd: int) -> None:
        self.sys = sys
        self.fd = fd

    def ioctl(self, name: str, arg: int | bytearray = 0) -> int:
        try:
            return self.sys.ioctl(self.fd, getattr(nr, name), arg)
        except OSError as error:
            raise call_failed(name, error) from error

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.sys.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Kvm(_Fd):
    """/dev/kvm."""

    API_VERSION = 12

    def __init__(self, sys: Sys) -> None:
        try:
            super().__init__(sys, sys.open("/dev/kvm"))
        except OSError as error:
            raise call_failed("/dev/kvm", error) from error

    def check_version(self) -> None:
        version = self.ioctl("KVM_GET_API_VERSION")
        if version != self.API_VERSION:
            raise VmmError(f"/dev/kvm speaks API version {version}, not {self.API_VERSION}")

    def extension(self, cap: str) -> int:
        return self.ioctl("KVM_CHECK_EXTENSION", getattr(nr, cap))

    def supported_cpuid(self) -> list[KvmCpuidEntry2]:
        """KVM_GET_SUPPORTED_CPUID, with as much room as it takes."""
        room = _CPUID_ROOM
        while True:
            buffer = _cpuid2([KvmCpuidEntry2()] * room)
            try:
                self.sys.ioctl(self.fd, nr.KVM_GET_SUPPORTED_CPUID, buffer)
            except OSError as error:
                if error.errno != E2BIG:
                    raise call_failed("KVM_GET_SUPPORTED_CPUID", error) from error
                room *= 2
            else:
                return entries(bytes(buffer))

    def create_vm(self, vm_type: VmType) -> "Vm":
        return Vm(self.sys, self.ioctl("KVM_CREATE_VM", vm_type))


class Vm(_Fd):
    """A VM.  sev_fd: /dev/sev, which the SEV commands name."""

    def __init__(self, sys: Sys, fd: int) -> None:
        super().__init__(sys, fd)
        self._scratch = sys.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.sev_fd = -1

    def close(self) -> None:
        if self.fd >= 0:
            self.sys.munmap(self._scratch, PAGE_SIZE)
        super().close()

    def extension(self, cap: str) -> int:
        return self.ioctl("KVM_CHECK_EXTENSION", getattr(nr, cap))

    def enable_cap(self, cap: str, *args: int) -> None:
        fields = {f"arg{i}": arg for i, arg in enumerate(args)}
        self.ioctl("KVM_ENABLE_CAP", KvmEnableCap(None, cap=getattr(nr, cap), **fields).data)

    def create_guest_memfd(self, size: int) -> int:
        return self.ioctl("KVM_CREATE_GUEST_MEMFD", KvmCreateGuestMemfd(size=size).data)

    def set_user_memory_region2(self, region: KvmUserspaceMemoryRegion2) -> None:
        self.ioctl("KVM_SET_USER_MEMORY_REGION2", region.data)

    def set_private(self, gpa: int, size: int, private: bool) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        request = KvmMemoryAttributes(address=gpa, size=size, attributes=attributes)
        self.ioctl("KVM_SET_MEMORY_ATTRIBUTES", request.data)

    def create_vcpu(self, vcpu_id: int, mmap_size: int) -> "Vcpu":
        return Vcpu(self.sys, self.ioctl("KVM_CREATE_VCPU", vcpu_id), vcpu_id, mmap_size)

    def sev(self, command: SevCmdId, argument: _L) -> _L:
        """KVM_MEMORY_ENCRYPT_OP; the argument as the kernel left it."""
        self.sys.store(self._scratch, bytes(argument))
        cmd = KvmSevCmd(id=command, data_ptr=self._scratch, sev_fd=self.sev_fd)
        try:
            self.sys.ioctl(self.fd, nr.KVM_MEMORY_ENCRYPT_OP, cmd.data)
        except OSError as error:
            failed = call_failed(f"KVM_SEV_{command.name}", error)
            raise VmmError(f"{failed}, firmware status {cmd.error:#x}", failed.errno) from error
        return type(argument)(self.sys.load(self._scratch, argument.SIZE))


class Vcpu(_Fd):
    """A vCPU with its kvm_run page."""

    def __init__(self, sys: Sys, fd: int, vcpu_id: int, mmap_size: int) -> None:
        super().__init__(sys, fd)
        self.vcpu_id = vcpu_id
        self._mmap_size = mmap_size
        self.run_page = sys.mmap(mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd)

    def close(self) -> None:
        if self.fd >= 0:
            self.sys.munmap(self.run_page, self._mmap_size)
        super().close()

    def set(self, name: str, registers: Layout) -> None:
        """KVM_SET_REGS and the like."""
        self.ioctl(name, registers.data)

    def set_cpuid2(self, told: list[KvmCpuidEntry2]) -> None:
        self.ioctl("KVM_SET_CPUID2", _cpuid2(told))

    def run(self) -> int:
        """KVM_RUN; 0, or the errno that came with a filled kvm_run."""
        try:
            return self.sys.ioctl(self.fd, nr.KVM_RUN, 0)
        except OSError as error:
            return error.errno or 0

    def exit(self) -> KvmRun:
        """kvm_run as the last KVM_RUN left it."""
        return KvmRun(self.sys.load(self.run_page, KvmRun.SIZE))

    def answer(self, offset: int, value: bytes) -> None:
        """Write into kvm_run, or into the I/O data behind it."""
        self.sys.store(self.run_page + offset, value)

    def data(self, offset: int, length: int) -> bytes:
        return self.sys.load(self.run_page + offset, length)

    def pre_fault(self, gpa: int, size: int) -> None:
        """KVM_PRE_FAULT_MEMORY until all of it is mapped."""
        request = KvmPreFaultMemory(gpa=gpa, size=size)
        while request.size:
            self.ioctl("KVM_PRE_FAULT_MEMORY", request.data)


def _cpuid2(records: list[KvmCpuidEntry2]) -> bytearray:
    """struct kvm_cpuid2: a count, padding, the records."""
    return bytearray(len(records).to_bytes(8, "little") + b"".join(map(bytes, records)))
