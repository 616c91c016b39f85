"""A process runs its calls without a stop at free locks; that changes nothing but the time it takes."""

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.machine import MachineProcess
from softcvm.sim.steps import Lockdep, Point, Steps, run
from softcvm.uapi import dispatch
from tests.uapi.calls import KEEP_SIZE, MIB, PAGE, PUNCH_HOLE, VmCalls


class Stepping(MachineProcess):
    """The same calls, stopping at every point."""

    def __init__(self, process: MachineProcess) -> None:
        super().__init__(process.machine, process.proc)
        self._lockdep = Lockdep()  # nobody's, so that run() changes nothing


def life(sys: MachineProcess) -> None:
    """Pages come, are used, converted and go, at the edges of slots and in the middle."""
    calls = VmCalls(sys, VmType.SW_PROTECTED)
    gmem = calls.private_slot(size=2 * MIB)
    vcpu = calls.vcpu()
    for gpa in (0, 7 * PAGE, 8 * PAGE, 2 * MIB - PAGE):
        calls.prefault(vcpu, gpa, PAGE)
        calls.attributes(gpa, PAGE, 0)
        sys.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, gpa, PAGE)
        sys.fallocate(gmem, KEEP_SIZE, gpa, 2 * PAGE if gpa < MIB else PAGE)
        calls.attributes(gpa, PAGE, 8)
    calls.prefault(vcpu, 0, 2 * MIB)
    calls.region(0, 0, 0)
    calls.close()


def test_stopping_at_free_locks_or_not_gives_equal_machines_and_events() -> None:
    seen: list[list[object]] = [[], []]
    prints = []
    for stepping in (0, 1):
        machine = Machine(memory=256 * MIB, collector=seen[stepping].append)
        process = machine.process()
        life(Stepping(process) if stepping else process)
        prints.append(machine.fingerprint())
        assert not machine.linux.lockdep.straight
    assert seen[0] == seen[1]
    assert prints[0] == prints[1]


def test_the_points_are_there_for_who_steps_the_call_itself() -> None:
    machine = Machine(memory=256 * MIB)
    calls = VmCalls(machine.process())
    gmem = calls.private_slot(size=2 * MIB)
    points: list[str] = []

    def watched(steps: Steps[None]) -> Steps[None]:
        for point in steps:
            points.append(point.what)
            yield Point("", point.waits_for)

    proc = machine.linux.processes[0]
    run(watched(dispatch.sys_fallocate(proc, gmem, KEEP_SIZE, 0, PAGE)))
    run(watched(dispatch.sys_fallocate(proc, gmem, KEEP_SIZE | PUNCH_HOLE, 0, PAGE)))
    assert points == [
        "lock gmem invalidate_lock for read",
        "lock folio lock 0x0",
        "lock gmem invalidate_lock for write",
        "lock kvm->mmu_lock for write",
        "lock folio lock 0x0",
        "lock kvm->mmu_lock for write",
    ]


def test_a_failing_call_leaves_the_locks_visible_again() -> None:
    machine = Machine(memory=256 * MIB)
    process = machine.process()
    fd = process.open("/dev/kvm")
    for _ in range(2):
        try:
            process.ioctl(fd, k.KVM_CREATE_VM, 99)
        except OSError:
            assert not machine.linux.lockdep.straight
