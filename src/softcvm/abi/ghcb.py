"""GHCB: the page and the MSR by which an SEV-ES or SNP guest talks to its hypervisor.

[GHCB-56421] revision 2.  Linux: arch/x86/include/asm/sev-common.h and struct ghcb in
arch/x86/include/asm/svm.h, v6.12 and v7.2 alike.

A page-state-change buffer that fills the shared buffer has 253 entries: (2032 - 8) / 8, and Linux's
VMGEXIT_PSC_MAX_COUNT agrees.  The 252 of the 2022 upstream proposal ("up to 252 individual pages") is
one less; nothing in the format makes the last entry special, so 253 is what is used here.
"""

from enum import IntEnum, IntFlag

from softcvm.abi.layout import U8, U16, U32, U64, Bits, Bytes, Layout

__all__ = (
    "GHCB_HV_FT_SUPPORTED",
    "GHCB_MSR_AP_RESET_HOLD_RESULT",
    "GHCB_MSR_GPA_NONE",
    "GHCB_MSR_INFO_MASK",
    "GHCB_MSR_PSC_ERROR",
    "GHCB_SHARED_BUFFER",
    "GHCB_SHARED_BUFFER_SIZE",
    "GHCB_USAGE_STANDARD",
    "GHCB_VALID",
    "GHCB_VERSION_DEFAULT",
    "GHCB_VERSION_MAX",
    "GHCB_VERSION_MIN",
    "PSC_ENTRIES_PROPOSED",
    "PSC_ENTRY_SIZE",
    "PSC_HEADER_SIZE",
    "PSC_MAX_ENTRIES",
    "ApCreation",
    "Ghcb",
    "GhcbError",
    "GhcbExit",
    "GhcbMsr",
    "GuestRequestError",
    "HvFeatures",
    "IoioInfo",
    "PscEntry",
    "PscError",
    "PscHeader",
    "PscOp",
    "TermReason",
    "cpuid_request",
    "ghcb_valid",
    "gpa_request",
    "psc_entry",
    "psc_request",
    "sev_info",
    "termination_request",
    "valid_mask",
)

GHCB_VERSION_MIN = 1
GHCB_VERSION_MAX = 2
GHCB_VERSION_DEFAULT = 2
"""What KVM_SEV_INIT2 takes a ghcb_version of 0 to mean (arch/x86/kvm/svm/sev.c, v7.2)."""

GHCB_SHARED_BUFFER = 0x800
GHCB_SHARED_BUFFER_SIZE = 2032
GHCB_USAGE_STANDARD = 0


class Ghcb(Layout, size=4096):
    """The GHCB page.  [GHCB-56421 §2.6 Table 3]"""

    cpl = U8(0x0CB)
    xss = U64(0x140)
    dr7 = U64(0x160)
    rip = U64(0x178)
    rsp = U64(0x1D8)
    rax = U64(0x1F8)
    rcx = U64(0x308)
    rdx = U64(0x310)
    rbx = U64(0x318)
    rbp = U64(0x328)
    rsi = U64(0x330)
    rdi = U64(0x338)
    r8 = U64(0x340)
    r9 = U64(0x348)
    r10 = U64(0x350)
    r11 = U64(0x358)
    r12 = U64(0x360)
    r13 = U64(0x368)
    r14 = U64(0x370)
    r15 = U64(0x378)
    sw_exit_code = U64(0x390)
    sw_exit_info_1 = U64(0x398)
    sw_exit_info_2 = U64(0x3A0)
    sw_scratch = U64(0x3A8)
    xcr0 = U64(0x3E8)
    valid_bitmap = Bytes(0x3F0, 16)
    x87_state_gpa = U64(0x400)
    shared_buffer = Bytes(GHCB_SHARED_BUFFER, GHCB_SHARED_BUFFER_SIZE)
    protocol_version = U16(0xFFA)
    ghcb_usage = U32(0xFFC)


GHCB_VALID = {
    name: field.offset // 8
    for name, field in Ghcb.fields().items()
    if isinstance(field, U8) and field.offset < 0x3F0
}
"""Field -> its bit of valid_bitmap: bit n covers the quadword at offset 8*n."""


def ghcb_valid(bitmap: bytes, field: str) -> bool:
    """Whether the guest marked a field as supplied."""
    bit = GHCB_VALID[field]
    return bool(bitmap[bit >> 3] >> (bit & 7) & 1)


def valid_mask(*fields: str) -> int:
    """The valid_bitmap, as a little-endian number, that marks these fields."""
    mask = 0
    for field in fields:
        mask |= 1 << GHCB_VALID[field]
    return mask


class GhcbMsr(IntEnum):
    """GHCBInfo, bits 11:0 of the GHCB MSR; 0 says the rest is a GHCB GPA.  [GHCB-56421 §2.3.1]"""

    GPA = 0x000
    SEV_INFO_RESP = 0x001
    SEV_INFO_REQ = 0x002
    CPUID_REQ = 0x004
    CPUID_RESP = 0x005
    AP_RESET_HOLD_REQ = 0x006
    AP_RESET_HOLD_RESP = 0x007
    PREF_GPA_REQ = 0x010
    PREF_GPA_RESP = 0x011
    REG_GPA_REQ = 0x012
    REG_GPA_RESP = 0x013
    PSC_REQ = 0x014
    PSC_RESP = 0x015
    VMPL_REQ = 0x016
    VMPL_RESP = 0x017
    HV_FT_REQ = 0x080
    HV_FT_RESP = 0x081
    TERM_REQ = 0x100


GHCB_MSR_INFO_MASK = 0xFFF
GHCB_MSR_GPA_NONE = (1 << 52) - 1
"""GHCBData of all ones: no preferred GPA, or a GPA that was not registered."""
GHCB_MSR_PSC_ERROR = 1 << 63 | GhcbMsr.PSC_RESP
"""KVM's error reply to a page-state change by MSR."""
GHCB_MSR_AP_RESET_HOLD_RESULT = GHCB_MSR_GPA_NONE << 12
"""Bits 63:12 of the AP reset hold response: not zero once a SIPI released the processor."""


def sev_info(max_version: int, min_version: int, c_bit: int) -> int:
    """SEV information response."""
    return max_version << 48 | min_version << 32 | c_bit << 24 | GhcbMsr.SEV_INFO_RESP


def cpuid_request(function: int, register: int) -> int:
    """CPUID request; register 0..3 are EAX, EBX, ECX, EDX."""
    return function << 32 | register << 30 | GhcbMsr.CPUID_REQ


def gpa_request(gfn: int) -> int:
    """Register GHCB GPA request."""
    return gfn << 12 | GhcbMsr.REG_GPA_REQ


def psc_request(gfn: int, op: int) -> int:
    """Page-state change of one 4K page by MSR."""
    return op << 52 | gfn << 12 | GhcbMsr.PSC_REQ


def termination_request(reason_set: int, reason: int) -> int:
    return reason << 16 | reason_set << 12 | GhcbMsr.TERM_REQ


class TermReason(IntEnum):
    """Reason set 0.  [GHCB-56421 §2.3.1]"""

    GENERAL = 0
    PROTOCOL_RANGE = 1
    SNP_UNSUPPORTED = 2


class HvFeatures(IntFlag):
    """Hypervisor features.  [GHCB-56421 §4.1.11]"""

    SNP = 1 << 0
    AP_CREATION = 1 << 1
    RESTRICTED_INJECTION = 1 << 2
    RESTRICTED_INJECTION_TIMER = 1 << 3
    APIC_ID_LIST = 1 << 4
    MULTI_VMPL = 1 << 5


GHCB_HV_FT_SUPPORTED = HvFeatures.SNP | HvFeatures.AP_CREATION
"""What KVM answers (arch/x86/kvm/svm/sev.c, v7.2)."""


class GhcbExit(IntEnum):
    """SW_EXITCODE: #VMEXIT codes and the GHCB's own events.  [GHCB-56421 §4 Table 6]"""

    READ_DR7 = 0x27
    WRITE_DR7 = 0x37
    RDTSC = 0x6E
    RDPMC = 0x6F
    CPUID = 0x72
    INVD = 0x76
    IOIO = 0x7B
    MSR = 0x7C
    VMMCALL = 0x81
    RDTSCP = 0x87
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MMIO_READ = 0x8000_0001
    MMIO_WRITE = 0x8000_0002
    NMI_COMPLETE = 0x8000_0003
    AP_RESET_HOLD = 0x8000_0004
    AP_JUMP_TABLE = 0x8000_0005
    PSC = 0x8000_0010
    GUEST_REQUEST = 0x8000_0011
    EXT_GUEST_REQUEST = 0x8000_0012
    AP_CREATION = 0x8000_0013
    HV_DOORBELL = 0x8000_0014
    HV_IPI = 0x8000_0015
    HV_TIMER = 0x8000_0016
    APIC_ID_LIST = 0x8000_0017
    RUN_VMPL = 0x8000_0018
    HV_FEATURES = 0x8000_FFFD
    TERM_REQUEST = 0x8000_FFFE
    UNSUPPORTED_EVENT = 0x8000_FFFF


class GhcbError(IntEnum):
    """SW_EXITINFO2 when the low half of SW_EXITINFO1 is 2.  [GHCB-56421 §4.1 Table 7]"""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH_AREA = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


class GuestRequestError(IntEnum):
    """High half of SW_EXITINFO2 of a guest request: the hypervisor's own failures.  [GHCB-56421 §4.1.8]"""

    INVALID_LENGTH = 1
    BUSY = 2
    GENERIC = 1 << 31


class ApCreation(IntEnum):
    """Low half of SW_EXITINFO1 of AP creation.  [GHCB-56421 §4.1.9]"""

    CREATE_ON_INIT = 0
    CREATE = 1
    DESTROY = 2


class IoioInfo:
    """Bits of SW_EXITINFO1 of IOIO.  [APM2-24593 §15.10.2]"""

    IN = 1 << 0
    STRING = 1 << 2
    REP = 1 << 3
    SIZE_SHIFT = 4
    SIZE_MASK = 7 << 4  # one bit each for 1, 2, 4 bytes: the field's value is the size
    PORT_SHIFT = 16


class PscOp(IntEnum):
    """Operation of a page-state change.  [GHCB-56421 §4.1.6]"""

    PRIVATE = 1
    SHARED = 2
    PSMASH = 3
    UNSMASH = 4


class PscError(IntEnum):
    """SW_EXITINFO2 of a refused page-state change.  [GHCB-56421 §4.1.6]; Linux VMGEXIT_PSC_ERROR_*"""

    INVALID_HDR = 1 << 32 | 1
    INVALID_ENTRY = 1 << 32 | 2
    GENERIC = 0x100 << 32


class PscHeader(Layout, size=8):
    """Start of a page-state-change buffer.  end_entry is the last entry to do, inclusive."""

    cur_entry = U16(0)
    end_entry = U16(2)
    reserved = U32(4)


class PscEntry(Layout, size=8):
    """One range: 1 or 512 pages of 4K.  cur_page counts those done."""

    cur_page = Bits(11, 0)
    gfn = Bits(51, 12)
    operation = Bits(55, 52)
    pagesize = Bits(56)
    reserved = Bits(63, 57)


PSC_HEADER_SIZE = PscHeader.SIZE
PSC_ENTRY_SIZE = PscEntry.SIZE
PSC_MAX_ENTRIES = (GHCB_SHARED_BUFFER_SIZE - PSC_HEADER_SIZE) // PSC_ENTRY_SIZE
PSC_ENTRIES_PROPOSED = 252
"""What the 2022 mail on the first design counts ("up to 252 individual pages")."""


def psc_entry(gfn: int, op: int, *, huge: bool = False, cur_page: int = 0) -> int:
    """A PscEntry as a number."""
    return int(huge) << 56 | op << 52 | gfn << 12 | cur_page
