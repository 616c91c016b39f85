"""MSR accesses that go to user space: filters and refusals (the cases of userspace_msr_exit_test.c)."""

from functools import partial
from typing import Any

import pytest

from softcvm.abi.insn import Program, Rdmsr, Wrmsr
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.vcpu import KvmEnableCap, KvmMsrFilter, KvmMsrFilterRange
from softcvm.abi.svm import Vector
from tests.kernel.svm.test_run import Guest, raised, trying
from tests.uapi.calls import VmCalls, errno_of
from tests.uapi.test_real_kvm import Answers, both, kernel

__all__ = ("kernel",)

INVAL, UNKNOWN, FILTER = 1, 2, 4
READ, WRITE = 1, 2
PAT, NONE = 0x277, 0xDEAD


def msr_filter(memory: int, *ranges: tuple[int, int, int], flags: int = 0) -> KvmMsrFilter:
    """Ranges of (flags, base, count), each with its bitmap at `memory`."""
    rows = b"".join(
        bytes(KvmMsrFilterRange(flags=f, base=base, nmsrs=n, bitmap=memory))
        for f, base, n in ranges
    )
    return KvmMsrFilter(flags=flags, ranges=rows.ljust(384, b"\0"))


def script(note: Any) -> Program:
    yield from trying(Rdmsr(PAT), note)
    yield from trying(Wrmsr(PAT, 0x0606_0606), note)
    yield from trying(Rdmsr(NONE), note)
    yield from trying(Wrmsr(PAT, 2), note)


def guest(host: Any, reasons: int) -> Guest:
    made = Guest(host, VmType.DEFAULT, script)
    cap = KvmEnableCap(cap=k.KVM_CAP_X86_USER_SPACE_MSR, arg0=reasons)
    made.user.ioctl(made.vm.fd, k.KVM_ENABLE_CAP, cap)
    return made


def test_each_refusal_leaves_with_its_reason_and_user_space_decides(host: Any) -> None:
    vcpu = guest(host, INVAL | UNKNOWN | FILTER)
    denied = msr_filter(vcpu.memory, (READ, PAT, 1))
    vcpu.user.ioctl(vcpu.vm.fd, k.KVM_X86_SET_MSR_FILTER, denied)

    run = vcpu.run()
    assert (run.exit_reason, run.msr_index, run.msr_reason) == (
        k.KVM_EXIT_X86_RDMSR,
        PAT,
        FILTER,
    )
    vcpu.user.sys.store(vcpu.shared + 48, (0x1234_5678_9ABC).to_bytes(8, "little"))
    run = vcpu.run()  # the write is not filtered
    assert (run.exit_reason, run.msr_index, run.msr_reason) == (
        k.KVM_EXIT_X86_RDMSR,
        NONE,
        UNKNOWN,
    )
    vcpu.user.sys.store(vcpu.shared + 32, b"\1")  # error: #GP
    run = vcpu.run()
    assert (run.exit_reason, run.msr_data, run.msr_reason) == (k.KVM_EXIT_X86_WRMSR, 2, INVAL)
    assert vcpu.run().exit_reason == k.KVM_EXIT_HLT
    assert vcpu.seen == [0x1234_5678_9ABC, None, raised(Vector.GP), None]


def test_without_the_capability_a_filter_is_gp(host: Any) -> None:
    vcpu = guest(host, 0)
    denied = msr_filter(vcpu.memory, (READ | WRITE, PAT, 1))
    vcpu.user.ioctl(vcpu.vm.fd, k.KVM_X86_SET_MSR_FILTER, denied)
    assert vcpu.run().exit_reason == k.KVM_EXIT_HLT
    assert vcpu.seen == [raised(Vector.GP)] * 4


def test_a_set_bit_allows_and_the_default_rules_the_rest(host: Any) -> None:
    vcpu = guest(host, FILTER)
    vcpu.user.sys.store(vcpu.memory, b"\x01" + bytes(7))
    only_pat = msr_filter(vcpu.memory, (READ, PAT, 1), flags=1)
    vcpu.user.ioctl(vcpu.vm.fd, k.KVM_X86_SET_MSR_FILTER, only_pat)
    run = vcpu.run()
    assert (run.exit_reason, run.msr_data, run.msr_reason) == (
        k.KVM_EXIT_X86_WRMSR,
        0x0606_0606,
        FILTER,
    )


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_filters_are_judged_as_by_the_real_kernel(kernel: str, flags: int) -> None:
    def ask(calls: VmCalls) -> Answers:
        memory = calls.sys.mmap(4096, 3, 0x22)
        answers: Answers = []
        for rows in (
            (),
            ((READ, PAT, 1),),
            ((0, PAT, 1),),
            ((4, PAT, 1),),
            ((READ, PAT, 0),),
            ((9, PAT, 0),),
            ((READ, 0, 0x600 * 8),),
            ((READ, 0, 0x600 * 8 + 1),),
            ((READ, 0, 0xFFFF_FFFF),),
            ((READ, PAT, 1), (0, PAT, 1)),
        ):
            for at in (memory, 0):
                data = bytearray(bytes(msr_filter(at, *rows, flags=flags)))
                call = partial(calls.sys.ioctl, calls.fd, k.KVM_X86_SET_MSR_FILTER, data)
                answers.append(((rows, bool(at), errno_of(call)), "0"))
        return answers

    both(kernel, ask)
