"""A core that executes machine code: a vCPU's registers in an engine, its memory through both page tables.

Owns one entry into the guest from VMRUN to #VMEXIT: what each stop of the engine means, and the loop between
them.  The engine is engine.py, registers tcg_registers.py, the guest's page table paging.py, the delivery of
exceptions idt.py; what leaves the guest, and how, is intercepts.py's for every kind of core.

Of page tables only those of long mode are walked.
"""

from typing import Any

from softcvm.abi.control_registers import CR4_OSXSAVE, CR4_TSD, EFER_LMA
from softcvm.abi.insn import (
    GuestOp,
    Hlt,
    Load,
    Pvalidate,
    PvalidateOut,
    Rdmsr,
    Rmpadjust,
    Store,
    Vmgexit,
)
from softcvm.abi.svm import EventInj, ExitCode, GuestException, PfErr, Vector
from softcvm.abi.vmsa import Vmsa
from softcvm.hw.access import NptFault
from softcvm.hw.cpu.core import GuestCpu, record_exit
from softcvm.hw.cpu.decode import (
    accessed,
    decode,
    leaves,
    linear_rip,
    mode_of,
    state_instruction,
)
from softcvm.hw.cpu.engine import (
    FETCH,
    PERM_EXEC,
    PERM_READ,
    PERM_WRITE,
    WRITE,
    Engine,
    Halt,
    Stop,
    host_tsc,
)
from softcvm.hw.cpu.idt import Event, deliver
from softcvm.hw.cpu.idt_legacy import deliver_outside_long_mode
from softcvm.hw.cpu.intercepts import intercepted
from softcvm.hw.cpu.paging import Access, walk_guest
from softcvm.hw.cpu.tcg_registers import Registers
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.hw.cpu.vmrun import VmExitRaised
from softcvm.hw.cpu.xsave import xrstor, xsave
from softcvm.hw.dram_mapped import MappedDram
from softcvm.hw.insn.pvalidate import pvalidate
from softcvm.hw.insn.rmpadjust import rmpadjust
from softcvm.hw.soc import Soc
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT
from softcvm.sim.errors import Unmodelled
from softcvm.sim.state import State
from softcvm.sim.steps import Point, Steps

__all__ = ("TcgCore",)

_SLICE = Point("guest code")
_U32 = (1 << 32) - 1
_CF = 1
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
_LONGEST = 15
_RDTSC, _RDTSCP = b"\x0f\x31", b"\x0f\x01\xf9"
_XSAVE_SIZE = 576 + 256


class TcgCore(State):
    """Runs one vCPU on unicorn.  Its state outside of an entry is the save area's."""

    saved = ()
    derived = {
        "soc": "the machine it belongs to",
        "_engine": "holds nothing that the save area does not, between entries",
        "_registers": "as the engine",
        "_cpu": "during an entry",
        "_event": "None between entries, but for an event under delivery",
        "_asked": "during an entry",
        "_over": "during an entry",
        "_fetching": "during an entry",
        "_translations": "what the engine's translations were made from",
    }

    def __init__(self, soc: Soc) -> None:
        self.soc = soc
        self._engine: Engine | None = None
        self._registers: Registers | None = None
        self._cpu: GuestCpu | None = None
        self._event: Event | None = None
        """Being delivered when the guest left; it is delivered again (EXITINTINFO)."""
        self._translations: tuple[object, ...] = ()
        self._asked: int | None = None
        """The page that the engine asked for last."""
        self._over = False
        """The instruction at RIP is the engine's to execute, though it has a hook."""
        self._fetching = False
        """It asked for code; an error code tells that only where pages may be not executable."""

    def interrupt(self) -> None:
        """A physical interrupt; any thread may raise it."""
        if self._engine is not None:
            self._engine.interrupt()

    def vmrun(self, vmcb: Vmcb) -> Steps[None]:
        """Run the guest's code until something leaves the guest."""
        try:
            cpu = self._cpu = GuestCpu(self.soc, vmcb)
        except VmExitRaised as refused:
            record_exit(self.soc, vmcb, refused.code, refused.info_1, refused.info_2)
            return
        state = cpu.vmsa
        try:
            self._enter(cpu, vmcb, state)
            while True:
                yield _SLICE
                if vmcb.intr:
                    raise VmExitRaised(ExitCode.INTR)
                self._go_on(cpu, vmcb, state)
        except NptFault as fault:
            vmcb.insn_bytes = self._decode_assist(state, fault)
            gpa = fault.gpa | self._offset(state, vmcb.insn_bytes)
            self._leave(cpu, vmcb, state)
            cpu.leave(vmcb, ExitCode.NPF, fault.error_code, gpa)
        except VmExitRaised as left:
            if left.code == ExitCode.SHUTDOWN:
                self._event = None  # nothing is left to deliver
            self._leave(cpu, vmcb, state)
            cpu.leave(vmcb, left.code, left.info_1, left.info_2)

    def _enter(self, cpu: GuestCpu, vmcb: Vmcb, state: Vmsa) -> None:
        dram = self.soc.dram
        if not isinstance(dram, MappedDram):
            raise Unmodelled("machine code on a machine whose DRAM has no backing")
        if self._engine is None:
            self._engine = Engine(dram.memory, self._translate)
            self._registers = Registers(self._engine)
        assert self._registers is not None
        self._registers.load(state)
        if vmcb.tsc_offset:
            self._engine.stop_at(frozenset({"rdtsc", "rdtscp"}))
        self._flush_stale(cpu)
        dram.sync_in()
        if vmcb.event_inj & EventInj.VALID:
            event, vmcb.event_inj = vmcb.event_inj, 0
            code = event >> 32 if event & EventInj.ERROR_CODE_VALID else None
            self._event = Event(event & 0xFF, code, state.cr2)

    def _flush_stale(self, cpu: GuestCpu) -> None:
        """What was translated holds until the nested page table changes, or another guest is meant."""
        made_from = (cpu.npt, cpu.npt.changes, cpu.asid)
        if made_from != self._translations and self._engine is not None:
            self._engine.flush()
            self._translations = made_from

    def _leave(self, cpu: GuestCpu, vmcb: Vmcb, state: Vmsa) -> None:
        """The registers go where the guest's are: the save area, or encrypted into the VMSA page."""
        if self._registers is not None and self._translations:
            self._registers.store(state)
        if isinstance(self.soc.dram, MappedDram):
            self.soc.dram.sync_out()
        if cpu.vmsa_pa is not None:
            self.soc.dram.write(cpu.vmsa_pa, bytes(state.data), cpu.key(True))
        self._cpu = None

    def _decode_assist(self, state: Vmsa, fault: NptFault) -> bytes:
        """[APM2-24593 §15.8.4]: bytes of the instruction, unless fetching it was what faulted."""
        if fault.error_code & PfErr.FETCH or not fault.error_code & PfErr.GUEST_FINAL:
            return b""
        if self._registers is None:
            return b""
        self._registers.store_general(state)
        try:
            return self._fetch_code(state)
        except (GuestException, NptFault):
            return b""

    def _offset(self, state: Vmsa, code: bytes) -> int:
        """Offset in the page of the access that faulted: the engine asks for whole pages."""
        if not code or self._asked is None:
            return 0
        return accessed(code, state, self._asked) & PAGE_MASK

    # One stop after the other

    def _go_on(self, cpu: GuestCpu, vmcb: Vmcb, state: Vmsa) -> None:
        assert self._engine is not None
        if self._event is not None:
            self._deliver(cpu, state, self._event)
            return
        self._flush_stale(cpu)
        rip = self._engine.uc.reg_read(self._engine.x.UC_X86_REG_RIP)
        over, self._over = self._over, False
        assert self._registers is not None
        self._registers.will_run()
        stop = self._engine.run(rip, linear_rip(state) if over else None)
        match stop.why:
            case Halt.FAULT:
                self._fault(stop)
            case Halt.EXCEPTION:
                code = 0 if stop.vector in _WITH_ERROR_CODE else None
                self._event = Event(
                    stop.vector, code, length=self._software(state, stop.vector)
                )
            case Halt.INVALID:
                self._instruction(cpu, vmcb, state)
            case Halt.INTERCEPT:
                self._instruction(cpu, vmcb, state, hooked=True)
            case Halt.INTERRUPTED:
                pass  # whoever interrupted has set vmcb.intr, or wants the model for a while

    def _software(self, state: Vmsa, vector: int) -> int:
        """Length of the INT n that RIP has just passed; 0 for an exception, whose RIP is where it was.

        Vectors below 32 are taken for exceptions, but for those that no instruction raises in 64-bit mode.
        """
        if vector < 32 and vector not in (Vector.BP, Vector.OF):
            return 0
        assert self._registers is not None
        assert self._engine is not None
        self._registers.store_general(state)
        last = self._engine.fetched(linear_rip(state) - 1, 1)
        return 1 if vector == Vector.BP and last == b"\xcc" else 2

    def _fault(self, stop: Stop) -> None:
        """Raised while an address was translated."""
        cause = stop.cause
        if isinstance(cause, GuestException):
            cr2 = cause.cr2
            if cause.vector == Vector.PF and not self._fetching:
                assert self._registers is not None
                assert self._cpu is not None
                self._registers.store_general(self._cpu.vmsa)
                try:
                    code = self._fetch_code(self._cpu.vmsa)
                except GuestException as gone:  # another changed the tables meanwhile
                    self._event = Event(int(gone.vector), gone.error_code, gone.cr2)
                    return
                cr2 |= self._offset(self._cpu.vmsa, code)
            self._event = Event(int(cause.vector), cause.error_code, cr2)
            return
        assert cause is not None
        raise cause

    def _deliver(self, cpu: GuestCpu, state: Vmsa, event: Event) -> None:
        """Through the guest's IDT; a nested fault on the way leaves the event pending."""
        assert self._registers is not None
        self._registers.store(state)
        try:
            if state.efer & EFER_LMA:
                deliver(self, state, event)
            else:
                deliver_outside_long_mode(self, state, event)
        except GuestException as second:
            state.rip = state.rip - event.length & (1 << 64) - 1
            self._registers.load(state)
            self._event = event.then(Event(int(second.vector), second.error_code, second.cr2))
            return
        self._event = None
        self._registers.load(state)

    def _instruction(
        self, cpu: GuestCpu, vmcb: Vmcb, state: Vmsa, *, hooked: bool = False
    ) -> None:
        """One that the engine left to us, at RIP; or, at an old hook, one that it can execute."""
        assert self._registers is not None
        self._registers.store(state)
        self._asked = None  # what faults now is not the engine's access
        try:
            code = self._fetch_code(state)
            assert self._engine is not None
            if hooked and not leaves(code, mode_of(state), self._engine.also_stops):
                self._over = True
                return
            length = self._read_tsc(vmcb, state, code) or self._own_instruction(state, code)
            if not length:
                op, length = decode(code, state)
                if op is None:
                    raise GuestException(Vector.UD)
                _write_back(state, op, self._execute(cpu, vmcb, op, length))
        except GuestException as exception:
            error = exception.error_code if exception.vector in _WITH_ERROR_CODE else None
            self._event = Event(int(exception.vector), error, exception.cr2)
            return
        state.rip += length
        self._registers.load(state)

    def _read_tsc(self, vmcb: Vmcb, state: Vmsa, code: bytes) -> int:
        """RDTSC with the guest's offset; its length, 0 for another instruction.  The engine's own has none."""
        if code.startswith(_RDTSCP):
            raise Unmodelled("RDTSCP of a guest with a TSC offset")
        if not code.startswith(_RDTSC):
            return 0
        if state.cpl and state.cr4 & CR4_TSD:
            raise GuestException(Vector.GP)
        assert self._engine is not None
        tsc = host_tsc() + vmcb.tsc_offset
        state.rax, state.rdx = tsc & _U32, tsc >> 32 & _U32
        return len(_RDTSC)

    def _own_instruction(self, state: Vmsa, code: bytes) -> int:
        """One that the processor executes itself and the engine cannot; its length, 0 for another."""
        found = state_instruction(code, state)
        if found is None:
            return 0
        name, address, length = found
        if not state.cr4 & CR4_OSXSAVE:
            raise GuestException(Vector.UD)
        mask = state.xcr0 & ((state.rdx & _U32) << 32 | state.rax & _U32)
        access = Access(user=state.cpl == 3)
        match name:
            case "xgetbv":
                if state.rcx & _U32:
                    raise GuestException(Vector.GP)
                state.rax, state.rdx = state.xcr0 & _U32, state.xcr0 >> 32
            case _ if address & 63:
                raise GuestException(Vector.GP)
            case "xsave":
                before = self.read_linear(address, _XSAVE_SIZE, access)
                area = xsave(state, mask, before)
                self.write_linear(address, area, access._replace(write=True))
            case _:
                xrstor(state, mask, self.read_linear(address, _XSAVE_SIZE, access))
        return length

    def _execute(self, cpu: GuestCpu, vmcb: Vmcb, op: GuestOp, length: int) -> Any:
        match op:
            case Pvalidate() | Rmpadjust() if not cpu.snp:
                raise GuestException(Vector.UD)
            case Pvalidate():
                op = op._replace(gpa=self._gpa_of(cpu, op.gpa))
                return pvalidate(self.soc, cpu.npt, cpu.asid, cpu.vmpl, op)
            case Rmpadjust():
                op = op._replace(gpa=self._gpa_of(cpu, op.gpa))
                return rmpadjust(self.soc, cpu.npt, cpu.asid, cpu.vmpl, op)
            case Vmgexit() | Hlt() if cpu.sev_es:  # automatic exits: RIP is behind them
                cpu.vmsa.rip += length
                assert self._registers is not None
                self._registers.load(cpu.vmsa)
                if isinstance(op, Vmgexit):
                    raise VmExitRaised(ExitCode.VMGEXIT)
                raise VmExitRaised(ExitCode.HLT if vmcb.hlt_exits else ExitCode.INTR)
            case Hlt() if not vmcb.hlt_exits:
                cpu.vmsa.rip += length
                assert self._registers is not None
                self._registers.load(cpu.vmsa)
        return intercepted(cpu, vmcb, op, length)

    # Memory, as the processor itself reaches it

    def _translate(self, address: int, kind: int) -> tuple[int, int]:
        """For the engine: the page behind a linear address, and what may be done there without asking again."""
        cpu = self._cpu
        assert cpu is not None
        assert self._registers is not None
        state = cpu.vmsa
        self._refresh(state)
        self._asked = address
        self._fetching = kind == FETCH
        access = Access(write=kind == WRITE, fetch=kind == FETCH, user=self._registers.cpl == 3)
        found = walk_guest(_Table(cpu), state, address, access, self._c_bit(cpu))
        where = cpu.reach_page(found.gpa, c=found.c, write=access.write, fetch=access.fetch)
        dram = self.soc.dram
        assert isinstance(dram, MappedDram)
        key = cpu.key(found.c or (access.fetch and cpu.sev))  # SEV fetches are encrypted always
        if key is not None and dram.pinned(where):
            where = dram.shadow(where, key)
        else:
            dram.turn(where, key)
        perms = PERM_READ
        if found.writable and access.write:
            perms |= PERM_WRITE
        if found.executable:
            perms |= PERM_EXEC
        return where << PAGE_SHIFT, perms

    def read_linear(self, address: int, length: int, access: Access) -> bytes:
        """What the processor reads for itself.  GuestException, NptFault."""
        return b"".join(
            self._reach(piece, size, access) for piece, size in _pieces(address, length)
        )

    def write_linear(self, address: int, data: bytes, access: Access) -> None:
        done = 0
        for piece, size in _pieces(address, len(data)):
            self._reach(piece, size, access, data[done : done + size])
            done += size

    def _reach(
        self, address: int, length: int, access: Access, data: bytes | None = None
    ) -> bytes:
        cpu = self._cpu
        assert cpu is not None
        found = walk_guest(_Table(cpu), cpu.vmsa, address, access, self._c_bit(cpu))
        if data is None:
            return cpu.load(Load(found.gpa, length, found.c), bytearray())
        cpu.store(Store(found.gpa, data, found.c), 0)
        return b""

    def _gpa_of(self, cpu: GuestCpu, address: int) -> int:
        """What PVALIDATE and RMPADJUST take in rAX is linear.  #PF as of a load."""
        if cpu.vmsa.cpl:
            raise GuestException(Vector.GP)
        return walk_guest(_Table(cpu), cpu.vmsa, address, Access(), self._c_bit(cpu)).gpa

    def _c_bit(self, cpu: GuestCpu) -> int | None:
        return 1 << self.soc.profile.c_bit if cpu.sev else None

    def _refresh(self, state: Vmsa) -> None:
        """Control registers and flags that the walk looks at, as the guest has changed them."""
        engine = self._engine
        assert engine is not None
        uc, x = engine.uc, engine.x
        state.cr0, state.cr3, state.cr4, state.rflags = uc.reg_read_batch(
            [x.UC_X86_REG_CR0, x.UC_X86_REG_CR3, x.UC_X86_REG_CR4, x.UC_X86_REG_EFLAGS]
        )

    def _fetch_code(self, state: Vmsa) -> bytes:
        """Bytes at RIP, as many as can be fetched of an instruction."""
        assert self._registers is not None
        access = Access(fetch=True, user=self._registers.cpl == 3)
        start = linear_rip(state)
        room = 4096 - (start & PAGE_MASK)
        code = self.read_linear(start, min(_LONGEST, room), access)
        if room < _LONGEST and decode(code, state)[1] == 0:
            code += self.read_linear(start + room, _LONGEST - room, access)
        return code


class _Table:
    """The guest's page table in its physical memory (paging.PageTable)."""

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu

    def read_entry(self, gpa: int, c: bool) -> int:
        c = c or self._cpu.sev  # a walk's accesses are encrypted always
        return int.from_bytes(
            self._cpu.load(Load(gpa, 8, c), bytearray(), table=True), "little"
        )

    def write_entry(self, gpa: int, c: bool, value: int) -> None:
        c = c or self._cpu.sev
        self._cpu.store(Store(gpa, value.to_bytes(8, "little"), c), 0, table=True)


def _pieces(address: int, length: int) -> list[tuple[int, int]]:
    """A range of linear addresses by pages."""
    pieces = []
    while length:
        size = min(length, 4096 - (address & PAGE_MASK))
        pieces.append((address & (1 << 64) - 1, size))
        address += size
        length -= size
    return pieces


def _write_back(state: Vmsa, op: GuestOp, result: Any) -> None:
    """What an instruction that the processor executed itself leaves in registers."""
    match op:
        case Rdmsr():
            state.rax, state.rdx = result & _U32, result >> 32
        case Pvalidate():
            assert isinstance(result, PvalidateOut)
            state.rax = int(result.code)
            state.rflags = state.rflags & ~_CF | (_CF if result.cf else 0)
        case Rmpadjust():
            state.rax = int(result)
        case _:
            pass
