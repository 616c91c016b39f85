"""Registers in kvm_run: the same as the ioctls give and take (KVM_CAP_SYNC_REGS; checks of sync_regs_test.c)."""

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.vcpu import KvmRegs, KvmSregs
from tests.uapi.calls import MIB, RW, SHARED, VmCalls, errno_of

VALID, DIRTY, SYNC = 288, 296, 304
REGS, SREGS, EVENTS = 1, 2, 4


class Vcpu:
    """A vCPU whose guest only halts, and its kvm_run."""

    def __init__(self, vm_type: int = VmType.DEFAULT) -> None:
        self.calls = VmCalls(Machine(kernel="6.12", memory=64 * MIB).process(), vm_type)
        self.sys = self.calls.sys
        self.fd = self.calls.vcpu()
        self.run_page = self.sys.mmap(4096, RW, SHARED, self.fd)

    def write(self, at: int, data: bytes) -> None:
        self.sys.store(self.run_page + at, data)

    def read(self, at: int, size: int) -> bytes:
        return self.sys.load(self.run_page + at, size)

    def run(self, valid: int = 0, dirty: int = 0) -> str:
        self.write(VALID, valid.to_bytes(8, "little") + dirty.to_bytes(8, "little"))
        return errno_of(lambda: self.sys.ioctl(self.fd, k.KVM_RUN))

    def get(self, request: int, size: int) -> bytes:
        buffer = bytearray(size)
        self.sys.ioctl(self.fd, request, buffer)
        return bytes(buffer)


def test_what_comes_out_is_what_the_ioctls_say() -> None:
    vcpu = Vcpu()
    assert vcpu.run(valid=REGS | SREGS | EVENTS) == "0"
    regs = vcpu.get(k.KVM_GET_REGS, KvmRegs.SIZE)
    sregs = vcpu.get(k.KVM_GET_SREGS, KvmSregs.SIZE)
    events = vcpu.get(k.KVM_GET_VCPU_EVENTS, 64)
    assert vcpu.read(SYNC, len(regs)) == regs
    assert vcpu.read(SYNC + len(regs), len(sregs)) == sregs
    assert vcpu.read(SYNC + len(regs) + len(sregs), 64) == events


def test_only_what_is_dirty_goes_in_and_only_what_is_valid_comes_out() -> None:
    vcpu = Vcpu()
    regs = KvmRegs(vcpu.get(k.KVM_GET_REGS, KvmRegs.SIZE))
    regs.rbx = 0xBAD_1DEA
    vcpu.write(SYNC, bytes(regs))
    assert vcpu.run() == "0"
    assert KvmRegs(vcpu.get(k.KVM_GET_REGS, KvmRegs.SIZE)).rbx != 0xBAD_1DEA
    assert vcpu.run(dirty=REGS) == "0"
    assert KvmRegs(vcpu.get(k.KVM_GET_REGS, KvmRegs.SIZE)).rbx == 0xBAD_1DEA
    assert vcpu.read(DIRTY, 8) == bytes(8)
    assert KvmRegs(vcpu.read(SYNC, KvmRegs.SIZE)).rip == regs.rip  # not asked for, not written


@pytest.mark.parametrize(("valid", "dirty"), [(8, 0), (0, 8), (1 << 31, 0), (15, 7)])
def test_unknown_fields_are_refused(valid: int, dirty: int) -> None:
    assert Vcpu().run(valid, dirty) == "EINVAL"


def test_bad_system_registers_are_refused_and_stay_dirty() -> None:
    vcpu = Vcpu()
    sregs = KvmSregs(vcpu.get(k.KVM_GET_SREGS, KvmSregs.SIZE))
    sregs.cr4 = 1 << 63
    vcpu.write(SYNC + KvmRegs.SIZE, bytes(sregs))
    assert vcpu.run(dirty=SREGS) == "EINVAL"
    assert vcpu.read(DIRTY, 8) == SREGS.to_bytes(8, "little")
