"""A script played on one Sys, call by call, with what came of each call as text."""

import errno
import signal
from collections.abc import Callable
from typing import NamedTuple, Protocol
from zlib import crc32

from softcvm.abi.sys import HostSignal, Sys
from softcvm.sim.errors import Unmodelled
from tools.kvm_diff.script import (
    ARENA,
    ARENA_PAGES,
    NO_FD,
    PAGE,
    Call,
    Ref,
    Script,
    Struct,
    Value,
    pack,
)

__all__ = ("Outcome", "PlayedSys", "Player", "play")

_ERRNO = {errno.EOPNOTSUPP: "EOPNOTSUPP"}


def _name(error: OSError) -> str:
    code = error.errno or 0
    return _ERRNO.get(code) or errno.errorcode.get(code, str(code))


class PlayedSys(Sys, Protocol):
    """Sys, and two calls that a VMM of the model does not need."""

    def dup(self, fd: int) -> int: ...

    def mmap(
        self,
        length: int,
        prot: int,
        flags: int,
        fd: int = -1,
        offset: int = 0,
        addr: int = 0,
    ) -> int: ...


class Outcome(NamedTuple):
    """What a call gave: a number, an errno, a signal, data; and checksums of the arena's pages,
    where they are watched and can be read."""

    text: str
    memory: tuple[tuple[int, int], ...] = ()
    unmodelled: bool = False


class Player:
    """One process: what its handles stand for."""

    def __init__(self, sys: PlayedSys) -> None:
        self.sys = sys
        self.fds: dict[int, int] = {}

    def do(self, call: Call) -> str:
        """Make the call; a number, an errno or a signal as text.  Unmodelled."""
        try:
            result = getattr(self, f"_{call.method}")(*map(self._value, call.args))
        except OSError as error:
            return _name(error)
        except HostSignal as signalled:
            return f"{signal.Signals(signalled.signo).name} at {signalled.addr:#x}"
        if call.handle is not None and str(result).isdigit():
            self.fds[call.handle] = int(result)
        return str(result)

    def teller(self, method: str) -> "Callable[..., int]":
        """The method as a function that tells what it gave and returns the number, for scripts
        written as Python."""

        def tell(*args: Value | int) -> int:
            text = self.do(Call(method, method, args))
            print(f"{method}: {text}")
            return int(text.split()[0]) if text.split()[0].isdigit() else NO_FD

        return tell

    def _value(self, value: Value) -> int | str | bytes | bytearray:
        match value:
            case Ref(handle):
                return self.fds.get(handle, NO_FD)
            case Struct():
                return pack(value, self.fds)
            case _:
                return value

    def _open(self, path: str) -> int:
        return self.sys.open(path)

    def _close(self, fd: int) -> int:
        self.sys.close(fd)
        return 0

    def _dup(self, fd: int) -> int:
        return self.sys.dup(fd)

    def _ioctl(self, fd: int, request: int, arg: int | bytearray) -> str:
        if not isinstance(arg, bytearray):
            return str(self.sys.ioctl(fd, request, arg))
        before = bytes(arg)
        try:
            result = str(self.sys.ioctl(fd, request, arg))
        except OSError as error:
            result = _name(error)
        return result if arg == before else f"{result} wrote {arg.hex()}"

    def _ioctl_close(self, fd: int, request: int, arg: int | bytearray) -> int:
        """What it opens is closed at once: it could hold more memory than the host has."""
        opened = self.sys.ioctl(fd, request, arg)
        self.sys.close(opened)
        return opened

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        self.sys.fallocate(fd, mode, offset, length)
        return 0

    def _mmap(self, addr: int, length: int, prot: int, flags: int, fd: int, offset: int) -> str:
        return hex(self.sys.mmap(length, prot, flags, fd, offset, addr))

    def _mmap_munmap(self, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
        """Where the kernel finds room; that is not compared."""
        self.sys.munmap(self.sys.mmap(length, prot, flags, fd, offset), length)
        return 0

    def _munmap(self, addr: int, length: int) -> int:
        self.sys.munmap(addr, length)
        return 0

    def _madvise(self, addr: int, length: int, advice: int) -> int:
        self.sys.madvise(addr, length, advice)
        return 0

    def _load(self, addr: int, length: int) -> str:
        return "data " + _short(self.sys.load(addr, length))

    def _store(self, addr: int, data: bytes) -> int:
        self.sys.store(addr, data)
        return 0


def play(
    sys: PlayedSys, script: Script, peek: Callable[[int, int], bytes | None]
) -> list[Outcome]:
    """Every call in order, up to the first that is not modelled.

    peek: the bytes at an address, None where they cannot be read.
    """
    player = Player(sys)
    outcomes = []
    for call in script.calls:
        try:
            text = player.do(call)
        except Unmodelled as missing:
            outcomes.append(Outcome(str(missing), unmodelled=True))
            break
        except (
            Exception
        ) as error:  # a bug of the model: a difference, with a script to repeat it
            outcomes.append(Outcome(f"raised {type(error).__name__}: {error}"))
            break
        outcomes.append(Outcome(text, _arena(peek) if script.watch else ()))
    return outcomes


def _arena(peek: Callable[[int, int], bytes | None]) -> tuple[tuple[int, int], ...]:
    pages = []
    for i in range(ARENA_PAGES):
        data = peek(ARENA + i * PAGE, PAGE)
        if data is not None:
            pages.append((i, crc32(data)))
    return tuple(pages)


def _short(data: bytes) -> str:
    """Bytes as a person compares them: runs of one byte as their length."""
    out: list[str] = []
    i = 0
    while i < len(data) and len(out) < 40:
        end = i + 1
        while end < len(data) and data[end] == data[i]:
            end += 1
        out.append(f"{data[i]:02x}" + (f"*{end - i}" if end - i > 1 else ""))
        i = end
    return " ".join(out) + (f" ... {crc32(data):08x}" if i < len(data) else "")
