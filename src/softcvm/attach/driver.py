"""The driver of a caught program's system calls: several threads run steps of one model, one at a time.

Owns the lock around the model and who sleeps for what.  A call keeps the model to itself until it must wait
for another, sleeps, or has run for so long that others should come in.

Lock: `_model`, never held while a thread sleeps in the model.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

from softcvm.sim.steps import Lockdep, Point, Steps, Task, Wait

__all__ = ("Driver",)

T = TypeVar("T")
_LOOK = 0.005
"""Seconds after which a sleeper looks again for what nobody announces: a signal."""
_SLICE = 0.002
"""Seconds after which a call lets others in."""


class Driver:
    """Runs steps of one machine, for any number of threads."""

    def __init__(self, lockdep: Lockdep, asked: Callable[[Wait, Task], None]) -> None:
        """asked: told of what a task is about to sleep for, with the model to itself."""
        self._lockdep = lockdep
        self._asked = asked
        self._model = threading.Condition(threading.Lock())
        self._wanted = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the model to oneself, without a task."""
        self._wanted += 1
        self._model.acquire()
        self._wanted -= 1
        try:
            yield
        finally:
            self._model.notify_all()
            self._model.release()

    def run(self, steps: Steps[T], task: Task) -> T:
        """Run steps to their end as this task.  What they raise is raised here."""
        with self.alone():
            try:
                return self._run(steps, task)
            finally:
                self._lockdep.straight = False

    def _run(self, steps: Steps[T], task: Task) -> T:
        dep = self._lockdep
        since = monotonic()
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
                    self._asked(point.waits_for, task)
                while _waits(point):
                    self._model.notify_all()
                    self._model.wait(_LOOK)
                since = monotonic()
            elif self._wanted and monotonic() - since > _SLICE:
                dep.straight = False
                self._let_in()
                since = monotonic()

    def _let_in(self) -> None:
        """Whoever waits for the model comes first."""
        self._model.notify_all()
        self._model.release()
        try:
            while self._wanted:
                threading.Event().wait(0.0001)
        finally:
            self._model.acquire()


def _waits(point: Point) -> bool:
    return point.waits_for is not None and point.waits_for.busy
