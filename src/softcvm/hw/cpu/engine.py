"""unicorn as one processor: it executes instructions, and stops wherever the model has to decide.

Owns the engine, its translations of code and of addresses, and how a stop is found.  What an address leads to
is the `translate` that it is given; what a stop means is tcg.py's.

Guest memory is one mapping of the machine's DRAM, so that loads and stores run at native speed; the engine asks
for the translation of a page once and keeps it until flush().  Instructions that leave the guest are found when
the engine translates the block that holds them, by decoding that block; a hook then stops before each of them.
"""

import ctypes
import re
import struct
from collections.abc import Callable
from enum import Enum, auto
from functools import cache
from typing import Any, NamedTuple

from softcvm.hw.cpu.decode import leaving
from softcvm.hw.cpu.engine_state import HiddenState

__all__ = (
    "FETCH",
    "PERM_EXEC",
    "PERM_READ",
    "PERM_WRITE",
    "READ",
    "WRITE",
    "Engine",
    "Halt",
    "Stop",
    "host_tsc",
)

READ, WRITE, FETCH = 16, 17, 18  # UC_MEM_READ, UC_MEM_WRITE, UC_MEM_FETCH
PERM_READ, PERM_WRITE, PERM_EXEC = 1, 2, 4
_SUSPECT = re.compile(
    rb"[\xe4-\xe7\xec-\xef\x6c-\x6f\xf4]|\x0f[\x01\x05\x07\x08\x09\x0b\x30-\x35\xa2\xae\xc7]",
    re.S,
)
"""Bytes that an instruction which leaves the guest can begin with, prefixes aside."""


class Halt(Enum):
    """Why the engine stopped."""

    FAULT = auto()  # `translate` raised; the exception is in Stop.cause
    EXCEPTION = auto()  # the processor's own exception or INT n; Stop.vector
    INVALID = auto()  # an instruction that the engine does not know
    INTERCEPT = auto()  # before an instruction that leaves the guest
    INTERRUPTED = auto()  # interrupt() was called


class Stop(NamedTuple):
    why: Halt
    vector: int = 0
    cause: Exception | None = None


Translate = Callable[[int, int], tuple[int, int]]
"""(linear address, READ/WRITE/FETCH) -> (physical address of the page, permissions), or raises."""


class Engine:
    """One vCPU's processor, in any mode."""

    def __init__(self, memory: memoryview, translate: Translate) -> None:
        """memory: the machine's DRAM."""
        import unicorn
        from unicorn import unicorn_const, x86_const

        self._code_pages: dict[int, int] = {}
        """Where the engine fetches code from; the guest's tables may say otherwise by now."""
        self._u: Any = unicorn_const
        self.x: Any = x86_const
        self._error: Any = unicorn.UcError
        self._translate: Translate = lambda address, kind: (len(memory), PERM_READ | PERM_EXEC)
        self.uc: Any = unicorn.Uc(self._u.UC_ARCH_X86, self._u.UC_MODE_64)
        uc = self.uc
        uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_EPYC)
        uc.ctl_exits_enabled(True)
        uc.ctl_set_exits([])
        uc.ctl_set_tlb_mode(self._u.UC_TLB_VIRTUAL)
        self._memory = memory
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        uc.mem_map_ptr(0, len(memory), self._u.UC_PROT_ALL, address)
        uc.mem_map(len(memory), 4096)
        uc.mem_write(len(memory), b"\xeb\x00\xf4")  # jmp .+2; hlt
        uc.hook_add(self._u.UC_HOOK_TLB_FILL, self._fill)
        uc.emu_start(0xFFFF_F000_0000_0000, 0)  # the first block of all is not reported
        self._translate = translate
        self.flush()
        uc.hook_add(self._u.UC_HOOK_INTR, self._interrupted)
        uc.hook_add(self._u.UC_HOOK_INSN_INVALID, self._invalid)
        uc.hook_add(self._u.UC_HOOK_EDGE_GENERATED, self._block_translated)
        self._flag, self._stub = _block_hook(uc, self._u.UC_HOOK_BLOCK)
        self._sites: set[int] = set()
        """Addresses with a hook before an instruction.  They stay: other code may be there by now, or another
        address space's, and what has been translated elsewhere relies on them."""
        self.also_stops: frozenset[str] = frozenset()
        """Instructions that the engine could execute but not as this guest must see them (stop_at())."""
        self._over: int | None = None
        self._stop: Stop | None = None
        self.hidden = HiddenState(uc)
        uc.reg_write(x86_const.UC_X86_REG_CR4, 1 << 5)  # it begins in long mode without paging,
        uc.reg_write(x86_const.UC_X86_REG_CR0, 1 << 31 | 0x11)  # which no processor can be in
        uc.reg_write(x86_const.UC_X86_REG_CR0, 0x10)

    # What the engine calls

    def _fill(self, uc: Any, address: int, kind: int, entry: Any, _: Any) -> bool:
        try:
            entry.paddr, entry.perms = self._translate(address, kind)
            if entry.perms & PERM_EXEC:
                self._code_pages[address & ~4095] = entry.paddr
        except Exception as cause:
            self._stop = Stop(Halt.FAULT, cause=cause)
            return False
        return True

    def _interrupted(self, uc: Any, vector: int, _: Any) -> None:
        self._stop = Stop(Halt.EXCEPTION, vector)
        uc.emu_stop()

    def _invalid(self, uc: Any, _: Any) -> bool:
        self._stop = Stop(Halt.INVALID)
        return False

    def _block_translated(self, uc: Any, block: Any, _: Any, __: Any) -> None:
        if self._look_at(block.pc, block.size):
            uc.emu_stop()

    def _reached(self, uc: Any, address: int, size: int, _: Any) -> None:
        if address == self._over:
            self._over = None
            return
        self._stop = Stop(Halt.INTERCEPT)
        uc.emu_stop()

    # What the model calls

    def run(self, rip: int, over: int | None = None) -> Stop:
        """Execute from RIP until the model has to decide; RIP is where it stopped.

        over: linear address of the first instruction, if it is the guest's own though there is a hook before it.
        """
        self._over = over
        while True:
            stop = self._run_once(rip)
            if stop is not None:
                if stop.why is Halt.EXCEPTION:
                    self.hidden.forget_exception()
                return stop
            if self._flag.value:
                self._flag.value = 0
                return Stop(Halt.INTERRUPTED)
            rip = self.uc.reg_read(self.x.UC_X86_REG_RIP)  # a block was translated anew

    def _run_once(self, rip: int) -> Stop | None:
        self._stop = None
        try:
            self.uc.emu_start(rip, 0)
        except self._error:
            if self._stop is None:
                raise
        return self._stop

    def interrupt(self) -> None:
        """Stop at the next block.  Any thread may call it."""
        self._flag.value = 1

    def flush(self) -> None:
        """Forget all translations of addresses."""
        self._code_pages.clear()
        self.uc.ctl(self._u.UC_CTL_TLB_FLUSH, self._u.UC_CTL_IO_WRITE)

    def stop_at(self, names: frozenset[str]) -> None:
        """From now on stop before these instructions too."""
        if not names <= self.also_stops:
            self.also_stops |= names
            self.uc.ctl_flush_tb()

    def _look_at(self, address: int, size: int) -> bool:
        """Put hooks before what leaves the guest in a block; whether there is a new one."""
        code = self.fetched(address, size)
        if not _SUSPECT.search(code):
            return False
        new = False
        for place, length in leaving(code, self.hidden.mode(), self.also_stops):
            at = address + place
            if at not in self._sites:
                self._sites.add(at)
                self.uc.hook_add(self._u.UC_HOOK_CODE, self._reached, begin=at, end=at)
                self.uc.ctl_remove_cache(at, at + length)
                new = True
        return new

    def fetched(self, address: int, length: int) -> bytes:
        """Code where the engine has fetched it from, on one page or more; it ends before a page that was not."""
        found = b""
        while len(found) < length:
            at = address + len(found)
            page = self._code_pages.get(at & ~4095)
            if page is None:
                break
            size = min(length - len(found), 4096 - (at & 4095))
            found += bytes(self._memory[page + (at & 4095) : page + (at & 4095) + size])
        return found


def _block_hook(uc: Any, kind: int) -> tuple[ctypes.c_uint64, Any]:
    """A hook before every block that stops the engine when a flag is set: 25 bytes of code, no Python.

    emu_stop() from another thread would have the engine execute a memory operation twice.
    """
    import mmap

    from unicorn.unicorn_py3.unicorn import uclib

    flag = ctypes.c_uint64(0)
    stop = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value or 0
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code = b"\x48\xb8" + struct.pack("<Q", ctypes.addressof(flag))  # mov rax, flag
    code += b"\x48\x83\x38\x00\x75\x01\xc3"  # cmp qword [rax], 0; jne +1; ret
    code += b"\x48\xb8" + struct.pack("<Q", stop) + b"\xff\xe0"  # mov rax, stop; jmp rax
    page[: len(code)] = code
    entry = ctypes.addressof(ctypes.c_char.from_buffer(page))
    handle = ctypes.c_size_t()
    status = uclib.uc_hook_add(
        uc._uch,
        ctypes.byref(handle),
        ctypes.c_int(kind),
        ctypes.c_void_p(entry),
        None,
        ctypes.c_uint64(1),
        ctypes.c_uint64(0),
    )
    if status:
        raise RuntimeError(f"uc_hook_add: {status}")
    return flag, page


def host_tsc() -> int:
    """What RDTSC gives without any guest's offset."""
    from unicorn import x86_const

    clock = _clock()
    clock.emu_start(0x1000, 0x1002)
    low, high = clock.reg_read_batch([x86_const.UC_X86_REG_RAX, x86_const.UC_X86_REG_RDX])
    return int(high << 32 | low)


@cache
def _clock() -> Any:
    """An engine of its own, which has a RDTSC and nothing else."""
    import unicorn
    from unicorn import unicorn_const

    uc = unicorn.Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64)
    uc.mem_map(0x1000, 0x1000)
    uc.mem_write(0x1000, b"\x0f\x31")
    return uc
