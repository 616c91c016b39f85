"""What KVM_RUN returns besides 0: every errno, when, and what kvm_run says then (api.rst 4.10, 5).

kvm_arch_vcpu_ioctl_run() of arch/x86/kvm/x86.c, v6.12 and v7.2.  Only a memory fault leaves an exit reason
beside an errno; EINTR leaves INTR, and whatever else is refused leaves the last reason as it was.
"""

from errno import EAGAIN, EFAULT, EINTR, EINVAL, EIO
from typing import Any

import pytest

from softcvm import Machine
from softcvm.abi.ghcb import psc_request
from softcvm.abi.insn import Load, Program, Vmgexit, Wrmsr
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.run import KvmExit, KvmRun
from softcvm.abi.svm import Msr
from softcvm.kernel.virt.kvm.gmem_inode import kvm_gmem_error_folio
from softcvm.sim.choice import Scripted
from softcvm.sim.steps import run
from tests.kernel.svm.conftest import Host

KERNELS = ("6.12", "6.18", "7.3")
EHWPOISON = 133
PAGE = 4096


def launched(kernel: str, guest: Any, **options: Any) -> Any:
    """A small SNP VM whose vCPU 0 runs the guest."""
    host = Host(Machine(kernel, memory=1 << 28, **options))
    host.guest(guest)
    vm = host.vm()
    vm.launch(16)
    vm.exit_hypercalls()
    return vm


def reads_page_3(_: int) -> Program:
    yield Load(3 * PAGE, 4)


def shares_page_5(_: int) -> Program:
    yield Wrmsr(Msr.SEV_ES_GHCB, psc_request(5, 2))
    yield Vmgexit()


def kvm_run(vm: Any, vcpu: int = 0) -> tuple[int, int]:
    """errno and exit reason."""
    errno = vm.user.errno(vm.vcpus[vcpu], k.KVM_RUN)
    return errno, vm.kvm_run(vcpu).exit_reason


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_poisoned_page_is_ehwpoison_with_the_gpa(kernel: str) -> None:
    vm = launched(kernel, reads_page_3)
    assert vm.prefault(3, 1) == 0
    inode = vm.user.sys.proc.files.lookup(vm.gmem).private.inode
    run(kvm_gmem_error_folio(inode, 3))
    assert kvm_run(vm) == (EHWPOISON, KvmExit.MEMORY_FAULT)
    seen = vm.kvm_run()
    assert (seen.memory_fault_gpa, seen.memory_fault_flags) == (3 * PAGE, 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_that_is_missing_is_efault_and_that_runs_out_is_what_guest_memfd_says(
    kernel: str,
) -> None:
    vm = launched(kernel, reads_page_3)
    vm.user.sys.close(vm.gmem)
    assert kvm_run(vm) == (EFAULT, KvmExit.MEMORY_FAULT)
    vm = launched(kernel, reads_page_3)
    vm.host.linux.choices = Scripted({"alloc_pages": [1]})
    assert kvm_run(vm) == (12, KvmExit.MEMORY_FAULT)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ret", [0, EINVAL, EAGAIN, 1, EIO, (1 << 64) - EINVAL])
def test_the_answer_to_a_conversion_is_checked_from_7_2_on(kernel: str, ret: int) -> None:
    vm = launched(kernel, shares_page_5)
    assert kvm_run(vm) == (0, KvmExit.HYPERCALL)
    vm.answer(ret)
    if kernel == "7.3" and ret not in (0, EINVAL, EAGAIN):
        assert kvm_run(vm) == (EINVAL, KvmExit.HYPERCALL)
    else:
        assert kvm_run(vm) == (0, KvmExit.HLT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_immediate_exit_completes_the_last_exit_first(kernel: str) -> None:
    vm = launched(kernel, shares_page_5)
    assert kvm_run(vm) == (0, KvmExit.HYPERCALL)
    vm.answer(0)
    vm.user.sys.store(vm.runs[0] + KvmRun.immediate_exit.offset, b"\1")
    assert kvm_run(vm)[0] == EINTR
    vm.user.sys.store(vm.runs[0] + KvmRun.immediate_exit.offset, b"\0")
    assert kvm_run(vm) == (0, KvmExit.HLT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_signal_is_eintr_with_exit_reason_intr(kernel: str) -> None:
    vm = launched(kernel, reads_page_3)
    vm.host.linux.choices = Scripted({"signal_pending": [1]})
    assert kvm_run(vm) == (EINTR, KvmExit.INTR)
    assert vm.kvm.arch.npt.lookup(3) is not None  # the fault before it was still served


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_in_kvm_run_are_einval_for_a_guest_whose_state_is_its_own(
    kernel: str,
) -> None:
    vm = launched(kernel, reads_page_3)
    vm.user.sys.store(vm.runs[0] + KvmRun.kvm_valid_regs.offset, b"\1")
    assert kvm_run(vm)[0] == EINVAL


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_dead_vm_is_eio(kernel: str) -> None:
    vm = launched(kernel, reads_page_3)
    vm.kvm.bug("a test says so")
    assert kvm_run(vm)[0] == EIO
