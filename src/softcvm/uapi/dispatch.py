"""System calls of a process on the software host, by what the file descriptor is.

The only place where the kernel's refusals leave the model: a KernelError becomes
OSError(errno), as Python raises it for a real system call.  Unmodelled is not caught.
Everything here is Steps: a driver runs them.
"""

import os
from errno import EINVAL, ENODEV, ENOENT, ENOTTY
from typing import TYPE_CHECKING, TypeVar

from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.fs.file import File, FileKind
from softcvm.kernel.mm.mmap import MAP_ANONYMOUS, VmOps
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.kernel.virt.kvm.gmem_inode import GmemFile
from softcvm.kernel.virt.kvm.gmem_mmap import GmemVmOps, VcpuVmOps
from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu
from softcvm.kernel.virt.kvm.stats import StatsFile, kvm_stats_read
from softcvm.sim.addr import PAGE_MASK, Hva
from softcvm.sim.steps import Steps
from softcvm.uapi.dev_kvm import kvm_dev_ioctl
from softcvm.uapi.dev_sev import sev_dev_ioctl
from softcvm.uapi.events import Ioctl, Syscall
from softcvm.uapi.guest_memfd import gmem_fallocate, vfs_check_fallocate
from softcvm.uapi.numbers import ioctl_name
from softcvm.uapi.vcpu import kvm_vcpu_ioctl
from softcvm.uapi.vm import kvm_vm_ioctl

if TYPE_CHECKING:
    from softcvm.kernel.task import Process

__all__ = (
    "sys_close",
    "sys_dup",
    "sys_fallocate",
    "sys_ioctl",
    "sys_madvise",
    "sys_mmap",
    "sys_munmap",
    "sys_open",
    "sys_read",
    "sys_send_fd",
)

T = TypeVar("T")
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_S64 = 1 << 63


def sys_open(proc: "Process", path: str, flags: int) -> Steps[int]:
    """open(2) of a device node of this machine."""
    return (yield from _syscall(proc, "open", (path, flags), _open(proc, path, flags)))


def sys_close(proc: "Process", fd: int) -> Steps[None]:
    """close(2)"""
    yield from _syscall(proc, "close", (fd,), proc.files.close(fd))


def sys_dup(proc: "Process", fd: int) -> Steps[int]:
    """dup(2)"""
    return (yield from _syscall(proc, "dup", (fd,), _dup(proc, fd)))


def sys_send_fd(proc: "Process", fd: int, receiver: "Process") -> Steps[int]:
    """A descriptor in another process for the same file (SCM_RIGHTS, recvmsg(2))."""
    return (
        yield from _syscall(proc, "send_fd", (fd, receiver.pid), _send_fd(proc, fd, receiver))
    )


def sys_ioctl(proc: "Process", fd: int, request: int, arg: int | bytearray) -> Steps[int]:
    """ioctl(2); a bytearray stands for the address of a buffer with these contents."""
    linux = proc.linux
    linux.counters.ioctls += 1
    request &= _U32
    kind, result, errno, why = "", -1, 0, ""
    try:
        file = proc.files.lookup(fd)
        kind = file.kind.value
        file.get()
        try:
            result = yield from _ioctl(proc, file, request, arg)
        finally:
            linux.task_work.fput(file)
            if linux.task_work.pending:
                yield from linux.task_work.run()
    except KernelError as error:
        errno, why = error.errno, error.why
        raise OSError(errno, f"{ioctl_name(request)}: {why}") from error
    finally:
        proc.deliver_signals()
        if linux.tp.emit:
            linux.tp.emit(Ioctl(ioctl_name(request), kind, result, errno, why))
    return result


def sys_read(proc: "Process", fd: int, addr: int, size: int, offset: int | None) -> Steps[int]:
    """read(2), or pread(2) at an offset: of KVM's statistics; no other file here has the operation."""
    steps = _read(proc, fd, addr, size, offset)
    return (yield from _syscall(proc, "read", (fd, addr, size), steps))


def sys_fallocate(proc: "Process", fd: int, mode: int, offset: int, length: int) -> Steps[None]:
    """fallocate(2)"""
    args = (fd, mode, offset, length)
    return _syscall(proc, "fallocate", args, _fallocate(proc, fd, mode, offset, length))


def sys_mmap(
    proc: "Process", length: int, prot: int, flags: int, fd: int, offset: int, addr: int = 0
) -> Steps[int]:
    """mmap(2)"""
    args = (length, prot, flags, fd, offset)
    steps = _mmap(proc, length, prot, flags, fd, offset, addr)
    return (yield from _syscall(proc, "mmap", args, steps))


def sys_munmap(proc: "Process", addr: int, length: int) -> Steps[None]:
    """munmap(2)"""
    yield from _syscall(proc, "munmap", (addr, length), proc.mm.munmap(Hva(addr), length))


def sys_madvise(proc: "Process", addr: int, length: int, advice: int) -> Steps[None]:
    """madvise(2)"""
    args = (addr, length, advice)
    yield from _syscall(proc, "madvise", args, proc.mm.madvise(addr, length, advice))


def _syscall(
    proc: "Process", name: str, args: tuple[int | str, ...], steps: Steps[T]
) -> Steps[T]:
    result, errno, why = -1, 0, ""
    try:
        try:
            value = yield from steps
        finally:
            if proc.linux.task_work.pending:
                yield from proc.linux.task_work.run()
        result = value if isinstance(value, int) else 0
        return value
    except KernelError as error:
        errno, why = error.errno, error.why
        raise OSError(errno, f"{name}: {why}") from error
    finally:
        proc.deliver_signals()
        if proc.linux.tp.emit:
            proc.linux.tp.emit(Syscall(name, args, result, errno, why))


def _open(proc: "Process", path: str, flags: int) -> Steps[int]:
    yield from ()
    match path:
        case "/dev/kvm":
            file = File(FileKind.DEV_KVM, None)
        case "/dev/sev":
            file = File(FileKind.DEV_SEV, proc.linux.sev_dev)
        case _ if path.startswith("/dev/"):
            raise KernelError(ENOENT, f"this machine has no {path}")
        case _:
            raise Unmodelled(f"open({path!r}): the software host has device nodes only")
    fd = proc.files.get_unused_fd(proc.rlimits.nofile)
    return proc.files.install(fd, file, cloexec=bool(flags & os.O_CLOEXEC))


def _dup(proc: "Process", fd: int) -> Steps[int]:
    yield from ()
    return proc.files.dup(fd, proc.rlimits.nofile)


def _send_fd(proc: "Process", fd: int, receiver: "Process") -> Steps[int]:
    yield from ()
    file = proc.files.lookup(fd)
    number = receiver.files.get_unused_fd(receiver.rlimits.nofile)
    return receiver.files.install(number, file.get())


def _ioctl(proc: "Process", file: File, request: int, arg: int | bytearray) -> Steps[int]:
    argp = UserPtr(proc.mm, arg)
    value = 0 if isinstance(arg, bytearray) else arg & _U64
    match file.private:
        case Kvm() as kvm:
            return kvm_vm_ioctl(kvm, proc, request, value, argp)
        case KvmVcpu() as vcpu:
            return kvm_vcpu_ioctl(vcpu, proc, request, value, argp)
        case GmemFile():
            raise KernelError(ENOTTY, f"{ioctl_name(request)} on a guest_memfd")
        case _ if file.kind is FileKind.DEV_KVM:
            return kvm_dev_ioctl(proc, request, value, argp)
        case _ if file.kind is FileKind.DEV_SEV:
            return sev_dev_ioctl(proc, request, argp)
        case _:
            raise KernelError(ENOTTY, f"a {file.kind.value} file has no ioctls")


def _read(proc: "Process", fd: int, addr: int, size: int, offset: int | None) -> Steps[int]:
    file = proc.files.fget(fd)
    try:
        if not isinstance(file.private, StatsFile) or (offset is not None and offset < 0):
            raise KernelError(EINVAL, f"fd {fd} cannot be read at {offset}")
        return (yield from kvm_stats_read(file.private, proc, addr, size, offset))
    finally:
        proc.linux.task_work.fput(file)


def _fallocate(proc: "Process", fd: int, mode: int, offset: int, length: int) -> Steps[None]:
    if not -_S64 <= offset < _S64 or not -_S64 <= length < _S64:
        raise ValueError("fallocate() takes signed 64-bit offsets, as os.posix_fallocate does")
    file = proc.files.fget(fd)
    try:
        if not isinstance(file.private, GmemFile):
            vfs_check_fallocate(proc.linux.profile, mode, offset, length)
            raise KernelError(ENODEV, f"fd {fd} is no regular file")
        yield from gmem_fallocate(proc, file.private, mode, offset, length)
    finally:
        proc.linux.task_work.fput(file)


def _mmap(
    proc: "Process", length: int, prot: int, flags: int, fd: int, offset: int, addr: int
) -> Steps[int]:
    if offset & PAGE_MASK:
        raise KernelError(EINVAL, f"offset {offset:#x} is not page aligned")
    file = None
    if not flags & MAP_ANONYMOUS:
        file = proc.files.fget(fd)
    try:
        ops = _vm_ops(file) if file is not None else None
        return (yield from proc.mm.mmap(length, prot, flags, file, ops, offset, addr))
    finally:
        if file is not None:
            proc.linux.task_work.fput(file)


def _vm_ops(file: File) -> VmOps | None:
    """What a file answers to mmap(2); None is ENODEV."""
    match file.private:
        case GmemFile() as gmem if gmem.inode.linux.profile.gmem_mmap:
            return GmemVmOps(gmem.inode)
        case KvmVcpu() as vcpu:
            return VcpuVmOps(vcpu)
        case _:
            return None
