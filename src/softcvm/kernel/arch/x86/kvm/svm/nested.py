"""KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE where guests have no SVM (arch/x86/kvm/svm/nested.c, v6.12).

kvm_amd is loaded with nested=0: EFER.SVME cannot be set, a guest of a guest never runs, and the global interrupt
flag stays set.  The format and its checks are the same as with nested=1.
"""

import struct
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

from softcvm.kernel.errors import KernelError
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.mm.uaccess import UserPtr

__all__ = ("NESTED_STATE_SIZE", "svm_get_nested_state", "svm_set_nested_state")

_HEADER = struct.Struct("<HHI120x")
"""struct kvm_nested_state without data: flags, format, size."""
_VMCB_SIZE = 0x1000
NESTED_STATE_SIZE = _HEADER.size + _VMCB_SIZE
"""KVM_CAP_NESTED_STATE: the most that there can be."""
_GUEST_MODE, _RUN_PENDING, _EVMCS, _MTF_PENDING, _GIF_SET = 1, 2, 4, 8, 1 << 8
_KNOWN = _GUEST_MODE | _RUN_PENDING | _EVMCS | _MTF_PENDING | _GIF_SET
_FORMAT_SVM = 1


def svm_get_nested_state(argp: "UserPtr") -> Steps[None]:
    """E2BIG with the size that it takes, where there is less room than for the header."""
    room = int.from_bytes((yield from argp.read(4, 4)), "little")
    if room < _HEADER.size:
        yield from argp.write(_HEADER.size.to_bytes(4, "little"), 4)
        raise KernelError(E2BIG, f"room for {room} bytes of nested state")
    yield from argp.write(_HEADER.pack(_GIF_SET, _FORMAT_SVM, _HEADER.size))


def svm_set_nested_state(argp: "UserPtr") -> Steps[None]:
    """EINVAL: anything but GIF set and no guest mode, as is due while EFER.SVME is clear."""
    flags, format_, size = _HEADER.unpack((yield from argp.read(_HEADER.size)))
    if size < _HEADER.size or flags & ~_KNOWN:
        raise KernelError(EINVAL, f"nested state of {size} bytes, flags {flags:#x}")
    if flags & _RUN_PENDING and not flags & _GUEST_MODE:
        raise KernelError(EINVAL, "a nested entry pending outside of guest mode")
    if format_ != _FORMAT_SVM or flags != _GIF_SET:
        raise KernelError(EINVAL, f"nested state of format {format_}, flags {flags:#x}")
