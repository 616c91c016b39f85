"""How a scripted vCPU gets on its feet: protocol, GHCB, tables, console, in the order Linux needs them."""

from typing import NamedTuple

from softcvm.abi.ghcb import HvFeatures, PscOp
from softcvm.guest.boot_info import BootInfo, Extent, free_of
from softcvm.guest.checks import Check, expect
from softcvm.guest.console import Console
from softcvm.guest.ghcb import (
    GhcbClient,
    GuestSteps,
    hv_features,
    msr_page_state_change,
    negotiate,
)
from softcvm.guest.memory import GuestMemory
from softcvm.guest.tables import CpuidTable, read_cpuid_table, read_secrets
from softcvm.sim.addr import PAGE_SIZE

__all__ = ("Vcpu", "bring_up", "ghcb_pages")

_MIB = 1 << 20


class Vcpu(NamedTuple):
    """What the scenes of a program use."""

    info: BootInfo
    ghcb: GhcbClient
    console: Console
    memory: GuestMemory
    cpuid: CpuidTable
    features: HvFeatures


def ghcb_pages(info: BootInfo) -> Extent:
    """One page per vCPU in the lowest RAM above 1 MiB that was not launched; shared for good.

    Raises ValueError when there is no such RAM.
    """
    found = free_of(info.unaccepted(), info.vcpus * PAGE_SIZE, PAGE_SIZE, above=_MIB)
    if found is None:
        raise ValueError("no RAM for a GHCB page per vCPU")
    return found


def bring_up(info: BootInfo, vcpu_id: int) -> GuestSteps[Vcpu]:
    """Everything up to a working console and a known CPUID table."""
    named = yield from negotiate()
    features = yield from hv_features()
    ghcb = GhcbClient(ghcb_pages(info).start + vcpu_id * PAGE_SIZE)
    yield from msr_page_state_change(ghcb.gpa, PscOp.SHARED)
    yield from ghcb.register()
    console = Console(ghcb)
    yield from console.probe()
    cpuid = CpuidTable([])
    if info.cpuid_gpa is not None:
        cpuid = yield from read_cpuid_table(info.cpuid_gpa)
        yield from expect(console, cpuid.c_bit == named, Check.TABLES, (cpuid.c_bit, named))
    if info.secrets_gpa is not None:
        yield from read_secrets(info.secrets_gpa)
    memory = GuestMemory(ghcb, evict=not cpuid.coherency_sfw_no)
    return Vcpu(info, ghcb, console, memory, cpuid, features)
