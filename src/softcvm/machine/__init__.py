"""machine: one computer, put together and switched on."""

from softcvm.machine.machine import Machine
from softcvm.machine.process import MachineProcess

__all__ = ("Machine", "MachineProcess")
