"""Guests that execute machine code: their speed beside plain unicorn, and a page flip as their memory grows.

The guest has everything behind it that one under `softcvm exec` has: KVM_RUN, both page tables, the RMP's
checks.  Plain unicorn has one mapping and no hook.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from bench.sides import Bench, Side
from softcvm.abi.kvm.memory import KvmUserspaceMemoryRegion2, MemFlag, VmType
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE, KvmExit
from softcvm.abi.kvm.vcpu import KvmRegs, KvmSegment, KvmSregs
from softcvm.attach.dram_memory import DramMemory
from softcvm.machine import Machine
from softcvm.sim.addr import PAGE_SIZE
from softcvm.vmm.kvm import Kvm

__all__ = ("BENCHES",)

_HOST = 1 << 30
_CODE, _TABLES, _LOW = 0x1000, 0x2000, 0x100000
_DATA, _DATA_SIZE = 0x1000_0000, 64 << 20
_ANON, _RW = 0x22, 3
_BUFFER, _PASSES = 256 << 10, 64
_FLIPS = 50


# r8 and r10: buffers; r9: their length; rdx: how often.
_MEMSET = bytes.fromhex(
    "4c89c7 4489c9"  # 1: mov rdi, r8; mov ecx, r9d
    "8807 48ffc7 ffc9 75f7"  # 2: mov [rdi], al; inc rdi; dec ecx; jnz 2b
    "ffca 75ed f4"  # dec edx; jnz 1b; hlt
)
_MEMCMP = bytes.fromhex(
    "4c89c7 4c89d6 4489c9"  # 1: mov rdi, r8; mov rsi, r10; mov ecx, r9d
    "8a06 3a07 750a 48ffc6 48ffc7 ffc9 75f0"  # 2: mov al, [rsi]; cmp al, [rdi]; jne 3f; ...; jnz 2b
    "ffca 75e3 f4"  # 3: dec edx; jnz 1b; hlt
)
_TOUCH = bytes.fromhex(
    "8807 4881c700100000 ffc9 75f3 f4"  # 1: mov [rdi], al; add rdi, 4096; dec ecx; jnz 1b; hlt
)


class _Guest:
    """A VM with private memory whose vCPU runs `text` in 64-bit mode, on tables that map 1 GiB as it is."""

    def __init__(self, text: bytes) -> None:
        machine = Machine(memory=_HOST, backing=DramMemory(_HOST))
        machine.vm_machine_code()
        sys = machine.process()
        self.vm = Kvm(sys).create_vm(VmType.SW_PROTECTED)
        low = sys.mmap(_LOW, _RW, _ANON)
        self.vm.set_user_memory_region2(
            KvmUserspaceMemoryRegion2(slot=0, memory_size=_LOW, userspace_addr=low)
        )
        self.vm.set_user_memory_region2(
            KvmUserspaceMemoryRegion2(
                slot=1,
                flags=MemFlag.GUEST_MEMFD,
                guest_phys_addr=_DATA,
                memory_size=_DATA_SIZE,
                userspace_addr=sys.mmap(_DATA_SIZE, _RW, _ANON),
                guest_memfd=self.vm.create_guest_memfd(_DATA_SIZE),
            )
        )
        self.vm.set_private(_DATA, _DATA_SIZE, True)
        sys.store(low + _CODE, text)
        for n, table in enumerate(_page_tables()):
            sys.store(low + _TABLES + n * PAGE_SIZE, table)
        self.vcpu = self.vm.create_vcpu(0, KVM_RUN_MMAP_SIZE)
        self.vcpu.set("KVM_SET_SREGS", _long_mode())

    def run(self, **registers: int) -> None:
        """Up to the HLT at its end."""
        values: dict[str, Any] = registers | {"rip": _CODE, "rflags": 2}
        self.vcpu.set("KVM_SET_REGS", KvmRegs(**values))
        if self.vcpu.run() or self.vcpu.exit().exit_reason != KvmExit.HLT:
            raise RuntimeError(f"the guest ended with {self.vcpu.exit()}")


def _page_tables() -> tuple[bytes, bytes, bytes]:
    def entries(*values: int) -> bytes:
        return b"".join(value.to_bytes(8, "little") for value in values)

    large = entries(*(n << 21 | 0x83 for n in range(512)))
    return entries(_TABLES + PAGE_SIZE | 3), entries(_TABLES + 2 * PAGE_SIZE | 3), large


def _long_mode() -> KvmSregs:
    flat: dict[str, Any] = {"limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1}
    code = bytes(KvmSegment(selector=8, type=11, l=1, **flat).data)
    data = bytes(KvmSegment(selector=16, type=3, db=1, **flat).data)
    task = bytes(KvmSegment(limit=0x67, type=11, present=1).data)
    none = bytes(KvmSegment(unusable=1).data)
    segments = {"cs": code, "tr": task, "ldt": none} | dict.fromkeys(
        ("ds", "es", "fs", "gs", "ss"), data
    )
    return KvmSregs(
        **segments, cr0=0x8005_0033, cr3=_TABLES, cr4=0x220, efer=0xD00, apic_base=0xFEE0_0900
    )


def _loop(text: bytes) -> tuple[Side, Side]:
    """Seconds of the same loop over the same buffers."""
    registers = {"r8": _DATA, "r9": _BUFFER, "r10": _DATA + _BUFFER, "rdx": _PASSES}
    guest = _Guest(text)
    return _seconds(lambda: guest.run(**registers)), _seconds(_plain(text, registers))


def _plain(text: bytes, registers: dict[str, int]) -> Callable[[], None]:
    import unicorn
    from unicorn import x86_const

    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(_CODE, PAGE_SIZE)
    uc.mem_map(_DATA, 2 * _BUFFER)
    uc.mem_write(_CODE, text)

    def run() -> None:
        for name, value in registers.items():
            uc.reg_write(getattr(x86_const, f"UC_X86_REG_{name.upper()}"), value)
        uc.emu_start(_CODE, _CODE + len(text) - 1)

    return run


def _seconds(call: Callable[[], None]) -> Side:
    def side() -> float:
        begun = perf_counter()
        call()
        return perf_counter() - begun

    return side


def _flip() -> tuple[Side, Side]:
    return _flips(16_000), _flips(1_000)


def _flips(pages: int) -> Side:
    """Seconds for a page to become shared or private again, used by the guest that had it mapped."""
    guest = _Guest(_TOUCH)
    guest.vcpu.pre_fault(_DATA, pages * PAGE_SIZE)
    guest.run(rdi=_DATA, rcx=pages)
    middle = _DATA + pages // 2 * PAGE_SIZE

    def flips() -> None:
        for n in range(_FLIPS):
            guest.vm.set_private(middle, PAGE_SIZE, bool(n % 2))
            guest.run(rdi=middle, rcx=1)

    return _seconds(flips)


BENCHES = (
    Bench(
        "guest-memset",
        "a guest sets bytes one by one",
        "plain unicorn, which checks nothing",
        2.0,
        partial(_loop, _MEMSET),
    ),
    Bench(
        "guest-memcmp",
        "a guest compares bytes one by one",
        "plain unicorn, which checks nothing",
        2.0,
        partial(_loop, _MEMCMP),
    ),
    Bench(
        "guest-flip",
        "a page that a guest uses becomes shared or private, 16,000 pages mapped",
        "the same with 1,000",
        1.5,
        _flip,
    ),
)
