"""INS and OUTS that KVM emulates, for guests whose registers it sees (arch/x86/kvm/emulate.c, x86.c; v6.12).

INS with a repeat prefix reads ahead: as many items as lie on the page, fit into 1024 bytes and are left in RCX leave
to user space at once.  OUTS leaves with one item at a time.  RIP stays until RCX is zero; RCX is read again when user
space has answered, which may have changed it.
"""

from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.svm import EventInj, Vector
from softcvm.kernel.arch.x86.kvm.gva import GuestPageFault, kvm_gva_to_gpa
from softcvm.kernel.arch.x86.kvm.svm.ghcb_page import kvm_read_guest, kvm_vcpu_write_guest
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.virt.kvm.coalesced_mmio import kvm_io_bus_write
from softcvm.sim.addr import PAGE_MASK, PAGE_SIZE, Gpa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("PlainStringIo", "emulate_string_io")

_READ_AHEAD = 1024
"""sizeof(struct read_cache.data)"""
_RFLAGS_DF = 1 << 10
_U64 = (1 << 64) - 1
_PF = int(EventInj.VALID | EventInj.TYPE_EXCEPTION | EventInj.ERROR_CODE_VALID | Vector.PF)


class PlainStringIo(NamedTuple):
    """next_rip: behind the instruction."""

    port: int
    size: int
    incoming: bool
    repeated: bool
    next_rip: int


def emulate_string_io(vcpu: "KvmVcpu", io: PlainStringIo) -> Steps[int]:
    """One instruction, or the next items of one with a repeat prefix: 1 enters the guest, 0 leaves to user space."""
    regs = vcpu.arch.regs
    if io.repeated and not regs.rcx:
        regs.rip = io.next_rip
        return 1
    if io.incoming:
        return _ins(vcpu, io)
    return (yield from _outs(vcpu, io))


def _ins(vcpu: "KvmVcpu", io: PlainStringIo) -> int:
    asked = _items(vcpu, io)
    _leave(vcpu, io, asked, bytes(asked * io.size))

    def complete_emulated_pio(vcpu: "KvmVcpu") -> Steps[int]:
        count = _items(vcpu, io)
        data = bytes(vcpu.pio_data[: asked * io.size]).ljust(count * io.size, b"\0")
        regs = vcpu.arch.regs
        step = -io.size if regs.rflags & _RFLAGS_DF else io.size
        for n in range(count) if step < 0 else (0,):
            length = io.size if step < 0 else count * io.size
            piece = data[n * io.size : n * io.size + length]
            if not (yield from _write(vcpu, regs.rdi + n * step & _U64, piece)):
                return 1
        regs.rdi = regs.rdi + count * step & _U64
        _advance(vcpu, io, count)
        return 1

    vcpu.arch.complete_userspace_io = complete_emulated_pio
    return 0


def _outs(vcpu: "KvmVcpu", io: PlainStringIo) -> Steps[int]:
    regs = vcpu.arch.regs
    data = yield from _read(vcpu, regs.rsi, io.size)
    if data is None:
        return 1
    handled = kvm_io_bus_write(vcpu.kvm, io.port, data, pio=True)
    if not handled:
        _leave(vcpu, io, 1, data)
    step = -io.size if regs.rflags & _RFLAGS_DF else io.size
    regs.rsi = regs.rsi + step & _U64
    _advance(vcpu, io, 1)
    return int(handled)


def _items(vcpu: "KvmVcpu", io: PlainStringIo) -> int:
    """pio_in_emulated(): how many items are read ahead."""
    if not io.repeated:
        return 1
    regs = vcpu.arch.regs
    offset = regs.rdi & PAGE_MASK
    room = offset if regs.rflags & _RFLAGS_DF else PAGE_SIZE - offset
    return min(room // io.size, _READ_AHEAD // io.size, regs.rcx) or 1


def _advance(vcpu: "KvmVcpu", io: PlainStringIo, count: int) -> None:
    regs = vcpu.arch.regs
    if io.repeated:
        regs.rcx = regs.rcx - count & _U64
        if regs.rcx:
            return
    regs.rip = io.next_rip


def _leave(vcpu: "KvmVcpu", io: PlainStringIo, count: int, data: bytes) -> None:
    run = vcpu.run
    vcpu.pio_data[: len(data)] = data
    vcpu.stat["io_exits"] += 1
    run.exit_reason = KvmExit.IO
    run.io_direction = 0 if io.incoming else 1
    run.io_size, run.io_port, run.io_count = io.size, io.port, count
    run.io_data_offset = PAGE_SIZE  # KVM_PIO_PAGE_OFFSET


def _write(vcpu: "KvmVcpu", address: int, data: bytes) -> Steps[bool]:
    """False: a page fault is on its way to the guest."""
    for at, length in _pieces(address, len(data)):
        gpa = yield from _gpa(vcpu, at, write=True)
        if gpa is None:
            return False
        start = at - address & _U64
        try:
            yield from kvm_vcpu_write_guest(vcpu, gpa, data[start : start + length])
        except KernelError:
            raise Unmodelled(f"INS to GPA {gpa:#x}, which has no memory") from None
    return True


def _read(vcpu: "KvmVcpu", address: int, length: int) -> Steps[bytes | None]:
    found = b""
    for at, size in _pieces(address, length):
        gpa = yield from _gpa(vcpu, at, write=False)
        if gpa is None:
            return None
        try:
            found += yield from kvm_read_guest(vcpu.kvm, gpa, size)
        except KernelError:
            raise Unmodelled(f"OUTS from GPA {gpa:#x}, which has no memory") from None
    return found


def _gpa(vcpu: "KvmVcpu", address: int, *, write: bool) -> Steps[Gpa | None]:
    user = vcpu.arch.sregs.segment("ss").dpl == 3
    found = yield from kvm_gva_to_gpa(vcpu, address, write=write, user=user)
    if not isinstance(found, GuestPageFault):
        return found
    vcpu.arch.sregs.cr2 = found.address
    vcpu.arch.svm.vmcb.event_inj = _PF | found.error_code << 32
    return None


def _pieces(address: int, length: int) -> list[tuple[int, int]]:
    """A range of linear addresses by pages."""
    pieces = []
    while length:
        size = min(length, PAGE_SIZE - (address & PAGE_MASK))
        pieces.append((address, size))
        address, length = address + size & _U64, length - size
    return pieces
