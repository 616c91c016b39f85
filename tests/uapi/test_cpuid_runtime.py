"""CPUID bits that follow registers and capabilities (kvm_update_cpuid_runtime(); checks of cr4_cpuid_sync_test.c,
xcr0_cpuid_test.c and kvm_pv_test.c, v6.12).  Sizes of XSAVE areas are those of the manual. [APM4-26568 XSAVE]
"""

import struct

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.vcpu import KvmSregs
from tests.uapi.calls import MIB, VmCalls, errno_of

OSXSAVE, OSPKE, APIC, PV_UNHALT = 1 << 27, 1 << 4, 1 << 9, 1 << 7
CR4_OSXSAVE, CR4_PKE = 1 << 18, 1 << 22
EXITS_HLT = 2


class Vcpu:
    def __init__(self) -> None:
        self.calls = VmCalls(Machine(kernel="6.12", memory=64 * MIB).process(), VmType.DEFAULT)
        self.fd = self.calls.vcpu()
        self.table = bytearray((256).to_bytes(8, "little") + bytes(40 * 256))
        self.calls.sys.ioctl(self.calls.kvm, k.KVM_GET_SUPPORTED_CPUID, self.table)
        self.set_cpuid()

    def set_cpuid(self) -> None:
        self.calls.sys.ioctl(self.fd, k.KVM_SET_CPUID2, bytearray(self.table))

    def leaf(self, function: int, index: int = 0) -> tuple[int, ...]:
        buffer = bytearray(self.table)
        self.calls.sys.ioctl(self.fd, k.KVM_GET_CPUID2, buffer)
        for at in range(8, len(buffer), 40):
            if struct.unpack_from("<2I", buffer, at) == (function, index):
                return struct.unpack_from("<4I", buffer, at + 12)
        raise LookupError(function)

    def set_cr4(self, value: int) -> None:
        buffer = bytearray(KvmSregs.SIZE)
        self.calls.sys.ioctl(self.fd, k.KVM_GET_SREGS, buffer)
        sregs = KvmSregs(buffer)
        sregs.cr4 = value
        self.calls.sys.ioctl(self.fd, k.KVM_SET_SREGS, bytearray(sregs.data))

    def set_xcr0(self, value: int) -> str:
        xcrs = struct.pack("<IIIIQ", 1, 0, 0, 0, value).ljust(392, b"\0")
        return errno_of(lambda: self.calls.sys.ioctl(self.fd, k.KVM_SET_XCRS, bytearray(xcrs)))


def test_osxsave_and_ospke_say_what_cr4_has() -> None:
    vcpu = Vcpu()
    assert not vcpu.leaf(1)[2] & OSXSAVE
    assert not vcpu.leaf(7)[2] & OSPKE
    vcpu.set_cr4(CR4_OSXSAVE | CR4_PKE)
    assert vcpu.leaf(1)[2] & OSXSAVE
    assert vcpu.leaf(7)[2] & OSPKE
    vcpu.set_cr4(0)
    assert not vcpu.leaf(1)[2] & OSXSAVE


def test_the_size_of_the_xsave_area_follows_xcr0() -> None:
    vcpu = Vcpu()
    assert vcpu.leaf(0xD)[1] == 576
    assert vcpu.set_xcr0(7) == "0"
    assert vcpu.leaf(0xD)[1] == 576 + 256
    assert vcpu.leaf(0xD, 1)[1] == 576 + 256


def test_xcr0_takes_whole_groups_that_the_guest_has() -> None:
    vcpu = Vcpu()
    assert [vcpu.set_xcr0(value) for value in (1, 3, 7, 0xE7, 0x2E7)] == ["0"] * 5
    refused = (0, 2, 5, 0x27, 0xE3, 0x1F, 1 << 62 | 7, 3 << 17 | 7)
    assert [vcpu.set_xcr0(value) for value in refused] == ["EINVAL"] * len(refused)


def test_a_guest_without_cpuid_has_x87_only() -> None:
    vcpu = Vcpu()
    vcpu.calls.sys.ioctl(vcpu.fd, k.KVM_SET_CPUID2, bytearray(8))
    assert (vcpu.set_xcr0(1), vcpu.set_xcr0(3)) == ("0", "EINVAL")


def test_pv_unhalt_goes_where_hlt_stays_in_the_guest() -> None:
    vcpu = Vcpu()
    assert vcpu.leaf(0x4000_0001)[0] & PV_UNHALT
    vcpu.calls.enable_cap(k.KVM_CAP_X86_DISABLE_EXITS, EXITS_HLT)
    vcpu.set_cpuid()
    assert not vcpu.leaf(0x4000_0001)[0] & PV_UNHALT
