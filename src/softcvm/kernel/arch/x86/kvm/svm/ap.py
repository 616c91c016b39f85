"""AP creation: a guest chooses the VMSA page that another of its vCPUs runs from (arch/x86/kvm/svm/sev.c, v7.2).

Owns the VMGEXIT by which one vCPU asks for it, what the target does about it at its next INIT or entry, and
what a SIPI means to a vCPU whose registers KVM cannot set.  The page is guest_memfd's and stays so: KVM
keeps its address and no reference.  Zapping or freeing it is stopped by nothing but RMPUPDATE, which
refuses a VMSA that is in use.

Lock: target's snp_vmsa_mutex, taken with the own vcpu->mutex and kvm->srcu held; folio locks below it.
"""

from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.ghcb import (
    GHCB_MSR_AP_RESET_HOLD_RESULT,
    GHCB_MSR_INFO_MASK,
    ApCreation,
    GhcbError,
    GhcbExit,
    GhcbMsr,
)
from softcvm.abi.kvm.vcpu import MpState
from softcvm.abi.svm import SevFeatures
from softcvm.kernel.arch.x86.kvm.cpuid import cpuid_maxphyaddr
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_es_guest, sev_info, sev_snp_guest
from softcvm.kernel.arch.x86.kvm.vcpu import KvmRequest
from softcvm.kernel.errors import KernelError
from softcvm.kernel.virt.kvm.gmem_pfn import kvm_gmem_get_pfn
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PTRS_PER_PMD, Gfn, Gpa, pfn_to_spa
from softcvm.sim.steps import Point, Steps, Wait, lockdep_assert_held

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = (
    "SnpApCreation",
    "SnpVmsaReloaded",
    "sev_es_init_vmcb",
    "sev_snp_ap_creation",
    "sev_snp_init_protected_guest_state",
    "sev_vcpu_deliver_sipi_vector",
)

_INT_INJ_MODES = SevFeatures.RESTRICTED_INJECTION | SevFeatures.ALTERNATE_INJECTION


class SnpApCreation(NamedTuple):
    """A guest asked for a vCPU to be created or destroyed; `refused` is why KVM did not."""

    vm: int
    vcpu: int
    target: int
    request: int
    vmsa_gpa: int
    refused: str


class SnpVmsaReloaded(NamedTuple):
    """A vCPU took its new VMSA; pfn is -1 when it has none now."""

    vm: int
    vcpu: int
    gpa: int
    pfn: int


def sev_snp_ap_creation(vcpu: "KvmVcpu") -> Steps[int]:
    """Note for the target what it shall run from; it acts on it itself.

    Anything wrong is INVALID_INPUT to the guest, and the target is left as it was.
    """
    sev_es = vcpu.arch.svm.sev_es
    request, apic_id = (
        vcpu.arch.svm.vmcb.exit_info_1 & 0xFFFF_FFFF,
        vcpu.arch.svm.vmcb.exit_info_1 >> 32,
    )
    target = next((v for v in vcpu.kvm.vcpus if v.vcpu_id == apic_id), None)
    refused = f"no vCPU has APIC ID {apic_id:#x}"
    if target is not None:
        mutex = target.arch.svm.sev_es.snp_vmsa_mutex
        yield from mutex.acquire()
        try:
            refused = _refusal(vcpu, request)
            if not refused:
                yield from _request(vcpu, target, ApCreation(request))
        finally:
            mutex.release()
    tp = vcpu.kvm.linux.tp
    if tp.emit:
        tp.emit(
            SnpApCreation(
                vcpu.kvm.id,
                vcpu.vcpu_id,
                apic_id,
                request,
                vcpu.arch.svm.vmcb.exit_info_2,
                refused,
            )
        )
    if refused:
        assert sev_es.ghcb is not None
        sev_es.ghcb.set(sw_exit_info_1=2, sw_exit_info_2=int(GhcbError.INVALID_INPUT))
    return 1


def _refusal(vcpu: "KvmVcpu", request: int) -> str:
    """What is wrong with a request, if anything."""
    if request == ApCreation.DESTROY:
        return ""
    sev = sev_info(vcpu.kvm)
    features, gpa = vcpu.arch.regs.rax, vcpu.arch.svm.vmcb.exit_info_2
    if request > ApCreation.DESTROY:
        return f"request {request:#x}"  # a VMPL other than 0 makes one, too
    compared = ~0 if vcpu.kvm.linux.profile.ap_features_all_match else int(_INT_INJ_MODES)
    if (features ^ sev.vmsa_features) & compared:
        return f"SEV features {features:#x} instead of {sev.vmsa_features:#x}"
    if gpa & PAGE_MASK or gpa >> cpuid_maxphyaddr(vcpu):
        return f"VMSA at {gpa:#x}"
    if (gpa >> PAGE_SHIFT) % PTRS_PER_PMD == 0:
        return f"VMSA at {gpa:#x}, the start of a 2M region: the CPU erratum"
    return ""


def _request(vcpu: "KvmVcpu", target: "KvmVcpu", request: ApCreation) -> Steps[None]:
    """Leave the request with the target, and unless it is for its next INIT make it look.

    Since 309d28576f0a the requester goes on only when the target is out of the guest; before, it might still
    enter with the old VMSA, which the guest takes to be unused by then.
    """
    sev_es = target.arch.svm.sev_es
    destroy = request is ApCreation.DESTROY
    sev_es.snp_pending_vmsa_gpa = None if destroy else Gpa(vcpu.arch.svm.vmcb.exit_info_2)
    sev_es.snp_ap_waiting_for_reset = True
    if request is ApCreation.CREATE_ON_INIT:
        return
    target.arch.requests |= KvmRequest.UPDATE_PROTECTED_GUEST_STATE
    vcpu.kvm.ops.vcpu_kick(target)
    if vcpu.kvm.linux.profile.ap_request_waits:
        wait = Wait(f"vCPU {target.vcpu_id} leaves", lambda: not target.arch.in_guest)
        while target.arch.in_guest:
            yield Point(f"wait until vCPU {target.vcpu_id} is out of the guest", wait)


# The target's side


def sev_snp_init_protected_guest_state(vcpu: "KvmVcpu") -> Steps[None]:
    """Consume a request, at INIT or before the guest is entered: off, then on with the new VMSA.

    A vCPU whose new VMSA cannot be had is runnable all the same, so that KVM_RUN fails instead of hanging.
    """
    if not sev_snp_guest(vcpu.kvm):
        return
    sev_es = vcpu.arch.svm.sev_es
    yield from sev_es.snp_vmsa_mutex.acquire()
    try:
        if not sev_es.snp_ap_waiting_for_reset:
            return
        sev_es.snp_ap_waiting_for_reset = False
        vcpu.arch.mp_state = MpState.HALTED
        gpa, sev_es.snp_pending_vmsa_gpa = sev_es.snp_pending_vmsa_gpa, None
        yield from _reload_vmsa(vcpu, gpa)
        if gpa is not None:
            vcpu.arch.mp_state = MpState.RUNNABLE
    finally:
        sev_es.snp_vmsa_mutex.release()


def _reload_vmsa(vcpu: "KvmVcpu", gpa: Gpa | None) -> Steps[None]:
    """sev_snp_reload_vmsa(): let go of the old VMSA, and find the page of the new one."""
    svm, kvm = vcpu.arch.svm, vcpu.kvm
    lockdep_assert_held(svm.sev_es.snp_vmsa_mutex)
    svm.vmcb.vmsa_pa = None
    svm.sev_es.snp_guest_vmsa_gpa = None
    if gpa is not None and (slot := kvm.gfn_to_memslot(Gfn(gpa >> PAGE_SHIFT))) is not None:
        try:
            page = yield from kvm_gmem_get_pfn(kvm, slot, Gfn(gpa >> PAGE_SHIFT))
        except KernelError:
            pass  # no page: the vCPU has no VMSA, and entering it fails
        else:
            svm.sev_es.snp_has_guest_vmsa = True
            svm.sev_es.snp_guest_vmsa_gpa = gpa
            svm.vmcb.vmsa_pa = pfn_to_spa(page.pfn)
            kvm.linux.page_alloc.put_pages(page.pfn, 1)
    if kvm.linux.tp.emit:
        pfn = -1 if svm.vmcb.vmsa_pa is None else svm.vmcb.vmsa_pa >> PAGE_SHIFT
        kvm.linux.tp.emit(SnpVmsaReloaded(kvm.id, vcpu.vcpu_id, gpa or 0, pfn))


def sev_es_init_vmcb(vcpu: "KvmVcpu") -> None:
    """The VMCB at INIT: until the guest has once given a VMSA of its own, KVM's page is used again."""
    svm = vcpu.arch.svm
    if sev_es_guest(vcpu.kvm) and svm.vmsa is not None and not svm.sev_es.snp_has_guest_vmsa:
        svm.vmcb.vmsa_pa = pfn_to_spa(svm.vmsa)


def sev_vcpu_deliver_sipi_vector(vcpu: "KvmVcpu") -> None:
    """The first SIPI starts the vCPU as the VMM set it up; a later one ends an AP reset hold."""
    svm = vcpu.arch.svm
    sev_es = svm.sev_es
    if not sev_es.received_first_sipi:
        sev_es.received_first_sipi = True
    elif sev_es.ap_reset_hold is GhcbExit.AP_RESET_HOLD:
        assert sev_es.ghcb is not None
        sev_es.ghcb.set(sw_exit_info_2=1)
    elif sev_es.ap_reset_hold is GhcbMsr.AP_RESET_HOLD_REQ:
        kept = svm.vmcb.ghcb_gpa & ~(GHCB_MSR_AP_RESET_HOLD_RESULT | GHCB_MSR_INFO_MASK)
        svm.vmcb.ghcb_gpa = kept | 1 << 12 | GhcbMsr.AP_RESET_HOLD_RESP
