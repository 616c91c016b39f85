"""The real kernel, at arm's length: a child process that a time limit can end."""

import os
import pickle
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from select import select

from softcvm.abi.kvm import _generated_kvm as k
from tools.kvm_diff.generate import Features
from tools.kvm_diff.host import read_frame, write_frame
from tools.kvm_diff.play import Outcome
from tools.kvm_diff.script import Call, Ref, Script, ioctl

__all__ = ("RealKernel", "nearest_profile", "real_kernel", "why_not")

_TIMEOUT = 60.0
VM_TYPES = range(6)


def why_not() -> str:
    """Why there is no real kernel to ask; empty when there is one."""
    if not os.path.exists("/dev/kvm"):
        return "no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no access to /dev/kvm"
    return ""


def nearest_profile() -> str:
    """The model's kernel that is the running one, or the last before it."""
    major, minor = (int(part) for part in platform.release().split(".")[:2])
    if (major, minor) < (6, 18):
        return "6.12"
    return "6.18" if (major, minor) < (7, 0) else "7.3"


class RealKernel:
    """The running kernel, asked by one child process."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        if child.stdin is None or child.stdout is None:
            raise ValueError("the child's standard input and output are not pipes")
        self._in, self._out = child.stdin.fileno(), child.stdout.fileno()

    def play(self, script: Script) -> list[Outcome]:
        """TimeoutError where a call never comes back; RuntimeError where the player dies."""
        write_frame(self._in, pickle.dumps(script))
        ready, _, _ = select([self._out], [], [], _TIMEOUT)
        if not ready:
            raise TimeoutError(f"no answer from the real kernel in {_TIMEOUT:.0f} s")
        answer: list[Outcome] | str = pickle.loads(
            read_frame(self._out) or pickle.dumps("gone")
        )
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def features(self) -> Features:
        """What this kernel was built with and this processor can do."""
        caps = (
            "GUEST_MEMFD",
            "GUEST_MEMFD_FLAGS",
            "MEMORY_ATTRIBUTES",
            "PRE_FAULT_MEMORY",
            "MULTI_ADDRESS_SPACE",
            "VM_TYPES",
        )
        calls = (
            Call("open", "open", ("/dev/kvm",), 0),
            ioctl("CREATE_VM", Ref(0), 0, 1),
            *(ioctl("CHECK_EXTENSION", Ref(1), getattr(k, f"KVM_CAP_{cap}")) for cap in caps),
        )
        told = [int(outcome.text) for outcome in self.play(Script(calls))[2:]]
        gmem, flags, attributes, prefault, spaces, types = told
        return Features(
            gmem=bool(gmem),
            gmem_flags=flags,
            attributes=bool(attributes),
            prefault=bool(prefault),
            address_spaces=max(1, spaces),
            vm_types=frozenset(t for t in VM_TYPES if (types or 1) >> t & 1),
        )


@contextmanager
def real_kernel() -> Iterator[RealKernel]:
    """A child that plays on the real kernel, ended on every way out."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tools.kvm_diff.host"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    try:
        yield RealKernel(child)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
