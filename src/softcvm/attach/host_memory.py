"""Reading and writing any address of this process without dying of it.

process_vm_readv(2) and process_vm_writev(2) on ourselves move the bytes page by page and stop
where an access would fault, but say EFAULT for every reason.  Only the processor knows the
signal, so that a page they refuse is touched by a forked child: how the child ends is the
answer (HostSignal), and a child that lives (a page that may be written and not read: get_user_pages
refuses it, x86 does not) means that we may touch it ourselves.

A child has the mappings of its parent but those under MADV_DONTFORK and MADV_WIPEONFORK, and
private memory copy-on-write, which changes nothing here.  Where process_vm_readv(2) is not
allowed, the child decides about every page.
"""

import ctypes
import os
import resource
import signal

from softcvm.abi.sys import HostSignal

__all__ = ("load", "peek", "store")

_PAGE = 4096
_IOV_MAX = 1024


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


def load(addr: int, length: int) -> bytes:
    """The bytes at an address.  HostSignal."""
    out = bytearray(length)
    _move(addr, out, write=False)
    return bytes(out)


def peek(addr: int, length: int) -> bytes | None:
    """The bytes at an address, None where get_user_pages() refuses one of them; no child asks
    why."""
    out = bytearray(length)
    here = ctypes.addressof((ctypes.c_char * length).from_buffer(out))
    done = 0
    while done < length and (
        moved := _vm_move(addr + done, here + done, length - done, write=False)
    ):
        done += moved
    return bytes(out) if done == length else None


def store(addr: int, data: bytes) -> None:
    """Write bytes at an address.  HostSignal, and the bytes before the bad page are written."""
    _move(addr, bytearray(data), write=True)


def _move(addr: int, buffer: bytearray, *, write: bool) -> None:
    length = len(buffer)
    if not length:
        return
    here = ctypes.addressof((ctypes.c_char * length).from_buffer(buffer))
    done = 0
    while done < length:
        done += _vm_move(addr + done, here + done, length - done, write=write)
        if done < length:
            size = min(length - done, _PAGE - (addr + done) % _PAGE)
            signo = _signal_of(addr + done, here + done, size, write=write)
            if signo:
                raise HostSignal(signo, addr + done)
            _touch(addr + done, here + done, size, write=write)
            done += size


def _vm_move(addr: int, here: int, length: int, *, write: bool) -> int:
    """How many bytes the kernel moved before the first page it refuses; whole pages only."""
    remote: list[_Iovec] = []
    at, end = addr, addr + length
    while at < end and len(remote) < _IOV_MAX:
        size = min(end - at, _PAGE - at % _PAGE)
        remote.append(_Iovec(at, size))
        at += size
    local = _Iovec(here, at - addr)
    call = _libc.process_vm_writev if write else _libc.process_vm_readv
    pages = (_Iovec * len(remote))(*remote)
    return max(0, int(call(os.getpid(), ctypes.byref(local), 1, pages, len(remote), 0)))


def _signal_of(addr: int, here: int, length: int, *, write: bool) -> int:
    """The signal that ends a process which makes this access, or 0.

    A write of what a page holds already is not possible where it cannot be read: the child
    writes the real bytes.  In shared memory they are the ones that our caller wants there.
    """
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for signo in (signal.SIGSEGV, signal.SIGBUS):
            signal.signal(signo, signal.SIG_DFL)  # a test runner may catch them
        _touch(addr, here, length, write=write)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _touch(addr: int, here: int, length: int, *, write: bool) -> None:
    if write:
        ctypes.memmove(addr, here, length)
    else:
        ctypes.memmove(here, addr, length)
