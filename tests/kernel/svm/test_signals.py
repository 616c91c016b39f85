"""Signals during long calls: what was done stays done, and a sleep ends."""

from errno import EINTR, EIO
from typing import Any

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmPreFaultMemory
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.sev import KvmSevCmd, KvmSevSnpLaunchUpdate, SevCmdId
from tests.kernel.svm.test_ap_creation import launch, mp_state
from tests.uapi.calls import KEEP_SIZE, MIB, PAGE, VmCalls

SIZE = 4 * MIB


class Scene:
    """A private VM with one slot of private memory."""

    def __init__(self, order: int = 0, kernel: str = "7.3") -> None:
        self.machine = Machine(kernel=kernel, memory=64 * MIB, gmem_max_order=order)
        self.sys = self.machine.process()
        self.calls = VmCalls(self.sys)
        self.gmem = self.calls.private_slot(size=SIZE)
        self.vcpu = self.calls.vcpu()
        gmem: Any = self.sys.proc.files.lookup(self.gmem).private
        self.inode = gmem.inode

    def resident(self) -> int:
        runs = self.inode.folios.runs(0, SIZE // PAGE)
        return sum(hi - lo for lo, hi, folio in runs if folio is not None)


@pytest.mark.parametrize(
    ("order", "after", "pages"), [(0, 0, 0), (0, 1, 1), (0, 300, 300), (9, 1, 512)]
)
def test_fallocate_keeps_the_folios_it_had_before_the_signal(
    order: int, after: int, pages: int
) -> None:
    """kvm_gmem_allocate() looks once for each folio."""
    scene = Scene(order)
    scene.sys.signal(after)
    with pytest.raises(InterruptedError):
        scene.sys.fallocate(scene.gmem, KEEP_SIZE, 0, SIZE)
    assert scene.resident() == pages


def test_fallocate_that_ends_before_the_signal_is_not_disturbed() -> None:
    scene = Scene()
    scene.sys.signal(17)
    scene.sys.fallocate(scene.gmem, KEEP_SIZE, 0, 17 * PAGE)
    assert scene.resident() == 17


@pytest.mark.parametrize(("after", "pages"), [(0, 0), (1, 0), (2, 1), (3, 1), (20, 10)])
def test_prefault_advances_past_the_pages_before_the_signal(after: int, pages: int) -> None:
    """Two looks for each page: in the loop, and in kvm_tdp_map_page().  Some pages are a success."""
    scene = Scene()
    range_ = KvmPreFaultMemory(gpa=0, size=64 * PAGE)
    scene.sys.signal(after)
    if pages:
        scene.sys.ioctl(scene.vcpu, k.KVM_PRE_FAULT_MEMORY, range_.data)
    else:
        with pytest.raises(InterruptedError):
            scene.sys.ioctl(scene.vcpu, k.KVM_PRE_FAULT_MEMORY, range_.data)
    assert (range_.gpa, range_.size) == (pages * PAGE, (64 - pages) * PAGE)


@pytest.mark.parametrize(("after", "pages"), [(0, 0), (1, 1), (5, 5)])
def test_a_launch_update_stops_at_the_signal_and_says_how_far_it_came(
    host: Any, after: int, pages: int
) -> None:
    """Nothing done is EIO, whatever stopped it; anything done is a short success."""
    vm = host.vm()
    vm.memory(16)
    vm.start()
    uaddr, at = vm.user.mmap(8 * PAGE), vm.user.mmap(PAGE)
    params = KvmSevSnpLaunchUpdate(gfn_start=0, uaddr=uaddr, len=8 * PAGE, type=1)
    host.user.sys.store(at, bytes(params))
    cmd = KvmSevCmd(id=SevCmdId.SNP_LAUNCH_UPDATE, data_ptr=at, sev_fd=host.dev_sev)
    digest = vm.digest()
    host.user.sys.signal(after)
    errno = vm.user.errno(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd)
    left = KvmSevSnpLaunchUpdate(host.user.sys.load(at, params.SIZE))
    assert errno == (0 if pages else EIO)
    assert (left.gfn_start, left.len) == (pages, (8 - pages) * PAGE)
    assert (vm.digest() == digest) == (pages == 0)


def test_a_signal_is_over_when_its_call_is(host: Any) -> None:
    vm = host.vm(0, init=False)
    host.user.sys.signal()
    assert host.user.ioctl(host.dev_kvm, k.KVM_GET_API_VERSION) == 12
    assert host.user.sys.proc.signal_after is None
    vm.vcpu()


def test_a_vcpu_that_nobody_starts_sleeps_until_a_signal(host: Any) -> None:
    """The only thread of the process sleeps in KVM_RUN: nothing but a signal can end that."""

    def idle() -> Any:
        yield from ()

    vm = launch(host, idle, apic=True)
    for _ in range(2):
        with pytest.raises(OSError, match="KVM_RUN") as asleep:
            vm.run(1)
        assert asleep.value.errno == EINTR
        assert vm.kvm_run(1).exit_reason == KvmExit.INTR
    assert mp_state(vm).name == "UNINITIALIZED"


def test_immediate_exit_comes_before_the_sleep(host: Any) -> None:
    def idle() -> Any:
        yield from ()

    vm = launch(host, idle, apic=True)
    vm.user.sys.store(vm.runs[1] + 1, b"\1")
    vm.user.sys.store(vm.runs[1] + 8, bytes(4))
    with pytest.raises(OSError, match="KVM_RUN") as left:
        vm.run(1)
    assert left.value.errno == EINTR
    assert vm.kvm_run(1).exit_reason == KvmExit.UNKNOWN
