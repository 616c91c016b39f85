"""The process that asks the real kernel: scripts come on standard input, outcomes leave on
standard output.

Each script is played by a fork of its own: descriptors 3 and up are free, the arena is empty,
and whatever the script leaves open dies with it.  Nothing here runs threads.
"""

import os
import pickle
import resource

from softcvm.attach.host_memory import peek
from softcvm.attach.host_sys import HostSys
from tools.kvm_diff.play import play
from tools.kvm_diff.script import NOFILE

__all__ = ("read_frame", "serve", "write_frame")


def read_frame(fd: int) -> bytes:
    """One message; empty at the end."""
    head = _read(fd, 4)
    return _read(fd, int.from_bytes(head, "little")) if head else b""


def _read(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = os.read(fd, length - len(data))
        if not more:
            return b""
        data += more
    return data


def write_frame(fd: int, data: bytes) -> None:
    data = len(data).to_bytes(4, "little") + data
    while data:
        data = data[os.write(fd, data) :]


def serve() -> None:
    """Play what comes until there is no more."""
    os.closerange(3, 256)
    resource.setrlimit(resource.RLIMIT_NOFILE, (NOFILE, NOFILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while message := read_frame(0):
        child = os.fork()
        if not child:
            outcomes = play(HostSys(), pickle.loads(message), peek)
            write_frame(1, pickle.dumps(outcomes))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            write_frame(1, pickle.dumps(f"the player ended with status {status:#x}"))


if __name__ == "__main__":
    serve()
