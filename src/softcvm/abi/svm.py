"""SVM as SEV-SNP extends it: exit codes, error-code bits, MSRs, exception vectors.

[APM2-24593 §15.12, §15.25.6, §15.35, §15.36 and appendix C]; Linux: arch/x86/include/uapi/asm/svm.h and
PFERR_* in arch/x86/include/asm/kvm_host.h, v7.2.
"""

from enum import IntEnum, IntFlag

__all__ = (
    "VC_NOT_RESTARTABLE",
    "VC_NOT_VALIDATED",
    "EventInj",
    "ExitCode",
    "GuestException",
    "Msr",
    "NestedCtl",
    "PfErr",
    "SevFeatures",
    "SevStatus",
    "Vector",
)


class PfErr(IntFlag):
    """Bits of a #PF error code and of EXITINFO1 of #VMEXIT(NPF).  [APM2-24593 §15.25.6, §15.36.10]"""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RSVD = 1 << 3
    FETCH = 1 << 4
    PK = 1 << 5
    SHSTK = 1 << 6
    RMP = 1 << 31
    GUEST_FINAL = 1 << 32
    GUEST_PAGE = 1 << 33
    GUEST_ENC = 1 << 34
    GUEST_SIZEM = 1 << 35
    GUEST_VMPL = 1 << 36
    GUEST_SSS = 1 << 37
    IMPLICIT_ACCESS = 1 << 48  # KVM's own, never set by the processor
    PRIVATE_ACCESS = 1 << 49  # KVM's own


class ExitCode(IntEnum):
    """#VMEXIT codes of the model.  [APM2-24593 appendix C; GHCB-56421 §4]"""

    INVALID = 0xFFFF_FFFF_FFFF_FFFF
    INTR = 0x60
    CPUID = 0x72
    HLT = 0x78
    IOIO = 0x7B
    MSR = 0x7C
    SHUTDOWN = 0x7F
    VMMCALL = 0x81
    XSETBV = 0x8D
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_UNACCELERATED_ACCESS = 0x402
    VMGEXIT = 0x403


class Vector(IntEnum):
    BP = 3
    OF = 4
    UD = 6
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    VC = 29


VC_NOT_VALIDATED = 0x404
"""#VC error code: the page is assigned to the guest but not validated.  [APM2-24593 §15.36.10]"""
VC_NOT_RESTARTABLE = 0x406


class Msr(IntEnum):
    EFER = 0xC000_0080
    SYSCFG = 0xC001_0010
    HWCR = 0xC001_0015
    VM_HSAVE_PA = 0xC001_0117
    VM_PAGE_FLUSH = 0xC001_011E
    SEV_ES_GHCB = 0xC001_0130
    SEV_STATUS = 0xC001_0131
    RMP_BASE = 0xC001_0132
    RMP_END = 0xC001_0133
    RMP_CFG = 0xC001_0136


class SevFeatures(IntFlag):
    """SEV_FEATURES of the VMSA.  [APM2-24593 Table B-4]"""

    SNP_ACTIVE = 1 << 0
    VTOM = 1 << 1
    REFLECT_VC = 1 << 2
    RESTRICTED_INJECTION = 1 << 3
    ALTERNATE_INJECTION = 1 << 4
    DEBUG_SWAP = 1 << 5
    SECURE_TSC = 1 << 9


class SevStatus(IntFlag):
    """SEV_STATUS MSR: bit n+2 is SEV_FEATURES bit n.  [APM2-24593 §15.34.10]"""

    SEV = 1 << 0
    SEV_ES = 1 << 1
    SNP = 1 << 2


class NestedCtl(IntFlag):
    """Control area 0x90: what kind of guest VMRUN enters.  [APM2-24593 Table B-1]"""

    NP_ENABLE = 1 << 0
    SEV_ENABLE = 1 << 1
    SEV_ES_ENABLE = 1 << 2


class EventInj(IntFlag):
    """EVENTINJ, over the vector in bits 7:0; an error code lies in bits 63:32.  [APM2-24593 §15.20]"""

    TYPE_EXCEPTION = 3 << 8
    ERROR_CODE_VALID = 1 << 11
    VALID = 1 << 31


class GuestException(Exception):
    """An exception delivered inside the guest."""

    def __init__(self, vector: Vector, error_code: int = 0, cr2: int = 0) -> None:
        super().__init__(f"#{vector.name} error code {error_code:#x} at {cr2:#x}")
        self.vector = vector
        self.error_code = error_code
        self.cr2 = cr2
