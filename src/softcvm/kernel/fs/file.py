"""struct file and file descriptors (fs/file.c, fs/file_table.c, include/linux/fs.h; v7.2).

A File is an open file description: it lives until its last reference is put, whichever process
holds it. References are file descriptors, mappings and callers in between.  What the last put
does is the business of whoever opened it (`release`).  A FilesStruct numbers the files of one
process.
"""

from collections.abc import Callable
from enum import Enum
from errno import EBADF, EMFILE

from softcvm.kernel.errors import KernelError
from softcvm.sim.state import State
from softcvm.sim.steps import Lockdep, Steps, Task

__all__ = ("File", "FileKind", "FilesStruct", "TaskWork", "fput")


class FileKind(Enum):
    """Whose file_operations a file has."""

    DEV_KVM = "kvm"
    VM = "kvm-vm"
    VCPU = "kvm-vcpu"
    GUEST_MEMFD = "kvm-gmem"
    STATS = "kvm-stats"
    DEV_SEV = "sev"
    FOREIGN = "foreign"
    """A file that is none of the model's: a caught program's own."""


class File(State):
    """An open file description.  `private` is the object behind it, `release` runs at the last
    fput()."""

    saved = ("kind", "private", "refcount")
    derived = {"release": "follows from kind"}

    def __init__(
        self,
        kind: FileKind,
        private: State | None,
        release: "Callable[[File], Steps[None]] | None" = None,
    ) -> None:
        self.kind = kind
        self.private = private
        self.release = release
        self.refcount = 1

    def get(self) -> "File":
        """get_file(): one reference more, for a caller that already holds one."""
        if self.refcount <= 0:
            raise ValueError(
                f"get_file() on a {self.kind.value} file whose last reference is gone"
            )
        self.refcount += 1
        return self

    def get_active(self) -> "File | None":
        """get_file_active(): a reference, unless the last one is gone and release is due or
        running."""
        return self.get() if self.refcount > 0 else None


def fput(file: File) -> Steps[None]:
    """Put a reference with no lock held; the last one releases the file at once."""
    if file.refcount <= 0:
        raise ValueError(f"fput() of a {file.kind.value} file whose last reference is gone")
    file.refcount -= 1
    if file.refcount == 0 and file.release is not None:
        yield from file.release(file)


class TaskWork(State):
    """Last references that were put deep inside the kernel: released on the way out
    (task_work_add()).

    fput() may be called with any lock held, so that what release does waits until the task
    returns to user space.
    """

    saved = ()
    derived = {"_lockdep": "knows who runs", "_pending": "empty at quiescent points"}

    def __init__(self, lockdep: Lockdep) -> None:
        self._lockdep = lockdep
        self._pending: list[tuple[Task, File]] = []

    def fput(self, file: File) -> None:
        """Put a reference; if it is the last, this task releases the file in run()."""
        if file.refcount <= 0:
            raise ValueError(f"fput() of a {file.kind.value} file whose last reference is gone")
        file.refcount -= 1
        if file.refcount == 0 and file.release is not None:
            self._pending.append((self._lockdep.current, file))

    @property
    def pending(self) -> bool:
        """Whether the running task has something to release."""
        if not self._pending:
            return False
        return any(task is self._lockdep.current for task, _ in self._pending)

    def run(self) -> Steps[None]:
        """task_work_run(): with no lock held, before user space or the guest goes on."""
        while self.pending:
            at = next(
                i for i, (task, _) in enumerate(self._pending) if task is self._lockdep.current
            )
            _, file = self._pending.pop(at)
            if file.release is not None:
                yield from file.release(file)


class FilesStruct(State):
    """A process's file descriptors: lowest free number first, at most RLIMIT_NOFILE of them."""

    saved = ("fds", "close_on_exec")
    derived = {
        "_first": "constant: 0, 1 and 2 are the terminal, outside the model",
        "_next_fd": "no number below it is free",
        "foreign": "files outside the model",
    }

    def __init__(self, first: int = 3) -> None:
        self.fds: dict[int, File | None] = {}
        """None is a number handed out by get_unused_fd() whose file is not there yet."""
        self.close_on_exec: set[int] = set()
        self._first = self._next_fd = first
        self.foreign: Callable[[int], bool] | None = None
        """Whether a number is open outside the model: it is not given out, and is no bad descriptor."""

    def get_unused_fd(self, limit: int) -> int:
        """Reserve the lowest number not in use.  EMFILE at the limit."""
        fd = self._next_fd
        while fd in self.fds or (self.foreign is not None and self.foreign(fd)):
            fd += 1
        if fd >= limit:
            raise KernelError(EMFILE, f"RLIMIT_NOFILE is {limit}")
        self.fds[fd] = None
        self._next_fd = fd + 1
        return fd

    def put_unused_fd(self, fd: int) -> None:
        """Give a reserved number back."""
        if self.fds.pop(fd) is not None:
            raise ValueError(f"put_unused_fd() of {fd}, which is open")
        self._next_fd = min(self._next_fd, fd)

    def install(self, fd: int, file: File, *, cloexec: bool = False) -> int:
        """fd_install(): a reserved number takes over the caller's reference."""
        self.fds[fd] = file
        if cloexec:
            self.close_on_exec.add(fd)
        return fd

    def lookup(self, fd: int) -> File:
        """fdget(): the file behind a number, borrowed for the length of a system call.
        EBADF."""
        file = self.fds.get(fd)
        if file is not None:
            return file
        if self.foreign is not None and self.foreign(fd):
            return File(FileKind.FOREIGN, None)
        raise KernelError(EBADF, f"fd {fd} is not open")

    def fget(self, fd: int) -> File:
        """The file behind a number with a new reference, which the caller puts.  EBADF."""
        return self.lookup(fd).get()

    def close(self, fd: int) -> Steps[None]:
        """close(2).  EBADF."""
        file = self.lookup(fd)
        self._drop(fd)
        yield from fput(file)

    def dup(self, fd: int, limit: int) -> int:
        """dup(2): a second number for the same file, never close-on-exec.  EBADF, EMFILE."""
        file = self.lookup(fd)
        return self.install(self.get_unused_fd(limit), file.get())

    def dup_to(self, fd: int, number: int, *, cloexec: bool) -> Steps[int]:
        """dup3(2) onto a number, which is closed first if it is open.  EBADF."""
        file = self.lookup(fd).get()
        if number in self.fds:
            yield from self.close(number)
        return self.install(number, file, cloexec=cloexec)

    def fork(self) -> "FilesStruct":
        """dup_fd(): the same files under the same numbers."""
        other = FilesStruct(self._first)
        other._next_fd = self._next_fd
        other.close_on_exec = set(self.close_on_exec)
        other.fds = {fd: file.get() for fd, file in self.fds.items() if file is not None}
        return other

    def set_close_on_exec(self, fd: int, *, on: bool) -> None:
        """FD_CLOEXEC of a number that is open."""
        if on:
            self.close_on_exec.add(fd)
        else:
            self.close_on_exec.discard(fd)

    def do_close_on_exec(self) -> Steps[None]:
        """execve(2): close what asked for it, in ascending order."""
        for fd in sorted(self.close_on_exec):
            yield from self.close(fd)

    def _drop(self, fd: int) -> None:
        del self.fds[fd]
        self.close_on_exec.discard(fd)
        self._next_fd = min(self._next_fd, fd)

    def close_all(self) -> Steps[None]:
        """exit_files(): close every number in ascending order."""
        for fd in sorted(self.fds):
            yield from self.close(fd)
