"""What each caught system call does: to the model, or on to the real kernel.

A handler gets the call and gives its result, a negative errno, or CARRY_ON for the host's kernel to execute
it.  Calls on emulated files have numbers from FD_BASE up; a number up there that is not the model's is a
descriptor of the program's own.
"""

import os
import struct
from collections.abc import Callable
from errno import EACCES, EBADF, EFAULT, EINVAL, EMFILE, ENOENT, ESPIPE
from typing import TYPE_CHECKING

from softcvm.abi.kvm import _generated_kvm as nr
from softcvm.attach.filter import FD_BASE
from softcvm.attach.kernel_abi import Nr
from softcvm.attach.listener import Notification
from softcvm.attach.nodes import NODES, node_stat, node_statx, text_of
from softcvm.attach.process import Thread
from softcvm.kernel.errors import Unmodelled
from softcvm.kernel.fs.file import File, FileKind
from softcvm.kernel.mm.memory import BadAccess
from softcvm.kernel.virt.kvm.gmem_inode import GmemFile
from softcvm.uapi import dispatch

if TYPE_CHECKING:
    from softcvm.attach.supervisor import Supervisor

__all__ = ("CARRY_ON", "HANDLERS", "LATER", "Handler")

CARRY_ON = 1 << 70
"""The real kernel executes the call."""
LATER = CARRY_ON + 1
"""Another thread answers."""
Handler = Callable[["Supervisor", Thread, Notification], int]

_U32 = (1 << 32) - 1
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_F_DUPFD, _F_SETFD, _F_GETFL, _F_DUPFD_CLOEXEC = 0, 2, 3, 1030
_FD_CLOEXEC, _FIONCLEX, _FIOCLEX = 1, 0x5450, 0x5451
_O_LARGEFILE = 0o100000
_MAP_FIXED, _MAP_ANONYMOUS = 0x10, 0x20


def _int(value: int) -> int:
    """A C int from the register that holds it."""
    value &= _U32
    return value - (1 << 32) if value >> 31 else value


def _long(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _emulated(thread: Thread, value: int) -> File | None:
    """The model's file behind a descriptor, borrowed."""
    return thread.process.proc.files.fds.get(value & _U32)


# Paths


def _path(thread: Thread, addr: int) -> str | None:
    """An absolute path as the program gives it; symbolic links are not followed."""
    try:
        path = thread.process.memory.string(addr)
    except BadAccess:
        return None
    return os.path.normpath(os.fsdecode(path)) if path.startswith(b"/") else None


def _open(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return _open_path(sup, thread, call, call.args[0], _int(call.args[1]))


def _openat(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return _open_path(sup, thread, call, call.args[1], _int(call.args[2]))


def _openat2(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    try:
        how = thread.process.memory.read(call.args[2], 8)
    except BadAccess:
        return CARRY_ON
    return _open_path(sup, thread, call, call.args[1], _int(int.from_bytes(how, "little")))


def _open_path(
    sup: "Supervisor", thread: Thread, call: Notification, addr: int, flags: int
) -> int:
    path = _path(thread, addr)
    if path is None:
        return CARRY_ON
    if path in NODES:
        thread.process.read_limits()
        return sup.model(thread, call, dispatch.sys_open(thread.process.proc, path, flags))
    try:
        text = text_of(sup.machine, path)
    except OSError as error:
        return -(error.errno or ENOENT)
    if text is None:
        return CARRY_ON
    if flags & os.O_ACCMODE != os.O_RDONLY:
        return -EACCES
    return sup.give_text(call, text, cloexec=bool(flags & os.O_CLOEXEC))


def _stat(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return _stat_path(thread, call.args[0], call.args[1])


def _newfstatat(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    if call.args[3] & _AT_EMPTY_PATH and _emulated(thread, call.args[0]):
        return _fstat(sup, thread, call._replace(args=(call.args[0], call.args[2], 0, 0, 0, 0)))
    return _stat_path(thread, call.args[1], call.args[2])


def _stat_path(thread: Thread, addr: int, buffer: int) -> int:
    path = _path(thread, addr)
    return _write(thread, buffer, node_stat(path)) if path in NODES else CARRY_ON


def _statx(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    path = _path(thread, call.args[1])
    if path in NODES:
        return _write(thread, call.args[4], node_statx(path))
    if call.args[2] & _AT_EMPTY_PATH and _emulated(thread, call.args[0]):
        raise Unmodelled("statx() of an emulated file by its descriptor")
    return CARRY_ON


def _access(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return _access_path(sup, thread, call.args[0], call.args[1])


def _faccessat(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return _access_path(sup, thread, call.args[1], call.args[2])


def _access_path(sup: "Supervisor", thread: Thread, addr: int, mode: int) -> int:
    path = _path(thread, addr)
    if path is None:
        return CARRY_ON
    if path in NODES:
        return -EACCES if mode & os.X_OK else 0
    try:
        return CARRY_ON if text_of(sup.machine, path) is None else 0
    except OSError as error:
        return -(error.errno or ENOENT)


def _write(thread: Thread, addr: int, data: bytes) -> int:
    try:
        thread.process.memory.write(addr, data)
    except BadAccess:
        return -EFAULT
    return 0


# Descriptors


_CREATES = {
    nr.KVM_CREATE_VM,
    nr.KVM_CREATE_VCPU,
    nr.KVM_CREATE_GUEST_MEMFD,
    nr.KVM_CREATE_DEVICE,
    nr.KVM_GET_STATS_FD,
}


def _ioctl(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    fd, request, arg = call.args[0] & _U32, call.args[1] & _U32, call.args[2]
    process = thread.process
    if fd not in process.proc.files.fds:
        return CARRY_ON
    if request in (_FIOCLEX, _FIONCLEX):  # do_vfs_ioctl(): of the descriptor, whatever the file
        process.proc.files.set_close_on_exec(fd, on=request == _FIOCLEX)
        return CARRY_ON
    if request in _CREATES:
        process.read_limits()
    steps = dispatch.sys_ioctl(process.proc, fd, request, arg)
    if request == nr.KVM_RUN:
        sup.model_later(thread, call, steps)
        return LATER
    return sup.model(thread, call, steps, patient=False)


def _close(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    """The model's file first, its stand-in by the real kernel after it."""
    fd = call.args[0] & _U32
    if fd not in thread.process.proc.files.fds:
        return CARRY_ON
    thread.process.stand_ins.discard(fd)
    sup.model(thread, call, dispatch.sys_close(thread.process.proc, fd))
    return CARRY_ON


def _close_range(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    first, last, flags = call.args[0] & _U32, call.args[1] & _U32, call.args[2] & _U32
    held = [fd for fd in sorted(thread.process.proc.files.fds) if first <= fd <= last]
    if held and flags:
        raise Unmodelled(f"close_range() of emulated files with flags {flags:#x}")
    for fd in held:
        thread.process.stand_ins.discard(fd)
        sup.model(thread, call, dispatch.sys_close(thread.process.proc, fd))
    return CARRY_ON


def _dup(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    if _emulated(thread, call.args[0]) is None:
        return CARRY_ON
    thread.process.read_limits()
    return sup.model(thread, call, dispatch.sys_dup(thread.process.proc, call.args[0] & _U32))


def _dup3(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    """dup2() and dup3(): an emulated file can only go where emulated files are."""
    old, new = call.args[0] & _U32, call.args[1] & _U32
    files = thread.process.proc.files
    if files.fds.get(old) is None:
        if new in files.fds:  # one of the program's own takes the place
            thread.process.stand_ins.discard(new)
            sup.model(thread, call, dispatch.sys_close(thread.process.proc, new))
        return CARRY_ON
    if old == new:
        return new if call.nr == Nr.DUP2 else -EINVAL
    if new < FD_BASE:
        raise Unmodelled(f"dup2() of an emulated file to descriptor {new}, below {FD_BASE}")
    thread.process.read_limits()
    if new >= thread.process.proc.rlimits.nofile:
        return -EBADF
    cloexec = call.nr == Nr.DUP3 and bool(call.args[2] & os.O_CLOEXEC)
    thread.process.stand_ins.discard(new)
    return sup.model(thread, call, files.dup_to(old, new, cloexec=cloexec))


def _fcntl(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    fd, command = call.args[0] & _U32, _int(call.args[1])
    files = thread.process.proc.files
    if files.fds.get(fd) is None:
        return CARRY_ON
    if command in (_F_DUPFD, _F_DUPFD_CLOEXEC):
        thread.process.read_limits()
        limit = thread.process.proc.rlimits.nofile
        least = _int(call.args[2])
        if not 0 <= least < limit:
            return -EINVAL
        number = next((n for n in range(max(least, FD_BASE), limit) if n not in files.fds), 0)
        if not number:
            return -EMFILE
        cloexec = command == _F_DUPFD_CLOEXEC
        return sup.model(thread, call, files.dup_to(fd, number, cloexec=cloexec))
    if command == _F_GETFL:
        reads = files.fds[fd]
        mode = os.O_RDONLY if reads and reads.kind is FileKind.STATS else os.O_RDWR
        return mode | _O_LARGEFILE
    if command == _F_SETFD:
        files.set_close_on_exec(fd, on=bool(call.args[2] & _FD_CLOEXEC))
    return CARRY_ON  # the stand-in's descriptor has the same flags


def _fallocate(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    fd = call.args[0] & _U32
    if fd not in thread.process.proc.files.fds:
        return CARRY_ON
    mode, offset, length = _int(call.args[1]), _long(call.args[2]), _long(call.args[3])
    steps = dispatch.sys_fallocate(thread.process.proc, fd, mode, offset, length)
    return sup.model(thread, call, steps, patient=False)


def _no_io(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    """read(), write() and their like: none of these files has the operation.  [vfs_read()]"""
    return CARRY_ON if _emulated(thread, call.args[0]) is None else -EINVAL


def _read(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return _read_at(sup, thread, call, None)


def _pread(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return _read_at(sup, thread, call, _long(call.args[3]))


def _read_at(sup: "Supervisor", thread: Thread, call: Notification, offset: int | None) -> int:
    """KVM's statistics can be read; of the other files none has the operation."""
    if _emulated(thread, call.args[0]) is None:
        return CARRY_ON
    fd, addr, size = call.args[0] & _U32, call.args[1], call.args[2]
    return sup.model(
        thread, call, dispatch.sys_read(thread.process.proc, fd, addr, size, offset)
    )


def _no_write(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    file = _emulated(thread, call.args[0])
    if file is not None and file.kind is FileKind.STATS:
        return -EBADF  # opened for reading
    return _no_io(sup, thread, call)


def _no_readv(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    file = _emulated(thread, call.args[0])
    if file is not None and file.kind is FileKind.STATS:
        raise Unmodelled("readv() of KVM's statistics")
    return _no_io(sup, thread, call)


def _lseek(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    """noop_llseek() of KVM's own files; a guest_memfd and /dev/sev have none."""
    file = _emulated(thread, call.args[0])
    if file is None:
        return CARRY_ON
    has = (FileKind.DEV_KVM, FileKind.VM, FileKind.VCPU, FileKind.STATS)
    return 0 if file.kind in has else -ESPIPE


def _ftruncate(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    """A guest_memfd keeps its size; nothing else here is a regular file."""
    return CARRY_ON if _emulated(thread, call.args[0]) is None else -EINVAL


def _fstat(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    file = _emulated(thread, call.args[0])
    if file is None:
        return CARRY_ON
    match file.private:
        case GmemFile() as gmem:
            inode = gmem.inode
            head = struct.pack(
                "<QQQIIIIQqqq", 1, inode.ino, 1, 0o100600, 0, 0, 0, 0, inode.size, 4096, 0
            )
            return _write(thread, call.args[1], head.ljust(144, b"\0"))
        case _:
            path = {FileKind.DEV_KVM: "/dev/kvm", FileKind.DEV_SEV: "/dev/sev"}.get(file.kind)
            if path is not None:
                return _write(thread, call.args[1], node_stat(path))
            head = struct.pack("<QQQIIIIQqqq", 15, 1, 1, 0o600, 0, 0, 0, 0, 0, 4096, 0)
            return _write(thread, call.args[1], head.ljust(144, b"\0"))  # anon_inode


# Memory


def _mmap(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    addr, length, prot, flags, fd, offset = call.args
    file = None if flags & _MAP_ANONYMOUS else _emulated(thread, fd)
    if file is None:
        return sup.mapping_changes(thread, call)
    if file.kind is FileKind.VCPU:
        return CARRY_ON  # its pages are the stand-in's own
    steps = dispatch.sys_mmap(
        thread.process.proc, length, _int(prot), _int(flags), fd & _U32, _long(offset), addr
    )
    result = sup.model(thread, call, steps)
    if result >= 0:
        raise Unmodelled(f"mapping a {file.kind.value} file into a caught program")
    return result


def _unmap(sup: "Supervisor", thread: Thread, call: Notification) -> int:
    return sup.mapping_changes(thread, call)


HANDLERS: dict[int, Handler] = {
    Nr.OPEN: _open,
    Nr.OPENAT: _openat,
    Nr.OPENAT2: _openat2,
    Nr.STAT: _stat,
    Nr.LSTAT: _stat,
    Nr.NEWFSTATAT: _newfstatat,
    Nr.STATX: _statx,
    Nr.ACCESS: _access,
    Nr.FACCESSAT: _faccessat,
    Nr.FACCESSAT2: _faccessat,
    Nr.IOCTL: _ioctl,
    Nr.CLOSE: _close,
    Nr.CLOSE_RANGE: _close_range,
    Nr.DUP: _dup,
    Nr.DUP2: _dup3,
    Nr.DUP3: _dup3,
    Nr.FCNTL: _fcntl,
    Nr.FALLOCATE: _fallocate,
    Nr.READ: _read,
    Nr.WRITE: _no_write,
    Nr.PREAD64: _pread,
    Nr.PWRITE64: _no_write,
    Nr.READV: _no_readv,
    Nr.WRITEV: _no_write,
    Nr.LSEEK: _lseek,
    Nr.FTRUNCATE: _ftruncate,
    Nr.FSTAT: _fstat,
    Nr.MMAP: _mmap,
    Nr.MUNMAP: _unmap,
    Nr.MREMAP: _unmap,
    Nr.MADVISE: _unmap,
}
