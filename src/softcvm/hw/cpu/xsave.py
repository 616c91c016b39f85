"""XSAVE, XRSTOR, XGETBV and XSETBV on a guest's registers.  [APM4-26568 XSAVE, APM2-24593 §11.5]

The engine has no AVX, so that it cannot execute these; the upper halves of YMM registers live in the save area
only.  Owns the standard format for x87, SSE and YMM.
"""

import struct

from softcvm.abi.svm import GuestException, Vector
from softcvm.abi.vmsa import Vmsa

__all__ = ("xrstor", "xsave", "xsetbv")

MXCSR_MASK = 0x2_FFFF
_X87, _SSE, _YMM = 1, 2, 4
_HEADER, _YMM_AT = 512, 576


def xsave(state: Vmsa, mask: int, before: bytes) -> bytes:
    """The area after XSAVE of the features in `mask`, which XCR0 has; `before` is what lay there."""
    area = bytearray(before)
    if mask & _X87:
        area[0:24] = struct.pack(
            "<HHBBHQQ",
            *(state.x87_fcw, state.x87_fsw, state.x87_ftw & 0xFF, 0),
            *(state.x87_fop, state.x87_rip, state.x87_dp),
        )
        low, high = state.fpreg_x87[:64], state.fpreg_x87[64:]
        for n in range(8):
            register = low[8 * n : 8 * n + 8] + high[2 * n : 2 * n + 2]
            area[32 + 16 * n : 48 + 16 * n] = register.ljust(16, b"\0")
    if mask & (_SSE | _YMM):
        area[24:32] = struct.pack("<II", state.mxcsr, MXCSR_MASK)
    if mask & _SSE:
        area[160:416] = state.fpreg_xmm
    if mask & _YMM:
        area[_YMM_AT : _YMM_AT + 256] = state.fpreg_ymm
    (held,) = struct.unpack_from("<Q", area, _HEADER)
    struct.pack_into("<Q", area, _HEADER, held & ~mask | _in_use(state) & mask)
    return bytes(area)


def xrstor(state: Vmsa, mask: int, area: bytes) -> None:
    """Load the features in `mask`; those that the header does not have get their initial state."""
    (held,) = struct.unpack_from("<Q", area, _HEADER)
    if mask & _X87:
        x87 = area if held & _X87 else (0x37F).to_bytes(2, "little").ljust(160, b"\0")
        fields = struct.unpack_from("<HHBxHQQ", x87)
        state.x87_fcw, state.x87_fsw, state.x87_ftw, state.x87_fop = fields[:4]
        state.x87_rip, state.x87_dp = fields[4:]
        registers = [x87[32 + 16 * n : 42 + 16 * n] for n in range(8)]
        state.fpreg_x87 = b"".join(r[:8] for r in registers) + b"".join(
            r[8:] for r in registers
        )
    if mask & (_SSE | _YMM):
        (state.mxcsr,) = struct.unpack_from("<I", area, 24)
    if mask & _SSE:
        state.fpreg_xmm = area[160:416] if held & _SSE else bytes(256)
    if mask & _YMM:
        state.fpreg_ymm = area[_YMM_AT : _YMM_AT + 256] if held & _YMM else bytes(256)


def xsetbv(state: Vmsa, register: int, value: int, supported: int) -> None:
    """XSETBV where no hypervisor steps in: #GP outside of level 0 and for what the processor has not.

    [APM4-26568 XSETBV, APM2-24593 §11.5.2]
    """
    avx512 = value >> 5 & 7
    if (
        register
        or state.cpl
        or value & ~supported
        or not value & _X87
        or (value & _YMM and not value & _SSE)
        or avx512 not in (0, 7)
        or (avx512 and not value & _YMM)
    ):
        raise GuestException(Vector.GP)
    state.xcr0 = value


def _in_use(state: Vmsa) -> int:
    """XINUSE: features that are not in their initial state; the processor always counts the first two."""
    return _X87 | _SSE | (_YMM if any(state.fpreg_ymm) else 0)
