"""The host's own interfaces by which a program is caught: seccomp notification and ptrace, x86-64 only.

Numbers and layouts of include/uapi/linux/{seccomp,ptrace,audit}.h, arch/x86/entry/syscalls/syscall_64.tbl and
struct user_regs_struct; v6.12.  Calls that Python's library lacks are made through ctypes.
"""

import ctypes
import os
from enum import IntEnum

__all__ = (
    "AUDIT_ARCH_X86_64",
    "LIBC",
    "Iovec",
    "Nr",
    "Registers",
    "UnavailableError",
    "call",
    "seccomp",
)

AUDIT_ARCH_X86_64 = 0xC000_003E
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
LIBC.ptrace.restype = ctypes.c_long
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_SYS_SECCOMP = 317
_PR_SET_NO_NEW_PRIVS = 38


class UnavailableError(Exception):
    """This machine does not let softcvm catch a program; the text says what, and how to allow it."""


class Nr(IntEnum):
    """System calls that are caught, some of them only for certain arguments."""

    READ = 0
    WRITE = 1
    OPEN = 2
    CLOSE = 3
    STAT = 4
    FSTAT = 5
    LSTAT = 6
    LSEEK = 8
    MMAP = 9
    MUNMAP = 11
    IOCTL = 16
    PREAD64 = 17
    PWRITE64 = 18
    READV = 19
    WRITEV = 20
    ACCESS = 21
    MREMAP = 25
    MADVISE = 28
    DUP = 32
    DUP2 = 33
    FCNTL = 72
    FTRUNCATE = 77
    OPENAT = 257
    NEWFSTATAT = 262
    FACCESSAT = 269
    FALLOCATE = 285
    DUP3 = 292
    STATX = 332
    CLOSE_RANGE = 436
    OPENAT2 = 437
    FACCESSAT2 = 439


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class Registers(ctypes.Structure):
    """struct user_regs_struct."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
            *(
                "rax",
                "rcx",
                "rdx",
                "rsi",
                "rdi",
                "orig_rax",
                "rip",
                "cs",
                "eflags",
                "rsp",
                "ss",
            ),
            *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


def call(result: int, what: str) -> int:
    """The result of a C function that says -1 for failure.  OSError."""
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


class _SockFilter(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class _SockFprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_SockFilter))]


def seccomp(program: list[tuple[int, int, int, int]], flags: int) -> int:
    """Install a filter on the calling thread, which gives up gaining privileges; the listener's fd."""
    filters = (_SockFilter * len(program))(*(_SockFilter(*line) for line in program))
    fprog = _SockFprog(len(program), filters)
    call(LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    set_mode_filter = 1
    result = LIBC.syscall(_SYS_SECCOMP, set_mode_filter, flags, ctypes.byref(fprog))
    return call(result, "seccomp(SECCOMP_SET_MODE_FILTER)")
