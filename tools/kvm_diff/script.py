"""Scripts: system calls as data, and the same as Python that can be run.

A call names a method of Sys, its arguments and the handle under which its result is known later.
`Ref` stands for the number behind a handle, which may have been closed, reused or never opened;
then it is a number that no file has.  Addresses are plain numbers: everything is mapped at fixed
places in one arena, so that they are the same everywhere.
"""

from collections.abc import Iterator
from typing import NamedTuple

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm import memory, vcpu
from softcvm.abi.layout import Layout

__all__ = (
    "ARENA",
    "ARENA_PAGES",
    "NOFILE",
    "NO_FD",
    "PAGE",
    "Call",
    "Ref",
    "Script",
    "Struct",
    "Value",
    "as_python",
    "ioctl",
    "pack",
)

PAGE = 4096
ARENA = 0x10_0000_0000
"""Nothing else of a Python process lies here or in the terabyte after it."""
ARENA_PAGES = 32
NOFILE = 32
"""RLIMIT_NOFILE of whoever plays a script."""
NO_FD = 1000

LAYOUTS: dict[str, type[Layout]] = {
    cls.__name__: cls
    for cls in (
        memory.KvmCreateGuestMemfd,
        memory.KvmUserspaceMemoryRegion,
        memory.KvmUserspaceMemoryRegion2,
        memory.KvmMemoryAttributes,
        memory.KvmPreFaultMemory,
        memory.KvmDirtyLog,
        memory.KvmClearDirtyLog,
        vcpu.KvmEnableCap,
        vcpu.KvmRegs,
        vcpu.KvmDebugregs,
        vcpu.KvmMpState,
    )
}

_DEFAULTS: dict[str, tuple[tuple[str, int], ...]] = {
    "KvmUserspaceMemoryRegion2": (
        ("guest_memfd", NO_FD),
    ),  # 0 is a file, on the real side only
}


class Ref(NamedTuple):
    """The file descriptor that a call returned."""

    handle: int


class Struct(NamedTuple):
    """An argument passed by address; fields that are not named are 0."""

    layout: str
    fields: tuple[tuple[str, int | Ref], ...] = ()


Value = int | str | bytes | Ref | Struct


class Call(NamedTuple):
    """One call.  `label` is what a report counts it under."""

    label: str
    method: str
    args: tuple[Value, ...]
    handle: int | None = None


class Script(NamedTuple):
    """Calls in order.  `watch`: compare all of the arena after each of them, which makes every
    page present, instead of what the script loads itself."""

    calls: tuple[Call, ...]
    watch: bool = False


def ioctl(
    name: str, fd: Value, arg: Value = 0, handle: int | None = None, *, method: str = "ioctl"
) -> Call:
    """KVM_<name> on a file."""
    return Call(f"KVM_{name}", method, (fd, int(getattr(k, f"KVM_{name}")), arg), handle)


def pack(struct: Struct, fds: dict[int, int]) -> bytearray:
    """The bytes of an argument."""
    cls = LAYOUTS[struct.layout]
    packed = cls()
    for name, value in (*_DEFAULTS.get(struct.layout, ()), *struct.fields):
        field = getattr(cls, name)
        number = fds.get(value.handle, NO_FD) if isinstance(value, Ref) else value
        setattr(packed, name, number & field.mask)
    return bytearray(packed.data)


def as_python(script: Script, answers: dict[int, str]) -> str:
    """The script as a program for both kernels; `answers` are remarks by number of the call."""
    names = {f.handle for call in script.calls for f in _refs(call)}
    lines = list(_PROLOGUE)
    for i, call in enumerate(script.calls):
        shown = f"{call.method}({', '.join(map(_shown, call.args))})"
        if call.handle in names:
            shown = f"fd{call.handle} = {shown}"
        lines.append(shown + (f"  # {answers[i]}" if i in answers else ""))
    if script.watch:
        lines.append(f"# after every call: load all of the {ARENA_PAGES} pages at ARENA")
    return "\n".join(lines) + "\n"


_PROLOGUE = (
    "from softcvm import HostSys, Machine",
    "from softcvm.abi.kvm import _generated_kvm as k",
    "from tools.kvm_diff.play import Player",
    "from tools.kvm_diff.script import ARENA, Ref, Struct",
    "",
    'p = Player(HostSys())  # or Player(Machine(kernel="6.18", memory=256 << 20).process())',
    "fallocate, ioctl, ioctl_close, madvise, mmap = map(",
    '    p.teller, ("fallocate", "ioctl", "ioctl_close", "madvise", "mmap")',
    ")",
    "mmap_munmap, munmap, load, store, close, dup, open = map(",
    '    p.teller, ("mmap_munmap", "munmap", "load", "store", "close", "dup", "open")',
    ")",
)


def _refs(call: Call) -> Iterator[Ref]:
    for arg in call.args:
        if isinstance(arg, Ref):
            yield arg
        elif isinstance(arg, Struct):
            yield from (value for _, value in arg.fields if isinstance(value, Ref))


_REQUESTS = {
    value: f"k.{name}"
    for name, value in vars(k).items()
    if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == 0xAE
}


def _shown(value: Value) -> str:
    match value:
        case Ref(handle):
            return f"fd{handle}"
        case Struct(layout, fields):
            told = ", ".join(f'("{name}", {_shown(v)})' for name, v in fields)
            return f'Struct("{layout}", ({told}{"," if len(fields) == 1 else ""}))'
        case int() if value in _REQUESTS:
            return _REQUESTS[value]
        case int() if ARENA <= value < ARENA + 64 * PAGE:
            return f"ARENA + {value - ARENA:#x}" if value > ARENA else "ARENA"
        case bytes() if value and value == value[:1] * len(value):
            return f"b{value[:1]!r} * {len(value)}".replace("bb", "b", 1)
        case int() if abs(value) > 64:
            return hex(value)
        case _:
            return repr(value)
