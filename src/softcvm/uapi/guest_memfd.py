"""Operations on a guest_memfd (kvm_gmem_fops, virt/kvm/guest_memfd.c, v7.2), with the VFS
checks before them."""

from errno import EFBIG, EINVAL, EOPNOTSUPP
from typing import TYPE_CHECKING

from softcvm.kernel.errors import KernelError
from softcvm.kernel.profile import KernelProfile
from softcvm.kernel.virt.kvm.gmem_inode import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    GmemFile,
    kvm_gmem_fallocate,
)
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.task import Process

__all__ = ("gmem_fallocate", "vfs_check_fallocate")

_S64_MAX = (1 << 63) - 1
_COLLAPSE_RANGE, _ZERO_RANGE, _INSERT_RANGE, _UNSHARE_RANGE = 0x08, 0x10, 0x20, 0x40
_WRITE_ZEROES = 0x80
_MODE_MASK = (
    FALLOC_FL_PUNCH_HOLE | _COLLAPSE_RANGE | _ZERO_RANGE | _INSERT_RANGE | _UNSHARE_RANGE
)


def gmem_fallocate(
    proc: "Process", gmem: GmemFile, mode: int, offset: int, length: int
) -> Steps[None]:
    """vfs_fallocate(), then the file's own.  EINVAL, EOPNOTSUPP, EFBIG and what guest_memfd
    answers."""
    vfs_check_fallocate(proc.linux.profile, mode, offset, length)
    if offset + length > _S64_MAX:
        raise KernelError(EFBIG, f"offset {offset:#x} + length {length:#x}")
    return kvm_gmem_fallocate(gmem.inode, proc, mode, offset, length)


def vfs_check_fallocate(profile: KernelProfile, mode: int, offset: int, length: int) -> None:
    """What vfs_fallocate() refuses before it looks at the file.  EINVAL, EOPNOTSUPP."""
    if offset < 0 or length <= 0:
        raise KernelError(EINVAL, f"offset {offset}, length {length}")
    keep_size = bool(mode & FALLOC_FL_KEEP_SIZE)
    modes = _MODE_MASK | (_WRITE_ZEROES if profile.falloc_write_zeroes else 0)
    if mode & ~(modes | FALLOC_FL_KEEP_SIZE):
        raise KernelError(EOPNOTSUPP, f"fallocate mode {mode:#x}")
    match mode & modes:
        case 0 | 0x10 | 0x40:  # allocate, ZERO_RANGE, UNSHARE_RANGE
            pass
        case 0x02 if keep_size:
            pass
        case 0x08 | 0x20 | 0x80 if not keep_size:
            pass
        case _:
            raise KernelError(EOPNOTSUPP, f"fallocate mode {mode:#x}")
