"""The CPUID instruction of a caught program: patched where code is mapped, answered in the trap.

The program runs on the real processor, so what instructions there are is the real processor's to say.  Who made
it, and what it has for virtual machines, is the model's.  A patch is INT3 and NOP over the instruction, in the
program's private copy of the page; the file on disk stays as it is.
"""

from collections.abc import Iterator
from typing import NamedTuple

from softcvm.attach import ptrace
from softcvm.attach.cpuid_sites import cpuid_sites
from softcvm.attach.process import Caught
from softcvm.hw.cpu.cpuid import CpuidResult, cpuid
from softcvm.hw.profile import CpuProfile

__all__ = ("answer_cpuid", "patch_code", "read_real_cpuid")

_PATCH, _CPUID = b"\xcc\x90", b"\x0f\xa2"
_U32 = (1 << 32) - 1
_MOST_LEAVES = 0x40
_SUBLEAVES = {4: 8, 7: 3, 0xB: 4, 0xD: 20, 0x8000_001D: 6}
"""Leaves that ECX tells more of, and how far anybody asks."""
_EXTENDED = 0x8000_0000
_SVM_BIT = 1 << 2
_OURS = frozenset({*range(0x8000_0002, 0x8000_0005), 0x8000_0008, 0x8000_000A, 0x8000_001F})
"""Leaves that are the model's altogether: the name, address sizes, SVM, memory encryption."""
_CACHE_LEAVES = frozenset({0x8000_0005, 0x8000_0006, 0x8000_001D})
"""What C libraries ask AMD's processors for, and others do not have."""
_AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)  # "AuthenticAMD" as EBX, ECX and EDX


class _Mapping(NamedTuple):
    start: int
    end: int
    offset: int
    path: str


def _code_mappings(pid: int) -> Iterator[_Mapping]:
    """Private mappings of code from files."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            addresses, perms, offset, _, _, *path = line.rstrip("\n").split(maxsplit=5)
            if "x" in perms and "p" in perms and path and path[0].startswith("/"):
                start, end = addresses.split("-")
                yield _Mapping(int(start, 16), int(end, 16), int(offset, 16), path[0])


def patch_code(process: Caught, address: int | None = None) -> None:
    """Patch what is mapped now, or only the mapping that begins at an address."""
    for mapping in _code_mappings(process.pid):
        if address is None or mapping.start == address:
            _patch(process, mapping)


def _places(process: Caught, mapping: _Mapping) -> list[int]:
    """Addresses of the mapping's CPUID instructions."""
    try:
        # Through the process's root: it may see other files under this name.
        sites = cpuid_sites(f"/proc/{process.pid}/root{mapping.path}")
    except OSError:
        return []  # deleted meanwhile, or not readable: its code runs as it is
    return [
        mapping.start + site - mapping.offset
        for site in sites
        if 0 <= site - mapping.offset < mapping.end - mapping.start - 1
    ]


def _patch(process: Caught, mapping: _Mapping) -> None:
    places = _places(process, mapping)
    if not places:
        return
    with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
        for place in places:
            memory.seek(place)
            if memory.read(2) == _CPUID:  # else patched already, in the parent
                memory.seek(place)
                memory.write(_PATCH)
    process.cpuid_sites.update(places)


def answer_cpuid(process: Caught, tid: int) -> bool:
    """Execute the CPUID that a stopped thread has trapped on; False when the trap is another."""
    registers = ptrace.get_registers(tid)
    place = registers.rip - 1
    if place not in process.cpuid_sites:
        return False
    function, index = registers.rax & _U32, registers.rcx & _U32
    known = process.real_cpuid
    real = known.get((function, index), known.get((function, 0), CpuidResult()))
    result = _overlaid(process.machine.soc.profile, function, index, real)
    registers.rax, registers.rbx, registers.rcx, registers.rdx = result
    registers.rip = place + len(_CPUID)
    ptrace.set_registers(tid, registers)
    return True


def read_real_cpuid(process: Caught, tid: int) -> None:
    """Ask the real processor once, through the first CPUID instruction of a program that has just been executed.

    It has one thread, stopped in execve(), and nothing is patched yet.
    """
    if process.real_cpuid:
        return
    place = next(
        (
            place
            for mapping in _code_mappings(process.pid)
            for place in _places(process, mapping)
        ),
        None,
    )
    if place is None:
        return
    before = ptrace.get_registers(tid)

    def ask(function: int, index: int = 0) -> CpuidResult:
        registers = ptrace.get_registers(tid)
        registers.rax, registers.rcx, registers.rip = function, index, place
        registers.orig_rax = (1 << 64) - 1
        ptrace.set_registers(tid, registers)
        after = registers
        while after.rip == place:  # the first step only leaves the system call
            ptrace.step(tid)
            after = ptrace.get_registers(tid)
        return CpuidResult(
            *(value & _U32 for value in (after.rax, after.rbx, after.rcx, after.rdx))
        )

    for base in (0, _EXTENDED):
        last = ask(base).eax
        for function in range(base, min(last, base + _MOST_LEAVES) + 1):
            for index in range(_SUBLEAVES.get(function, 1)):
                process.real_cpuid[function, index] = ask(function, index)
    ptrace.set_registers(tid, before)


def _overlaid(profile: CpuProfile, function: int, index: int, real: CpuidResult) -> CpuidResult:
    ours = cpuid(profile, function, 0 if function in _OURS else index)
    match function:
        case 0:
            return CpuidResult(real.eax, *_AMD)
        case 1:
            return real._replace(eax=profile.signature)
        case _ if function == _EXTENDED:
            return CpuidResult(max(real.eax, ours.eax), *_AMD)
        case 0x8000_0001:
            return real._replace(eax=profile.signature, ecx=real.ecx | _SVM_BIT)
        case _ if function in _OURS:
            return ours
        case _ if function in _CACHE_LEAVES and not any(real):
            return ours
        case _:
            return real
