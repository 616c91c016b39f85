"""AP creation against the target's own life, the second task let in at every single point.

Rows R16 and R17 of the windows that Linux closes (arch/x86/kvm/svm/sev.c).
"""

from typing import Any

import pytest

from softcvm.abi.ghcb import GhcbExit
from softcvm.abi.insn import Hlt, Program, Rmpadjust, StartState
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.run import KvmExit
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.sim.steps import Steps
from softcvm.uapi.vcpu import kvm_vcpu_ioctl
from tests.kernel.svm.test_ap_creation import (
    CREATE,
    DESTROY,
    GHCB,
    ON_INIT,
    VMSA,
    ap,
    call,
    launch,
    make_vmsa,
    register,
)
from tests.kernel.svm.test_ghcb import ghcb
from tests.kernel.two_tasks import TaskRun


def pause() -> Any:
    """Leave to user space, so that the test comes in."""
    return call(ghcb(GhcbExit.MMIO_READ, 0xFE00_0000, 4, sw_scratch=GHCB + 0x800))


def kvm_run(vm: Any, vcpu: int) -> Steps[int]:
    proc = vm.user.sys.proc
    return kvm_vcpu_ioctl(vm.kvm.vcpus[vcpu], proc, k.KVM_RUN, 0, UserPtr(proc.mm, 0))


def race(vm: Any, split: int) -> tuple[TaskRun, TaskRun]:
    """`split` steps of the target, the requester as far as it goes, then both; what sleeps at the end
    gets a signal."""
    linux = vm.host.linux
    target = TaskRun(linux, "target", kvm_run(vm, 1))
    requester = TaskRun(linux, "requester", kvm_run(vm, 0))
    for _ in range(split):
        if not target.done:
            target.step()
    for _ in range(2_000):
        if requester.done or requester.blocked:
            break
        requester.step()
    for _ in range(2_000):
        for task in (target, requester):
            if not task.done:
                task.step()
        if all(task.done or task.blocked for task in (target, requester)):
            vm.user.sys.signal()
        if target.done and requester.done:
            vm.user.sys.proc.deliver_signals()
            return target, requester
    raise AssertionError("the two wait for each other")


def destroys() -> Program:
    yield from register()
    yield from make_vmsa()
    yield from ap(CREATE)
    yield from pause()
    yield from ap(DESTROY)
    yield Rmpadjust(VMSA, 0, 1, 0, vmsa=False)  # the page is the guest's again


def works() -> Program:
    for _ in range(2):
        for _ in range(3):
            yield StartState()
        yield Hlt()


def destroyed_at(boot: Any, kernel: str, split: int) -> tuple[KvmExit, bool]:
    vm = launch(boot(kernel), destroys, works)
    vm.run(0)
    vm.run(1)
    target, requester = race(vm, split)
    assert requester.error is None
    assert target.error is None or vm.kvm_run(1).exit_reason == KvmExit.INTR
    return KvmExit(vm.kvm_run(1).exit_reason), vm.kvm.vcpus[1].arch.svm.vmcb.vmsa_pa is None


SPLITS = range(24)


@pytest.mark.parametrize("kernel", ["6.18", "7.3"])
def test_r17_a_destroyed_vcpu_never_enters_with_the_old_vmsa(boot: Any, kernel: str) -> None:
    """309d28576f0a: when the requester goes on, the target is out of the guest and has seen it."""
    ends = {destroyed_at(boot, kernel, split)[0] for split in SPLITS}
    assert ends == {KvmExit.HLT, KvmExit.INTR}


def test_r17_before_6_16_it_could(boot: Any) -> None:
    """The window is between the last look for requests and VMRUN, with interrupts off."""
    ends = [destroyed_at(boot, "6.12", split)[0] for split in SPLITS]
    assert ends.count(KvmExit.FAIL_ENTRY) == 1


def creates_on_init() -> Program:
    yield from register()
    yield from make_vmsa()
    yield from ap(ON_INIT)


@pytest.mark.parametrize("split", range(16))
def test_r16_a_vmsa_for_the_next_init_is_taken_whole_or_kept_whole(
    host: Any, split: int
) -> None:
    vm = launch(host, creates_on_init, works, apic=True)
    arch = vm.kvm.vcpus[1].arch
    kvms = arch.svm.vmcb.vmsa_pa
    arch.apic_init = True
    race(vm, split)
    sev_es = arch.svm.sev_es
    taken = (sev_es.snp_ap_waiting_for_reset, sev_es.snp_pending_vmsa_gpa)
    if taken == (False, None):
        assert (sev_es.snp_guest_vmsa_gpa, sev_es.snp_has_guest_vmsa) == (VMSA, True)
    else:
        assert taken == (True, VMSA)
        assert arch.svm.vmcb.vmsa_pa == kvms


def test_a_vmsa_in_use_that_is_punched_out_is_lost_to_the_host(host: Any) -> None:
    """RMPUPDATE refuses it (FAIL_INUSE); Linux warns, and the page that it frees stays the guest's."""
    vm = launch(host, destroys, works)
    vm.run(0)
    vm.run(1)
    pfn = vm.kvm.vcpus[1].arch.svm.vmcb.vmsa_pa >> 12
    task = TaskRun(host.linux, "target", kvm_run(vm, 1))
    while pfn not in host.soc.rmp.in_use:
        task.step()
    warnings = host.linux.counters.warnings
    vm.user.sys.fallocate(vm.gmem, 3, VMSA, 4096)
    assert host.linux.counters.warnings > warnings
    assert host.soc.rmp.entry(pfn).vmsa
    while not task.done:
        task.step()
    assert vm.kvm_run(1).exit_reason == KvmExit.HLT
