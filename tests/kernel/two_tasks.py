"""Two tasks on one machine, at every point where the second can step in.

Obvious on purpose: run the first task for `split` steps, then the second for as long as it can
go, then whoever can.
"""

from collections.abc import Callable, Generator
from typing import Any

from softcvm.kernel.errors import KernelError
from softcvm.kernel.host import Linux
from softcvm.sim.steps import Point, Steps, Task

__all__ = ("TaskRun", "run_split", "steps_of")


class TaskRun:
    """One generator of steps, its Task, and how it ended."""

    def __init__(self, linux: Linux, name: str, steps: Steps[Any]) -> None:
        self.linux = linux
        self.task = Task(name)
        self.steps: Generator[Point, None, Any] = self._to_user_space(steps)
        self.done = False
        self.error: KernelError | None = None
        self.result: Any = None
        self.blocked = False

    def _to_user_space(self, steps: Steps[Any]) -> Steps[Any]:
        """A system call: what it puts on the way is released at its end."""
        try:
            return (yield from steps)
        finally:
            yield from self.linux.task_work.run()

    def step(self) -> None:
        """Run to the next point."""
        before = self.linux.lockdep.current
        self.linux.lockdep.current = self.task
        try:
            point = next(self.steps)
            self.blocked = point.waits_for is not None and point.waits_for.busy
        except StopIteration as stop:
            self.done, self.result = True, stop.value
        except KernelError as error:
            self.done, self.error = True, error
        finally:
            self.linux.lockdep.current = before


def steps_of(linux: Linux, steps: Steps[Any]) -> int:
    """How many points a task has when nobody else runs."""
    run = TaskRun(linux, "alone", steps)
    count = 0
    while not run.done:
        run.step()
        count += 1
    return count


def run_split(
    linux: Linux, first: Callable[[], Steps[Any]], second: Callable[[], Steps[Any]], split: int
) -> tuple[TaskRun, TaskRun]:
    """`split` steps of the first, all of the second as far as it goes, then both in turns."""
    a, b = TaskRun(linux, "first", first()), TaskRun(linux, "second", second())
    for _ in range(split):
        if not a.done:
            a.step()
    for _ in range(300):
        if b.done or b.blocked:
            break
        b.step()
    for _ in range(5_000):
        for task in (a, b):
            if not task.done:
                task.step()
        if a.done and b.done:
            return a, b
    raise AssertionError("the two tasks wait for each other")
