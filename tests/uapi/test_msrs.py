"""MSRs, CR4 and the switches of KVM_ENABLE_CAP.

The judge of what common x86 code decides is the real kernel, where /dev/kvm is; what AMD's code decides is from
arch/x86/kvm/svm/svm.c v6.12, read, and from the kernel's own selftests (hwcr_msr_test.c, set_sregs_test.c).
"""

from functools import partial
from itertools import product

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.vcpu import KvmSregs
from softcvm.kernel.errors import Unmodelled
from softcvm.kernel.task import Rlimits
from tests.uapi.calls import MIB, VmCalls, errno_of
from tests.uapi.test_real_kvm import Answers, both, kernel

__all__ = ("kernel",)

U64 = (1 << 64) - 1
CAP_PLATFORM_INFO, CAP_EXCEPTION_PAYLOAD, CAP_DISABLE_NX = 159, 164, 220
CAP_APIC_BUS, CAP_ENFORCE_PV = 237, 190


def set_msr(calls: VmCalls, vcpu: int, index: int, value: int) -> int:
    data = bytearray(24)
    data[0:4] = (1).to_bytes(4, "little")
    data[8:12] = index.to_bytes(4, "little")
    data[16:24] = value.to_bytes(8, "little")
    return calls.sys.ioctl(vcpu, k.KVM_SET_MSRS, data)


def get_msr(calls: VmCalls, fd: int, index: int) -> int | None:
    """None: refused."""
    data = bytearray(24)
    data[0:4] = (1).to_bytes(4, "little")
    data[8:12] = index.to_bytes(4, "little")
    done = calls.sys.ioctl(fd, k.KVM_GET_MSRS, data)
    return int.from_bytes(data[16:24], "little") if done else None


def vm(kernel: str = "6.12", vm_type: int = VmType.DEFAULT) -> tuple[VmCalls, int]:
    calls = VmCalls(Machine(kernel=kernel, memory=64 * MIB).process(), vm_type)
    return calls, calls.vcpu()


COMMON = (
    *(0x200, 0x201, 0x20F, 0x210, 0x250, 0x258, 0x260, 0x268, 0x26F, 0x2FF, 0xFE),  # MTRRs
    *(
        0x17A,
        0x17B,
        0x280,
        0x29F,
        0x400,
        0x401,
        0x403,
        0x47F,
        0x480,
    ),  # machine check
    *(0xCE, 0x34, 0x8B, 0x198, 0x2A, 0x17, 0x11E, 0x606, 0x79),
    *(
        0xC001_0015,
        0xC001_001B,
        0xC001_0058,
        0xC001_001F,
        0xC001_1023,
        0x4B56_4D05,
        0x4B56_4D08,
    ),
    *(0xDEAD_BEEF, 0x3B, 0x1FC, 0xC000_0081, 0xC000_0082, 0xC000_0100),
)
VALUES = (
    0,
    1,
    6,
    0x0706_0504_0106_0504,
    0x0606_0606_0606_0606,
    0x606,
    0xC06,
    0x800,
    U64,
    U64 >> 1,
    1 << 24,
)


def test_msrs_of_common_code_take_what_the_real_kernel_takes(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        vcpu = calls.vcpu()
        answers: Answers = []
        for index, value in product(COMMON, VALUES):
            done = set_msr(calls, vcpu, index, value)
            answers.append((("set", hex(index), hex(value), done), "0"))
            answers.append((("get", hex(index), get_msr(calls, vcpu, index)), "0"))
        return answers

    both(kernel, ask)


def test_after_setup_mce_the_banks_are_what_the_real_kernel_has(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        vcpu = calls.vcpu()
        answers: Answers = []
        for cap in (0, 33, 32, 1 << 24 | 32, 1 << 8 | 4, 1 << 40 | 4):
            buffer = bytearray(cap.to_bytes(8, "little"))
            setup = errno_of(partial(calls.sys.ioctl, vcpu, k.KVM_X86_SETUP_MCE, buffer))
            banks = [get_msr(calls, vcpu, 0x400 + n) for n in (0, 1, 4, 12, 16, 127)]
            answers.append(((hex(cap), banks, get_msr(calls, vcpu, 0x17B)), setup))
        return answers

    both(kernel, ask)


def test_hwcr_keeps_two_bits_ignores_three_and_refuses_the_rest() -> None:
    calls, vcpu = vm()
    for bit in range(64):
        allowed = bit in (3, 6, 8, 18, 24)
        assert set_msr(calls, vcpu, 0xC001_0015, 1 << bit) == int(allowed), bit
        expected = 1 << bit if bit in (18, 24) else 0
        assert get_msr(calls, vcpu, 0xC001_0015) == expected
        set_msr(calls, vcpu, 0xC001_0015, 0)


@pytest.mark.parametrize(
    ("index", "value", "back"),
    [
        (0x48, 0x87, 0x87),
        (0x48, 0x88, None),
        (0xC000_0103, U64, 0xFFFF_FFFF),
        (0x1D9, 0x3F, 1),
        (0x1D9, 0x41, None),
        (0xC001_0117, 0x1234_5678, 0x1234_5000),
        (0xC001_1029, 2, 2),
        (0xC001_1029, 4, None),
        (0xC000_0080, 0x901, 0x901),
        (0xC000_0080, 1 << 20, None),
        (0xC001_0114, 0x1F, 0x1F),
        (0xDA0, 1, None),
        (0x277, 0x0706_0504_0106_0504, 0x0706_0504_0106_0504),
        (0x277, 2, None),
        (0x140, 1, 1),
        (0x140, 2, None),
    ],
)
def test_msrs_of_amd_keep_what_svm_keeps(index: int, value: int, back: int | None) -> None:
    calls, vcpu = vm()
    assert set_msr(calls, vcpu, index, value) == int(back is not None)
    if back is not None:
        assert get_msr(calls, vcpu, index) == back


def test_every_advertised_msr_can_be_read() -> None:
    calls, vcpu = vm()
    for request, fd in (
        (k.KVM_GET_MSR_INDEX_LIST, vcpu),
        (k.KVM_GET_MSR_FEATURE_INDEX_LIST, calls.kvm),
    ):
        short = bytearray(8)
        assert errno_of(partial(calls.sys.ioctl, calls.kvm, request, short)) == "E2BIG"
        count = int.from_bytes(short[:4], "little")
        assert count > 3
        data = bytearray(count.to_bytes(4, "little") + bytes(4 * count))
        calls.sys.ioctl(calls.kvm, request, data)
        for at in range(4, len(data), 4):
            index = int.from_bytes(data[at : at + 4], "little")
            assert get_msr(calls, fd, index) is not None, hex(index)


def test_a_pv_msr_is_gone_once_the_guests_features_are_enforced() -> None:
    calls, vcpu = vm()
    assert set_msr(calls, vcpu, 0x4B56_4D05, 0) == 1
    assert get_msr(calls, vcpu, 0x4B56_4D05) == 0
    enforce = bytearray(104)
    enforce[0:4] = CAP_ENFORCE_PV.to_bytes(4, "little")
    enforce[8] = 1
    calls.sys.ioctl(vcpu, k.KVM_ENABLE_CAP, enforce)
    assert set_msr(calls, vcpu, 0x4B56_4D05, 1) == 0
    with pytest.raises(Unmodelled):
        set_msr(*vm(), 0x4B56_4D03, 1)


def test_cr4_takes_the_bits_that_the_real_features_allow() -> None:
    """Bit by bit as set_sregs_test.c does; without CPUID only the processor decides."""
    calls, vcpu = vm()
    buffer = bytearray(KvmSregs.SIZE)
    calls.sys.ioctl(vcpu, k.KVM_GET_SREGS, buffer)
    for bit in range(64):
        sregs = KvmSregs(bytes(buffer))
        sregs.cr4 = 1 << bit
        expected = "0" if bit <= 10 or bit in (11, 16, 17, 18, 20, 21, 22) else "EINVAL"
        if bit == 12:
            expected = "0"  # LA57: genoa
        assert (
            errno_of(partial(calls.sys.ioctl, vcpu, k.KVM_SET_SREGS, sregs.data)) == expected
        ), bit
    sregs = KvmSregs(bytes(buffer))
    sregs.apic_base = 1 << 10
    assert errno_of(partial(calls.sys.ioctl, vcpu, k.KVM_SET_SREGS, sregs.data)) == "EINVAL"


def test_switches_refuse_what_the_real_kernel_refuses(kernel: str) -> None:
    caps = (129, 159, 164, 188, 204, 218, 237, 128, 212)
    values = (0, 1, 2, 4, 8, 16, U64, 1 << 32)

    def ask(calls: VmCalls) -> Answers:
        answers: Answers = []
        for cap, value in product(caps, values):
            if cap == 129 and value & 12:
                continue  # Unmodelled: EOI broadcasts
            answers.append(((cap, value), errno_of(partial(calls.enable_cap, cap, value))))
        return answers

    both(kernel, ask)


def test_the_boot_processor_is_chosen_before_vcpus_exist(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        choose = partial(calls.sys.ioctl, calls.fd, k.KVM_SET_BOOT_CPU_ID)
        answers: Answers = [(n, errno_of(partial(choose, n))) for n in (0, 3, 4096, 4097, U64)]
        calls.vcpu(3)
        answers.append(("late", errno_of(partial(choose, 0))))
        return answers

    both(kernel, ask)


def test_signal_masks_and_events_are_judged_as_by_the_real_kernel(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        vcpu = calls.vcpu()
        answers: Answers = []
        for length in (0, 4, 8, 16):
            mask = bytearray(length.to_bytes(4, "little") + bytes(16))
            call = partial(calls.sys.ioctl, vcpu, k.KVM_SET_SIGNAL_MASK, mask)
            answers.append((("mask", length), errno_of(call)))
        for flags, nr, injected in product((0, 1, 8, 16, 32, 64), (2, 32), (0, 1)):
            events = bytearray(64)
            events[0], events[1] = injected, nr
            events[20] = flags
            if flags & 8:  # a kernel with SMM is another matter
                continue
            call = partial(calls.sys.ioctl, vcpu, k.KVM_SET_VCPU_EVENTS, events)
            answers.append((("events", flags, nr, injected), errno_of(call)))
        return answers

    both(kernel, ask)


def test_nx_huge_pages_are_root_business() -> None:
    sys = Machine(memory=64 * MIB).process(Rlimits(cap_sys_boot=False))
    calls = VmCalls(sys, VmType.DEFAULT)
    assert errno_of(partial(calls.enable_cap, CAP_DISABLE_NX, 1)) == "EPERM"
    calls, _ = vm()
    assert errno_of(partial(calls.enable_cap, CAP_DISABLE_NX, 1)) == "EINVAL"
    assert errno_of(partial(calls.enable_cap, CAP_APIC_BUS, 1)) == "ENXIO"
