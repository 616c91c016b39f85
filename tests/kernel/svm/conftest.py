"""A software host for tests of kvm_amd: boot Linux, open device nodes, launch small SNP guests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EFAULT

import pytest

from softcvm.abi.insn import Program
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KvmCreateGuestMemfd,
    KvmMemoryAttributes,
    KvmPreFaultMemory,
    KvmUserspaceMemoryRegion2,
    MemFlag,
    VmType,
)
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE, KvmRun
from softcvm.abi.kvm.vcpu import KvmEnableCap
from softcvm.abi.layout import Layout
from softcvm.abi.sev import (
    KvmSevCmd,
    KvmSevInit,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmSevSnpLaunchUpdate,
    SevCmdId,
)
from softcvm.hw.soc import Soc
from softcvm.kernel.host import Linux
from softcvm.kernel.virt.kvm.kvm_main import Kvm
from softcvm.machine import Machine
from softcvm.machine.process import MachineProcess
from softcvm.sim.addr import PAGE_SHIFT
from softcvm.sim.choice import Choices

PROT_RW, ANON_PRIVATE, SHARED = 3, 0x22, 1
POLICY = 0x30000
Guest = Callable[[int], Program]


@dataclass
class User:
    """What a user-space process does, by system call."""

    sys: MachineProcess

    def ioctl(self, fd: int, request: int, arg: int | Layout = 0) -> int:
        return self.sys.ioctl(fd, request, arg.data if isinstance(arg, Layout) else arg)

    def errno(self, fd: int, request: int, arg: int | Layout = 0) -> int:
        """The errno of an ioctl, 0 if it succeeds."""
        try:
            self.ioctl(fd, request, arg)
        except OSError as error:
            return error.errno or -1
        return 0

    def mmap(self, length: int, flags: int = ANON_PRIVATE, fd: int = -1) -> int:
        return self.sys.mmap(length, PROT_RW, flags, fd)


@dataclass
class Host:
    """One booted machine with a VMM's process on it."""

    machine: Machine
    user: User = field(init=False)
    dev_kvm: int = field(init=False)
    dev_sev: int = field(init=False)

    def __post_init__(self) -> None:
        self.user = User(self.machine.process())
        self.dev_kvm = self.user.sys.open("/dev/kvm")
        self.dev_sev = self.user.sys.open("/dev/sev")

    @property
    def linux(self) -> Linux:
        return self.machine.linux

    @property
    def soc(self) -> Soc:
        return self.linux.soc

    def guest(self, guest: Guest) -> None:
        """What the vCPUs of the VMs created from now on execute."""
        self.machine.vm_guest(guest)

    def vm(self, vm_type: VmType = VmType.SNP, *, init: bool = True) -> "Vm":
        vm = Vm(self, self.user.ioctl(self.dev_kvm, k.KVM_CREATE_VM, vm_type))
        if init:
            vm.op(SevCmdId.INIT2, KvmSevInit())
        return vm


@dataclass
class Vm:
    """A VM with one slot of private memory at GFN 0, once memory() has been called."""

    host: Host
    fd: int
    gmem: int = -1
    shared: int = 0
    npages: int = 0
    vcpus: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)

    @property
    def user(self) -> User:
        return self.host.user

    @property
    def kvm(self) -> Kvm:
        kvm = self.user.sys.proc.files.lookup(self.fd).private
        assert isinstance(kvm, Kvm)
        return kvm

    def sev_cmd(
        self,
        command: int,
        params: Layout | None = None,
        *,
        sev_fd: int | None = None,
        error: int = 0,
    ) -> tuple[int, KvmSevCmd]:
        """errno and the command as it came back; params come back too."""
        addr = 0
        if params is not None:
            addr = self.user.mmap(4096)
            self.user.sys.store(addr, bytes(params))
        cmd = KvmSevCmd(
            id=command,
            data_ptr=addr,
            error=error,
            sev_fd=self.host.dev_sev if sev_fd is None else sev_fd,
        )
        errno = self.user.errno(self.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd)
        if params is not None:
            params.data[:] = self.user.sys.load(addr, params.SIZE)
            self.user.sys.munmap(addr, 4096)
        return errno, cmd

    def op(self, command: int, params: Layout | None = None) -> KvmSevCmd:
        errno, cmd = self.sev_cmd(command, params)
        assert errno == 0, errno
        return cmd

    def memory(self, npages: int, *, private: bool = True) -> None:
        self.npages = npages
        self.gmem = self.user.ioctl(
            self.fd, k.KVM_CREATE_GUEST_MEMFD, KvmCreateGuestMemfd(size=npages << PAGE_SHIFT)
        )
        self.shared = self.user.mmap(npages << PAGE_SHIFT)
        self.user.ioctl(
            self.fd,
            k.KVM_SET_USER_MEMORY_REGION2,
            KvmUserspaceMemoryRegion2(
                flags=MemFlag.GUEST_MEMFD,
                memory_size=npages << PAGE_SHIFT,
                userspace_addr=self.shared,
                guest_memfd=self.gmem,
            ),
        )
        if private:
            self.attributes(0, npages, private=True)

    def attributes(self, gfn: int, npages: int, *, private: bool) -> None:
        self.user.ioctl(
            self.fd,
            k.KVM_SET_MEMORY_ATTRIBUTES,
            KvmMemoryAttributes(
                address=gfn << PAGE_SHIFT,
                size=npages << PAGE_SHIFT,
                attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0,
            ),
        )

    def start(self) -> None:
        self.op(SevCmdId.SNP_LAUNCH_START, KvmSevSnpLaunchStart(policy=POLICY))

    def update(
        self, gfn: int, contents: bytes, page_type: int = 1, *, uaddr: int | None = None
    ) -> tuple[int, KvmSevCmd, KvmSevSnpLaunchUpdate]:
        """One LAUNCH_UPDATE; errno, command and parameters as they came back."""
        if uaddr is None:
            uaddr = self.user.mmap(max(len(contents), 4096))
            self.user.sys.store(uaddr, contents)
        params = KvmSevSnpLaunchUpdate(
            gfn_start=gfn, uaddr=uaddr, len=len(contents), type=page_type
        )
        errno, cmd = self.sev_cmd(SevCmdId.SNP_LAUNCH_UPDATE, params)
        return errno, cmd, params

    def vcpu(self, vcpu_id: int = 0) -> int:
        fd = self.user.ioctl(self.fd, k.KVM_CREATE_VCPU, vcpu_id)
        self.vcpus.append(fd)
        self.runs.append(self.user.mmap(KVM_RUN_MMAP_SIZE, SHARED, fd))
        return fd

    def finish(self) -> KvmSevCmd:
        return self.op(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())

    def launch(self, npages: int, vcpus: int = 1) -> None:
        """A whole launch that measures nothing but the VMSAs."""
        self.memory(npages)
        self.start()
        for vcpu_id in range(vcpus):
            self.vcpu(vcpu_id)
        self.finish()

    def exit_hypercalls(self) -> None:
        cap = KvmEnableCap(cap=k.KVM_CAP_EXIT_HYPERCALL, arg0=1 << KVM_HC_MAP_GPA_RANGE)
        self.user.ioctl(self.fd, k.KVM_ENABLE_CAP, cap)

    def run(self, vcpu: int = 0) -> KvmRun:
        """KVM_RUN; kvm_run as the VMM sees it.  A refusal other than a memory fault is an OSError."""
        errno = self.user.errno(self.vcpus[vcpu], k.KVM_RUN)
        seen = self.kvm_run(vcpu)
        if errno and (errno, seen.exit_reason) != (EFAULT, k.KVM_EXIT_MEMORY_FAULT):
            raise OSError(errno, "KVM_RUN")
        return seen

    def kvm_run(self, vcpu: int = 0) -> KvmRun:
        return KvmRun(self.user.sys.load(self.runs[vcpu], KvmRun.SIZE))

    def answer(self, ret: int, vcpu: int = 0) -> None:
        """hypercall.ret"""
        self.user.sys.store(
            self.runs[vcpu] + KvmRun.hypercall_ret.offset, ret.to_bytes(8, "little")
        )

    def prefault(self, gfn: int, npages: int) -> int:
        """KVM_PRE_FAULT_MEMORY over a range, or its errno."""
        left = KvmPreFaultMemory(gpa=gfn << PAGE_SHIFT, size=npages << PAGE_SHIFT)
        errno = 0
        while left.size and not errno:
            errno = self.user.errno(self.vcpus[0], k.KVM_PRE_FAULT_MEMORY, left)
        return errno

    def context(self) -> int:
        sev = self.kvm.arch.sev
        assert sev is not None
        assert sev.snp_context is not None
        return sev.snp_context << PAGE_SHIFT

    def digest(self) -> bytes:
        """The launch digest in the guest's context."""
        return self.host.soc.psp.gctx(self.context()).ld


Boot = Callable[..., Host]


@pytest.fixture(scope="session")
def boot() -> Boot:
    """boot(kernel="7.3", cpu="genoa", order=0, pages=..., choices=...) -> Host"""

    def make(
        kernel: str = "7.3",
        cpu: str = "genoa",
        order: int = 0,
        pages: int = 1 << 16,
        choices: Choices | None = None,
        *,
        reject_assigned: bool = False,
    ) -> Host:
        machine = Machine(
            kernel, cpu, pages << PAGE_SHIFT, gmem_max_order=order, choices=choices
        )
        machine.linux.snp.reject_assigned = reject_assigned
        return Host(machine)

    return make


@pytest.fixture
def host(boot: Boot) -> Host:
    return boot()
