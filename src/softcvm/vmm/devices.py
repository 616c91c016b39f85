"""Devices on I/O ports: a debug console that collects lines, and one that works on a guest's buffers."""

from collections.abc import Callable
from typing import Protocol

from softcvm.abi.board import BOUNCE_PORT, DEBUGCON_PORT, DEBUGCON_READBACK
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.vmm.memory import GuestMemory

__all__ = ("Bounce", "DebugConsole", "PortDevice", "Ports")

_COMPLEMENT = bytes(byte ^ 0xFF for byte in range(256))


class PortDevice(Protocol):
    """One I/O port."""

    def read(self, size: int) -> int: ...

    def write(self, value: int, size: int) -> None: ...


class DebugConsole:
    """Text written a byte at a time; whole lines go to `on_line`."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._partial = bytearray()

    def read(self, size: int) -> int:
        return DEBUGCON_READBACK

    def write(self, value: int, size: int) -> None:
        if value & 0xFF != ord("\n"):
            self._partial.append(value & 0xFF)
            return
        line = self._partial.decode("utf-8", "backslashreplace")
        self._partial.clear()
        self._on_line(line)


class Bounce:
    """Complements the bytes of the shared page whose frame number is written to it."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.pages = 0

    def read(self, size: int) -> int:
        return self.pages & ((1 << 8 * size) - 1)

    def write(self, value: int, size: int) -> None:
        gpa = value << PAGE_SHIFT
        if sum(length for _, _, length in self._memory.pieces(gpa, PAGE_SIZE)) != PAGE_SIZE:
            return  # a device that masters the bus onto nothing
        self._memory.write(gpa, self._memory.read(gpa, PAGE_SIZE).translate(_COMPLEMENT))
        self.pages += 1


class Ports:
    """Which device answers at a port; elsewhere reads float high and writes are lost."""

    def __init__(self, memory: GuestMemory, on_line: Callable[[str], None]) -> None:
        self._devices: dict[int, PortDevice] = {
            DEBUGCON_PORT: DebugConsole(on_line),
            BOUNCE_PORT: Bounce(memory),
        }

    def read(self, port: int, size: int) -> int:
        device = self._devices.get(port)
        return device.read(size) if device else (1 << 8 * size) - 1

    def write(self, port: int, value: int, size: int) -> None:
        device = self._devices.get(port)
        if device:
            device.write(value, size)
