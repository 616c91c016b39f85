"""What a hostile guest does: short tapes of instructions, good and bad, on the addresses that others use.

GFN 16 to 23 are shared in VMs that a well-behaved VMM built; the GHCB is GFN 16.
"""

from struct import pack

from softcvm.abi.ghcb import (
    GHCB_SHARED_BUFFER,
    ApCreation,
    Ghcb,
    GhcbExit,
    GhcbMsr,
    PscOp,
    gpa_request,
    psc_entry,
    psc_request,
    termination_request,
    valid_mask,
)
from softcvm.abi.insn import (
    Fetch,
    GuestOp,
    Hlt,
    Load,
    Pvalidate,
    Rmpadjust,
    Rmpquery,
    Store,
    Touch,
    Vmgexit,
    Wrmsr,
)
from softcvm.abi.svm import Msr

__all__ = ("REGISTER", "TAPES")

PAGE = 4096
GHCB = 16 * PAGE
Tape = tuple[GuestOp, ...]


def by_msr(value: int) -> Tape:
    return (Wrmsr(Msr.SEV_ES_GHCB, value), Vmgexit())


def by_page(
    code: int, info_1: int = 0, info_2: int = 0, at: int = GHCB, usage: int = 0, **more: int
) -> Tape:
    given = {
        "sw_exit_code": code,
        "sw_exit_info_1": info_1,
        "sw_exit_info_2": info_2,
        **more,
    }
    mask = valid_mask(*given).to_bytes(16, "little")
    page = Ghcb(None, valid_bitmap=mask, protocol_version=2, ghcb_usage=usage, **given)
    return (Store(at, bytes(page), c=False), Wrmsr(Msr.SEV_ES_GHCB, at), Vmgexit())


def by_buffer(*entries: int, cur: int = 0, end: int | None = None, offset: int = 0) -> Tape:
    """A page-state-change buffer; `offset` is where in the shared buffer it lies."""
    scratch = GHCB + GHCB_SHARED_BUFFER + offset
    last = len(entries) - 1 if end is None else end
    body = pack("<HHI", cur, last & 0xFFFF, 0) + b"".join(pack("<Q", e) for e in entries)
    store, wrmsr, exit_ = by_page(GhcbExit.PSC, sw_scratch=scratch)
    return (store, Store(scratch, body[: 4096 - (scratch - GHCB)], c=False), wrmsr, exit_)


def _accesses() -> list[Tape]:
    tapes: list[Tape] = []
    for gfn in (0, 1, 3, 15, 16, 17, 511, 512, 513, 700, 1023, 1200):
        tapes += [
            (Touch(gfn * PAGE, write=True),),
            (Touch(gfn * PAGE, c=False, write=True),),
            (Load(gfn * PAGE + 8, 16), Store(gfn * PAGE + PAGE - 4, b"hostile!")),
            (Pvalidate(gfn * PAGE, 0, True), Touch(gfn * PAGE, write=True)),
            (Pvalidate(gfn * PAGE, 0, False),),
        ]
    return tapes


REGISTER: Tape = by_msr(gpa_request(16))
"""Make the GHCB known, without which KVM answers nothing that is asked through it."""

TAPES: tuple[Tape, ...] = (
    (Hlt(),),
    *_accesses(),
    (Touch(0, 600),),
    (Touch(0, 16, write=True), Touch(24 * PAGE, 480, write=True)),
    (Pvalidate(0, 0, True, 16), Pvalidate(24 * PAGE, 0, True, 480)),
    (Pvalidate(512 * PAGE, 1, True), Touch(512 * PAGE, 512, write=True)),
    (Pvalidate(512 * PAGE, 1, False),),
    (Pvalidate(512 * PAGE, 0, True), Touch(513 * PAGE)),
    (Pvalidate(600 * PAGE, 0, True, 40), Load(600 * PAGE, 5000)),
    (Rmpadjust(0, 0, 1, 0xF), Rmpquery(0, 1)),
    (Rmpadjust(3 * PAGE, 0, 1, 0, vmsa=True),),
    (Rmpadjust(512 * PAGE, 1, 3, 1),),
    (Fetch(PAGE), Fetch(700 * PAGE, user=True)),
    *(by_msr(psc_request(gfn, op)) for gfn in (0, 3, 17, 512, 700) for op in PscOp),
    by_msr(psc_request((1 << 40) - 1, PscOp.PRIVATE)),
    by_msr(gpa_request(16)),
    by_msr(gpa_request(3)),
    by_msr(int(GhcbMsr.HV_FT_REQ)),
    by_msr(int(GhcbMsr.AP_RESET_HOLD_REQ)),
    by_msr(int(GhcbMsr.SEV_INFO_REQ)),
    by_msr(termination_request(0, 0)),
    by_msr(0),
    by_msr(0xFFFF_FFFF_FFFF_F000),
    (*by_msr(gpa_request(16)), *by_page(GhcbExit.HV_FEATURES)),
    (*by_msr(gpa_request(16)), *by_buffer(psc_entry(700, PscOp.PRIVATE))),
    by_buffer(*(psc_entry(gfn, PscOp.SHARED) for gfn in range(600, 853))),
    by_buffer(psc_entry(512, PscOp.PRIVATE, huge=True), psc_entry(3, PscOp.SHARED)),
    by_buffer(
        psc_entry(512, PscOp.SHARED, huge=True), psc_entry(1024, PscOp.SHARED, huge=True)
    ),
    by_buffer(psc_entry(512, PscOp.PRIVATE, huge=True, cur_page=100)),
    by_buffer(psc_entry(513, PscOp.PRIVATE, huge=True)),
    by_buffer(psc_entry(5, PscOp.SHARED, cur_page=3)),
    by_buffer(psc_entry(5, PscOp.SHARED, cur_page=1), psc_entry(6, PscOp.PSMASH)),
    by_buffer(psc_entry(6, 9), psc_entry(7, PscOp.UNSMASH), psc_entry(8, PscOp.SHARED)),
    by_buffer(psc_entry(8, PscOp.SHARED), end=252),
    by_buffer(psc_entry(8, PscOp.SHARED), end=253),
    by_buffer(psc_entry(8, PscOp.SHARED), end=0xFFFF),
    by_buffer(psc_entry(8, PscOp.SHARED), cur=9),
    by_buffer(psc_entry(8, PscOp.SHARED), psc_entry(9, PscOp.SHARED), offset=2008),
    by_buffer(psc_entry(8, PscOp.SHARED), offset=2024),
    by_buffer(psc_entry((1 << 40) - 1, PscOp.PRIVATE), psc_entry(0, PscOp.PRIVATE)),
    by_page(GhcbExit.PSC, sw_scratch=3 * PAGE),
    by_page(GhcbExit.PSC, sw_scratch=GHCB),
    by_page(GhcbExit.PSC, sw_scratch=(1 << 64) - 4),
    by_page(GhcbExit.PSC),
    by_page(0x1234),
    by_page(GhcbExit.CPUID, rax=1, rcx=0),
    by_page(GhcbExit.CPUID, rax=0xD, rcx=0),
    by_page(GhcbExit.HV_FEATURES, usage=1),
    by_page(GhcbExit.TERM_REQUEST),
    by_page(GhcbExit.AP_RESET_HOLD),
    by_page(GhcbExit.AP_JUMP_TABLE, info_1=0, info_2=0x1000),
    by_page(GhcbExit.AP_JUMP_TABLE, info_1=1),
    by_page(GhcbExit.AP_JUMP_TABLE, info_1=7),
    by_page(GhcbExit.NMI_COMPLETE),
    by_page(GhcbExit.UNSUPPORTED_EVENT),
    by_page(GhcbExit.RDTSC),
    by_page(GhcbExit.IOIO, info_1=0x3F8_0010, rax=0x41),
    by_page(GhcbExit.IOIO, info_1=0x3F8_0011),
    by_page(GhcbExit.IOIO, info_1=0x3F8_0001),
    by_page(GhcbExit.IOIO, info_1=0x3F8_0014, info_2=100, sw_scratch=GHCB + GHCB_SHARED_BUFFER),
    by_page(
        GhcbExit.IOIO, info_1=0x3F8_0015, info_2=5000, sw_scratch=GHCB + GHCB_SHARED_BUFFER
    ),
    by_page(GhcbExit.IOIO, info_1=0x3F8_0015, info_2=1 << 40, sw_scratch=GHCB + 0x900),
    by_page(GhcbExit.MMIO_READ, 0xFEC0_0000, 4, sw_scratch=GHCB + GHCB_SHARED_BUFFER),
    by_page(GhcbExit.MMIO_WRITE, 0xFEC0_0000, 8, sw_scratch=GHCB + GHCB_SHARED_BUFFER + 2030),
    by_page(GhcbExit.MMIO_WRITE, 0xFEC0_0000, 9, sw_scratch=GHCB + GHCB_SHARED_BUFFER),
    by_page(GhcbExit.MMIO_READ, 0xFEC0_0000, 0, sw_scratch=GHCB + GHCB_SHARED_BUFFER),
    by_page(GhcbExit.VMMCALL, rax=12, cpl=0, rbx=0x5000, rcx=2, rdx=0x10),
    by_page(GhcbExit.VMMCALL, rax=12, cpl=3),
    by_page(GhcbExit.VMMCALL, rax=99, cpl=0),
    by_page(GhcbExit.GUEST_REQUEST, 17 * PAGE, 18 * PAGE),
    by_page(GhcbExit.GUEST_REQUEST, 17 * PAGE, 17 * PAGE),
    by_page(GhcbExit.GUEST_REQUEST, 17 * PAGE, 4000 * PAGE),
    by_page(GhcbExit.EXT_GUEST_REQUEST, 17 * PAGE, 18 * PAGE, rax=19 * PAGE, rbx=1),
    *(
        by_page(GhcbExit.AP_CREATION, apic_id << 32 | request, gfn * PAGE, rax=features)
        for apic_id, request, gfn, features in (
            (1, ApCreation.CREATE, 3, 1),
            (0, ApCreation.CREATE, 3, 1),
            (1, ApCreation.CREATE_ON_INIT, 3, 1),
            (0, ApCreation.DESTROY, 0, 1),
            (1, ApCreation.DESTROY, 0, 0),
            (1, ApCreation.CREATE, 512, 1),
            (1, ApCreation.CREATE, 1200, 1),
            (1, ApCreation.CREATE, 17, 1),
            (9, ApCreation.CREATE, 3, 1),
            (1, 7, 3, 1),
        )
    ),
    by_page(GhcbExit.HV_FEATURES, at=3 * PAGE),
    by_page(GhcbExit.HV_FEATURES, at=17 * PAGE),
)
