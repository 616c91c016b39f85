"""The driver of a caught program's system calls: several threads run steps of one model, one at a time.

Owns the lock around the model and who sleeps for what.  A call keeps the model to itself until it must wait
for another, sleeps, or has run for so long that others should come in.

Locks: `_turns` around who has the model; `_news` to sleep on.  Neither is held while steps run.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

from softcvm.sim.steps import Lockdep, Point, Steps, Task, Wait

__all__ = ("Driver", "Sleeps")

T = TypeVar("T")
_SLICE = 0.0005
"""Seconds for which a call keeps the model although others want it."""
_LOOK = 0.005
"""Seconds after which a sleeper looks again for what nobody announces: a signal."""


class Sleeps(Exception):
    """Steps that somebody cannot wait for have come to a point where they must."""

    def __init__(self, point: Point) -> None:
        super().__init__(point.what)
        self.point = point


class Driver:
    """Runs steps of one machine, for any number of threads."""

    def __init__(
        self,
        lockdep: Lockdep,
        asked: Callable[[Wait, Task], None],
        hurry: Callable[[], None],
        idle: Callable[[], None],
    ) -> None:
        """asked: told of what a task is about to sleep for.

        hurry: have guests that run come to a point.  idle: a task waits, and its thread has time for other
        things.  All three are called without the model.
        """
        self._lockdep = lockdep
        self._asked = asked
        self._hurry = hurry
        self._idle = idle
        self._turns = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Lock] = deque()
        """Who waits for the model, each behind a lock of its own, first come first."""
        self._since = 0.0
        """When the model was taken."""
        self._news = threading.Condition()
        """Somebody has left the model: locks may be free."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the model to oneself, without a task."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def run(
        self, steps: Steps[T], task: Task, *, after: Point | None = None, patient: bool = True
    ) -> T:
        """Run steps to their end as this task.  What they raise is raised here.

        after: where they stand, waiting.  Who is not patient gets Sleeps when they must wait for another
        task, and goes on with them later.
        """
        with self.alone():
            try:
                if after is not None:
                    self._sleep(after, task)
                return self._run(steps, task, patient)
            finally:
                self._lockdep.straight = False

    def _sleep(self, point: Point, task: Task) -> None:
        """Until what a task waits for is there; a signal is looked for in its own name."""
        dep = self._lockdep
        while True:
            dep.current = task
            if not _waits(point):
                return
            self._release()
            try:
                self._idle()
                with self._news:
                    self._news.wait(_LOOK)
            finally:
                self._acquire()

    def _run(self, steps: Steps[T], task: Task, patient: bool) -> T:
        dep = self._lockdep
        while True:
            dep.current, dep.straight = task, True
            try:
                point = next(steps)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if _waits(point):
                dep.straight = False
                if isinstance(point.waits_for, Wait):
                    self._release()
                    try:
                        self._asked(point.waits_for, task)
                    finally:
                        self._acquire()
                dep.current = task
                if not patient and _waits(point):
                    raise Sleeps(point)
                self._sleep(point, task)
            elif self._queue and monotonic() - self._since > _SLICE:
                dep.straight = False
                self._release()
                self._acquire()

    def _acquire(self) -> None:
        with self._turns:
            if not self._taken:
                self._taken = True
                self._since = monotonic()
                return
            ours = threading.Lock()
            ours.acquire()
            self._queue.append(ours)
        while not ours.acquire(timeout=_SLICE):
            self._hurry()  # a guest may run and run
        self._since = monotonic()

    def _release(self) -> None:
        with self._turns:
            if self._queue:
                self._queue.popleft().release()  # it is taken still, by the next one
            else:
                self._taken = False
        with self._news:
            self._news.notify_all()


def _waits(point: Point) -> bool:
    return point.waits_for is not None and point.waits_for.busy
