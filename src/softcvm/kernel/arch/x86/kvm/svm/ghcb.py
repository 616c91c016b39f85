"""#VMGEXIT: what a guest asks of its hypervisor, by MSR or by page (arch/x86/kvm/svm/sev.c, v7.2).

Owns the dispatch and the checks of the GHCB protocol; a mistake of the guest is answered to the guest.
Page-state changes are psc.py, the instructions that KVM emulates for the guest (CPUID, MSR, port I/O,
MMIO) emulate.py, requests to firmware guest_request.py, starting other vCPUs ap.py.

Every field of the page is read once, into VcpuSevEs, and only that copy is checked and used.
"""

from contextlib import suppress
from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.ghcb import (
    GHCB_HV_FT_SUPPORTED,
    GHCB_MSR_AP_RESET_HOLD_RESULT,
    GHCB_MSR_GPA_NONE,
    GHCB_MSR_INFO_MASK,
    GHCB_USAGE_STANDARD,
    GHCB_VERSION_MIN,
    PSC_HEADER_SIZE,
    Ghcb,
    GhcbError,
    GhcbExit,
    GhcbMsr,
    IoioInfo,
    ghcb_valid,
)
from softcvm.abi.ghcb import (
    sev_info as ghcb_msr_sev_info,
)
from softcvm.abi.kvm.run import KvmExit, SystemEvent
from softcvm.kernel.arch.x86.kvm.svm import ap, emulate, guest_request, psc
from softcvm.kernel.arch.x86.kvm.svm.ghcb_page import (
    GhcbPage,
    Scratch,
    kvm_read_guest,
    kvm_vcpu_map,
    kvm_vcpu_write_guest,
)
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info, sev_snp_guest
from softcvm.kernel.errors import KernelError
from softcvm.kernel.locks import Rank
from softcvm.kernel.virt.kvm.dirty_log import mark_page_dirty_in_slot
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, Gfn, Gpa
from softcvm.sim.state import State
from softcvm.sim.steps import Lockdep, Mutex, Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "VcpuSevEs",
    "ghcb_reply_error",
    "setup_vmgexit_scratch",
    "sev_es_unmap_ghcb",
    "sev_es_vcpu_reset",
    "sev_handle_vmgexit",
)

_SCRATCH_LIMIT = 16 * 4096
"""GHCB_SCRATCH_AREA_LIMIT: of a copy of guest memory outside the GHCB."""


class VcpuSevEs(State):
    """struct vcpu_sev_es_state: the exit under way.

    ghcb: mapped from the exit until the vCPU is entered again.  sw_scratch, valid_bitmap: copies
    of the page's fields; those of exit code and infos are in the VMCB, where an exit of any guest has them.
    """

    saved = (
        "ghcb",
        "ghcb_registered_gpa",
        "valid_bitmap",
        "sw_scratch",
        "scratch",
        "psc",
        "string_io",
        "ap_reset_hold",
        "received_first_sipi",
        "snp_pending_vmsa_gpa",
        "snp_guest_vmsa_gpa",
        "snp_ap_waiting_for_reset",
        "snp_has_guest_vmsa",
    )
    derived = {"snp_vmsa_mutex": "free at quiescent points"}

    def __init__(self, lockdep: Lockdep) -> None:
        self.ghcb: GhcbPage | None = None
        self.ghcb_registered_gpa: Gpa | None = None
        self.valid_bitmap = bytes(16)
        self.sw_scratch = 0
        self.scratch: Scratch | None = None
        self.psc: psc.Psc | None = None
        self.string_io: emulate.StringIo | None = None
        self.ap_reset_hold: GhcbMsr | GhcbExit | None = None
        """By which request the vCPU waits for a SIPI."""
        self.received_first_sipi = False
        self.snp_vmsa_mutex = Mutex(lockdep, "snp_vmsa_mutex", Rank.SNP_VMSA_MUTEX)
        """Around the four below, which another vCPU sets (ap.py)."""
        self.snp_pending_vmsa_gpa: Gpa | None = None
        self.snp_guest_vmsa_gpa: Gpa | None = None
        self.snp_ap_waiting_for_reset = False
        self.snp_has_guest_vmsa = False
        """The guest gave a VMSA at least once: KVM's own page is never used again."""

    def is_valid(self, *fields: str) -> bool:
        """Whether the guest marked all of these fields as supplied."""
        return all(ghcb_valid(self.valid_bitmap, field) for field in fields)

    def read_scratch(self, at: int, length: int) -> bytes:
        assert self.scratch is not None
        assert self.ghcb is not None
        return self.scratch.read(self.ghcb, at, length)

    def write_scratch(self, at: int, data: bytes) -> None:
        assert self.scratch is not None
        assert self.ghcb is not None
        self.scratch.write(self.ghcb, at, data)


def sev_es_vcpu_reset(vcpu: "KvmVcpu") -> None:
    """The GHCB MSR after reset: what a SEV information request would answer."""
    _answer_sev_info(vcpu)


def sev_handle_vmgexit(vcpu: "KvmVcpu") -> Steps[int]:
    """1: the guest goes on.  0: user space must act.  KernelError: KVM_RUN fails with it."""
    svm, kvm = vcpu.arch.svm, vcpu.kvm
    sev_es = svm.sev_es
    ghcb_gpa = svm.vmcb.ghcb_gpa
    if ghcb_gpa & GHCB_MSR_INFO_MASK:
        return _msr_protocol(vcpu)
    if not ghcb_gpa:
        return 1  # no page to answer in
    try:
        sev_es.ghcb = yield from kvm_vcpu_map(kvm, Gpa(ghcb_gpa))
    except KernelError:
        return 1  # the same: straight back to the guest
    ghcb = sev_es.ghcb.snapshot()
    _sync_from_ghcb(vcpu, ghcb)
    if sev_snp_guest(kvm) and sev_es.ghcb_registered_gpa != ghcb_gpa:
        if not kvm.linux.profile.unregistered_ghcb_answered:
            raise KernelError(EINVAL, f"GHCB GPA {ghcb_gpa:#x} is not registered")
        return ghcb_reply_error(vcpu, GhcbError.NOT_REGISTERED)
    reason = _validate(vcpu, ghcb.ghcb_usage)
    if reason is not None:
        return ghcb_reply_error(vcpu, reason)
    sev_es.ghcb.set(sw_exit_info_1=0, sw_exit_info_2=0)
    return (yield from _dispatch(vcpu))


def _sync_from_ghcb(vcpu: "KvmVcpu", ghcb: Ghcb) -> None:
    """sev_es_sync_from_ghcb(): take what the guest supplied, then clear its marks in the page."""
    sev_es, regs = vcpu.arch.svm.sev_es, vcpu.arch.regs
    sev_es.valid_bitmap = ghcb.valid_bitmap
    regs.data[:] = bytes(len(regs.data))
    for name in ("rax", "rbx", "rcx", "rdx", "rsi"):
        if sev_es.is_valid(name):
            setattr(regs, name, getattr(ghcb, name))
    if sev_es.is_valid("xcr0"):
        vcpu.arch.xcr0 = ghcb.xcr0
    vmcb = vcpu.arch.svm.vmcb
    vmcb.exit_code = ghcb.sw_exit_code
    vmcb.exit_info_1 = ghcb.sw_exit_info_1
    vmcb.exit_info_2 = ghcb.sw_exit_info_2
    sev_es.sw_scratch = ghcb.sw_scratch if sev_es.is_valid("sw_scratch") else 0
    vcpu.arch.svm.cpl = ghcb.cpl if sev_es.is_valid("cpl") else 0
    assert sev_es.ghcb is not None
    sev_es.ghcb.clear_valid_bitmap()


_NEEDS: dict[GhcbExit, tuple[str, ...]] = {
    GhcbExit.READ_DR7: (),
    GhcbExit.WRITE_DR7: ("rax",),
    GhcbExit.RDTSC: (),
    GhcbExit.RDPMC: ("rcx",),
    GhcbExit.CPUID: ("rax", "rcx"),
    GhcbExit.INVD: (),
    GhcbExit.IOIO: (),
    GhcbExit.MSR: ("rcx",),
    GhcbExit.VMMCALL: ("rax", "cpl"),
    GhcbExit.RDTSCP: (),
    GhcbExit.WBINVD: (),
    GhcbExit.MONITOR: ("rax", "rcx", "rdx"),
    GhcbExit.MWAIT: ("rax", "rcx"),
    GhcbExit.MMIO_READ: ("sw_scratch",),
    GhcbExit.MMIO_WRITE: ("sw_scratch",),
    GhcbExit.NMI_COMPLETE: (),
    GhcbExit.AP_RESET_HOLD: (),
    GhcbExit.AP_JUMP_TABLE: (),
    GhcbExit.PSC: ("sw_scratch",),
    GhcbExit.GUEST_REQUEST: (),
    GhcbExit.EXT_GUEST_REQUEST: (),
    GhcbExit.AP_CREATION: (),
    GhcbExit.HV_FEATURES: (),
    GhcbExit.TERM_REQUEST: (),
    GhcbExit.UNSUPPORTED_EVENT: (),
}
"""Events that KVM knows, and the fields that each must come with besides the exit code and infos."""

_SNP_ONLY = (
    GhcbExit.PSC,
    GhcbExit.GUEST_REQUEST,
    GhcbExit.EXT_GUEST_REQUEST,
    GhcbExit.AP_CREATION,
)


def _validate(vcpu: "KvmVcpu", usage: int) -> GhcbError | None:
    """sev_es_validate_vmgexit(): what the guest did wrong, if anything."""
    sev_es = vcpu.arch.svm.sev_es
    if usage != GHCB_USAGE_STANDARD:
        return GhcbError.INVALID_USAGE
    if not sev_es.is_valid("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2"):
        return GhcbError.MISSING_INPUT
    if vcpu.arch.svm.vmcb.exit_code not in _NEEDS:
        return GhcbError.INVALID_EVENT
    code = GhcbExit(vcpu.arch.svm.vmcb.exit_code)
    if code in _SNP_ONLY and not sev_snp_guest(vcpu.kvm):
        return GhcbError.MISSING_INPUT
    if not sev_es.is_valid(*_NEEDS[code], *_needs_more(vcpu, code)):
        return GhcbError.MISSING_INPUT
    if code in (GhcbExit.GUEST_REQUEST, GhcbExit.EXT_GUEST_REQUEST):
        aligned = (
            not (vcpu.arch.svm.vmcb.exit_info_1 | vcpu.arch.svm.vmcb.exit_info_2) & PAGE_MASK
        )
        if not aligned or vcpu.arch.svm.vmcb.exit_info_1 == vcpu.arch.svm.vmcb.exit_info_2:
            return GhcbError.MISSING_INPUT
    return None


def _needs_more(vcpu: "KvmVcpu", code: GhcbExit) -> tuple[str, ...]:
    """Fields that an event needs depending on what it says."""
    info_1 = vcpu.arch.svm.vmcb.exit_info_1
    if code is GhcbExit.CPUID and vcpu.arch.regs.rax == 0xD:
        return ("xcr0",)
    if code is GhcbExit.MSR and info_1:
        return ("rax", "rdx")
    if code is GhcbExit.IOIO:
        if info_1 & IoioInfo.STRING:
            return ("sw_scratch",)
        return () if info_1 & IoioInfo.IN else ("rax",)
    if code is GhcbExit.AP_CREATION and info_1 & 0xFFFF_FFFF != 2:
        return ("rax",)
    return ()


def _dispatch(vcpu: "KvmVcpu") -> Steps[int]:
    sev_es = vcpu.arch.svm.sev_es
    ghcb = sev_es.ghcb
    assert ghcb is not None
    code = GhcbExit(vcpu.arch.svm.vmcb.exit_code)
    match code:
        case GhcbExit.MMIO_READ | GhcbExit.MMIO_WRITE:
            return (yield from emulate.sev_es_mmio(vcpu, write=code is GhcbExit.MMIO_WRITE))
        case GhcbExit.NMI_COMPLETE:
            return 1  # the model delivers no NMI that this could unblock
        case GhcbExit.AP_RESET_HOLD:
            sev_es.ap_reset_hold = code
            return emulate.kvm_emulate_ap_reset_hold(vcpu)
        case GhcbExit.AP_JUMP_TABLE:
            return _ap_jump_table(vcpu)
        case GhcbExit.HV_FEATURES:
            ghcb.set(sw_exit_info_2=GHCB_HV_FT_SUPPORTED)
            return 1
        case GhcbExit.TERM_REQUEST:
            return _terminate(vcpu)
        case GhcbExit.PSC:
            if not (yield from setup_vmgexit_scratch(vcpu, PSC_HEADER_SIZE, sync=True)):
                return 1
            return psc.snp_begin_psc(vcpu)
        case GhcbExit.GUEST_REQUEST:
            return (yield from guest_request.snp_handle_guest_req(vcpu))
        case GhcbExit.EXT_GUEST_REQUEST:
            return (yield from guest_request.snp_handle_ext_guest_req(vcpu))
        case GhcbExit.AP_CREATION:
            return (yield from ap.sev_snp_ap_creation(vcpu))
        case GhcbExit.UNSUPPORTED_EVENT:
            raise KernelError(
                EINVAL,
                f"the guest met an event it cannot handle: {vcpu.arch.svm.vmcb.exit_info_1:#x} {vcpu.arch.svm.vmcb.exit_info_2:#x}",
            )
        case _:
            return (yield from emulate.svm_invoke_exit_handler(vcpu, code))


def ghcb_reply_error(vcpu: "KvmVcpu", reason: GhcbError) -> int:
    """The guest made a mistake: tell it which, and go on."""
    ghcb = vcpu.arch.svm.sev_es.ghcb
    assert ghcb is not None
    ghcb.set(sw_exit_info_1=2, sw_exit_info_2=int(reason))
    return 1


def _ap_jump_table(vcpu: "KvmVcpu") -> int:
    sev_es, sev = vcpu.arch.svm.sev_es, sev_info(vcpu.kvm)
    assert sev_es.ghcb is not None
    if vcpu.arch.svm.vmcb.exit_info_1 == 0:
        sev.ap_jump_table = vcpu.arch.svm.vmcb.exit_info_2
    elif vcpu.arch.svm.vmcb.exit_info_1 == 1:
        sev_es.ghcb.set(sw_exit_info_2=sev.ap_jump_table)
    else:
        return ghcb_reply_error(vcpu, GhcbError.INVALID_INPUT)
    return 1


def _terminate(vcpu: "KvmVcpu") -> int:
    """KVM_SYSTEM_EVENT_SEV_TERM with the GHCB MSR, which says why when it was a request by MSR."""
    run = vcpu.run
    run.exit_reason = KvmExit.SYSTEM_EVENT
    run.system_event_type = SystemEvent.SEV_TERM
    run.system_event_ndata = 1
    value = vcpu.arch.svm.vmcb.ghcb_gpa.to_bytes(8, "little")
    run.system_event_data = value + run.system_event_data[8:]
    return 0


# Scratch area


def setup_vmgexit_scratch(vcpu: "KvmVcpu", min_len: int, *, sync: bool) -> Steps[bool]:
    """Find the scratch area of at least min_len bytes; False when the guest was told that it is no good.

    Protocol version 2 wants it in the GHCB's own buffer.  Before that it may be anywhere; KVM then works on
    a copy.  EFAULT: the guest memory there cannot be read.
    """
    sev_es = vcpu.arch.svm.sev_es
    assert sev_es.ghcb is not None
    gpa = sev_es.sw_scratch
    if not gpa or gpa + min_len >= 1 << 64:
        ghcb_reply_error(vcpu, GhcbError.INVALID_SCRATCH_AREA)
        return False
    if gpa & ~PAGE_MASK == sev_es.ghcb.gpa:
        sev_es.scratch = Scratch.inside(Gpa(gpa), sev_es.ghcb.gpa, min_len)
    elif sev_info(vcpu.kvm).ghcb_version >= 2 or min_len > _SCRATCH_LIMIT:
        sev_es.scratch = None
    else:
        copy = yield from kvm_read_guest(vcpu.kvm, Gpa(gpa), min_len)
        sev_es.scratch = Scratch(0, min_len, bytearray(copy), sync=sync)
    if sev_es.scratch is None:
        ghcb_reply_error(vcpu, GhcbError.INVALID_SCRATCH_AREA)
        return False
    return True


def sev_es_unmap_ghcb(vcpu: "KvmVcpu") -> Steps[None]:
    """Before the vCPU is entered: give registers and scratch data back to the guest, let go of the page."""
    sev_es = vcpu.arch.svm.sev_es
    sev_es.ap_reset_hold = None
    ghcb = sev_es.ghcb
    if ghcb is None:
        return
    scratch = sev_es.scratch
    if scratch is not None and scratch.copy is not None and scratch.sync:
        with suppress(KernelError):  # Linux ignores it too: the guest's own memory is gone
            yield from kvm_vcpu_write_guest(vcpu, Gpa(sev_es.sw_scratch), bytes(scratch.copy))
    regs = vcpu.arch.regs
    ghcb.set(rax=regs.rax, rbx=regs.rbx, rcx=regs.rcx, rdx=regs.rdx)
    ghcb.unmap()
    gfn = Gfn(ghcb.gpa >> PAGE_SHIFT)
    mark_page_dirty_in_slot(vcpu, vcpu.kvm.gfn_to_memslot(gfn), gfn)
    sev_es.ghcb = None
    sev_es.scratch = None


# MSR protocol


def _msr_protocol(vcpu: "KvmVcpu") -> int:
    """sev_handle_vmgexit_msr_protocol(): a request that KVM does not know leaves the MSR as it is."""
    vmcb = vcpu.arch.svm.vmcb
    request = vmcb.ghcb_gpa & GHCB_MSR_INFO_MASK
    snp = sev_snp_guest(vcpu.kvm)
    match request:
        case GhcbMsr.SEV_INFO_REQ:
            _answer_sev_info(vcpu)
        case GhcbMsr.CPUID_REQ:
            _answer_cpuid(vcpu)
        case GhcbMsr.AP_RESET_HOLD_REQ:
            vcpu.arch.svm.sev_es.ap_reset_hold = GhcbMsr.AP_RESET_HOLD_REQ
            ret = emulate.kvm_emulate_ap_reset_hold(vcpu)
            vmcb.ghcb_gpa &= ~GHCB_MSR_AP_RESET_HOLD_RESULT
            vmcb.ghcb_gpa = vmcb.ghcb_gpa & ~GHCB_MSR_INFO_MASK | GhcbMsr.AP_RESET_HOLD_RESP
            return ret
        case GhcbMsr.HV_FT_REQ:
            vmcb.ghcb_gpa = int(GHCB_HV_FT_SUPPORTED) << 12 | GhcbMsr.HV_FT_RESP
        case GhcbMsr.PREF_GPA_REQ if snp:
            vmcb.ghcb_gpa = GHCB_MSR_GPA_NONE << 12 | GhcbMsr.PREF_GPA_RESP
        case GhcbMsr.REG_GPA_REQ if snp:
            gpa = vmcb.ghcb_gpa & ~GHCB_MSR_INFO_MASK
            vcpu.arch.svm.sev_es.ghcb_registered_gpa = Gpa(gpa)
            vmcb.ghcb_gpa = gpa | GhcbMsr.REG_GPA_RESP
        case GhcbMsr.PSC_REQ if snp:
            return psc.snp_begin_psc_msr(vcpu, vmcb.ghcb_gpa)
        case GhcbMsr.PREF_GPA_REQ | GhcbMsr.REG_GPA_REQ | GhcbMsr.PSC_REQ | GhcbMsr.TERM_REQ:
            return _terminate(vcpu)
        case _:
            pass  # the guest finds its own request as the answer
    return 1


def _answer_sev_info(vcpu: "KvmVcpu") -> None:
    vcpu.arch.svm.vmcb.ghcb_gpa = ghcb_msr_sev_info(
        sev_info(vcpu.kvm).ghcb_version, GHCB_VERSION_MIN, vcpu.kvm.linux.soc.profile.c_bit
    )


def _answer_cpuid(vcpu: "KvmVcpu") -> None:
    vmcb, regs = vcpu.arch.svm.vmcb, vcpu.arch.regs
    register = vmcb.ghcb_gpa >> 30 & 3
    regs.rax, regs.rcx = vmcb.ghcb_gpa >> 32, 0
    emulate.kvm_emulate_cpuid(vcpu)
    value = (regs.rax, regs.rbx, regs.rcx, regs.rdx)[register]
    low = vmcb.ghcb_gpa & 0xFFFF_FFFF & ~GHCB_MSR_INFO_MASK
    vmcb.ghcb_gpa = (value & 0xFFFF_FFFF) << 32 | low | GhcbMsr.CPUID_RESP
