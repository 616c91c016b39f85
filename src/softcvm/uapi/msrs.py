"""KVM_GET_MSRS and KVM_SET_MSRS: a list of MSRs, of the system or of a vCPU (msr_io(), arch/x86/kvm/x86.c, v6.12)."""

from collections.abc import Callable
from errno import E2BIG

from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.sim.steps import Steps

__all__ = ("msr_io",)

_MAX_IO_MSRS = 256


def msr_io(
    argp: UserPtr, access: Callable[[int, int], int | None], *, writeback: bool = True
) -> Steps[int]:
    """struct kvm_msrs: how many were done.  What is refused, None, ends the list, and so does an error."""
    count = int.from_bytes((yield from argp.read(8))[:4], "little")
    if count >= _MAX_IO_MSRS:
        raise KernelError(E2BIG, f"{count} MSRs")
    data = bytearray((yield from argp.read(16 * count, 8)))
    done = 0
    for at in range(0, 16 * count, 16):
        index = int.from_bytes(data[at : at + 4], "little")
        try:
            value = access(index, int.from_bytes(data[at + 8 : at + 16], "little"))
        except KernelError:
            break  # __msr_io() reports how many it did, not why it stopped
        if value is None:
            break
        data[at + 8 : at + 16] = value.to_bytes(8, "little")
        done += 1
    if writeback:
        yield from argp.write(data, 8)
    return done
