"""What the system call boundary tells observers."""

from typing import NamedTuple

__all__ = ("Ioctl", "Syscall")


class Ioctl(NamedTuple):
    """One ioctl returned; `errno` 0 is success with `result`, otherwise `why` names the
    check."""

    name: str
    kind: str
    result: int
    errno: int
    why: str


class Syscall(NamedTuple):
    """Another system call returned."""

    name: str
    args: tuple[int | str, ...]
    result: int
    errno: int
    why: str
