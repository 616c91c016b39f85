"""Starting and stopping the other processors, in the order firmware and Linux do it together.

The boot processor sends INIT and SIPI by its x2APIC, as firmware does; the others come up from the VMSA that
was measured at launch and wait in an AP reset hold.  Then, as snp_set_wakeup_secondary_cpu of Linux
(arch/x86/coco/sev/core.c, v7.2), each is given a VMSA of the guest's own making and created from that.  It
uses memory, reports, and is destroyed again; its VMSA page becomes ordinary memory.
"""

from softcvm.abi.board import DELAY_PORT
from softcvm.abi.ghcb import ApCreation, GhcbExit, GhcbMsr
from softcvm.abi.insn import Load, Program, Rdmsr, Rmpadjust, StartState, Store, Vmgexit, Wrmsr
from softcvm.abi.rmp import RmpPageSize
from softcvm.abi.svm import Msr
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.guest.boot_info import BootInfo, Extent
from softcvm.guest.checks import Check, expect
from softcvm.guest.console import port_out
from softcvm.guest.ghcb import GuestSteps
from softcvm.guest.memory import PMD_SIZE
from softcvm.guest.programs.sharing import keeps, write_patterns
from softcvm.guest.programs.vcpu import Vcpu, bring_up
from softcvm.sim.addr import PAGE_SIZE, PTRS_PER_PMD

__all__ = ("application_processor", "start_and_stop")

_MSR_APIC_BASE, _X2APIC_EXTD = 0x1B, 1 << 10
_MSR_X2APIC_ICR = 0x830
_ALL_OTHERS = 3 << 18
_INIT, _STARTUP = 0x4500, 0x4600
_EFER_SVME = 1 << 12
_AP_RIP = 0x10
"""Where the guest's own VMSAs start: the part of the script that works."""
_DONE = b"DONE"


def started(info: BootInfo) -> range:
    """The vCPUs that are started: as many as one 2M region has VMSA pages for."""
    return range(1, min(info.vcpus, PTRS_PER_PMD))


def start_and_stop(vcpu: Vcpu, region: Extent) -> GuestSteps[int]:
    """Start every other processor, wait until each has used its memory, stop them; how many."""
    others = started(vcpu.info)
    yield from _init_and_sipi(vcpu)
    yield from _turn(vcpu)
    for n in others:
        yield from _write_vmsa(vcpu, _vmsa(region, n))
        yield from _ap(vcpu, ApCreation.CREATE, n, _vmsa(region, n))
    for _ in range(len(others)):
        if (yield from _all_done(region, others)):
            break
        yield from _turn(vcpu)
    done = yield from _all_done(region, others)
    yield from expect(vcpu.console, done, Check.PROCESSORS, len(others))
    for n in others:
        yield from _ap(vcpu, ApCreation.DESTROY, n)
    yield from _turn(vcpu)
    for n in others:
        yield Rmpadjust(_vmsa(region, n), RmpPageSize.PG_4K, 1, 0)
    yield from write_patterns(_vmsa(region, n) for n in others)
    yield from keeps(vcpu, (_vmsa(region, n) for n in others), Check.PROCESSORS)
    return len(others)


def application_processor(info: BootInfo, vcpu_id: int, region: Extent) -> Program:
    """What runs on another processor, from whichever VMSA."""
    start: Vmsa = yield StartState()
    if start.rip == _AP_RIP:
        vcpu = yield from bring_up(info, vcpu_id)
        page = _memory(region, vcpu_id)
        yield from vcpu.memory.set_shared([Extent(page, page + PAGE_SIZE)])
        yield from vcpu.memory.set_private([Extent(page, page + PAGE_SIZE)])
        yield from write_patterns([page])
        yield from keeps(vcpu, [page], Check.PROCESSORS)
        yield Store(page, _DONE)
    while True:
        yield Wrmsr(Msr.SEV_ES_GHCB, GhcbMsr.AP_RESET_HOLD_REQ)
        yield Vmgexit()


def _init_and_sipi(vcpu: Vcpu) -> GuestSteps[None]:
    reply = yield from vcpu.ghcb.checked_call(GhcbExit.MSR, rcx=_MSR_APIC_BASE)
    yield from _wrmsr(vcpu, _MSR_APIC_BASE, reply.rax | _X2APIC_EXTD)
    yield from _wrmsr(vcpu, _MSR_X2APIC_ICR, _ALL_OTHERS | _INIT)
    yield from _wrmsr(vcpu, _MSR_X2APIC_ICR, _ALL_OTHERS | _STARTUP)


def _wrmsr(vcpu: Vcpu, msr: int, value: int) -> GuestSteps[None]:
    yield from vcpu.ghcb.checked_call(
        GhcbExit.MSR, 1, rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32
    )


def _write_vmsa(vcpu: Vcpu, page: int) -> GuestSteps[None]:
    """Registers of a processor in real mode, in a page that becomes a VMSA of VMPL 0."""
    status: int = yield Rdmsr(Msr.SEV_STATUS)
    code = bytes(Segment(selector=0xF000, attrib=0x9B, limit=0xFFFF, base=0xFFFF_0000))
    vmsa = Vmsa(
        cs=code,
        efer=_EFER_SVME,
        cr0=0x10,
        cr4=1 << 6,
        dr6=0xFFFF_0FF0,
        dr7=0x400,
        rflags=2,
        rip=_AP_RIP,
        g_pat=0x0007_0406_0007_0406,
        xcr0=1,
        mxcsr=0x1F80,
        x87_fcw=0x37F,
        sev_features=status >> 2,
    )
    yield Store(page, bytes(vmsa))
    code_: int = yield Rmpadjust(page, RmpPageSize.PG_4K, 1, 0, vmsa=True)
    yield from expect(vcpu.console, not code_, Check.PROCESSORS, code_)


def _ap(vcpu: Vcpu, request: ApCreation, apic_id: int, vmsa: int = 0) -> GuestSteps[None]:
    status: int = yield Rdmsr(Msr.SEV_STATUS)
    yield from vcpu.ghcb.checked_call(
        GhcbExit.AP_CREATION, request | apic_id << 32, vmsa, rax=status >> 2
    )


def _turn(vcpu: Vcpu) -> GuestSteps[None]:
    """The I/O delay: the others get on meanwhile."""
    yield from port_out(vcpu.ghcb, DELAY_PORT, 0, 1)


def _all_done(region: Extent, others: range) -> GuestSteps[bool]:
    for n in others:
        if (yield Load(_memory(region, n), len(_DONE))) != _DONE:
            return False
    return True


def _vmsa(region: Extent, n: int) -> int:
    """Never the first page of a 2M region, which KVM refuses."""
    return region.start + n * PAGE_SIZE


def _memory(region: Extent, n: int) -> int:
    return region.start + PMD_SIZE + n * PAGE_SIZE
