"""A confidential VM from nothing to nothing: create, launch, run, tear down.

Owns the order in which a VMM brings an SNP VM up (QEMU's: VM, INIT2, memory, LAUNCH_START, vCPUs with their
reset registers, LAUNCH_UPDATEs, LAUNCH_FINISH) and takes it down (vCPUs, VM, memory, devices; the kernel
frees private memory when the last of the VM and its guest_memfds is closed).  Each part is its own module.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from softcvm.abi.kvm.memory import KVM_HC_MAP_GPA_RANGE, VmType
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.kvm.vcpu import KvmCpuidEntry2
from softcvm.abi.sys import Sys
from softcvm.vmm import launch
from softcvm.vmm.board import Board
from softcvm.vmm.cpuid import cpuid_page, vcpu_cpuid
from softcvm.vmm.devices import Ports
from softcvm.vmm.errors import VmmError, call_failed
from softcvm.vmm.kvm import Kvm, Vcpu, Vm
from softcvm.vmm.launch_plan import LaunchUpdate, snp_launch_plan
from softcvm.vmm.memory import GuestMemory
from softcvm.vmm.ovmf import OvmfImage
from softcvm.vmm.reset import reset_regs, reset_sregs
from softcvm.vmm.run import ExitPolicy, Runner, Termination
from softcvm.vmm.vmsa import BSP_RESET_EIP

__all__ = ("GuestConfig", "Vmm")


@dataclass(frozen=True)
class GuestConfig:
    """What the guest is: everything that its launch digest depends on, and its memory."""

    image: OvmfImage
    board: Board
    vcpus: int
    vcpu_sig: int
    guest_features: int = 1
    hashes: bytes | None = None
    policy: int = launch.DEFAULT_POLICY
    exits: ExitPolicy = ExitPolicy()  # noqa: RUF009 - frozen

    def plan(self) -> tuple[LaunchUpdate, ...]:
        return snp_launch_plan(self.image, hashes=self.hashes)


class Vmm:
    """One VM on one process.  close() gives everything back, however far it came."""

    def __init__(self, sys: Sys, config: GuestConfig) -> None:
        self.sys = sys
        self.config = config
        self.vcpus: list[Vcpu] = []
        self._open = ExitStack()
        try:
            self._create()
        except (VmmError, OSError):
            self._open.close()
            raise

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def launch(self, progress: launch.Progress | None = None) -> None:
        """From an initialised VM to one whose vCPUs can run."""
        config = self.config
        launch.launch_start(self.vm, config.policy)
        told = vcpu_cpuid(self.kvm.supported_cpuid(), config.vcpu_sig)
        self._create_vcpus(told)
        launch.launch_updates(self.vm, self.memory, config.plan(), cpuid_page(told), progress)
        launch.launch_finish(self.vm)

    def run(
        self,
        on_line: Callable[[str], None],
        on_exit: Callable[[KvmExit], None] | None = None,
    ) -> Termination:
        """Run the guest until it ends: the boot processor, and the others when it has started them."""
        runner = Runner(self.memory, Ports(self.memory, on_line), self.config.exits, on_exit)
        return runner.run(self.vcpus)

    def _create(self) -> None:
        self.kvm = self._open.enter_context(Kvm(self.sys))
        self.kvm.check_version()
        if not self.kvm.extension("KVM_CAP_VM_TYPES") >> VmType.SNP & 1:
            raise VmmError("this host has no SEV-SNP")
        try:
            sev_fd = self.sys.open("/dev/sev")
        except OSError as error:
            raise call_failed("/dev/sev", error) from error
        self._open.callback(self.sys.close, sev_fd)
        most = self.kvm.extension("KVM_CAP_MAX_VCPUS")
        if self.config.vcpus > most:
            raise VmmError(
                f"this host gives a VM at most {most} vCPUs, not {self.config.vcpus}"
            )
        self._vcpu_mmap_size = self.kvm.ioctl("KVM_GET_VCPU_MMAP_SIZE")
        self.vm: Vm = self.kvm.create_vm(VmType.SNP)
        self.vm.sev_fd = sev_fd
        # Memory goes last: its guest_memfds keep the VM, and its mappings serve the vCPUs.
        self.memory: GuestMemory = GuestMemory(self.sys, self.vm)
        self._open.callback(self.memory.close)
        self._open.push(self.vm)
        launch.init(self.vm, self.config.guest_features)
        self.vm.enable_cap("KVM_CAP_SPLIT_IRQCHIP", _IOAPIC_PINS)
        self.vm.enable_cap("KVM_CAP_EXIT_HYPERCALL", 1 << KVM_HC_MAP_GPA_RANGE)
        self.memory.add_board(self.config.board)

    def _create_vcpus(self, told: list[KvmCpuidEntry2]) -> None:
        config = self.config
        for vcpu_id in range(config.vcpus):
            vcpu = self.vm.create_vcpu(vcpu_id, self._vcpu_mmap_size)
            self._open.push(vcpu)
            self.vcpus.append(vcpu)
            eip = config.image.ap_reset_eip if vcpu_id else BSP_RESET_EIP
            vcpu.set_cpuid2(told)
            vcpu.set("KVM_SET_SREGS", reset_sregs(eip, bsp=vcpu_id == 0))
            vcpu.set("KVM_SET_REGS", reset_regs(eip, config.vcpu_sig))


_IOAPIC_PINS = 24
