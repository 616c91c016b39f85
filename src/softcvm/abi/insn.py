"""What a guest's processor is asked to do: one tuple per instruction or access.

Scripted guests yield these; the machine-code core decodes to the same ones.  A guest without page tables
of its own names guest physical addresses and says for each access whether its C-bit is set; without SEV
there is no such bit, and what the guest says of it counts for nothing.

An access or instruction with `count` stands for that many in ascending order, one per page of its size;
it ends early at the first that faults, and what came before stays done.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

__all__ = (
    "Cpuid",
    "Fetch",
    "GuestOp",
    "Hlt",
    "In",
    "Load",
    "Out",
    "Program",
    "Pvalidate",
    "PvalidateOut",
    "Rdmsr",
    "Rmpadjust",
    "Rmpquery",
    "RmpqueryOut",
    "StartState",
    "Store",
    "Touch",
    "Vmgexit",
    "Vmmcall",
    "Wrmsr",
)


class Load(NamedTuple):
    """Read bytes; the guest gets them back.  `c` is the C-bit of the mapping."""

    gpa: int
    length: int
    c: bool = True


class Store(NamedTuple):
    """Write bytes."""

    gpa: int
    data: bytes
    c: bool = True


class Touch(NamedTuple):
    """Access one byte in each of `count` 4K pages: read it, or write back what was there."""

    gpa: int
    count: int = 1  # type: ignore[assignment]  # not tuple.count
    write: bool = False
    c: bool = True


class Fetch(NamedTuple):
    """Execute from a page; always private.  The guest gets nothing back."""

    gpa: int
    user: bool = False


class Pvalidate(NamedTuple):
    """PVALIDATE F2 0F 01 FF; size is an RmpPageSize.  The guest gets a PvalidateOut.  [APM3-24594]"""

    gpa: int
    size: int
    validate: bool
    count: int = 1  # type: ignore[assignment]  # not tuple.count


class PvalidateOut(NamedTuple):
    """EAX, CF, and how many of `count` came to their end with EAX=0 and this CF."""

    code: int
    cf: bool
    done: int


class Rmpadjust(NamedTuple):
    """RMPADJUST F3 0F 01 FE.  The guest gets RAX.  [APM3-24594]"""

    gpa: int
    size: int
    target_vmpl: int
    perms: int
    vmsa: bool = False


class Rmpquery(NamedTuple):
    """RMPQUERY F3 0F 01 FD.  The guest gets an RmpqueryOut.  [APM3-24594]"""

    gpa: int
    target_vmpl: int


class RmpqueryOut(NamedTuple):
    code: int
    size: int
    perms: int
    vmsa: bool


class Wrmsr(NamedTuple):
    msr: int
    value: int


class Rdmsr(NamedTuple):
    msr: int


class In(NamedTuple):
    """IN of 1, 2 or 4 bytes: the guest gets the number, under SEV-ES #VC 0x7b."""

    port: int
    size: int = 1


class Out(NamedTuple):
    """OUT of the lowest 1, 2 or 4 bytes of a number; under SEV-ES #VC 0x7b."""

    port: int
    value: int
    size: int = 1


class StringIo(NamedTuple):
    """INS or OUTS of items of 1, 2 or 4 bytes, once or RCX times; under SEV-ES #VC 0x7b."""

    port: int
    size: int
    incoming: bool
    repeated: bool


class Vmmcall(NamedTuple):
    """VMMCALL with RAX and RBX, RCX, RDX, RSI: the guest gets RAX, under SEV-ES #VC 0x81."""

    nr: int
    args: tuple[int, int, int, int] = (0, 0, 0, 0)


class Cpuid(NamedTuple):
    """CPUID: the guest gets (EAX, EBX, ECX, EDX) as the hypervisor answers; under SEV-ES #VC 0x72."""

    function: int
    index: int = 0  # type: ignore[assignment]  # not tuple.index


class Xsetbv(NamedTuple):
    """XSETBV: an extended control register; KVM intercepts it but in a guest with SEV-ES."""

    register: int
    value: int


class Vmgexit(NamedTuple):
    """VMGEXIT F3 0F 01 D9.  The guest gets the GHCB MSR as the hypervisor left it.

    Without SEV-ES it is a VMMCALL, with the registers as they are.  [APM3-24594 VMGEXIT]
    """


class StartState(NamedTuple):
    """The registers that this vCPU was started with: the guest gets its abi.vmsa.Vmsa.

    A processor begins at the RIP of its VMSA; a script asks here which of its parts is meant.
    """


class Hlt(NamedTuple):
    """HLT: an automatic exit."""


GuestOp = (
    Load
    | Store
    | Touch
    | Fetch
    | Pvalidate
    | Rmpadjust
    | Rmpquery
    | Wrmsr
    | Rdmsr
    | Cpuid
    | In
    | Out
    | StringIo
    | Vmmcall
    | Vmgexit
    | Xsetbv
    | StartState
    | Hlt
)
Program = Generator[GuestOp, Any, None]
"""A scripted guest: yields operations, receives results, sees GuestException thrown at the operation."""
