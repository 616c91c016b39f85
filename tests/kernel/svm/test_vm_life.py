"""How an SNP VM ends: dead VMs, the order of the teardown, and what holds the VM until then."""

from errno import EIO
from typing import Any

import pytest

from softcvm.abi.insn import Program, StartState
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmCreateGuestMemfd, KvmMemoryAttributes, KvmPreFaultMemory
from softcvm.abi.kvm.vcpu import KvmEnableCap, KvmMpState, KvmRegs
from softcvm.abi.sev import KvmSevCmd
from softcvm.hw.events import RmpTransition
from softcvm.hw.psp.events import FirmwareCommand
from softcvm.kernel.errors import KernelError
from softcvm.kernel.virt.kvm.kvm_main import VmDestroyed
from softcvm.uapi.events import Ioctl
from tests.kernel.svm.test_ap_creation import CREATE, VMSA, ap, launch, make_vmsa, register
from tests.kernel.svm.test_ap_races import kvm_run
from tests.kernel.two_tasks import TaskRun

PUNCH = 3


def small(host: Any) -> Any:
    vm = host.vm()
    vm.launch(16, vcpus=2)
    return vm


def dead(host: Any) -> Any:
    vm = small(host)
    assert isinstance(vm.kvm.bug("a test"), KernelError)
    return vm


# Dead VMs


@pytest.mark.parametrize(
    ("request_", "arg"),
    [
        (k.KVM_CREATE_VCPU, 5),
        (k.KVM_CHECK_EXTENSION, k.KVM_CAP_GUEST_MEMFD),
        (k.KVM_SET_MEMORY_ATTRIBUTES, KvmMemoryAttributes(size=4096)),
        (k.KVM_CREATE_GUEST_MEMFD, KvmCreateGuestMemfd(size=4096)),
        (k.KVM_ENABLE_CAP, KvmEnableCap(cap=k.KVM_CAP_EXIT_HYPERCALL)),
        (k.KVM_MEMORY_ENCRYPT_OP, KvmSevCmd()),
        (0xDEAD, 0),  # the rule comes before the number
    ],
)
def test_every_ioctl_on_a_dead_vm_is_eio(host: Any, request_: int, arg: Any) -> None:
    vm = dead(host)
    assert vm.user.errno(vm.fd, request_, arg) == EIO


@pytest.mark.parametrize(
    ("request_", "arg"),
    [
        (k.KVM_RUN, 0),
        (k.KVM_GET_REGS, KvmRegs()),
        (k.KVM_SET_MP_STATE, KvmMpState()),
        (k.KVM_PRE_FAULT_MEMORY, KvmPreFaultMemory(size=4096)),
    ],
)
def test_every_ioctl_on_a_vcpu_of_a_dead_vm_is_eio(host: Any, request_: int, arg: Any) -> None:
    vm = dead(host)
    assert vm.user.errno(vm.vcpus[0], request_, arg) == EIO


def test_bug_52_a_dead_vm_stays_dead_however_often_it_is_entered(host: Any) -> None:
    vm = dead(host)
    for _ in range(3):
        assert vm.user.errno(vm.vcpus[0], k.KVM_RUN) == EIO
        assert vm.user.errno(vm.vcpus[1], k.KVM_RUN) == EIO


def test_system_calls_on_the_memory_of_a_dead_vm_go_on(host: Any) -> None:
    """The rule is one of the VM's and vCPUs' ioctls."""
    vm = dead(host)
    free = host.machine.linux.page_alloc.free_pages
    vm.user.sys.fallocate(vm.gmem, PUNCH, 0, 4096)
    after_punch = host.machine.linux.page_alloc.free_pages
    assert after_punch >= free
    vm.user.sys.fallocate(vm.gmem, 1, 0, 4096)
    assert host.machine.linux.page_alloc.free_pages == after_punch - 1


def test_a_dead_vm_can_be_closed_and_leaves_nothing(host: Any) -> None:
    before = host.machine.census()
    dead(host)
    host.machine.teardown()
    assert host.machine.census() == before


def test_a_vcpu_in_the_guest_is_kicked_out_when_its_vm_dies(host: Any) -> None:
    def spins() -> Program:
        while True:
            yield StartState()

    vm = launch(host, spins)
    task = TaskRun(host.linux, "vcpu", kvm_run(vm, 0))
    for _ in range(40):
        task.step()
    assert vm.kvm.vcpus[0].arch.in_guest
    vm.kvm.bug("a test")
    for _ in range(40):
        if not task.done:
            task.step()
    assert task.error is not None
    assert task.error.errno == EIO


# Teardown


def test_the_teardown_is_in_the_kernels_order(host: Any) -> None:
    """Fact sheet §5.8: mappings, vCPUs with their VMSA pages, the guest context, then memory."""
    vm = small(host)
    assert vm.prefault(0, 16) == 0
    kvm = vm.kvm
    vmsas = [vcpu.arch.svm.vmsa for vcpu in kvm.vcpus]
    context = kvm.arch.sev.snp_context
    gmem_pfn = kvm.arch.npt.lookup(0).pfn
    seen: list[Any] = []
    host.machine.events.attach(seen.append)
    host.machine.teardown()

    def released(pfn: int) -> int:
        """When the page became the hypervisor's, by RMPUPDATE."""
        return next(
            at
            for at, event in enumerate(seen)
            if isinstance(event, RmpTransition)
            and event.agent == "RMPUPDATE"
            and event.pfn <= pfn < event.pfn + event.npages
            and not event.new_lo & 1
        )

    decommissioned = next(
        at
        for at, event in enumerate(seen)
        if isinstance(event, FirmwareCommand) and event.command == "SNP_DECOMMISSION"
    )
    destroyed = next(at for at, event in enumerate(seen) if isinstance(event, VmDestroyed))
    # The guest_memfd holds the VM: its pages are back before the VM's own teardown begins.
    order = [
        released(gmem_pfn),
        *map(released, vmsas),
        decommissioned,
        released(context),
        destroyed,
    ]
    assert order == sorted(order)


def test_a_vcpu_fd_holds_the_vm(host: Any) -> None:
    vm = small(host)
    kvm = vm.kvm
    vm.user.sys.close(vm.fd)
    vm.user.sys.close(vm.gmem)
    assert kvm in host.linux.vm_list
    assert vm.run(0).exit_reason == k.KVM_EXIT_HLT  # it still runs
    vm.user.sys.munmap(vm.runs[0], 3 << 12)
    vm.user.sys.munmap(vm.runs[1], 3 << 12)
    vm.user.sys.close(vm.vcpus[0])
    assert kvm in host.linux.vm_list
    vm.user.sys.close(vm.vcpus[1])
    assert kvm not in host.linux.vm_list


def test_a_mapping_of_kvm_run_holds_the_vm(host: Any) -> None:
    """The mapping holds the file, and the file the VM."""
    vm = small(host)
    kvm = vm.kvm
    for fd in (vm.fd, vm.gmem, *vm.vcpus):
        vm.user.sys.close(fd)
    assert kvm in host.linux.vm_list
    vm.user.sys.munmap(vm.runs[0], 3 << 12)
    vm.user.sys.munmap(vm.runs[1], 3 << 12)
    assert kvm not in host.linux.vm_list


def test_another_process_cannot_use_a_vcpu_it_was_given_but_holds_the_vm(host: Any) -> None:
    vm = small(host)
    kvm = vm.kvm
    other = host.machine.process()
    fd = vm.user.sys.give(vm.vcpus[0], other)
    with pytest.raises(OSError, match="KVM_RUN") as refused:
        other.ioctl(fd, k.KVM_RUN)
    assert refused.value.errno == EIO
    vm.user.sys.exit()
    assert kvm in host.linux.vm_list
    other.close(fd)
    assert kvm not in host.linux.vm_list


def test_a_vmsa_of_the_guests_goes_with_its_guest_memfd(host: Any) -> None:
    def bsp() -> Program:
        yield from register()
        yield from make_vmsa()
        yield from ap(CREATE)

    before = host.machine.census()
    vm = launch(host, bsp)
    vm.run(0)
    vm.run(1)
    pfn = vm.kvm.vcpus[1].arch.svm.vmcb.vmsa_pa >> 12
    for run in vm.runs:
        vm.user.sys.munmap(run, 3 << 12)
    for fd in (vm.fd, *vm.vcpus):
        vm.user.sys.close(fd)
    entry = host.soc.rmp.entry(pfn)
    assert (entry.assigned, entry.vmsa, entry.gpa) == (True, True, VMSA)
    host.machine.teardown()
    assert (host.machine.census(), host.linux.leaked_pages) == (before, 0)


def test_every_refusal_names_the_rule(host: Any) -> None:
    vm = dead(host)
    seen: list[Any] = []
    host.machine.events.attach(seen.append)
    vm.user.errno(vm.vcpus[0], k.KVM_RUN)
    (event,) = [e for e in seen if isinstance(e, Ioctl)]
    assert (event.errno, "dead" in event.why) == (EIO, True)
