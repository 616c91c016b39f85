"""System registers as user space sets them: what a processor can be in (kvm_is_valid_sregs(), __set_sregs_common();
arch/x86/kvm/x86.c; v6.12)."""

from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmSregs, KvmSregs2
from softcvm.kernel.arch.x86.kvm.cpuid import cpuid_maxphyaddr
from softcvm.kernel.arch.x86.kvm.cpuid_runtime import kvm_update_cpuid_runtime
from softcvm.kernel.arch.x86.kvm.cr4 import kvm_is_valid_cr4
from softcvm.kernel.arch.x86.kvm.lapic import kvm_set_apic_base
from softcvm.kernel.arch.x86.kvm.regs import refuse_protected
from softcvm.kernel.errors import KernelError, Unmodelled

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("get_sregs", "get_sregs2", "set_sregs", "set_sregs2")

_CR0_PE, _CR0_NW, _CR0_CD, _CR0_PG = 1, 1 << 29, 1 << 30, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_SREGS2_FLAGS_PDPTRS_VALID = 1


def get_sregs(vcpu: "KvmVcpu") -> KvmSregs:
    refuse_protected(vcpu, "KVM_GET_SREGS")
    return KvmSregs(bytes(vcpu.arch.sregs))


def set_sregs(vcpu: "KvmVcpu", sregs: KvmSregs) -> None:
    refuse_protected(vcpu, "KVM_SET_SREGS")
    _check_sregs(vcpu, sregs)
    if not kvm_set_apic_base(vcpu, sregs.apic_base, host=True):
        raise KernelError(EINVAL, f"APIC base {sregs.apic_base:#x}")
    if vcpu.arch.guest_state_protected:
        return
    vcpu.arch.sregs = KvmSregs(bytes(sregs))
    kvm_update_cpuid_runtime(vcpu)


def get_sregs2(vcpu: "KvmVcpu") -> KvmSregs2:
    refuse_protected(vcpu, "KVM_GET_SREGS2")
    return KvmSregs2(bytes(vcpu.arch.sregs)[:280] + bytes(40))


def set_sregs2(vcpu: "KvmVcpu", sregs: KvmSregs2) -> None:
    if sregs.flags & ~_SREGS2_FLAGS_PDPTRS_VALID:
        raise KernelError(EINVAL, f"kvm_sregs2 flags {sregs.flags:#x}")
    if sregs.flags & _SREGS2_FLAGS_PDPTRS_VALID:
        pae = sregs.cr0 & _CR0_PG and sregs.cr4 & _CR4_PAE and not sregs.efer & _EFER_LMA
        if not pae:
            raise KernelError(EINVAL, "PDPTRS_VALID outside PAE paging")
        raise Unmodelled("KVM_SET_SREGS2 with PDPTRs")
    set_sregs(vcpu, KvmSregs(bytes(sregs)[:280] + bytes(32)))


def _check_sregs(vcpu: "KvmVcpu", sregs: KvmSregs) -> None:
    """The combinations of CR0, CR3, CR4 and EFER that a processor can be in."""
    if sregs.efer & _EFER_LME and sregs.cr0 & _CR0_PG:
        if not (sregs.cr4 & _CR4_PAE and sregs.efer & _EFER_LMA):
            raise KernelError(EINVAL, "paging in long mode without CR4.PAE or EFER.LMA")
        if sregs.cr3 >> cpuid_maxphyaddr(vcpu):
            raise KernelError(EINVAL, f"CR3 {sregs.cr3:#x}")
    elif sregs.efer & _EFER_LMA or sregs.segment("cs").l:
        raise KernelError(EINVAL, "EFER.LMA or CS.L without paging in long mode")
    if not kvm_is_valid_cr4(vcpu, sregs.cr4):
        raise KernelError(EINVAL, f"CR4 {sregs.cr4:#x}")
    if sregs.cr0 >> 32 or (sregs.cr0 & _CR0_NW and not sregs.cr0 & _CR0_CD):
        raise KernelError(EINVAL, f"CR0 {sregs.cr0:#x}")
    if sregs.cr0 & _CR0_PG and not sregs.cr0 & _CR0_PE:
        raise KernelError(EINVAL, f"CR0 {sregs.cr0:#x}: paging without protection")
