"""Steps: functions that another CPU may interrupt, and the locks they take.

A function that may block or be preempted is a generator of Steps[T]; its callers write
`x = yield from f()`.  What it yields is a Point: where the driver may let another task run.  Three
drivers exist: run() here goes straight through; the scheduler of exec and the explorer decide at each
point.  Locks carry the kernel's names and a rank; taking one below a held one is an error of the model.
"""

from collections.abc import Callable, Generator
from typing import Final, NamedTuple, TypeVar

__all__ = (
    "Deadlock",
    "LockOrder",
    "Lockdep",
    "Mutex",
    "Point",
    "RwSem",
    "Steps",
    "Task",
    "Wait",
    "lockdep_assert_held",
    "preempt",
    "run",
)

T = TypeVar("T")


class Point(NamedTuple):
    """A place where another task may run; `waits_for` is what this task cannot go on without."""

    what: str
    waits_for: "Mutex | RwSem | Wait | None" = None


Steps = Generator[Point, None, T]


class Deadlock(RuntimeError):
    """A task waits for a lock that nothing running can release."""


class LockOrder(RuntimeError):
    """A lock was taken against the stated order, twice, or released by a task that does not hold it."""


class Task:
    """One flow of control: a thread in a system call, or a vCPU inside KVM_RUN."""

    __slots__ = ("held", "name", "sigmask")

    def __init__(self, name: str) -> None:
        self.name = name
        self.sigmask: int | None = None
        """Signals that are blocked while a system call has set a mask of its own; None: the task's."""
        self.held: list[Mutex | RwSem] = []


class Lockdep:
    """Knows which task runs now and what it holds; drivers set `current` before they resume a task.

    straight: the driver is run() and lets nobody else in, so that a lock that is free is taken without
    stopping at its point.  Only run() sets it.
    """

    __slots__ = ("current", "straight")

    def __init__(self) -> None:
        self.current = Task("main")
        self.straight = False

    def acquired(self, lock: "Mutex | RwSem") -> None:
        held = self.current.held
        if held and held[-1].rank > lock.rank:
            names = " -> ".join(f"{h.name}({h.rank})" for h in held)
            raise LockOrder(f"{lock.name}({lock.rank}) taken while holding {names}")
        held.append(lock)

    def released(self, lock: "Mutex | RwSem") -> None:
        held = self.current.held
        if lock not in held:
            raise LockOrder(f"{self.current.name} releases {lock.name} without holding it")
        held.remove(lock)


def _nothing() -> Steps[None]:
    yield from ()


_TAKEN: Final = _nothing()
"""Steps that are over: what acquiring a free lock comes to where nobody looks at the points."""
list(_TAKEN)


class Mutex:
    """A sleeping lock or a spinlock: one owner.  Ranks grow inwards (docs/locking.md)."""

    __slots__ = ("lockdep", "name", "owner", "rank")

    def __init__(self, lockdep: Lockdep, name: str, rank: int) -> None:
        self.lockdep = lockdep
        self.name = name
        self.rank = rank
        self.owner: Task | None = None

    def acquire(self) -> Steps[None]:
        dep = self.lockdep
        if dep.straight and self.owner is None:
            self.owner = task = dep.current
            held = task.held
            if held and held[-1].rank > self.rank:
                dep.acquired(self)  # which says what is wrong
            held.append(self)
            return _TAKEN
        return self._acquire()

    def _acquire(self) -> Steps[None]:
        yield Point(f"lock {self.name}")
        if self.owner is self.lockdep.current:
            raise LockOrder(f"{self.name} taken twice by {self.owner.name}")
        while self.owner is not None:
            yield Point(f"wait {self.name}", self)
        self.owner = self.lockdep.current
        self.lockdep.acquired(self)

    def release(self) -> None:
        held = self.lockdep.current.held
        if held and held[-1] is self:
            held.pop()
        else:
            self.lockdep.released(self)
        self.owner = None

    @property
    def busy(self) -> bool:
        return self.owner is not None


class RwSem:
    """A reader-writer lock: many readers or one writer."""

    __slots__ = ("lockdep", "name", "rank", "readers", "writer")

    def __init__(self, lockdep: Lockdep, name: str, rank: int) -> None:
        self.lockdep = lockdep
        self.name = name
        self.rank = rank
        self.readers: list[Task] = []
        self.writer: Task | None = None

    def acquire_read(self) -> Steps[None]:
        dep = self.lockdep
        if dep.straight and self.writer is None:
            task = dep.current
            self.readers.append(task)
            held = task.held
            if held and held[-1].rank > self.rank:
                dep.acquired(self)
            held.append(self)
            return _TAKEN
        return self._acquire_read()

    def _acquire_read(self) -> Steps[None]:
        yield Point(f"lock {self.name} for read")
        while self.writer is not None:
            self._refuse_own(self.lockdep.current)
            yield Point(f"wait {self.name}", self)
        self.readers.append(self.lockdep.current)
        self.lockdep.acquired(self)

    def acquire_write(self) -> Steps[None]:
        dep = self.lockdep
        if dep.straight and self.writer is None and not self.readers:
            self.writer = task = dep.current
            held = task.held
            if held and held[-1].rank > self.rank:
                dep.acquired(self)
            held.append(self)
            return _TAKEN
        return self._acquire_write()

    def _acquire_write(self) -> Steps[None]:
        yield Point(f"lock {self.name} for write")
        while self.writer is not None or self.readers:
            self._refuse_own(self.lockdep.current)
            yield Point(f"wait {self.name}", self)
        self.writer = self.lockdep.current
        self.lockdep.acquired(self)

    def release_read(self) -> None:
        task = self.lockdep.current
        held = task.held
        if held and held[-1] is self:
            held.pop()
        else:
            self.lockdep.released(self)
        self.readers.remove(task)

    def release_write(self) -> None:
        held = self.lockdep.current.held
        if held and held[-1] is self:
            held.pop()
        else:
            self.lockdep.released(self)
        self.writer = None

    def _refuse_own(self, task: Task) -> None:
        if self.writer is task or task in self.readers:
            raise LockOrder(f"{self.name} taken twice by {task.name}")

    @property
    def busy(self) -> bool:
        return self.writer is not None or bool(self.readers)


class Wait:
    """An interruptible sleep: `over` tells whether it can end.  No lock, so nothing is held against it."""

    __slots__ = ("name", "over")

    def __init__(self, name: str, over: Callable[[], bool]) -> None:
        self.name = name
        self.over = over

    @property
    def busy(self) -> bool:
        return not self.over()


def lockdep_assert_held(lock: Mutex | RwSem) -> None:
    """Raise LockOrder unless the running task holds this lock (Linux: lockdep_assert_held())."""
    if lock not in lock.lockdep.current.held:
        raise LockOrder(f"{lock.name} is not held by {lock.lockdep.current.name}")


def preempt(what: str) -> Steps[None]:
    """A point where nothing is taken but another CPU may step in."""
    yield Point(what)


def run(
    steps: Steps[T],
    interrupt: Callable[[], None] | None = None,
    *,
    lockdep: Lockdep | None = None,
) -> T:
    """Run steps straight through; with their machine's lockdep, without a stop at locks that are free.

    A sleep that nothing else can end is ended by `interrupt`, which sends the sleeper a signal.  Raises
    Deadlock when the steps wait for a lock, or sleep on after that: with one task, nobody can help.
    """
    if lockdep is not None:
        lockdep.straight = True
    try:
        while True:
            point = next(steps)
            if point.waits_for is None:
                continue
            if interrupt is not None and isinstance(point.waits_for, Wait):
                interrupt()
                if not point.waits_for.busy:
                    continue
            raise Deadlock(f"{point.what}: held, and no other task runs")
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        if lockdep is not None:
            lockdep.straight = False
