"""Hostile processes and hostile guests on one machine: every sentence of softcvm.invariants holds after each call.

Hypothesis looks for short ways to break one; seeded walks go further in the same time.  Calls run alone,
or two or three of them through each other, a step of this one, a step of that one, each a task of its
own; what is checked is checked when all of them are back in user space.  At the end everybody exits, and
the host must be as it was when it booted, but for pages that were leaked and counted.
"""

from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from softcvm.invariants import check_all, watch
from softcvm.kernel.errors import Unmodelled
from softcvm.kernel.mm.page_alloc import LEAKED
from softcvm.sim.steps import Steps, Task
from tests.machine.hostile import World
from tests.machine.hostile_host import ACTIONS, ALONE
from tests.machine.hostile_sev import SevWorld

NEED_GOOD_WILL = {
    "one_validated_page_per_gpa": "the guest validates what it likes",
    "nested_mappings_lead_to_pages_bound_there": "the VMM binds a page at a second address",
}
UNMODELLED = (
    "the OOM killer",
    "emulating a shared access to GPA",
    "KVM_ENABLE_CAP on a vCPU",
    "an encrypted access under ASID",
    "MSR ",
    "moving or mirroring an SNP VM before",
)
"""What these walks may run into that no kernel path models."""
MISFORTUNES = (
    *[("", 0)] * 8,
    *(("alloc_pages", nth) for nth in (1, 1, 2, 3, 5)),
    ("mem_attr_reserve", 1),
    ("gmem_bind_xarray", 1),
    *(("RMPUPDATE finds the entry locked", nth) for nth in (1, 2, 3)),
    ("PSMASH finds the entry locked", 1),
)
PATIENCE = (40, 40, 40, 3, 1, 0)
KERNELS = ("7.3", "7.3", "6.18", "6.12")


class Call(NamedTuple):
    """An action and its operands."""

    action: str
    operands: tuple[tuple[str, Any], ...]

    def steps(self, world: World) -> Steps[None]:
        steps: Steps[None] = getattr(world, self.action)(**dict(self.operands))
        return steps

    def __repr__(self) -> str:
        return f"{self.action}({', '.join(f'{n}={v}' for n, v in self.operands)})"


class Thread:
    """A call under way, as a task of its own."""

    def __init__(self, name: str, steps: Steps[None]) -> None:
        self.task = Task(name)
        self.steps = steps
        self.done = False
        self.waits_for: Any = None

    def step(self, world: World) -> None:
        lockdep = world.machine.linux.lockdep
        lockdep.current, before = self.task, lockdep.current
        try:
            self.waits_for = next(self.steps).waits_for
        except StopIteration:
            self.done = True
        except Unmodelled as missing:
            if not str(missing).startswith(UNMODELLED):
                raise
            self.done = True
        finally:
            lockdep.current = before
        if self.done:
            assert not self.task.held, [lock.name for lock in self.task.held]

    def abandon(self, world: World) -> None:
        """Let go of what it holds, as itself, after a failure that ends the walk."""
        world.machine.linux.lockdep.current = self.task
        with suppress(Exception):
            self.steps.close()

    @property
    def blocked(self) -> bool:
        return self.waits_for is not None and self.waits_for.busy


def drive(world: World, calls: list[Call], schedule: Callable[[int], int]) -> None:
    """Run calls to their ends; schedule(n) picks which of n threads that can go on does."""
    threads = [Thread(repr(call), call.steps(world)) for call in calls]
    try:
        _drive(world, threads, schedule)
    except BaseException:
        for thread in threads:
            thread.abandon(world)
        raise


def _drive(world: World, threads: list[Thread], schedule: Callable[[int], int]) -> None:
    stalled = 0
    for _ in range(200_000):
        threads = [thread for thread in threads if not thread.done]
        if not threads:
            return
        ready = [thread for thread in threads if not thread.blocked]
        if not ready:
            stalled += 1
            assert stalled < 500, f"deadlock: {[t.task.name for t in threads]}"
            world.chances.interrupted = True  # blocked vCPUs: send them a signal
            ready = threads
        ready[schedule(len(ready))].step(world)
    raise AssertionError(f"no end: {[t.task.name for t in threads]}")


class HostileWorld:
    """A world, what is checked of it, and how it ends."""

    def __init__(self, kernel: str, order: int, *, milan: bool) -> None:
        self.world = SevWorld(kernel, "milan" if milan else "genoa", order)
        self.linux = self.world.machine.linux
        self.boot = self.linux.page_alloc.frames.runs()
        self.rmp = self.world.machine.rmp.map.runs()
        self.watched = watch(self.world.machine)
        self.seqs: dict[int, int] = {}

    def do(
        self, calls: list[Call], misfortune: tuple[str, int], patience: int, seed: int
    ) -> None:
        chance = Random(seed)
        self.world.chances.begin(*misfortune, patience)
        together = [call for call in calls if call.action not in ALONE] or calls[:1]
        drive(self.world, together, chance.randrange)
        self.world.chances.begin()

    def check(self) -> None:
        broken = [
            f"{c.sentence}: {c.violations}"
            for c in check_all(self.world.machine, self.watched)
            if not c.held and c.name not in NEED_GOOD_WILL
        ]
        assert not broken, "\n".join(broken)
        for kvm in self.linux.vm_list:
            before = self.seqs.get(kvm.id, 0)
            assert kvm.mmu_invalidate_seq >= before, "mmu_invalidate_seq shrank"
            self.seqs[kvm.id] = kvm.mmu_invalidate_seq

    def end(self) -> None:
        """Everybody exits; nothing is left but what was leaked."""
        self.world.chances.begin()
        self.world.machine.teardown()
        self.check()
        linux = self.linux
        assert linux.vm_list == []
        assert linux.page_alloc.refs == []
        assert linux.page_alloc.waiting.held() == []
        ops: Any = linux.kvm_x86_ops
        assert ops.asids.used == ops.asids.reclaim
        for start, end, state in self.boot:
            for lo, hi, now in linux.page_alloc.frames.runs(start, end):
                assert now in (state, LEAKED), f"{hi - lo} frames from {lo:#x} are {now}"
        for start, end, value in self.rmp:
            for lo, hi, left in self.world.machine.rmp.map.runs(start, end):
                for first, last, owner in linux.page_alloc.frames.runs(
                    lo, min(hi, linux.page_alloc.frames.limit)
                ):
                    assert left == value or owner == LEAKED, f"RMP of {first:#x} to {last:#x}"


def call_strategy(name: str) -> st.SearchStrategy[Call]:
    operands = {key: st.sampled_from(several) for key, several in ACTIONS[name].items()}
    return st.fixed_dictionaries(operands).map(lambda drawn: Call(name, tuple(drawn.items())))


CALLS = st.sampled_from(sorted(ACTIONS)).flatmap(call_strategy)


class HostileMachine(RuleBasedStateMachine):
    @initialize(
        kernel=st.sampled_from(KERNELS), order=st.sampled_from((0, 9)), milan=st.booleans()
    )
    def begin(self, kernel: str, order: int, milan: bool) -> None:
        self.host = HostileWorld(kernel, order, milan=milan)

    @rule(
        call=CALLS, misfortune=st.sampled_from(MISFORTUNES), patience=st.sampled_from(PATIENCE)
    )
    def alone(self, call: Call, misfortune: tuple[str, int], patience: int) -> None:
        self.host.do([call], misfortune, patience, 0)

    @rule(
        calls=st.lists(CALLS, min_size=2, max_size=3),
        misfortune=st.sampled_from(MISFORTUNES),
        patience=st.sampled_from(PATIENCE),
        seed=st.integers(0, 1 << 16),
    )
    def together(
        self, calls: list[Call], misfortune: tuple[str, int], patience: int, seed: int
    ) -> None:
        self.host.do(calls, misfortune, patience, seed)

    @invariant()
    def every_sentence_holds(self) -> None:
        if hasattr(self, "host"):
            self.host.check()

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.host.end()


CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
WEIGHTS: tuple[dict[str, int], ...] = (
    {
        **dict.fromkeys(ACTIONS, 1),
        "run": 8,
        **dict.fromkeys(("build", "build_plain", "set_slot", "prefault", "drop_vm"), 2),
        **dict.fromkeys(("build_sev", "mirror_or_heir"), 3),
        **dict.fromkeys(("set_attributes", "fallocate"), 3),
    },
    {
        **dict.fromkeys(("delete_slot", "move_slot", "poison", "exit", "scribble"), 1),
        **dict.fromkeys(("prefault", "fallocate", "set_attributes", "discard", "touch"), 2),
        **dict.fromkeys(("build", "drop_vm"), 4),
        "run": 40,
    },
)
"""How often each action comes: where everybody is hostile, and where it is mostly the guests."""


DUEL = {
    **dict.fromkeys(("prefault", "fallocate"), 8),
    **dict.fromkeys(("run", "set_attributes", "discard"), 4),
    **dict.fromkeys(("delete_slot", "move_slot", "unmap", "map_gmem", "poison"), 1),
    **dict.fromkeys(("close", "drop_vm", "launch_update", "create_vcpu"), 1),
}
PLACES = ("gfn", "pgoff", "page", "index")


def random_calls(chance: Random, weights: dict[str, int], world: World) -> list[Call]:
    """One call, or two or three; those often meet at the same VM, and often at the same page of it."""
    number = chance.choice((1, 1, 2, 2, 3))
    victims: dict[str, Any] = {}
    if number > 1 and world.vms and chance.random() < 0.8:
        vm = chance.choice(world.vms)
        victims = {"vm": world.vms.index(vm), "who": world.actors.index(vm.actor)}
        owned: dict[str, list[Any]] = {"vcpu": [*world.vcpus], "gmem": [*world.gmems]}
        for key, held in owned.items():
            mine = [at for at, one in enumerate(held) if one.vm is vm]
            if mine:
                victims[key] = chance.choice(mine)
        areas = [at for at, area in enumerate(world.areas) if area.actor is vm.actor]
        if areas:
            victims["area"] = chance.choice(areas)
        if chance.random() < 0.7:
            weights = DUEL
            victims |= dict.fromkeys(PLACES, chance.choice((0, 3, 512, 700)))
    calls = []
    for _ in range(number):
        [name] = chance.choices(list(weights), list(weights.values()))
        operands = {key: chance.choice(several) for key, several in ACTIONS[name].items()}
        operands |= {key: victims[key] for key in operands.keys() & victims.keys()}
        calls.append(Call(name, tuple(operands.items())))
    return calls


def walk(seed: int, steps: int, machines: int = 1) -> list[SevWorld]:
    """`steps` steps on each of some machines, each torn down at its end."""
    chance = Random(seed)
    worlds = []
    for number in range(machines):
        kernel = KERNELS[(seed + number) % len(KERNELS)]
        order = chance.choice((0, 9, 9))
        weights = WEIGHTS[number % len(WEIGHTS)]
        host = HostileWorld(kernel, order, milan=bool(chance.randrange(2)))
        said: list[str] = []
        try:
            for _ in range(steps):
                calls = random_calls(chance, weights, host.world)
                misfortune, patience = chance.choice(MISFORTUNES), chance.choice(PATIENCE)
                order_of = chance.randrange(1 << 16)
                said.append(f"host.do({calls}, {misfortune}, {patience}, {order_of})")
                host.do(calls, misfortune, patience, order_of)
                host.check()
            host.end()
        except Exception as error:
            tail = "\n".join(said[-6:])
            error.add_note(
                f"{kernel}, order {order}, machine {number}, step {len(said)}:\n{tail}"
            )
            raise
        worlds.append(host.world)
    return worlds


def test_hostility_breaks_no_sentence() -> None:
    run_state_machine_as_test(
        HostileMachine,
        settings=settings(
            max_examples=25, stateful_step_count=40, suppress_health_check=CHECKS
        ),
    )


@pytest.mark.parametrize("seed", range(4))
def test_seeded_hostility_breaks_no_sentence(seed: int) -> None:
    walk(seed, steps=120, machines=2)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 110))
def test_fifty_thousand_hostile_steps_break_no_sentence(seed: int) -> None:
    """Ten seeds of 5,000 steps, on machines that live for 250."""
    walk(seed, steps=250, machines=20)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_hostility_at_length_breaks_no_sentence() -> None:
    run_state_machine_as_test(
        HostileMachine,
        settings=settings(
            max_examples=400, stateful_step_count=100, suppress_health_check=CHECKS
        ),
    )


def _nothing(*_: Any, **__: Any) -> Steps[None]:
    yield from ()


DEFECTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a punch hole zaps nothing": (
        "softcvm.kernel.virt.kvm.gmem_inode.kvm_gmem_invalidate_start_file",
        _nothing,
    ),
    "a fault never looks at the invalidations beside it": (
        "softcvm.kernel.virt.kvm.kvm_main.Kvm.mmu_invalidate_retry_gfn",
        lambda *_: False,
    ),
    "pages leave guest_memfd and stay the guest's": (
        "softcvm.kernel.arch.x86.kvm.svm.gmem.sev_gmem_invalidate",
        lambda *_: None,
    ),
    "a deleted memslot stays bound": (
        "softcvm.kernel.virt.kvm.memslots.kvm_gmem_unbind",
        _nothing,
    ),
    "an ASID is never given back": (
        "softcvm.kernel.arch.x86.kvm.svm.asid.SevAsids.free",
        _nothing,
    ),
    "a dead VM is served": ("softcvm.uapi.vm.check_usable", lambda *_: None),
}


def walk_far(seeds: range, steps: int) -> None:
    for seed in seeds:
        walk(seed, steps)


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_walks_find_a_defect(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences are worth something: a kernel with this defect does not get through."""
    monkeypatch.setattr(*DEFECTS[defect])
    with pytest.raises((AssertionError, ValueError, KeyError)):
        walk_far(range(120), steps=80)
