"""VMSA pages: where a vCPU's registers are, and what they are at launch (arch/x86/kvm/svm/sev.c, v7.2).

Owns the page that KVM allocates for each vCPU of an SEV-ES or SNP guest, its release, and the image that
LAUNCH_UPDATE measures: the save area that any vCPU is entered with (save_area.py), and what
sev_es_sync_vmsa() adds to it.
"""

from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.vmsa import Vmsa
from softcvm.kernel.arch.x86.kvm.svm.save_area import save_area, sync_fpu
from softcvm.kernel.arch.x86.kvm.svm.sev import kvm_rmp_make_shared
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_es_guest, sev_info, sev_snp_guest
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PTRS_PER_PMD, Pfn, PgLevel

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("sev_es_sync_vmsa", "sev_free_vcpu", "sev_vcpu_create", "snp_safe_alloc_page")

_DR7_FIXED_1 = 0x400


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
    once = sev_snp_guest(vcpu.kvm) or vcpu.kvm.linux.profile.encrypted_vmsa_refused
    if arch.guest_state_protected and once:
        raise KernelError(EINVAL, f"the VMSA of vCPU {vcpu.vcpu_id} is encrypted already")
    if arch.guest_debug or arch.debugregs.dr7 & ~_DR7_FIXED_1:
        raise KernelError(EINVAL, f"vCPU {vcpu.vcpu_id} is under debugging")
    linux, svm = vcpu.kvm.linux, arch.svm
    assert svm.vmsa is not None
    linux.soc.host_write(
        svm.vmsa << 12, bytes(vmsa_image(vcpu)), linux.snp.direct_map.level(svm.vmsa)
    )


def vmsa_image(vcpu: "KvmVcpu") -> Vmsa:
    """The save area with the fields that only a VMSA has.

    VMs from KVM_SEV_ES_INIT go without FPU state, so that old measurements stay as they were.
    """
    kvm = vcpu.kvm
    save = save_area(vcpu)
    save.sev_features = sev_info(kvm).vmsa_features
    if kvm.arch.vm_type:
        sync_fpu(save, vcpu.arch.fpu)
        save.fpreg_ymm = vcpu.arch.xsave_extended[:256]
    return save
