"""How this VMM fails: one exception whose text is one line for whoever started it."""

import os
from errno import errorcode

__all__ = ("VmmError", "call_failed")


class VmmError(Exception):
    """The VM cannot go on; errno is that of the system call that failed, 0 when none did."""

    def __init__(self, text: str, errno: int = 0) -> None:
        super().__init__(text)
        self.errno = errno


def call_failed(what: str, error: OSError) -> VmmError:
    """A system call failed where this VMM has no way around."""
    number = error.errno or 0
    why = error.strerror or os.strerror(number)
    return VmmError(f"{what}: {why} ({errorcode.get(number, number)})", number)
