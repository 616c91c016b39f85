"""The listener of a seccomp filter: receive what the program calls, and answer it.

Owns the notification's layout and the ways to answer.  What a call means is calls.py.
"""

import fcntl
import struct
from contextlib import suppress
from errno import EINTR, ENOENT
from typing import NamedTuple

__all__ = ("Listener", "Notification")

_RECV, _SEND, _ID_VALID = 0xC050_2100, 0xC018_2101, 0x4008_2102
_ADDFD, _SET_FLAGS = 0x4018_2103, 0x4008_2104
_SYNC_WAKE_UP = 1
_CONTINUE = 1
_ADDFD_SETFD = 1
_NOTIF = struct.Struct("<QIIiIQ6Q")
_RESP = struct.Struct("<QqiI")
_ADD = struct.Struct("<QIIII")
_ZEROES = bytes(_NOTIF.size)


class Notification(NamedTuple):
    """A thread waits in a system call."""

    id: int
    tid: int
    nr: int
    args: tuple[int, int, int, int, int, int]


class Listener:
    """One filter's listener, shared by all processes that inherited the filter."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray(_NOTIF.size)
        # The waiting thread and this one run in turns, on one processor if they can (v6.6; else slower).
        with suppress(OSError):
            fcntl.ioctl(fd, _SET_FLAGS, _SYNC_WAKE_UP)

    def receive(self) -> Notification | None:
        """The next call; None when its thread is gone already, or a signal came."""
        self._buffer[:] = _ZEROES
        try:
            fcntl.ioctl(self.fd, _RECV, self._buffer, True)
        except OSError as error:
            if error.errno in (ENOENT, EINTR):
                return None
            raise
        ident, tid, _, nr, _, _, *args = _NOTIF.unpack(self._buffer)
        a, b, c, d, e, f = args
        return Notification(ident, tid, nr, (a, b, c, d, e, f))

    def answer(self, ident: int, result: int) -> None:
        """End the call with a result, or a negative errno.  A thread that is gone is none to tell."""
        if -4096 < result < 0:
            self._send(_RESP.pack(ident, 0, result, 0))
        else:
            self._send(_RESP.pack(ident, result, 0, 0))

    def carry_on(self, ident: int) -> None:
        """Let the host's kernel execute the call."""
        self._send(_RESP.pack(ident, 0, 0, _CONTINUE))

    def add_fd(self, ident: int, source: int, number: int, *, cloexec: bool) -> bool:
        """Put a descriptor into the waiting thread's process, at this number; False if it is gone.  OSError."""
        flags = 0o2000000 if cloexec else 0
        try:
            self._add(_ADD.pack(ident, _ADDFD_SETFD, source, number, flags))
        except OSError as error:
            if error.errno != ENOENT:
                raise
            return False
        return True

    def add_any_fd(self, ident: int, source: int, *, cloexec: bool) -> int:
        """The same at the lowest number that is free there; the number."""
        flags = 0o2000000 if cloexec else 0
        return self._add(_ADD.pack(ident, 0, source, 0, flags))

    def waits(self, ident: int) -> bool:
        """Whether the thread still waits for this answer."""
        try:
            fcntl.ioctl(self.fd, _ID_VALID, bytearray(ident.to_bytes(8, "little")), True)
        except OSError as error:
            if error.errno == ENOENT:
                return False
            raise
        return True

    def _add(self, request: bytes) -> int:
        """The waiting thread itself installs it; a signal that comes first has it taken back."""
        while True:
            try:
                number: int = fcntl.ioctl(self.fd, _ADDFD, bytearray(request), True)
            except InterruptedError:
                continue
            return number

    def _send(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self.fd, _SEND, bytearray(response), True)
        except OSError as error:
            if error.errno != ENOENT:
                raise
