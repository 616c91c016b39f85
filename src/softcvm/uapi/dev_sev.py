"""ioctls on /dev/sev (drivers/crypto/ccp/sev-dev.c, v7.2): decoded and answered by the driver
itself."""

from typing import TYPE_CHECKING

from softcvm.kernel.drivers.crypto.ccp.sev_dev import sev_ioctl
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.task import Process

__all__ = ("sev_dev_ioctl",)


def sev_dev_ioctl(proc: "Process", request: int, argp: UserPtr) -> Steps[int]:
    return (yield from sev_ioctl(proc.linux, proc, request, argp))
