"""How the kernel layer fails: an errno with the reason, and nothing that looks like one by
accident.

A KernelError is Linux answering "no"; only uapi turns it into an OSError.  Unmodelled is the
model saying "I do not know" and passes through every layer.
"""

from errno import errorcode

from softcvm.sim.errors import Unmodelled

__all__ = ("EHWPOISON", "KernelError", "Unmodelled")

EHWPOISON = 133  # Linux only, so not in Python's errno
_NAMES = {**errorcode, EHWPOISON: "EHWPOISON"}


class KernelError(Exception):
    """A negative return value of a kernel function.  `errno` is positive, `why` names the
    check."""

    def __init__(self, errno: int, why: str) -> None:
        super().__init__(f"{_NAMES.get(errno, errno)}: {why}")
        self.errno = errno
        self.why = why
