"""Steps and locks: where another task may run, lock order, and locks that nobody can release."""

import pytest

from softcvm.sim.steps import (
    Deadlock,
    Lockdep,
    LockOrder,
    Mutex,
    Point,
    RwSem,
    Steps,
    Task,
    Wait,
    lockdep_assert_held,
    preempt,
    run,
)


@pytest.fixture
def lockdep() -> Lockdep:
    return Lockdep()


def test_run_returns_what_the_steps_return() -> None:
    def twice() -> Steps[int]:
        yield from preempt("between")
        return 42

    assert run(twice()) == 42


def test_taking_a_lock_is_a_point_even_when_it_is_free(lockdep: Lockdep) -> None:
    assert list(Mutex(lockdep, "slots_lock", 10).acquire()) == [Point("lock slots_lock")]


def test_locks_are_taken_outermost_first(lockdep: Lockdep) -> None:
    outer, inner = Mutex(lockdep, "slots_lock", 10), RwSem(lockdep, "mmu_lock", 30)
    run(outer.acquire())
    run(inner.acquire_write())
    assert [outer.busy, inner.busy] == [True, True]
    inner.release_write()
    outer.release()
    assert [outer.busy, inner.busy] == [False, False]
    assert lockdep.current.held == []


def test_taking_an_outer_lock_inside_an_inner_one_is_refused(lockdep: Lockdep) -> None:
    outer, inner = Mutex(lockdep, "slots_lock", 10), Mutex(lockdep, "mmu_lock", 30)
    run(inner.acquire())
    with pytest.raises(LockOrder, match=r"slots_lock\(10\) taken while holding mmu_lock\(30\)"):
        run(outer.acquire())


def test_a_lock_held_deeper_than_the_last_one_counts_too(lockdep: Lockdep) -> None:
    a, b, c = (Mutex(lockdep, name, rank) for name, rank in (("a", 10), ("b", 20), ("c", 30)))
    run(a.acquire())
    run(c.acquire())
    a.release()
    with pytest.raises(LockOrder):
        run(b.acquire())


def test_a_mutex_taken_twice_by_one_task_is_refused(lockdep: Lockdep) -> None:
    lock = Mutex(lockdep, "slots_lock", 10)
    run(lock.acquire())
    with pytest.raises(LockOrder, match="taken twice"):
        run(lock.acquire())


def test_a_reader_cannot_become_a_writer(lockdep: Lockdep) -> None:
    lock = RwSem(lockdep, "mmu_lock", 30)
    run(lock.acquire_read())
    with pytest.raises(LockOrder, match="taken twice"):
        run(lock.acquire_write())


def test_two_readers_share_and_a_writer_waits_for_both(lockdep: Lockdep) -> None:
    lock = RwSem(lockdep, "mmu_lock", 30)
    readers = [Task("reader 0"), Task("reader 1")]
    for lockdep.current in readers:
        run(lock.acquire_read())
    lockdep.current = Task("writer")
    steps = lock.acquire_write()
    assert next(steps) == Point("lock mmu_lock for write")
    assert next(steps).waits_for is lock
    for lockdep.current in readers:
        lock.release_read()
    lockdep.current = Task("writer")
    assert list(steps) == []
    assert lock.writer is lockdep.current


def test_a_wait_that_nobody_can_end_is_a_deadlock(lockdep: Lockdep) -> None:
    lock = Mutex(lockdep, "slots_lock", 10)
    lockdep.current = Task("vcpu 0")
    run(lock.acquire())
    lockdep.current = Task("vcpu 1")
    with pytest.raises(Deadlock, match="wait slots_lock"):
        run(lock.acquire())


def test_only_the_holder_releases(lockdep: Lockdep) -> None:
    lock = Mutex(lockdep, "slots_lock", 10)
    run(lock.acquire())
    lockdep.current = Task("another")
    with pytest.raises(LockOrder, match="without holding"):
        lock.release()


def test_lockdep_assert_held_speaks_of_the_running_task(lockdep: Lockdep) -> None:
    lock = Mutex(lockdep, "slots_lock", 10)
    with pytest.raises(LockOrder, match="is not held by main"):
        lockdep_assert_held(lock)
    run(lock.acquire())
    lockdep_assert_held(lock)
    lockdep.current = Task("another")
    with pytest.raises(LockOrder, match="is not held by another"):
        lockdep_assert_held(lock)


def sleeper(awake: list[bool]) -> Steps[str]:
    wait = Wait("an event", lambda: bool(awake))
    while not awake:
        yield Point("sleep", wait)
    return "woken"


def test_a_sleep_that_nobody_can_end_is_ended_by_the_interrupt() -> None:
    awake: list[bool] = []
    assert run(sleeper(awake), lambda: awake.append(True)) == "woken"


def test_a_sleep_without_an_interrupt_is_a_deadlock() -> None:
    with pytest.raises(Deadlock, match="sleep"):
        run(sleeper([]))
    with pytest.raises(Deadlock, match="sleep"):
        run(sleeper([]), lambda: None)


def test_run_with_a_lockdep_takes_free_locks_without_a_stop(lockdep: Lockdep) -> None:
    mutex, sem = Mutex(lockdep, "slots_lock", 10), RwSem(lockdep, "mmu_lock", 30)
    stops: list[Point] = []

    def steps() -> Steps[None]:
        for steps_of_one in (mutex.acquire, sem.acquire_read):
            for point in steps_of_one():
                stops.append(point)
                yield point
        sem.release_read()
        stops.extend(sem.acquire_write())

    run(steps(), lockdep=lockdep)
    assert stops == []
    assert lockdep.current.held == [mutex, sem]
    assert mutex.owner is sem.writer is lockdep.current
    assert not lockdep.straight


def test_a_free_lock_against_the_order_is_refused_without_a_stop_too(lockdep: Lockdep) -> None:
    outer, inner = Mutex(lockdep, "slots_lock", 10), RwSem(lockdep, "mmu_lock", 30)

    def steps() -> Steps[None]:
        yield from inner.acquire_write()
        yield from outer.acquire()

    with pytest.raises(LockOrder, match=r"slots_lock\(10\) taken while holding mmu_lock\(30\)"):
        run(steps(), lockdep=lockdep)
    assert not lockdep.straight


def test_a_held_lock_stops_a_straight_run_as_any_other(lockdep: Lockdep) -> None:
    lock = Mutex(lockdep, "slots_lock", 10)
    lockdep.current = Task("vcpu 0")
    run(lock.acquire())

    def steps() -> Steps[None]:
        yield from lock.acquire()

    with pytest.raises(LockOrder, match="taken twice"):
        run(steps(), lockdep=lockdep)
    lockdep.current = Task("vcpu 1")
    with pytest.raises(Deadlock, match="wait slots_lock"):
        run(steps(), lockdep=lockdep)
