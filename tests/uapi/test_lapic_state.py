"""KVM_GET_LAPIC and KVM_SET_LAPIC; the judge is the real kernel where /dev/kvm is."""

from functools import partial

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.kernel.errors import Unmodelled
from tests.uapi.calls import MIB, VmCalls, errno_of
from tests.uapi.test_msrs import set_msr
from tests.uapi.test_real_kvm import Answers, both, kernel

__all__ = ("kernel",)

CAP_SPLIT_IRQCHIP = 121


def registers(calls: VmCalls, vcpu: int) -> dict[int, int]:
    """Those that are not zero, by offset."""
    page = bytearray(0x400)
    calls.sys.ioctl(vcpu, k.KVM_GET_LAPIC, page)
    words = {at: int.from_bytes(page[at : at + 4], "little") for at in range(0, 0x400, 4)}
    return {at: word for at, word in words.items() if word}


def test_after_reset_the_page_is_the_real_kernels(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        calls.enable_cap(CAP_SPLIT_IRQCHIP, 24)
        return [((n, registers(calls, calls.vcpu(n))), "0") for n in (0, 1, 5)]

    both(kernel, ask)


def test_priorities_are_computed_from_what_is_set(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        calls.enable_cap(CAP_SPLIT_IRQCHIP, 24)
        vcpu = calls.vcpu()
        answers: Answers = []
        for task, served in (
            (0, 0),
            (0x35, 0),
            (0x30, 0x42),
            (0x30, 0x42),
            (0x50, 0x42),
            (0, 0x91),
            (0xFF, 0),
            (0, 0x91),
        ):
            page = bytearray(0x400)
            calls.sys.ioctl(vcpu, k.KVM_GET_LAPIC, page)
            page[0x80] = task
            page[0x100:0x180] = bytes(0x80)
            if served:
                page[0x100 + 16 * (served // 32) + served % 32 // 8] = 1 << served % 8
            done = errno_of(partial(calls.sys.ioctl, vcpu, k.KVM_SET_LAPIC, page))
            answers.append(((task, served, registers(calls, vcpu)), done))
        return answers

    both(kernel, ask)


def test_there_is_no_page_without_an_apic_in_the_kernel(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        vcpu = calls.vcpu()
        return [
            (hex(request), errno_of(partial(calls.sys.ioctl, vcpu, request, bytearray(0x400))))
            for request in (k.KVM_GET_LAPIC, k.KVM_SET_LAPIC)
        ]

    both(kernel, ask)


def test_what_would_run_or_interrupt_is_not_modelled() -> None:
    calls = VmCalls(Machine(memory=64 * MIB).process(), VmType.DEFAULT)
    calls.enable_cap(CAP_SPLIT_IRQCHIP, 24)
    vcpu = calls.vcpu()
    for at in (0x380, 0x200, 0x270):
        page = bytearray(0x400)
        page[at] = 1
        with pytest.raises(Unmodelled):
            calls.sys.ioctl(vcpu, k.KVM_SET_LAPIC, page)


def test_the_apic_id_follows_the_mode() -> None:
    """lapic.c: kvm_lapic_set_base() gives an APIC the ID of its new mode."""
    calls = VmCalls(Machine(memory=64 * MIB).process(), VmType.DEFAULT)
    calls.enable_cap(CAP_SPLIT_IRQCHIP, 24)
    vcpu = calls.vcpu(5)
    cpuid = bytearray(8 + 40)
    cpuid[0] = 1
    cpuid[8] = 1
    cpuid[8 + 20 : 8 + 24] = (1 << 21).to_bytes(4, "little")  # x2APIC
    calls.sys.ioctl(vcpu, k.KVM_SET_CPUID2, cpuid)
    assert registers(calls, vcpu)[0x20] == 5 << 24
    assert set_msr(calls, vcpu, 0x1B, 0xFEE0_0C00) == 1
    assert (
        registers(calls, vcpu)[0x20] == 5 << 24
    )  # as KVM told it before there were 32-bit IDs
    assert registers(calls, vcpu)[0xD0] == 1 << 5
    calls.enable_cap(129, 1)
    assert registers(calls, vcpu)[0x20] == 5
