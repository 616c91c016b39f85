"""The seccomp filter: which system calls of the caught program stop for softcvm, as classic BPF.

Everything else runs at native speed: the program reads a call's number, and at most two arguments of it.
Emulated files have descriptors from FD_BASE up; no other descriptor is looked at.
"""

from softcvm.attach.kernel_abi import AUDIT_ARCH_X86_64, Nr

__all__ = ("FD_BASE", "OURS", "build_filter")

FD_BASE = 512
OURS = 0x736F_6674
"""In the upper half of mmap()'s descriptor, which the kernel ignores: softcvm makes this call in the program's name."""
_FD_END = 1 << 30
"""Above it are AT_FDCWD and other negative numbers."""

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _NOTIFY, _KILL = 0x7FFF_0000, 0x7FC0_0000, 0x8000_0000
_NR_AT, _ARCH_AT = 0, 4
_X32_BIT = 1 << 30
_MAP_FIXED, _PROT_EXEC, _MAP_ANONYMOUS = 0x10, 4, 0x20

Line = tuple[int, int, int, int]

_ALWAYS = (
    Nr.OPEN,
    Nr.OPENAT,
    Nr.OPENAT2,
    Nr.STAT,
    Nr.LSTAT,
    Nr.ACCESS,
    Nr.FACCESSAT,
    Nr.FACCESSAT2,
    Nr.NEWFSTATAT,
    Nr.STATX,
    Nr.MUNMAP,
    Nr.MREMAP,
    Nr.MADVISE,
)
"""Calls with a path, and those that take memory away."""
_BY_FD = {
    Nr.IOCTL: (0,),
    Nr.READ: (0,),
    Nr.WRITE: (0,),
    Nr.CLOSE: (0,),
    Nr.FSTAT: (0,),
    Nr.LSEEK: (0,),
    Nr.PREAD64: (0,),
    Nr.PWRITE64: (0,),
    Nr.READV: (0,),
    Nr.WRITEV: (0,),
    Nr.DUP: (0,),
    Nr.DUP2: (0, 1),
    Nr.DUP3: (0, 1),
    Nr.FCNTL: (0,),
    Nr.FTRUNCATE: (0,),
    Nr.FALLOCATE: (0,),
    Nr.CLOSE_RANGE: (1,),
}
"""Calls with descriptors, and which arguments those are."""


def build_filter() -> list[Line]:
    """As (code, jt, jf, k).  A 32-bit program cannot be caught and is killed."""
    program: list[Line] = [
        (_LD, 0, 0, _ARCH_AT),
        (_JEQ, 1, 0, AUDIT_ARCH_X86_64),
        (_RET, 0, 0, _KILL),
        (_LD, 0, 0, _NR_AT),
        (_JGE, 0, 1, _X32_BIT),
        (_RET, 0, 0, _KILL),
    ]
    # What programs call most is looked for first.
    for nr, arguments in _BY_FD.items():
        program += _block(nr, [line for at in arguments for line in _notify_fd(at)])
    program += _block(Nr.MMAP, _mmap())
    for nr in _ALWAYS:
        program += _block(nr, [(_RET, 0, 0, _NOTIFY)])
    program.append((_RET, 0, 0, _ALLOW))
    return program


def _block(nr: Nr, body: list[Line]) -> list[Line]:
    """Run the body when the accumulator, the call's number, is nr; what falls out of it is allowed."""
    return [(_JEQ, 0, len(body) + 1, int(nr)), *body, (_RET, 0, 0, _ALLOW)]


def _argument(at: int) -> int:
    """Offset of the low half of an argument in struct seccomp_data."""
    return 16 + 8 * at


def _notify_fd(at: int) -> list[Line]:
    """Stop when the argument is the number of an emulated file, else fall through."""
    return [
        (_LD, 0, 0, _argument(at)),
        (_JGE, 0, 2, FD_BASE),
        (_JGE, 1, 0, _FD_END),
        (_RET, 0, 0, _NOTIFY),
    ]


def _mmap() -> list[Line]:
    """Mappings of emulated files, those that replace others, and those of code in a file."""
    return [
        (_LD, 0, 0, _argument(4) + 4),
        (_JEQ, 0, 1, OURS),
        (_RET, 0, 0, _ALLOW),
        (_LD, 0, 0, _argument(3)),
        (_JSET, 0, 1, _MAP_FIXED),
        (_RET, 0, 0, _NOTIFY),
        (_JSET, 0, 1, _MAP_ANONYMOUS),
        (_RET, 0, 0, _ALLOW),
        (_LD, 0, 0, _argument(2)),
        (_JSET, 0, 1, _PROT_EXEC),
        (_RET, 0, 0, _NOTIFY),
        *_notify_fd(4),
    ]
