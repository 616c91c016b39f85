"""A guest's side of the Guest-Hypervisor Communication Block.  [GHCB-56421]

Owns: the MSR protocol, the calls through a registered GHCB page, and the checks a guest makes on what the
hypervisor answers: nothing that it can write into the shared page is believed before it was checked.
Leaves to others: which memory changes state, and in which order with PVALIDATE (memory.py); what is
printed (console.py).

Where the guest of arch/x86/coco/sev (Linux v7.2) terminates, this one does, with the same reason codes.
"""

from collections.abc import Generator, Sequence
from enum import IntEnum
from struct import pack
from typing import Any, NamedTuple, NoReturn, TypeVar

from softcvm.abi.ghcb import (
    GHCB_MSR_GPA_NONE,
    GHCB_MSR_INFO_MASK,
    GHCB_SHARED_BUFFER,
    GHCB_SHARED_BUFFER_SIZE,
    GHCB_VERSION_MAX,
    GHCB_VERSION_MIN,
    PSC_HEADER_SIZE,
    PSC_MAX_ENTRIES,
    Ghcb,
    GhcbExit,
    GhcbMsr,
    HvFeatures,
    PscHeader,
    PscOp,
    TermReason,
    cpuid_request,
    gpa_request,
    psc_request,
    termination_request,
    valid_mask,
)
from softcvm.abi.insn import GuestOp, Hlt, Load, Store, Vmgexit, Wrmsr
from softcvm.abi.svm import Msr
from softcvm.sim.addr import PAGE_SHIFT

__all__ = (
    "GhcbClient",
    "GhcbReply",
    "GuestSteps",
    "LinuxTerm",
    "PscRequest",
    "TermSet",
    "hv_features",
    "msr_cpuid",
    "msr_page_state_change",
    "negotiate",
    "terminate",
)

T = TypeVar("T")
GuestSteps = Generator[GuestOp, Any, T]
"""A part of a scripted guest that comes back with a T."""


class TermSet(IntEnum):
    """Who gives the meaning of a termination code.  [GHCB-56421 §2.3.1]: 0 is the specification's."""

    GENERAL = 0
    LINUX = 1
    SOFTCVM = 2
    """This project's scripted guests: code 0 is a good end, another is the check that failed."""


class LinuxTerm(IntEnum):
    """Reason set 1 (GHCB_TERM_*, arch/x86/include/asm/sev-common.h, v7.2)."""

    REGISTER = 0
    PSC = 1
    PVALIDATE = 2
    NOT_VMPL0 = 3
    CPUID = 4
    CPUID_HV = 5
    SECRETS_PAGE = 6


class GhcbReply(NamedTuple):
    """What the hypervisor left in the GHCB."""

    rax: int
    rbx: int
    info_1: int
    info_2: int


class PscRequest(NamedTuple):
    """One entry of a page-state-change buffer: 4K or, `huge`, 2M."""

    gpa: int
    op: PscOp
    huge: bool = False


def terminate(reason_set: int, reason: int) -> GuestSteps[NoReturn]:
    """Ask to be ended; a hypervisor that goes on meets a halted vCPU."""
    yield Wrmsr(Msr.SEV_ES_GHCB, termination_request(reason_set, reason))
    yield Vmgexit()
    while True:
        yield Hlt()


def _exchange(request: int, response: GhcbMsr) -> GuestSteps[int]:
    """One request of the MSR protocol.  Any other response code is a broken hypervisor."""
    yield Wrmsr(Msr.SEV_ES_GHCB, request)
    value: int = yield Vmgexit()
    if value & GHCB_MSR_INFO_MASK != response:
        yield from terminate(TermSet.GENERAL, TermReason.GENERAL)
    return value


def negotiate() -> GuestSteps[int]:
    """Agree on a protocol version; the C-bit position the hypervisor names.

    What it names is a hint: a guest takes the real one from its own CPUID table.
    """
    value = yield from _exchange(GhcbMsr.SEV_INFO_REQ, GhcbMsr.SEV_INFO_RESP)
    low, high = value >> 32 & 0xFFFF, value >> 48
    if high < GHCB_VERSION_MIN or low > GHCB_VERSION_MAX or high < GHCB_VERSION_MAX:
        yield from terminate(TermSet.GENERAL, TermReason.PROTOCOL_RANGE)
    return value >> 24 & 0xFF


def hv_features() -> GuestSteps[HvFeatures]:
    """What the hypervisor can do.  An SNP guest cannot start without its SNP bit."""
    value = yield from _exchange(GhcbMsr.HV_FT_REQ, GhcbMsr.HV_FT_RESP)
    features = HvFeatures(value >> 12)
    if HvFeatures.SNP not in features:
        yield from terminate(TermSet.GENERAL, TermReason.SNP_UNSUPPORTED)
    return features


def msr_cpuid(function: int) -> GuestSteps[tuple[int, int, int, int]]:
    """CPUID as the hypervisor tells it, a register at a time: never to be relied on."""
    registers = []
    for register in range(4):
        value = yield from _exchange(cpuid_request(function, register), GhcbMsr.CPUID_RESP)
        registers.append(value >> 32)
    return registers[0], registers[1], registers[2], registers[3]


def msr_page_state_change(gpa: int, op: PscOp) -> GuestSteps[None]:
    """Change one 4K page without a GHCB: how the GHCB page itself becomes shared."""
    value = yield from _exchange(psc_request(gpa >> PAGE_SHIFT, op), GhcbMsr.PSC_RESP)
    if value >> 32:
        yield from terminate(TermSet.LINUX, LinuxTerm.PSC)


class GhcbClient:
    """One vCPU's registered GHCB.  Nothing here outlives a call but the page's address."""

    def __init__(self, gpa: int) -> None:
        self.gpa = gpa

    def register(self) -> GuestSteps[None]:
        """Share nothing, tell the hypervisor which page it is, and zero it."""
        gfn = self.gpa >> PAGE_SHIFT
        preferred = yield from _exchange(GhcbMsr.PREF_GPA_REQ, GhcbMsr.PREF_GPA_RESP)
        if preferred >> 12 not in (GHCB_MSR_GPA_NONE, gfn):
            yield from terminate(TermSet.LINUX, LinuxTerm.REGISTER)
        value = yield from _exchange(gpa_request(gfn), GhcbMsr.REG_GPA_RESP)
        if value >> 12 != gfn:
            yield from terminate(TermSet.LINUX, LinuxTerm.REGISTER)
        page = Ghcb(protocol_version=GHCB_VERSION_MAX)
        yield Store(self.gpa, bytes(page), c=False)

    def call(
        self, code: GhcbExit, info_1: int = 0, info_2: int = 0, **supplied: int
    ) -> GuestSteps[GhcbReply]:
        """VMGEXIT with these inputs; `supplied` are further GHCB fields, by name."""
        inputs = {
            "sw_exit_code": int(code),
            "sw_exit_info_1": info_1,
            "sw_exit_info_2": info_2,
            **supplied,
        }
        page = Ghcb(None, valid_bitmap=valid_mask(*inputs).to_bytes(16, "little"), **inputs)
        yield Store(self.gpa, bytes(page.data[:_REGISTERS_END]), c=False)
        yield Wrmsr(Msr.SEV_ES_GHCB, self.gpa)
        yield Vmgexit()
        left: bytes = yield Load(self.gpa, _REGISTERS_END, c=False)
        answer = Ghcb(left + bytes(Ghcb.SIZE - len(left)))
        return GhcbReply(answer.rax, answer.rbx, answer.sw_exit_info_1, answer.sw_exit_info_2)

    def checked_call(
        self, code: GhcbExit, info_1: int = 0, info_2: int = 0, **supplied: int
    ) -> GuestSteps[GhcbReply]:
        """A call that only a broken hypervisor refuses: SW_EXITINFO1 must come back without an error."""
        reply = yield from self.call(code, info_1, info_2, **supplied)
        if reply.info_1 & 0xFFFF_FFFF:
            yield from terminate(TermSet.GENERAL, TermReason.GENERAL)
        return reply

    def write_buffer(self, data: bytes) -> GuestSteps[int]:
        """Put data into the shared buffer; the address of it, for SW_SCRATCH."""
        if len(data) > GHCB_SHARED_BUFFER_SIZE:
            raise ValueError(f"{len(data)} bytes do not fit into the GHCB's shared buffer")
        yield Store(self.gpa + GHCB_SHARED_BUFFER, data, c=False)
        return self.gpa + GHCB_SHARED_BUFFER

    def read_buffer(self, length: int) -> GuestSteps[bytes]:
        data: bytes = yield Load(self.gpa + GHCB_SHARED_BUFFER, length, c=False)
        return data

    def page_state_change(self, requests: Sequence[PscRequest]) -> GuestSteps[None]:
        """Have the hypervisor change every one of these, PSC_MAX_ENTRIES to a buffer.

        Terminates when it fails, or when what it wrote back into the buffer cannot be true.
        """
        for first in range(0, len(requests), PSC_MAX_ENTRIES):
            yield from self._one_buffer(requests[first : first + PSC_MAX_ENTRIES])

    def _one_buffer(self, requests: Sequence[PscRequest]) -> GuestSteps[None]:
        end = len(requests) - 1
        # PscEntry: a page-aligned gpa is gfn << 12
        entries = [r.huge << 56 | r.op.value << 52 | r.gpa for r in requests]
        buffer = bytes(PscHeader(end_entry=end)) + pack(f"<{len(entries)}Q", *entries)
        scratch = yield from self.write_buffer(buffer)
        current = 0
        while current <= end:
            reply = yield from self.call(GhcbExit.PSC, sw_scratch=scratch)
            header = PscHeader((yield from self.read_buffer(PSC_HEADER_SIZE)))
            if (
                reply.info_1 & 0xFFFF_FFFF
                or reply.info_2
                or header.reserved
                or header.end_entry != end
                or header.cur_entry < current
            ):
                yield from terminate(TermSet.LINUX, LinuxTerm.PSC)
            current = header.cur_entry


_REGISTERS_END = 0x400
"""The save area up to and with the valid bitmap: all that a call supplies and reads back."""
