"""A host full of hostile processes: who they are, how they call, what they do to descriptors and memory.

Every action is Steps, so that several can be run through each other.  Operands are small tuples of
numbers from which Hypothesis and seeded walks both draw: few addresses, so that things meet.  An action
picks its victims by number among what is there; a refusal (OSError) or a signal is what user space gets
for it and nothing to worry about.  Everything else that comes out of the model is a bug.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from softcvm.abi.insn import GuestOp, Hlt, Program
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE
from softcvm.abi.layout import Layout
from softcvm.abi.sev import (
    KvmSevCmd,
)
from softcvm.abi.svm import GuestException
from softcvm.kernel.mm.memory import BadAccess, load, store
from softcvm.machine import Machine
from softcvm.machine.process import MachineProcess
from softcvm.sim.steps import Steps
from softcvm.uapi import dispatch

__all__ = (
    "ACTIONS",
    "ALONE",
    "ANY",
    "GFNS",
    "NO",
    "NPAGES",
    "PAGE",
    "PRIVATE_ANON",
    "RW",
    "YES",
    "Actor",
    "Area",
    "HostWorld",
    "Misfortune",
    "Vm",
    "action",
    "pick",
)

PAGE = 4096
RW, SHARED, PRIVATE_ANON, SHARED_ANON = 3, 1, 0x22, 0x21
KEEP, PUNCH = 1, 3
DONTNEED = 4
POLICY = 0x30000

GFNS = (0, 0, 1, 2, 3, 16, 17, 511, 512, 513, 700, 1023, 1024, 1536, 1 << 20)
NPAGES = (1, 1, 2, 16, 511, 512, 512, 513, 1024, 1500)
ANY = tuple(range(12))
TYPES = (4, 4, 4, 4, 1, 1, 0, 2, 3, 5, 9)
YES = (True, True, True, False)
NO = (False, False, False, True)

F = TypeVar("F", bound=Callable[..., Steps[None]])
ACTIONS: dict[str, dict[str, tuple[Any, ...]]] = {}
ALONE: set[str] = set()
"""What does not run beside others: exit waits for them, and LAUNCH_UPDATE races faults."""


def action(alone: bool = False, **operands: tuple[Any, ...]) -> Callable[[F], F]:
    def register(method: F) -> F:
        ACTIONS[method.__name__] = operands
        if alone:
            ALONE.add(method.__name__)
        return method

    return register


class Misfortune:
    """Choices: one injected failure at the n-th time somebody asks, and a signal when patience ends."""

    def __init__(self) -> None:
        self.label, self.countdown = "", 0
        self.patience = 0
        self.interrupted = False

    def begin(self, label: str = "", nth: int = 0, patience: int = 40) -> None:
        self.label, self.countdown = label, nth
        self.patience = patience
        self.interrupted = False

    def choose(self, label: str, outcomes: int) -> int:
        if label == "signal_pending":
            self.patience -= 1
            return int(self.interrupted or self.patience < 0)
        if label != self.label:
            return 0
        self.countdown -= 1
        return int(self.countdown == 0)


@dataclass(eq=False)
class Actor:
    """A process, two device nodes, a page for the arguments of its calls."""

    sys: MachineProcess
    kvm: int = -1
    sev: int = -1
    scratch: int = 0

    def open(self) -> "Actor":
        self.kvm = self.sys.open("/dev/kvm")
        self.sev = self.sys.open("/dev/sev")
        self.scratch = self.sys.mmap(PAGE, RW, PRIVATE_ANON)
        return self


@dataclass(eq=False)
class Vm:
    actor: Actor
    fd: int
    vm_type: int


@dataclass(eq=False)
class Vcpu:
    actor: Actor
    fd: int
    vm: Vm
    run: int = 0


@dataclass(eq=False)
class Gmem:
    actor: Actor
    fd: int
    npages: int
    vm: Vm


class Area(NamedTuple):
    actor: Actor
    addr: int
    npages: int


@dataclass
class HostWorld:
    """One machine, who is on it, and what they hold."""

    kernel: str
    cpu: str
    order: int
    chances: Misfortune = field(default_factory=Misfortune)
    actors: list[Actor] = field(default_factory=list)
    vms: list[Vm] = field(default_factory=list)
    vcpus: list[Vcpu] = field(default_factory=list)
    gmems: list[Gmem] = field(default_factory=list)
    areas: list[Area] = field(default_factory=list)
    tape: list[GuestOp] = field(default_factory=list)
    calls: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = Machine(
            self.kernel, self.cpu, 48 << 20, gmem_max_order=self.order, choices=self.chances
        )
        ops: Any = self.machine.linux.kvm_x86_ops
        ops.asids.min_sev_asid, ops.asids.max_sev_asid = 4, 6  # soon used up
        self.machine.vm_guest(self._guest)
        self.actors = [Actor(self.machine.process()).open() for _ in range(2)]

    def _guest(self, vcpu_id: int) -> Program:
        """Does what the tape says, whichever vCPU comes first; halts when it is empty."""
        while True:
            op = self.tape.pop(0) if self.tape else Hlt()
            try:
                yield op
            except GuestException:
                continue

    # -- calls ------------------------------------------------------------------------------------

    def call(self, steps: Steps[Any]) -> Steps[Any]:
        """One system call; None when it is refused or ends in a signal."""
        self.calls += 1
        try:
            return (yield from steps)
        except OSError as error:
            name = str(error.strerror).split(":")[0] + f" {error.errno}"
            self.refused[name] = self.refused.get(name, 0) + 1
            return None
        except BadAccess:
            return None

    def ioctl(
        self, actor: Actor, fd: int, request: int, arg: int | Layout = 0
    ) -> Steps[int | None]:
        told = arg.data if isinstance(arg, Layout) else arg
        steps = dispatch.sys_ioctl(actor.sys.proc, fd, request, told)
        done: int | None = yield from self.call(steps)
        return done

    def op(self, vm: Vm, command: int, params: Layout, sev_fd: int | None = None) -> Steps[Any]:
        """KVM_MEMORY_ENCRYPT_OP with its argument in a page of its own; the argument afterwards."""
        proc = vm.actor.sys.proc
        at = yield from self.call(dispatch.sys_mmap(proc, PAGE, RW, PRIVATE_ANON, -1, 0))
        if at is None:
            return None
        yield from self.call(store(proc.mm, at, bytes(params)))
        fd = vm.actor.sev if sev_fd is None else sev_fd
        cmd = KvmSevCmd(id=command, data_ptr=at, sev_fd=fd)
        done = yield from self.ioctl(vm.actor, vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd)
        left = yield from self.call(load(proc.mm, at, params.SIZE))
        yield from self.call(dispatch.sys_munmap(proc, at, PAGE))
        return None if done is None or left is None else type(params)(left)

    # -- processes and descriptors ----------------------------------------------------------------

    @action()
    def another_process(self) -> Steps[None]:
        yield from ()
        if len(self.actors) < 4:
            self.actors.append(Actor(self.machine.process()).open())

    @action(who=ANY, alone=True, really=NO)
    def exit(self, who: int, really: bool) -> Steps[None]:
        if not self.actors or not really:
            return
        actor = self.actors.pop(who % len(self.actors))
        self.forget(lambda held: held.actor is actor)
        yield from actor.sys.proc.exit()
        self.machine.linux.processes.remove(actor.sys.proc)
        if not self.actors:
            self.actors.append(Actor(self.machine.process()).open())

    def forget(self, gone: Callable[[Any], bool]) -> None:
        lists: tuple[list[Any], ...] = (self.vms, self.vcpus, self.gmems, self.areas)
        for held in lists:
            held[:] = [one for one in held if not gone(one)]

    @action(kind=(0, 1, 1, 2, 2), which=ANY, remember=NO)
    def close(self, kind: int, which: int, remember: bool) -> Steps[None]:
        held: Any = pick((self.vms, self.vcpus, self.gmems)[kind], which)
        if held is None:
            return
        if not remember:
            self.forget(lambda one: one is held)
        yield from self.call(dispatch.sys_close(held.actor.sys.proc, held.fd))

    @action(vm=ANY)
    def drop_vm(self, vm: int) -> Steps[None]:
        """Close everything of a VM that its VMM knows of, so that it goes away."""
        dropped: Vm | None = pick(self.vms, vm)
        if dropped is None:
            return
        vcpus = [vcpu for vcpu in self.vcpus if vcpu.vm is dropped]
        gmems = [gmem for gmem in self.gmems if gmem.vm is dropped]
        held: list[Any] = [*gmems, dropped, *vcpus]
        self.forget(lambda one: one in held)
        for one in held:
            proc = one.actor.sys.proc
            if isinstance(one, Vcpu) and one.run:
                size = KVM_RUN_MMAP_SIZE
                yield from self.call(dispatch.sys_munmap(proc, one.run, size))
            yield from self.call(dispatch.sys_close(proc, one.fd))

    @action(who=ANY, fd=ANY)
    def close_any_number(self, who: int, fd: int) -> Steps[None]:
        actor = self.actors[who % len(self.actors)]
        if fd + 3 not in (actor.kvm, actor.sev):
            yield from self.call(dispatch.sys_close(actor.sys.proc, fd + 3))

    @action(kind=(0, 1, 2), which=ANY, receiver=ANY)
    def give(self, kind: int, which: int, receiver: int) -> Steps[None]:
        """dup(2) or SCM_RIGHTS; the receiver may well try to use it."""
        lists: Any = (self.vms, self.vcpus, self.gmems)
        held = pick(lists[kind], which)
        if held is None:
            return
        to = self.actors[receiver % len(self.actors)]
        sender, receiver_proc = held.actor.sys.proc, to.sys.proc
        fd = yield from self.call(dispatch.sys_send_fd(sender, held.fd, receiver_proc))
        if fd is None:
            return
        if kind == 0:
            self.vms.append(Vm(to, fd, held.vm_type))
        elif kind == 1:
            self.vcpus.append(Vcpu(to, fd, held.vm))
        else:
            self.gmems.append(Gmem(to, fd, held.npages, held.vm))

    # -- memory of processes ----------------------------------------------------------------------

    @action(who=ANY, npages=NPAGES, shared=NO)
    def map_memory(self, who: int, npages: int, shared: bool) -> Steps[None]:
        actor = self.actors[who % len(self.actors)]
        flags = SHARED_ANON if shared else PRIVATE_ANON
        steps = dispatch.sys_mmap(actor.sys.proc, npages * PAGE, RW, flags, -1, 0)
        addr = yield from self.call(steps)
        if addr is not None:
            self.areas.append(Area(actor, addr, npages))

    @action(gmem=ANY, pgoff=GFNS, npages=NPAGES, write=YES)
    def map_gmem(self, gmem: int, pgoff: int, npages: int, write: bool) -> Steps[None]:
        held: Gmem | None = pick(self.gmems, gmem)
        if held is None:
            return
        proc = held.actor.sys.proc
        steps = dispatch.sys_mmap(proc, npages * PAGE, RW, SHARED, held.fd, pgoff * PAGE)
        addr = yield from self.call(steps)
        if addr is not None:
            self.areas.append(Area(held.actor, addr, npages))
            if write:
                yield from self.call(store(proc.mm, addr, b"hostile"))
                yield from self.call(load(proc.mm, addr + PAGE, 3 * PAGE))

    @action(area=ANY, page=GFNS, npages=NPAGES)
    def unmap(self, area: int, page: int, npages: int) -> Steps[None]:
        held = pick(self.areas, area)
        if held is not None:
            at = held.addr + page % held.npages * PAGE
            npages = min(npages, held.npages - page % held.npages)
            if npages == held.npages:
                self.areas.remove(held)
            yield from self.call(dispatch.sys_munmap(held.actor.sys.proc, at, npages * PAGE))

    @action(area=ANY, page=GFNS, npages=NPAGES)
    def discard(self, area: int, page: int, npages: int) -> Steps[None]:
        held = pick(self.areas, area)
        if held is not None:
            at = held.addr + page % held.npages * PAGE
            proc = held.actor.sys.proc
            yield from self.call(dispatch.sys_madvise(proc, at, npages * PAGE, DONTNEED))

    @action(area=ANY, page=GFNS, write=YES, offset=(0, 8, 0x390, 0x3A8, 0x800, 0xFFF))
    def touch(self, area: int, page: int, write: bool, offset: int) -> Steps[None]:
        held = pick(self.areas, area)
        if held is None:
            return
        at = held.addr + page % held.npages * PAGE + offset
        mm = held.actor.sys.proc.mm
        yield from self.call(store(mm, at, b"\xa5\x01") if write else load(mm, at, 16))


def pick(held: list[Any], number: int) -> Any:
    return held[number % len(held)] if held else None
