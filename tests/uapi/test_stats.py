"""KVM_GET_STATS_FD: the file's form is that of the real kernel where /dev/kvm is; kvm_binary_stats_test.c is the judge
under exec."""

import os
import struct

import pytest

from softcvm import HostSys, Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.sim.steps import run
from softcvm.uapi import dispatch
from tests.uapi.calls import MIB, PAGE, VmCalls, anon, errno_of
from tests.uapi.test_real_kvm import kernel

__all__ = ("kernel",)


class Stats:
    """A statistics file, taken apart as user space is told to."""

    def __init__(self, content: bytes) -> None:
        head = struct.unpack_from("<6I", content)
        self.flags, name_size, count, id_at, desc_at, self.data_at = head
        self.id = content[id_at : id_at + name_size].split(b"\0")[0].decode()
        self.forms: dict[str, tuple[int, int, int, int]] = {}
        self.values: dict[str, int] = {}
        for n in range(count):
            at = desc_at + n * (16 + name_size)
            flags, exponent, size, offset, bucket = struct.unpack_from("<IhHII", content, at)
            name = content[at + 16 : at + 16 + name_size].split(b"\0")[0].decode()
            self.forms[name] = (flags, exponent, size, bucket)
            place = self.data_at + offset
            self.values[name] = int.from_bytes(content[place : place + 8], "little")
        self.length = len(content)


def model(calls: VmCalls, fd: int) -> Stats:
    return Stats(read(calls, fd, 1 << 16, 0))


def read(calls: VmCalls, fd: int, size: int, offset: int | None) -> bytes:
    machine = calls.sys
    buffer = anon(machine, 1 << 16)
    steps = dispatch.sys_read(machine.proc, fd, buffer, size, offset)  # type: ignore[attr-defined]
    return machine.load(buffer, run(steps, lockdep=machine.proc.linux.lockdep))  # type: ignore[attr-defined]


def vm() -> VmCalls:
    return VmCalls(Machine(kernel="6.12", memory=64 * MIB).process(), VmType.SW_PROTECTED)


def test_every_statistic_has_the_real_kernels_form(kernel: str) -> None:
    real = VmCalls(HostSys(), VmType.DEFAULT)
    calls = vm()
    for ours, theirs in ((calls.fd, real.fd), (calls.vcpu(), real.vcpu())):
        fd = real.sys.ioctl(theirs, k.KVM_GET_STATS_FD)
        expected = Stats(os.pread(fd, 1 << 16, 0))
        os.close(fd)
        got = model(calls, calls.sys.ioctl(ours, k.KVM_GET_STATS_FD))
        assert got.flags == expected.flags
        # A kernel with another vendor module may count more.
        assert [name for name in expected.forms if name in got.forms] == list(got.forms)
        assert {name: expected.forms[name] for name in got.forms} == got.forms
    real.close()


def test_pages_are_those_that_are_mapped_now() -> None:
    calls = vm()
    fd = calls.sys.ioctl(calls.fd, k.KVM_GET_STATS_FD)
    vcpu = calls.vcpu()
    calls.private_slot(0, 0, 4 * MIB)
    assert model(calls, fd).values["pages_4k"] == 0
    assert calls.prefault(vcpu, 0, 8 * PAGE)[0] == "0"
    assert model(calls, fd).values["pages_4k"] == 8
    calls.attributes(0, PAGE, 0)
    assert model(calls, fd).values["pages_4k"] == 7


def test_a_vcpu_counts_its_entries_and_its_halts() -> None:
    calls = vm()
    vcpu = calls.vcpu()
    fd = calls.sys.ioctl(vcpu, k.KVM_GET_STATS_FD)
    for _ in range(3):
        calls.sys.ioctl(vcpu, k.KVM_RUN)
    values = model(calls, fd).values
    assert (values["exits"], values["halt_exits"], values["io_exits"]) == (3, 3, 0)


def test_reading_goes_on_where_it_stopped_and_ends() -> None:
    calls = vm()
    fd = calls.sys.ioctl(calls.fd, k.KVM_GET_STATS_FD)
    whole = read(calls, fd, 1 << 16, 0)
    parts = b""
    while part := read(calls, fd, 100, None):
        parts += part
    assert parts == whole
    assert read(calls, fd, 10, len(whole)) == b""
    assert errno_of(lambda: read(calls, calls.fd, 10, 0)) == "EINVAL"
    assert errno_of(lambda: read(calls, fd, 10, -1)) == "EINVAL"


def test_statistics_hold_the_vm_until_they_are_closed() -> None:
    calls = vm()
    machine = calls.sys.machine  # type: ignore[attr-defined]
    fd = calls.sys.ioctl(calls.fd, k.KVM_GET_STATS_FD)
    calls.close()
    assert len(machine.linux.vm_list) == 1
    calls.sys.close(fd)
    assert machine.linux.vm_list == []


@pytest.mark.parametrize("vcpu_id", [0, 7])
def test_the_id_names_process_and_vcpu(vcpu_id: int) -> None:
    calls = vm()
    pid = calls.sys.proc.pid  # type: ignore[attr-defined]
    fd = calls.sys.ioctl(calls.vcpu(vcpu_id), k.KVM_GET_STATS_FD)
    assert model(calls, fd).id == f"kvm-{pid}/vcpu-{vcpu_id}"
