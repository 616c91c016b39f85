"""What KVM does for an instruction that a guest leaves to it: CPUID, HLT, port I/O, MMIO (arch/x86/kvm/{x86,svm/sev}.c, v7.2).

No device lives in this kernel: port I/O and MMIO always leave to user space.  Registers are the guest's, or
those that an SEV-ES guest put into the GHCB; results go back there when the vCPU is entered again.
"""

from errno import EINVAL
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.ghcb import GhcbError, GhcbExit, IoioInfo
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.kvm.vcpu import KvmCpuidEntry2, MpState
from softcvm.abi.svm import EventInj, Vector
from softcvm.kernel.arch.x86.kvm.regs import is_64_bit_mode, kvm_get_linear_rip
from softcvm.kernel.arch.x86.kvm.string_io import PlainStringIo, emulate_string_io
from softcvm.kernel.arch.x86.kvm.svm.msr import msr_interception
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_es_guest, sev_info
from softcvm.kernel.arch.x86.kvm.x86 import kvm_emulate_hypercall, kvm_vcpu_has_events
from softcvm.kernel.arch.x86.kvm.xcr import kvm_set_xcr
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.virt.kvm.coalesced_mmio import kvm_io_bus_write
from softcvm.sim.addr import PAGE_SIZE
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "StringIo",
    "kvm_emulate_ap_reset_hold",
    "kvm_emulate_cpuid",
    "kvm_emulate_halt",
    "kvm_emulate_xsetbv",
    "sev_es_mmio",
    "svm_invoke_exit_handler",
    "svm_skip_emulated_instruction",
)

_U32 = (1 << 32) - 1
_GP = int(EventInj.VALID | EventInj.TYPE_EXCEPTION | EventInj.ERROR_CODE_VALID | Vector.GP)
_CPUID_SIGNIFICANT_INDEX = 1
_KVM_EXIT_IO_IN, _KVM_EXIT_IO_OUT = 0, 1
_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
_KVM_MMIO_SIZE = 8
_INT_MAX = (1 << 31) - 1
_QUIRK_OUT_7E_INC_RIP = 1 << 3


class StringIo(NamedTuple):
    """INS or OUTS under way: `done` items are over, `pending` are with user space."""

    port: int
    size: int
    incoming: bool
    done: int
    pending: int


def svm_invoke_exit_handler(vcpu: "KvmVcpu", code: GhcbExit) -> Steps[int]:
    """The intercepts that a guest may name as its exit code."""
    yield from ()
    match code:
        case GhcbExit.CPUID:
            kvm_emulate_cpuid(vcpu)
            return svm_skip_emulated_instruction(vcpu)
        case GhcbExit.IOIO:
            return (yield from _io_interception(vcpu))
        case GhcbExit.MSR:
            return msr_interception(vcpu, svm_skip_emulated_instruction)
        case GhcbExit.VMMCALL:
            return _vmmcall_interception(vcpu)
        case GhcbExit.READ_DR7 | GhcbExit.WRITE_DR7:
            return 1  # DR7 of an SEV-ES guest is out of KVM's reach
        case GhcbExit.INVD | GhcbExit.WBINVD | GhcbExit.MONITOR | GhcbExit.MWAIT:
            return 1  # no-ops without non-coherent DMA and without MWAIT in the guest
        case GhcbExit.RDTSC:
            run = vcpu.run  # not in svm_exit_handlers: svm_handle_invalid_exit()
            run.exit_reason = KvmExit.INTERNAL_ERROR
            run.internal_suberror = _INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
            run.internal_ndata = 2
            data = int(code).to_bytes(8, "little") + bytes(8)
            run.internal_data = data + run.internal_data[16:]
            return 0
        case other:
            raise Unmodelled(f"VMGEXIT {other.name}")


def _vmmcall_interception(vcpu: "KvmVcpu") -> int:
    """kvm_emulate_hypercall(); a guest whose state is protected counts as being in 64-bit mode."""
    arch = vcpu.arch
    regs, protected = arch.regs, arch.guest_state_protected
    ret = kvm_emulate_hypercall(
        vcpu,
        regs.rax,
        (regs.rbx, regs.rcx, regs.rdx, regs.rsi),
        long_mode=protected or is_64_bit_mode(vcpu),
        cpl=arch.svm.cpl if sev_es_guest(vcpu.kvm) else arch.sregs.segment("ss").dpl,
    )
    if ret is None:
        return 0
    regs.rax = ret
    return svm_skip_emulated_instruction(vcpu)


def svm_skip_emulated_instruction(vcpu: "KvmVcpu") -> int:
    """RIP goes behind the instruction that was intercepted; an SEV-ES guest moves its own.  Returns 1."""
    if not sev_es_guest(vcpu.kvm):
        vcpu.arch.regs.rip = vcpu.arch.svm.vmcb.next_rip
    return 1


# CPUID


def kvm_emulate_cpuid(vcpu: "KvmVcpu") -> None:
    """Answer from the table that user space gave; a leaf that is not there reads as zero.

    On AMD there is no redirection of leaves out of range.
    """
    regs = vcpu.arch.regs
    function, index = regs.rax & 0xFFFF_FFFF, regs.rcx & 0xFFFF_FFFF
    entry = _find(vcpu, function, index)
    if entry is not None:
        regs.rax, regs.rbx, regs.rcx, regs.rdx = entry.eax, entry.ebx, entry.ecx, entry.edx
        return
    regs.rax = regs.rbx = regs.rcx = regs.rdx = 0
    if function in (0xB, 0x1F) and (entry := _find(vcpu, function, 1)):
        regs.rcx, regs.rdx = index & 0xFF, entry.edx


def _find(vcpu: "KvmVcpu", function: int, index: int) -> KvmCpuidEntry2 | None:
    """cpuid_entry2_find(): the first entry that fits; its index counts only where it says so."""
    for entry in vcpu.arch.cpuid_entries:
        if entry.function == function and (
            not entry.flags & _CPUID_SIGNIFICANT_INDEX or entry.index == index
        ):
            return entry
    return None


# XSETBV


def kvm_emulate_xsetbv(vcpu: "KvmVcpu") -> int:
    """#GP outside of level 0 and for a value that the guest may not set."""
    regs, svm = vcpu.arch.regs, vcpu.arch.svm
    value = (regs.rdx & _U32) << 32 | regs.rax & _U32
    if vcpu.arch.sregs.segment("ss").dpl or not kvm_set_xcr(vcpu, regs.rcx & _U32, value):
        svm.vmcb.event_inj = _GP
        return 1
    return svm_skip_emulated_instruction(vcpu)


# HLT


def kvm_emulate_halt(vcpu: "KvmVcpu") -> int:
    svm_skip_emulated_instruction(vcpu)
    vcpu.stat["halt_exits"] += 1
    return _halt(vcpu, MpState.HALTED, KvmExit.HLT)


def kvm_emulate_ap_reset_hold(vcpu: "KvmVcpu") -> int:
    return _halt(vcpu, MpState.AP_RESET_HOLD, KvmExit.AP_RESET_HOLD)


def _halt(vcpu: "KvmVcpu", state: MpState, reason: KvmExit) -> int:
    """__kvm_emulate_halt(): wait in the kernel if the local APIC is there, else let user space wait."""
    if vcpu.kvm.arch.irqchip:
        if not kvm_vcpu_has_events(vcpu):
            vcpu.arch.mp_state = state
        return 1
    vcpu.run.exit_reason = reason
    return 0


# Port I/O


def _io_interception(vcpu: "KvmVcpu") -> Steps[int]:
    """IN and OUT of 1, 2 or 4 bytes: KVM_EXIT_IO; a request without a size is nothing to do."""
    info = vcpu.arch.svm.vmcb.exit_info_1 & 0xFFFF_FFFF
    size = (info & IoioInfo.SIZE_MASK) >> IoioInfo.SIZE_SHIFT
    if not size:
        return 1
    if info & IoioInfo.STRING:
        incoming = bool(info & IoioInfo.IN)
        if not sev_es_guest(vcpu.kvm):
            repeated, next_rip = bool(info & IoioInfo.REP), vcpu.arch.svm.vmcb.next_rip
            port = info >> IoioInfo.PORT_SHIFT
            io = PlainStringIo(port, size, incoming, repeated, next_rip)
            return (yield from emulate_string_io(vcpu, io))
        return (
            yield from _string_io(vcpu, info >> IoioInfo.PORT_SHIFT, size, incoming=incoming)
        )
    run = vcpu.run
    incoming = bool(info & IoioInfo.IN)
    data = bytes(size) if incoming else vcpu.arch.regs.rax.to_bytes(8, "little")[:size]
    port = info >> IoioInfo.PORT_SHIFT
    if not incoming and kvm_io_bus_write(vcpu.kvm, port, data, pio=True):
        return svm_skip_emulated_instruction(vcpu)
    vcpu.pio_data[:size] = data
    vcpu.stat["io_exits"] += 1
    run.exit_reason = KvmExit.IO
    run.io_direction = _KVM_EXIT_IO_IN if incoming else _KVM_EXIT_IO_OUT
    run.io_size = size
    run.io_port = port
    run.io_count = 1
    run.io_data_offset = PAGE_SIZE  # KVM_PIO_PAGE_OFFSET
    vcpu.arch.pio_linear_rip = kvm_get_linear_rip(vcpu)
    quirk = not vcpu.kvm.arch.disabled_quirks & _QUIRK_OUT_7E_INC_RIP
    if incoming:
        vcpu.arch.complete_userspace_io = _complete_pio_in
    elif run.io_port == 0x7E and quirk:
        svm_skip_emulated_instruction(vcpu)
        vcpu.arch.complete_userspace_io = _complete_pio_out_7e
    else:
        vcpu.arch.complete_userspace_io = _complete_pio_out
    return 0


def _complete_pio_out_7e(vcpu: "KvmVcpu") -> Steps[int]:
    """complete_fast_pio_out_port_0x7e(): RIP has been moved before user space saw the exit."""
    yield from ()
    return 1


def _complete_pio_out(vcpu: "KvmVcpu") -> Steps[int]:
    """complete_fast_pio_out(): where user space moved RIP, there is nothing to skip."""
    yield from ()
    if vcpu.arch.pio_linear_rip != kvm_get_linear_rip(vcpu):
        return 1
    return svm_skip_emulated_instruction(vcpu)


def _complete_pio_in(vcpu: "KvmVcpu") -> Steps[int]:
    """complete_fast_pio_in(): up to two bytes are merged into RAX, four replace it."""
    yield from ()
    if vcpu.arch.pio_linear_rip != kvm_get_linear_rip(vcpu):
        return 1
    regs, size = vcpu.arch.regs, vcpu.run.io_size
    kept = regs.rax.to_bytes(8, "little")[size:] if size < 4 else bytes(8 - size)
    regs.rax = int.from_bytes(bytes(vcpu.pio_data[:size]) + kept, "little")
    return svm_skip_emulated_instruction(vcpu)


def _string_io(vcpu: "KvmVcpu", port: int, size: int, *, incoming: bool) -> Steps[int]:
    """sev_es_string_io(): INS and OUTS of SW_EXITINFO2 items through the scratch area.

    EINVAL: more items than an int can count, or than there is an area for.
    """
    from softcvm.kernel.arch.x86.kvm.svm.ghcb import setup_vmgexit_scratch

    sev_es = vcpu.arch.svm.sev_es
    count = vcpu.arch.svm.vmcb.exit_info_2
    if count > _INT_MAX or count * size > _INT_MAX:
        raise KernelError(EINVAL, f"string I/O of {count} items")
    if not (yield from setup_vmgexit_scratch(vcpu, count * size, sync=incoming)):
        return 1
    sev_es.string_io = StringIo(port, size, incoming, 0, 0)
    return _next_piece(vcpu, sev_es.string_io)


def _next_piece(vcpu: "KvmVcpu", io: StringIo) -> int:
    """kvm_sev_es_outs(), kvm_sev_es_ins(): as many items as the I/O page holds; 1 when none is left."""
    sev_es, run = vcpu.arch.svm.sev_es, vcpu.run
    count = min(vcpu.arch.svm.vmcb.exit_info_2 - io.done, PAGE_SIZE // io.size)
    if not count:
        sev_es.string_io = None
        return 1
    sev_es.string_io = io._replace(pending=count)
    length = count * io.size
    data = bytes(length) if io.incoming else sev_es.read_scratch(io.done * io.size, length)
    if not io.incoming and kvm_io_bus_write(vcpu.kvm, io.port, data[: io.size], pio=True):
        for at in range(io.size, length, io.size):  # what finds no room then is lost
            kvm_io_bus_write(vcpu.kvm, io.port, data[at : at + io.size], pio=True)
        return _next_piece(vcpu, io._replace(done=io.done + count))
    vcpu.pio_data[:length] = data
    vcpu.stat["io_exits"] += 1
    run.exit_reason = KvmExit.IO
    run.io_direction = _KVM_EXIT_IO_IN if io.incoming else _KVM_EXIT_IO_OUT
    run.io_size = io.size
    run.io_port = io.port
    run.io_count = count
    run.io_data_offset = PAGE_SIZE
    vcpu.arch.complete_userspace_io = _complete_string_io
    return 0


def _complete_string_io(vcpu: "KvmVcpu") -> Steps[int]:
    """complete_sev_es_emulated_ins() and _outs()"""
    yield from ()
    sev_es = vcpu.arch.svm.sev_es
    io = sev_es.string_io
    assert io is not None
    if io.incoming:
        sev_es.write_scratch(io.done * io.size, bytes(vcpu.pio_data[: io.pending * io.size]))
    return _next_piece(vcpu, io._replace(done=io.done + io.pending))


# MMIO


def sev_es_mmio(vcpu: "KvmVcpu", *, write: bool) -> Steps[int]:
    """MMIO of up to 8 bytes through the scratch area: KVM_EXIT_MMIO.

    Protocol version 1 allows more, in pieces of 8.
    """
    from softcvm.kernel.arch.x86.kvm.svm.ghcb import ghcb_reply_error, setup_vmgexit_scratch

    sev_es = vcpu.arch.svm.sev_es
    length = vcpu.arch.svm.vmcb.exit_info_2
    if not length:
        return 1
    if sev_info(vcpu.kvm).ghcb_version >= 2 and length > _KVM_MMIO_SIZE:
        return ghcb_reply_error(vcpu, GhcbError.INVALID_INPUT)
    if not (yield from setup_vmgexit_scratch(vcpu, length, sync=not write)):
        return 1
    if length > _KVM_MMIO_SIZE:
        raise Unmodelled(f"VMGEXIT MMIO of {length} bytes (GHCB version 1)")
    run = vcpu.run
    address = vcpu.arch.svm.vmcb.exit_info_1
    if write and kvm_io_bus_write(vcpu.kvm, address, sev_es.read_scratch(0, length), pio=False):
        return 1
    vcpu.stat["mmio_exits"] += 1
    run.exit_reason = KvmExit.MMIO
    run.mmio_phys_addr = address
    run.mmio_len = length
    run.mmio_is_write = int(write)
    if write:
        run.mmio_data = sev_es.read_scratch(0, length) + run.mmio_data[length:]
    vcpu.arch.complete_userspace_io = _complete_mmio_write if write else _complete_mmio_read
    return 0


def _complete_mmio_write(vcpu: "KvmVcpu") -> Steps[int]:
    yield from ()
    return 1


def _complete_mmio_read(vcpu: "KvmVcpu") -> Steps[int]:
    yield from ()
    vcpu.arch.svm.sev_es.write_scratch(0, vcpu.run.mmio_data[: vcpu.arch.svm.vmcb.exit_info_2])
    return 1
