"""VMSA pages: where a vCPU's registers are, and what they are at launch (arch/x86/kvm/svm/sev.c, v7.2).

Owns the page that KVM allocates for each vCPU of an SEV-ES or SNP guest, its release, and the image that
LAUNCH_UPDATE measures.  The image is what svm.c would have put into the VMCB's save area: user space's
registers with KVM's own adjustments.
"""

from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmDtable, KvmSegment
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.kernel.arch.x86.kvm.svm.sev import kvm_rmp_make_shared
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_es_guest, sev_info, sev_snp_guest
from softcvm.kernel.arch.x86.kvm.vcpu import MSR_IA32_CR_PAT
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PTRS_PER_PMD, Pfn, PgLevel

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("sev_es_sync_vmsa", "sev_free_vcpu", "sev_vcpu_create", "snp_safe_alloc_page")

_EFER_SVME = 1 << 12
_CR0_NW_CD = 3 << 29
_CR4_MCE = 1 << 6
_DR7_FIXED_1 = 0x400
_QUIRK_CD_NW_CLEARED = 1 << 1
_MSR_IA32_DEBUGCTL = 0x1D9
_SAVED_MSRS = (
    ("sysenter_cs", 0x174),
    ("sysenter_esp", 0x175),
    ("sysenter_eip", 0x176),
    ("star", 0xC000_0081),
    ("lstar", 0xC000_0082),
    ("cstar", 0xC000_0083),
    ("sfmask", 0xC000_0084),
    ("kernel_gs_base", 0xC000_0102),
    ("g_pat", MSR_IA32_CR_PAT),
    ("dbgctl", _MSR_IA32_DEBUGCTL),
)
_GPRS = (
    *("rax", "rbx", "rcx", "rdx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags"),
    *(f"r{n}" for n in range(8, 16)),
)


def snp_safe_alloc_page(linux: "Linux") -> Pfn:
    """A zeroed page that is not the first of a 2M region.

    A CPU erratum raises RMP faults all over the region of a VMCB, VMSA or AVIC page at a 2M boundary, so
    Linux allocates two and keeps the one that is not there.  ENOMEM.
    """
    if not linux.snp.enabled:
        pfn = linux.page_alloc.alloc_pages()
    else:
        pfn = linux.page_alloc.alloc_pages(1)
        spare = pfn if pfn % PTRS_PER_PMD == 0 else Pfn(pfn + 1)
        linux.page_alloc.free_run(spare, 1)
        pfn = Pfn(pfn + 1) if spare == pfn else pfn
    linux.page_alloc.clear_pages(pfn, 1)
    return pfn


def sev_vcpu_create(vcpu: "KvmVcpu") -> None:
    """ENOMEM."""
    if sev_es_guest(vcpu.kvm):
        svm = vcpu.arch.svm
        svm.vmsa = snp_safe_alloc_page(vcpu.kvm.linux)
        svm.vmcb.vmsa_pa = svm.vmsa << 12


def sev_free_vcpu(vcpu: "KvmVcpu") -> None:
    """The VMSA page becomes the hypervisor's and is freed; one that does not is leaked with the VM dead."""
    svm, linux = vcpu.arch.svm, vcpu.kvm.linux
    if svm.vmsa is None:
        return
    vmsa, svm.vmsa = svm.vmsa, None
    svm.vmcb.vmsa_pa = None
    if sev_snp_guest(vcpu.kvm):
        try:
            kvm_rmp_make_shared(vcpu.kvm, vmsa, PgLevel.PG_4K)
        except KernelError:
            return  # the page is leaked and the VM marked as dead
    if vcpu.arch.guest_state_protected:
        if linux.soc.profile.sme_coherent:
            linux.soc.caches.clflush(1)
        else:
            linux.soc.caches.vm_page_flush(1)
    linux.page_alloc.free_run(vmsa, 1)


def sev_es_sync_vmsa(vcpu: "KvmVcpu") -> None:
    """Write the vCPU's registers into its VMSA page, in plain, for firmware to measure and encrypt.

    EINVAL: already encrypted, or under debugging.
    """
    arch = vcpu.arch
    if arch.guest_state_protected:
        raise KernelError(EINVAL, f"the VMSA of vCPU {vcpu.vcpu_id} is encrypted already")
    if arch.guest_debug or arch.debugregs.dr7 & ~_DR7_FIXED_1:
        raise KernelError(EINVAL, f"vCPU {vcpu.vcpu_id} is under debugging")
    linux, svm = vcpu.kvm.linux, arch.svm
    assert svm.vmsa is not None
    linux.soc.host_write(
        svm.vmsa << 12, bytes(vmsa_image(vcpu)), linux.snp.direct_map.level(svm.vmsa)
    )


def vmsa_image(vcpu: "KvmVcpu") -> Vmsa:
    """The save area as svm.c keeps it, then the fields that sev_es_sync_vmsa() adds."""
    arch, kvm = vcpu.arch, vcpu.kvm
    sregs = arch.sregs
    save = Vmsa()
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
        setattr(save, name, _segment(sregs.segment(name)))
    save.ldtr = _segment(sregs.segment("ldt"))
    save.gdtr = _table(sregs.table("gdt"))
    save.idtr = _table(sregs.table("idt"))
    save.cpl = sregs.segment("ss").dpl & 3
    # svm_set_efer(), svm_set_cr0(), svm_set_cr4(): SVME always, caching never off, MCE as the host has it.
    save.efer = sregs.efer | _EFER_SVME
    save.cr0 = sregs.cr0
    if not kvm.arch.disabled_quirks & _QUIRK_CD_NW_CLEARED:
        save.cr0 &= ~_CR0_NW_CD
    save.cr3 = sregs.cr3
    save.cr4 = sregs.cr4 | _CR4_MCE
    save.dr7 = arch.debugregs.dr7
    save.dr6 = arch.debugregs.dr6
    for name, index in _SAVED_MSRS:
        setattr(save, name, arch.msrs.get(index, 0))
    for name in _GPRS:
        setattr(save, name, getattr(arch.regs, name))
    save.xcr0 = arch.xcr0
    save.xss = arch.msrs.get(0xDA0, 0)
    save.sev_features = sev_info(kvm).vmsa_features
    _sync_fpu(save, vcpu)
    return save


def _sync_fpu(save: Vmsa, vcpu: "KvmVcpu") -> None:
    """FXSAVE state; VMs from KVM_SEV_ES_INIT go without, so that old measurements stay as they were.

    The x87 registers are laid out as 8 x 8 bytes, then 8 x 2.
    """
    fpu = vcpu.arch.fpu
    if not vcpu.kvm.arch.vm_type:
        return
    save.x87_dp = fpu.last_dp
    save.mxcsr = fpu.mxcsr
    save.x87_ftw = fpu.ftwx
    save.x87_fsw = fpu.fsw
    save.x87_fcw = fpu.fcw
    save.x87_fop = fpu.last_opcode
    save.x87_rip = fpu.last_ip
    registers = [fpu.fpr[at : at + 16] for at in range(0, 128, 16)]
    save.fpreg_x87 = b"".join(r[:8] for r in registers) + b"".join(r[8:10] for r in registers)
    save.fpreg_xmm = fpu.xmm


def _segment(var: KvmSegment) -> bytes:
    """svm_set_segment(): attributes packed as the VMCB has them."""
    present = var.present & 1 and not var.unusable
    attrib = (
        var.type & 0xF
        | (var.s & 1) << 4
        | (var.dpl & 3) << 5
        | int(bool(present)) << 7
        | (var.avl & 1) << 8
        | (var.l & 1) << 9
        | (var.db & 1) << 10
        | (var.g & 1) << 11
    )
    return bytes(Segment(selector=var.selector, attrib=attrib, limit=var.limit, base=var.base))


def _table(var: KvmDtable) -> bytes:
    return bytes(Segment(limit=var.limit, base=var.base))
