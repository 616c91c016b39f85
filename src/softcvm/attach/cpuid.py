"""The CPUID instruction of a caught program: patched where code is mapped, answered in the trap.

The program runs on the real processor, so what instructions there are is the real processor's to say.  Who made
it, and what it has for virtual machines, is the model's.  A patch is INT3 and NOP over the instruction, in the
program's private copy of the page; the file on disk stays as it is.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from softcvm.attach import ptrace
from softcvm.attach.cpuid_sites import cpuid_sites
from softcvm.attach.process import Caught
from softcvm.hw.cpu.cpuid import CpuidResult, cpuid
from softcvm.hw.profile import CpuProfile

__all__ = ("answer_cpuid", "patch_code")

_PATCH, _CPUID = b"\xcc\x90", b"\x0f\xa2"
_U32 = (1 << 32) - 1
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


def _patch(process: Caught, mapping: _Mapping) -> None:
    try:
        # Through the process's root: it may see other files under this name.
        sites = cpuid_sites(f"/proc/{process.pid}/root{mapping.path}")
    except OSError:
        return  # deleted meanwhile, or not readable: its code runs as it is
    length = mapping.end - mapping.start
    places = [
        mapping.start + site - mapping.offset
        for site in sites
        if 0 <= site - mapping.offset < length - 1
    ]
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
    real = process.real_cpuid.get((function, index))
    if real is None:
        real = process.real_cpuid[function, index] = _execute(process, tid, place)
    result = _overlaid(process.machine.soc.profile, function, index, real)
    registers.rax, registers.rbx, registers.rcx, registers.rdx = result
    registers.rip = place + len(_CPUID)
    ptrace.set_registers(tid, registers)
    return True


def _execute(process: Caught, tid: int, place: int) -> CpuidResult:
    """What the real processor says: the instruction is put back for one step."""
    registers = ptrace.get_registers(tid)
    registers.rip = place
    ptrace.set_registers(tid, registers)
    with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(place)
        memory.write(_CPUID)
        try:
            ptrace.step(tid)
        finally:
            with suppress(OSError):
                memory.seek(place)
                memory.write(_PATCH)
    after = ptrace.get_registers(tid)
    return CpuidResult(after.rax & _U32, after.rbx & _U32, after.rcx & _U32, after.rdx & _U32)


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
            return real._replace(ecx=real.ecx | _SVM_BIT)
        case _ if function in _OURS:
            return ours
        case _ if function in _CACHE_LEAVES and not any(real):
            return ours
        case _:
            return real
