"""Nested state where guests have no SVM: kvm_amd with nested=0 (svm_get_nested_state(), svm_set_nested_state(), v6.12).

Numbers are those of <asm/kvm.h>: a header of 128 bytes, KVM_STATE_NESTED_SVM_VMCB_SIZE, GIF_SET 0x100, format 1.
"""

import struct

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from tests.uapi.calls import MIB, VmCalls, errno_of

GIF_SET, SVM = 0x100, 1


def vcpu() -> tuple[VmCalls, int]:
    calls = VmCalls(Machine(kernel="6.12", memory=64 * MIB).process(), VmType.DEFAULT)
    return calls, calls.vcpu()


def test_the_capability_is_the_greatest_size_whether_or_not_guests_have_svm() -> None:
    calls, _ = vcpu()
    assert (
        calls.sys.ioctl(calls.kvm, k.KVM_CHECK_EXTENSION, k.KVM_CAP_NESTED_STATE) == 128 + 4096
    )


def test_the_interrupt_flag_is_set_and_there_is_nothing_else() -> None:
    calls, fd = vcpu()
    buffer = bytearray(struct.pack("<HHI", 0, 0, 128).ljust(128, b"\0"))
    calls.sys.ioctl(fd, k.KVM_GET_NESTED_STATE, buffer)
    assert struct.unpack_from("<HHI", buffer) == (GIF_SET, SVM, 128)
    calls.sys.ioctl(fd, k.KVM_SET_NESTED_STATE, buffer)


def test_a_buffer_that_is_too_small_is_told_the_size() -> None:
    calls, fd = vcpu()
    buffer = bytearray(struct.pack("<HHI", 0, 0, 127).ljust(128, b"\0"))
    assert errno_of(lambda: calls.sys.ioctl(fd, k.KVM_GET_NESTED_STATE, buffer)) == "E2BIG"
    assert struct.unpack_from("<I", buffer, 4) == (128,)


@pytest.mark.parametrize(
    ("flags", "format_", "size"),
    [
        (GIF_SET, SVM, 127),
        (GIF_SET, 0, 128),  # VMX
        (0, SVM, 128),  # GIF clear without SVM
        (GIF_SET | 1, SVM, 128),  # in guest mode without SVM
        (GIF_SET | 2, SVM, 128),  # an entry pending outside of guest mode
        (GIF_SET | 1 << 9, SVM, 128),
    ],
)
def test_anything_else_is_refused(flags: int, format_: int, size: int) -> None:
    calls, fd = vcpu()
    data = bytearray(struct.pack("<HHI", flags, format_, size).ljust(128, b"\0"))
    assert errno_of(lambda: calls.sys.ioctl(fd, k.KVM_SET_NESTED_STATE, data)) == "EINVAL"


def test_guests_are_not_offered_svm() -> None:
    calls, _ = vcpu()
    buffer = bytearray((256).to_bytes(8, "little") + bytes(40 * 256))
    calls.sys.ioctl(calls.kvm, k.KVM_GET_SUPPORTED_CPUID, buffer)
    found = {
        struct.unpack_from("<I", buffer, at)[0]: struct.unpack_from("<4I", buffer, at + 12)
        for at in range(8, len(buffer), 40)
    }
    assert not found[0x8000_0001][2] >> 2 & 1
    assert found.get(0x8000_000A, (0,) * 4) == (0,) * 4
