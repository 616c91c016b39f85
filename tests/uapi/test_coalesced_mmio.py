"""KVM_REGISTER_COALESCED_MMIO: which zones there may be (virt/kvm/coalesced_mmio.c, v6.12).

What a guest's writes to them do is in tests/attach/test_emulated_instructions.py.
"""

import struct

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from tests.uapi.calls import MIB, VmCalls, errno_of


def zone(addr: int, size: int, pio: int) -> bytes:
    return struct.pack("<QII", addr, size, pio)


def test_a_zone_is_of_memory_or_of_ports_and_a_bus_takes_a_thousand() -> None:
    calls = VmCalls(Machine(kernel="6.12", memory=64 * MIB).process(), VmType.DEFAULT)

    def ask(request: int, data: bytes) -> str:
        return errno_of(lambda: calls.sys.ioctl(calls.fd, request, bytearray(data)))

    assert ask(k.KVM_REGISTER_COALESCED_MMIO, zone(0, 8, 2)) == "EINVAL"
    assert ask(k.KVM_UNREGISTER_COALESCED_MMIO, zone(0, 8, 2)) == "EINVAL"
    assert ask(k.KVM_UNREGISTER_COALESCED_MMIO, zone(0, 8, 0)) == "0"
    for n in range(1000):
        assert ask(k.KVM_REGISTER_COALESCED_MMIO, zone(0x1000 * n, 8, 0)) == "0"
    assert ask(k.KVM_REGISTER_COALESCED_MMIO, zone(0, 8, 0)) == "ENOSPC"
    assert ask(k.KVM_REGISTER_COALESCED_MMIO, zone(0, 8, 1)) == "0"
    assert ask(k.KVM_UNREGISTER_COALESCED_MMIO, zone(4, 4, 0)) == "0"
    assert ask(k.KVM_REGISTER_COALESCED_MMIO, zone(0, 8, 0)) == "0"
