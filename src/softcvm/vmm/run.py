"""The KVM_RUN loop: what each exit asks of user space, and how it is answered.

kvm_cpu_exec() of QEMU's accel/kvm/kvm-all.c and kvm_arch_handle_exit() of target/i386/kvm/kvm.c.  Page-state
changes arrive as KVM_HC_MAP_GPA_RANGE; an access to memory in the other state as a memory-fault exit, which
is the implicit form of the same request.  Exits that this VMM has no answer to are VmmErrors that name them.

One thread runs all vCPUs: the first, and whenever its guest says that it can wait (a write to the delay port),
each of the others until it sleeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from errno import EAGAIN, EFAULT, EINTR, EINVAL
from typing import NamedTuple

from softcvm.abi.board import DELAY_PORT
from softcvm.abi.ghcb import GHCB_MSR_INFO_MASK, GhcbMsr
from softcvm.abi.kvm.memory import KVM_HC_MAP_GPA_RANGE, MapGpaRange
from softcvm.abi.kvm.run import KvmExit, KvmRun, MemoryExitFlag, SystemEvent
from softcvm.sim.addr import PAGE_SHIFT
from softcvm.vmm.devices import Ports
from softcvm.vmm.errors import VmmError
from softcvm.vmm.kvm import Vcpu
from softcvm.vmm.memory import GuestMemory

__all__ = ("ExitPolicy", "Runner", "Termination")

EHWPOISON = 133  # not in Python's errno
_IO_IN = 0
_HYPERCALL_RET = KvmRun.hypercall_ret.offset


class Termination(NamedTuple):
    """A guest asked for its end through the GHCB MSR: whose code it is, and the code."""

    reason_set: int
    reason: int


@dataclass(frozen=True)
class ExitPolicy:
    """Where a VMM has a choice."""

    prefault: bool = True
    """Map newly private memory at once (KVM_PRE_FAULT_MEMORY), instead of page by page when it is used."""
    implicit_conversion: bool = True
    """Convert memory that is used in its other state, instead of giving up."""


@dataclass
class Runner:
    """Runs vCPUs until the guest ends.  on_exit is called before each exit is served."""

    memory: GuestMemory
    ports: Ports
    policy: ExitPolicy
    on_exit: Callable[[KvmExit], None] | None = None
    exits: dict[str, int] = field(default_factory=dict)

    def run(self, vcpus: Sequence[Vcpu]) -> Termination:
        first, *others = vcpus
        while True:
            run, ended = self._run_once(first, first.run())
            if ended is not None:
                return ended
            if others and _waits(run):
                for vcpu in others:
                    ended = self._until_it_sleeps(vcpu)
                    if ended is not None:
                        return ended

    def _until_it_sleeps(self, vcpu: Vcpu) -> Termination | None:
        """EINTR: it is not started, or halted; the signal that ends its sleep lets us go on.

        EAGAIN: it has just been started.
        """
        while True:
            errno = vcpu.run()
            if errno == EINTR:
                return None
            if errno != EAGAIN:
                run, ended = self._run_once(vcpu, errno)
                if ended is not None or _waits(run):
                    return ended

    def _run_once(self, vcpu: Vcpu, errno: int) -> tuple[KvmRun, Termination | None]:
        """Serve one exit."""
        run = vcpu.exit()
        reason = self._reason(vcpu, run, errno)
        self.exits[reason.name] = self.exits.get(reason.name, 0) + 1
        if self.on_exit is not None:
            self.on_exit(reason)
        return run, self._serve(vcpu, run, reason)

    @staticmethod
    def _reason(vcpu: Vcpu, run: KvmRun, errno: int) -> KvmExit:
        """kvm_run is filled when KVM_RUN succeeds, and when a memory fault is why it fails."""
        known = run.exit_reason in KvmExit.__members__.values()
        memory_fault = known and run.exit_reason == KvmExit.MEMORY_FAULT
        if errno == 0 and known:
            return KvmExit(run.exit_reason)
        if errno in (EFAULT, EHWPOISON) and memory_fault:
            return KvmExit.MEMORY_FAULT
        raise VmmError(
            f"vCPU {vcpu.vcpu_id}: KVM_RUN ended with errno {errno}, exit reason {run.exit_reason}",
            errno,
        )

    def _serve(self, vcpu: Vcpu, run: KvmRun, reason: KvmExit) -> Termination | None:
        match reason:
            case KvmExit.HYPERCALL:
                self._hypercall(vcpu, run)
            case KvmExit.MEMORY_FAULT:
                self._memory_fault(vcpu, run)
            case KvmExit.IO:
                self._io(vcpu, run)
            case KvmExit.SYSTEM_EVENT:
                return self._system_event(vcpu, run)
            case _:
                raise VmmError(f"vCPU {vcpu.vcpu_id}: no answer to KVM_EXIT_{reason.name}")
        return None

    def _hypercall(self, vcpu: Vcpu, run: KvmRun) -> None:
        if run.hypercall_nr != KVM_HC_MAP_GPA_RANGE:
            raise VmmError(f"vCPU {vcpu.vcpu_id}: no answer to hypercall {run.hypercall_nr}")
        args = [
            int.from_bytes(run.hypercall_args[8 * i : 8 * i + 8], "little") for i in range(3)
        ]
        gpa, size = args[0], args[1] << PAGE_SHIFT
        done = self._convert(vcpu, gpa, size, bool(args[2] & MapGpaRange.ENCRYPTED))
        vcpu.answer(_HYPERCALL_RET, (0 if done else EINVAL).to_bytes(8, "little"))

    def _memory_fault(self, vcpu: Vcpu, run: KvmRun) -> None:
        gpa, size = run.memory_fault_gpa, run.memory_fault_size
        private = bool(run.memory_fault_flags & MemoryExitFlag.PRIVATE)
        wanted = f"{'private' if private else 'shared'} memory at {gpa:#x}"
        if not self.policy.implicit_conversion:
            raise VmmError(
                f"vCPU {vcpu.vcpu_id} used {wanted} without asking, and implicit conversion is off"
            )
        if not self._convert(vcpu, gpa, size, private):
            raise VmmError(f"vCPU {vcpu.vcpu_id} used {wanted}, where there is no memory")

    def _convert(self, vcpu: Vcpu, gpa: int, size: int, private: bool) -> bool:
        if not self.memory.convert(gpa, size, private):
            return False
        if private and self.policy.prefault:
            vcpu.pre_fault(gpa, size)
        return True

    def _io(self, vcpu: Vcpu, run: KvmRun) -> None:
        size, offset = run.io_size, run.io_data_offset
        length = size * run.io_count
        if run.io_direction == _IO_IN:
            values = [self.ports.read(run.io_port, size) for _ in range(run.io_count)]
            vcpu.answer(offset, b"".join(value.to_bytes(size, "little") for value in values))
            return
        data = vcpu.data(offset, length)
        for at in range(0, length, size):
            self.ports.write(run.io_port, int.from_bytes(data[at : at + size], "little"), size)

    @staticmethod
    def _system_event(vcpu: Vcpu, run: KvmRun) -> Termination:
        if run.system_event_type != SystemEvent.SEV_TERM or not run.system_event_ndata:
            raise VmmError(f"vCPU {vcpu.vcpu_id}: system event {run.system_event_type}")
        msr = int.from_bytes(run.system_event_data[:8], "little")
        if msr & GHCB_MSR_INFO_MASK != GhcbMsr.TERM_REQ:
            raise VmmError(f"vCPU {vcpu.vcpu_id}: SEV_TERM with GHCB MSR {msr:#x}")
        return Termination(msr >> 12 & 0xF, msr >> 16 & 0xFF)


def _waits(run: KvmRun) -> bool:
    """The guest gives its time away."""
    return bool(
        run.exit_reason == KvmExit.IO
        and run.io_port == DELAY_PORT
        and run.io_direction != _IO_IN
    )
