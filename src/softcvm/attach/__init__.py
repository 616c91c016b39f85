"""attach: how real programs and the real kernel are reached."""

from softcvm.attach.host_sys import HostSys

__all__ = ("HostSys",)
