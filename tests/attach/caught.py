"""Python programs that run under `softcvm exec`, with the real system's own ioctl(), mmap() and fork()."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PRELUDE = """
import ctypes, errno, fcntl, mmap, os, resource, signal, struct, sys, threading, time
kvm = os.open("/dev/kvm", os.O_RDWR)
def ioctl(fd, request, arg=0):
    try:
        return fcntl.ioctl(fd, request, arg)
    except OSError as error:
        return errno.errorcode[error.errno]
def refused(call, *args):
    try:
        return call(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
API_VERSION, CREATE_VM, CHECK_EXTENSION = 0xAE00, 0xAE01, 0xAE03
CREATE_VCPU, RUN, GET_REGS = 0xAE41, 0xAE80, 0x8090AE81
CREATE_GUEST_MEMFD = 0xC040AED4
def gmem(vm, size):
    return ioctl(vm, CREATE_GUEST_MEMFD, bytearray(struct.pack("<QQ48x", size, 0)))
"""


def softcvm_exec(
    *program: str, options: tuple[str, ...] = (), stdin: str = "", timeout: float = 30
) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-m", "softcvm", "exec", *options, "--", *program],
        capture_output=True,
        text=True,
        input=stdin,
        env=dict(os.environ, PYTHONPATH=path),
        check=False,
        timeout=timeout,
    )


def caught(code: str, *, options: tuple[str, ...] = (), timeout: float = 30) -> str:
    """What a Python program prints; it must end well."""
    program = PRELUDE + textwrap.dedent(code)
    done = softcvm_exec(sys.executable, "-c", program, options=options, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def children_of(pid: int) -> list[int]:
    """Processes that descend from this one."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children_of(int(child))]
    return found
