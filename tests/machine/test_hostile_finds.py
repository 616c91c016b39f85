"""What the hostile walks found, each as the shortest story that shows it."""

from contextlib import suppress
from errno import EINVAL
from typing import Any

import pytest

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmPreFaultMemory, KvmUserspaceMemoryRegion2, VmType
from softcvm.hw.access import HostRmpFault
from softcvm.invariants import check_all
from softcvm.kernel.mm.memory import BadAccess, store
from softcvm.machine import Machine
from softcvm.sim.steps import run
from softcvm.uapi import dispatch
from tests.kernel.two_tasks import TaskRun, run_split, steps_of
from tests.machine.hostile_sev import SevWorld
from tests.uapi.calls import MIB, PAGE, PRIVATE_ANON, RW, VmCalls, anon


@pytest.mark.parametrize("vm_type", [VmType.SEV, VmType.SEV_ES, VmType.SNP])
def test_kvm_run_before_init2_is_einval(vm_type: VmType) -> None:
    """svm_vcpu_pre_run() of arch/x86/kvm/svm/svm.c, v7.2: nothing to run the guest with yet."""
    calls = VmCalls(Machine(memory=64 * MIB).process(), vm_type)
    with pytest.raises(OSError, match="KVM_SEV_INIT2 is due") as refused:
        calls.sys.ioctl(calls.vcpu(), k.KVM_RUN)
    assert refused.value.errno == EINVAL


def test_a_vm_that_is_created_during_an_munmap_maps_nothing_of_it() -> None:
    """mmu_notifier_register() waits for mmap_lock: what a VM maps before it hears of removals would stay."""

    def both(split: int) -> int:
        machine = Machine(memory=64 * MIB)
        sys = machine.process()
        kvm, addr = sys.open("/dev/kvm"), anon(sys, MIB)
        VmCalls(sys, VmType.DEFAULT).region(size=MIB, hva=addr)  # who is told while others run
        sys.store(addr, b"x")
        munmap = dispatch.sys_munmap(sys.proc, addr, MIB)
        if split < 0:
            return steps_of(machine.linux, munmap)

        def map_it() -> Any:
            def ioctl(fd: int, request: int, arg: Any) -> Any:
                return dispatch.sys_ioctl(sys.proc, fd, request, arg)

            vm = yield from ioctl(kvm, k.KVM_CREATE_VM, VmType.DEFAULT)
            slot = KvmUserspaceMemoryRegion2(memory_size=MIB, userspace_addr=addr)
            yield from ioctl(vm, k.KVM_SET_USER_MEMORY_REGION2, slot.data)
            vcpu = yield from ioctl(vm, k.KVM_CREATE_VCPU, 0)
            with suppress(OSError):  # EFAULT, where munmap() was faster
                page = KvmPreFaultMemory(size=PAGE)
                yield from ioctl(vcpu, k.KVM_PRE_FAULT_MEMORY, page.data)

        run_split(machine.linux, lambda: munmap, map_it, split)
        assert not any(vm.mn_active_invalidate_count for vm in machine.linux.vm_list)
        assert [r.violations for r in check_all(machine) if not r.held] == []
        return 0

    for split in range(both(-1) + 1):
        both(split)


def test_a_vm_that_goes_during_an_munmap_takes_nobodys_notice_along() -> None:
    """The VM behind it in the list of notifiers still hears both ends."""

    def both(split: int) -> int:
        machine = Machine(memory=64 * MIB)
        sys = machine.process()
        calls = [VmCalls(sys, VmType.DEFAULT) for _ in range(3)]
        addr = anon(sys, MIB)
        for vm in calls:
            vm.region(size=MIB, hva=addr)
        sys.store(addr, b"x")
        steps = dispatch.sys_munmap(sys.proc, addr, MIB)
        if split < 0:
            return steps_of(machine.linux, steps)
        close = dispatch.sys_close(sys.proc, calls[0].fd)
        run_split(machine.linux, lambda: steps, lambda: close, split)
        left = machine.linux.vm_list
        assert [(vm.mn_active_invalidate_count, vm.mmu_invalidate_seq) for vm in left] == [
            (0, 1),
            (0, 1),
        ]
        return 0

    for split in range(both(-1) + 1):
        both(split)


def test_a_fault_that_waited_for_an_munmap_brings_no_page_back() -> None:
    """find_vma() comes after mmap_lock: a page put where nothing is mapped any more is lost for ever."""

    def both(split: int) -> int:
        machine = Machine(memory=64 * MIB)
        sys = machine.process()
        addr = sys.mmap(4 * PAGE, RW, PRIVATE_ANON)
        touch = store(sys.proc.mm, addr, b"x" * 2 * PAGE)
        if split < 0:
            return steps_of(machine.linux, touch)

        def write() -> Any:
            with suppress(BadAccess):  # SIGSEGV, where munmap() was faster
                yield from touch

        run_split(
            machine.linux,
            write,
            lambda: dispatch.sys_munmap(sys.proc, addr, 4 * PAGE),
            split,
        )
        assert [r.violations for r in check_all(machine) if not r.held] == []
        return 0

    for split in range(both(-1) + 1):
        both(split)


@pytest.mark.parametrize("what", ["mmap", "fallocate"])
def test_a_call_on_a_guest_memfd_keeps_it_open(what: str) -> None:
    """fdget(): close() in another thread does not take the file away from a call that is under way."""

    def both(split: int) -> int:
        machine = Machine(memory=64 * MIB)
        sys = machine.process()
        vm = VmCalls(sys, VmType.DEFAULT)
        gmem = vm.gmem(MIB, 3)

        def call() -> Any:
            if what == "mmap":
                return dispatch.sys_mmap(sys.proc, MIB, RW, 1, gmem, 0)
            return dispatch.sys_fallocate(sys.proc, gmem, 1, 0, MIB)

        if split < 0:
            return steps_of(machine.linux, call())

        def tried() -> Any:
            with suppress(OSError):  # EBADF, where close() was faster
                yield from call()

        run_split(machine.linux, tried, lambda: dispatch.sys_close(sys.proc, gmem), split)
        assert [r.violations for r in check_all(machine) if not r.held] == []
        return 0

    for split in range(both(-1) + 1):
        both(split)


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_launch_update_of_a_running_guest_lets_a_fault_clear_an_assigned_page(
    kernel: str,
) -> None:
    """What v7.2 does, and the versions before it: kvm_gmem_populate() unlocks the folio before it is uptodate.

    LAUNCH_UPDATE is not refused after LAUNCH_FINISH, it assigns the page before firmware says no, and
    kvm_gmem_get_pfn() takes no invalidate lock: it finds a folio that was never cleared, and clears it.
    Read so in 6.12.117 (virt/kvm/guest_memfd.c, snp_launch_update() in arch/x86/kvm/svm/sev.c).
    """

    def raced(split: int) -> bool:
        world = SevWorld(kernel, "genoa", 0)
        world.chances.begin()
        run(world.build(0, 1024, 1, 1, True))
        linux = world.machine.linux
        launch = TaskRun(linux, "launch", world.launch_update(0, 700, 1, 3, 0))
        fault = TaskRun(linux, "fault", world.prefault(0, 700, 1))
        oops = False
        for _ in range(split):
            if not launch.done:
                launch.step()
        try:
            for _ in range(200):
                if not fault.done:
                    fault.step()
        except HostRmpFault:
            oops, fault.done = True, True
        for _ in range(2000):
            for task in (launch, fault):
                if not task.done:
                    task.step()
        return oops

    assert any(raced(split) for split in range(60))


def test_switching_the_dirty_log_on_waits_for_faults_that_saw_the_slot_without_it() -> None:
    """synchronize_srcu() in kvm_swap_active_memslots(): or a page would be writable and in no log."""
    outcomes = set()

    def both(split: int) -> int:
        machine = Machine(memory=64 * MIB)
        calls = VmCalls(machine.process(), VmType.DEFAULT)
        addr, proc = anon(calls.sys, MIB), machine.linux.processes[0]
        calls.region(size=MIB, hva=addr)
        page = KvmPreFaultMemory(size=PAGE)
        slot = KvmUserspaceMemoryRegion2(flags=1, memory_size=MIB, userspace_addr=addr)
        vcpu = calls.vcpu()

        def fault() -> Any:
            return dispatch.sys_ioctl(proc, vcpu, k.KVM_PRE_FAULT_MEMORY, page.data)

        def log() -> Any:
            request = k.KVM_SET_USER_MEMORY_REGION2
            return dispatch.sys_ioctl(proc, calls.fd, request, slot.data)

        if split < 0:
            return steps_of(machine.linux, fault())
        run_split(machine.linux, fault, log, split)
        (kvm,) = machine.linux.vm_list
        leaf, bitmap = kvm.arch.npt.lookup(0), kvm.memslots[0].by_id[0].dirty_bitmap
        assert leaf is not None
        assert bitmap is not None
        assert bitmap[0] or not leaf.writable
        outcomes.add(leaf.writable)
        return 0

    for split in range(both(-1) + 1):
        both(split)
    assert outcomes == {True, False}  # logged while it came in, or write-protected afterwards
