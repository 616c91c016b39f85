"""Start a program so that its system calls can be caught: fork, trace, filter, exec.

Owns everything between fork() and the program's first instruction.  Works for an ordinary user; where the
machine forbids a piece of it, UnavailableError names the piece and what allows it.
"""

import os
import signal
import socket
from collections.abc import Sequence
from errno import EACCES, EBUSY, EINVAL, ENOENT, ENOEXEC, ENOSYS, EPERM
from typing import NamedTuple, NoReturn

from softcvm.attach.filter import build_filter
from softcvm.attach.kernel_abi import UnavailableError, seccomp
from softcvm.attach.ptrace import seize

__all__ = ("ExecError", "Started", "exec_error", "start")

_NEW_LISTENER, _WAIT_KILLABLE_RECV = 1 << 3, 1 << 5
_FLAGS = _NEW_LISTENER | _WAIT_KILLABLE_RECV
_RESET = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores and a program expects as they come."""


class ExecError(Exception):
    """The program cannot be executed; `status` is what a shell would end with."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Started(NamedTuple):
    """A program about to run: its process waits in execve() until the listener is served.

    exec_failed: a pipe that ends when execve() succeeds, or brings its errno.
    """

    pid: int
    listener: int
    exec_failed: int


def start(argv: Sequence[str]) -> Started:
    """Fork and prepare the program.  Raises UnavailableError."""
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(argv, theirs, ours, writer)
    theirs.close()
    os.close(writer)
    with ours:
        try:
            seize(pid)
        except OSError as error:
            _give_up(pid)
            raise UnavailableError(
                f"ptrace of a child is not allowed here ({error.strerror}): it needs "
                "kernel.yama.ptrace_scope of 0 or 1, and in a container the ptrace system call"
            ) from error
        ours.send(b"1")
        said, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        _give_up(pid)
        errno = said[0] if said else 0
        raise UnavailableError(_refused(errno))
    return Started(pid, fds[0], reader)


def exec_error(program: str, errno: int) -> ExecError:
    """What is wrong with the program, as a shell says it: 127 when it is not there, 126 otherwise."""
    return ExecError(f"{program}: {os.strerror(errno)}", 127 if errno == ENOENT else 126)


def _refused(errno: int) -> str:
    why = os.strerror(errno) if errno else "the child ended"
    match errno:
        case _ if errno == EINVAL:
            hint = "Linux 5.19 or later is needed"
        case _ if errno == ENOSYS:
            hint = "the kernel needs CONFIG_SECCOMP_FILTER"
        case _ if errno == EBUSY:
            hint = (
                "this process is under a filter with a listener already; run it outside of that"
            )
        case _ if errno in (EPERM, EACCES):
            hint = "in a container, its profile must allow the seccomp system call"
        case _:
            hint = "see docs/exec.md"
    return f"seccomp user notification is not to be had here ({why}): {hint}"


def _give_up(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _child(
    argv: Sequence[str], theirs: socket.socket, ours: socket.socket, failed: int
) -> NoReturn:
    """In the new process.  Nothing here may open a file once the filter is in place."""
    try:
        ours.close()
        for signo in _RESET:
            signal.signal(signo, signal.SIG_DFL)
        paths = _candidates(argv[0])
        program = build_filter()
        theirs.recv(1)  # traced from here on
        try:
            fd = seccomp(program, _FLAGS)
        except OSError as error:
            theirs.send(bytes([error.errno or EINVAL]))
            os._exit(126)
        socket.send_fds(theirs, [b"L"], [fd])
        os.close(fd)
        os.write(failed, bytes([_execute(paths, argv)]))
    finally:
        os._exit(126)


def _candidates(program: str) -> list[str]:
    """Where execvp() would look."""
    if "/" in program:
        return [program]
    return [os.path.join(folder or ".", program) for folder in os.get_exec_path()]


def _execute(paths: list[str], argv: Sequence[str]) -> int:
    """The errno when none of them can be executed, the most telling of them."""
    worst = ENOENT
    for path in paths:
        try:
            os.execve(path, list(argv), os.environ)
        except OSError as error:
            if error.errno == ENOEXEC:
                return ENOEXEC
            if error.errno not in (ENOENT, None):
                worst = error.errno
    return worst
