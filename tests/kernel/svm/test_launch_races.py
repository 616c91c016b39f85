"""LAUNCH_FINISH against what changes vCPUs, the second task let in at every single point."""

from errno import EBUSY, EINVAL
from functools import partial
from typing import Any

import pytest

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.vcpu import KvmRegs
from softcvm.abi.sev import KvmSevCmd, KvmSevSnpLaunchFinish, SevCmdId
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.kernel.virt.kvm.kvm_main import kvm_create_vcpu
from softcvm.sim.steps import Steps
from softcvm.uapi.vcpu import kvm_vcpu_ioctl
from softcvm.uapi.vm import kvm_vm_ioctl
from tests.kernel.two_tasks import run_split, steps_of


def started(host: Any) -> Any:
    vm = host.vm()
    vm.memory(4)
    vm.start()
    vm.vcpu()
    return vm


def finish(vm: Any) -> Steps[int]:
    at = vm.user.mmap(4096)
    vm.user.sys.store(at, bytes(KvmSevSnpLaunchFinish()))
    cmd = KvmSevCmd(id=SevCmdId.SNP_LAUNCH_FINISH, data_ptr=at, sev_fd=vm.host.dev_sev)
    proc = vm.user.sys.proc
    argp = UserPtr(proc.mm, cmd.data)
    return kvm_vm_ioctl(vm.kvm, proc, k.KVM_MEMORY_ENCRYPT_OP, 1, argp)


def set_regs(vm: Any) -> Steps[int]:
    proc = vm.user.sys.proc
    argp = UserPtr(proc.mm, KvmRegs(rip=0x1234).data)
    return kvm_vcpu_ioctl(vm.kvm.vcpus[0], proc, k.KVM_SET_REGS, 1, argp)


def observed(vm: Any, seen: list[list[bool]]) -> Steps[int]:
    """LAUNCH_FINISH, and which vCPUs were measured when it ended."""
    result = yield from finish(vm)
    seen.append([vcpu.arch.guest_state_protected for vcpu in vm.kvm.vcpus])
    return result


def test_r20_bug_34_a_launch_never_ends_around_half_a_vcpu(boot: Any) -> None:
    """624bf3440d72: EBUSY while a vCPU is being created; every vCPU that is there is measured."""
    vm = started(boot())
    points = steps_of(vm.host.linux, kvm_create_vcpu(vm.kvm, vm.user.sys.proc, 1))
    outcomes = set()
    for split in range(points + 1):
        vm = started(boot())
        proc = vm.user.sys.proc
        seen: list[list[bool]] = []

        create, end = run_split(
            vm.host.linux,
            partial(kvm_create_vcpu, vm.kvm, proc, 1),
            partial(observed, vm, seen),
            split,
        )
        assert create.error is None
        if end.error is None:
            assert all(seen[0])
            outcomes.add(len(seen[0]))
        else:
            assert end.error.errno == EBUSY
            assert not any(v.arch.guest_state_protected for v in vm.kvm.vcpus)
            outcomes.add(-EBUSY)
    assert outcomes == {1, 2, -EBUSY}


def ends(boot: Any, kernel: str) -> set[tuple[int, bool]]:
    """(errno of SET_REGS, whether its registers were measured), over every interleaving."""
    plain = started(boot(kernel))
    plain.finish()
    points = steps_of(plain.host.linux, finish(started(plain.host)))
    outcomes = set()
    for split in range(points + 1):
        vm = started(boot(kernel))
        end, setter = run_split(
            vm.host.linux, partial(finish, vm), partial(set_regs, vm), split
        )
        assert end.error is None
        errno = setter.error.errno if setter.error else 0
        outcomes.add((errno, vm.digest() != plain.digest()))
    return outcomes


def test_bug_35_registers_that_were_set_were_measured(boot: Any) -> None:
    assert ends(boot, "7.3") == {(0, True), (EINVAL, False)}


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_bug_35_before_all_vcpus_were_locked_they_may_be_lost(boot: Any, kernel: str) -> None:
    """cb923ee6a80f (2026): SET_REGS succeeds between the copy into the VMSA and its encryption."""
    assert (0, False) in ends(boot, kernel)


def test_bug_33_a_second_finish_finds_the_registers_encrypted(host: Any) -> None:
    vm = started(host)
    vm.finish()
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())[0] == EINVAL
    assert host.linux.counters.warnings == 0
