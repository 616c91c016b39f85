"""Writes that user space collects instead of taking an exit for each: KVM_REGISTER_COALESCED_MMIO (virt/kvm/
coalesced_mmio.c, v6.12).

Owns the zones of a VM and the ring that its vCPUs share with user space.  A full ring, or an index that user space
has made invalid, is an exit as if there were no zone.  No other device lives on the kernel's I/O buses.
"""

import struct
from errno import EINVAL, ENOSPC
from typing import TYPE_CHECKING, NamedTuple

from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PAGE_SIZE
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = (
    "CoalescedZone",
    "kvm_io_bus_write",
    "kvm_vm_ioctl_register_coalesced_mmio",
    "kvm_vm_ioctl_unregister_coalesced_mmio",
)

_ZONE = struct.Struct("<QII")
_RING = struct.Struct("<II")
"""struct kvm_coalesced_mmio_ring: first, last; entries follow."""
_ENTRY = struct.Struct("<QII8s")
_MAX = (PAGE_SIZE - _RING.size) // _ENTRY.size
_BUS_DEVICES = 1000
_U64, _INT_MAX = (1 << 64) - 1, (1 << 31) - 1


class CoalescedZone(NamedTuple):
    """struct kvm_coalesced_mmio_zone; pio: of ports, not of memory."""

    addr: int
    size: int
    pio: bool

    def has(self, addr: int, length: int) -> bool:
        """coalesced_mmio_in_range()"""
        if length > _INT_MAX or addr + length > _U64:
            return False
        return self.addr <= addr and addr + length <= self.addr + self.size & _U64


def _checked(data: bytes) -> CoalescedZone:
    addr, size, pio = _ZONE.unpack(data)
    if pio not in (0, 1):
        raise KernelError(EINVAL, f"a zone of kind {pio}")
    return CoalescedZone(addr, size, bool(pio))


def kvm_vm_ioctl_register_coalesced_mmio(kvm: "Kvm", data: bytes) -> Steps[None]:
    """EINVAL: neither memory nor ports.  ENOSPC: the bus is full."""
    zone = _checked(data)
    yield from kvm.slots_lock.acquire()
    try:
        if sum(other.pio == zone.pio for other in kvm.coalesced_zones) >= _BUS_DEVICES:
            raise KernelError(ENOSPC, f"{_BUS_DEVICES} devices on the bus")
        kvm.coalesced_zones.append(zone)
    finally:
        kvm.slots_lock.release()


def kvm_vm_ioctl_unregister_coalesced_mmio(kvm: "Kvm", data: bytes) -> Steps[None]:
    """Every zone that has this one inside.  EINVAL: neither memory nor ports."""
    gone = _checked(data)
    yield from kvm.slots_lock.acquire()
    kvm.coalesced_zones = [
        zone
        for zone in kvm.coalesced_zones
        if zone.pio != gone.pio or not zone.has(gone.addr, gone.size)
    ]
    kvm.slots_lock.release()


def kvm_io_bus_write(kvm: "Kvm", addr: int, data: bytes, *, pio: bool) -> bool:
    """Whether a guest's write is done with: a zone has it and the ring has room."""
    if not any(z.pio == pio and z.has(addr, len(data)) for z in kvm.coalesced_zones):
        return False
    ring = kvm.coalesced_mmio_ring
    first, last = _RING.unpack(bytes(ring[: _RING.size]))
    if last >= _MAX or (last + 1) % _MAX == first:
        return False
    at = _RING.size + last * _ENTRY.size
    ring[at : at + _ENTRY.size] = _ENTRY.pack(addr, len(data), pio, data.ljust(8, b"\0"))
    ring[4:8] = ((last + 1) % _MAX).to_bytes(4, "little")
    return True
