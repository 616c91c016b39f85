"""kvm_x86_ops: what generic x86 KVM asks of the vendor (arch/x86/include/asm/kvm-x86-ops.h,
v7.2).

One object per loaded vendor module, host wide: the free hook of guest_memfd has no VM to ask.
kvm_amd implements it in arch/x86/kvm/svm.  A hook that takes a run of pages means exactly the
loop over its pages, in ascending order.  Failures are KernelErrors.
"""

from typing import TYPE_CHECKING, Protocol

from softcvm.sim.addr import Gfn, Pfn
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.arch.x86.kvm.vcpu import MsrValue
    from softcvm.kernel.host import Linux
    from softcvm.kernel.mm.uaccess import UserPtr
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = ("X86Ops",)


class X86Ops(Protocol):
    """Names without the kvm_x86_ prefix are the kernel's own."""

    def supported_vm_types(self) -> int:
        """Mask of VM types of this vendor besides DEFAULT and SW_PROTECTED
        (kvm_caps.supported_vm_types)."""
        ...

    # VM and vCPU life
    def vm_init(self, kvm: "Kvm") -> None:
        """Set has_private_mem, has_protected_state, pre_fault_allowed and the vendor part
        (kvm.arch.sev)."""
        ...

    def vm_destroy(self, kvm: "Kvm") -> Steps[None]:
        """After the vCPUs, before the memslots are freed (kvm_arch_destroy_vm)."""
        ...

    def vcpu_precreate(self, kvm: "Kvm") -> None: ...

    def vcpu_create(self, vcpu: "KvmVcpu") -> Steps[None]: ...

    def vcpu_free(self, vcpu: "KvmVcpu") -> Steps[None]: ...

    def vcpu_run(self, vcpu: "KvmVcpu") -> Steps[int]:
        """One entry: VMRUN to #VMEXIT and the exit's own dispatch.

        1: go on in the kernel.  0: leave to user space, kvm_run is filled.  KernelError:
        KVM_RUN fails.
        """
        ...

    def vcpu_pre_run(self, vcpu: "KvmVcpu") -> None:
        """Refuse KVM_RUN before anything is entered."""
        ...

    def vcpu_reset(self, vcpu: "KvmVcpu") -> Steps[None]:
        """INIT, after KVM has reset its own copies of the registers."""
        ...

    def vcpu_deliver_sipi_vector(self, vcpu: "KvmVcpu") -> None:
        """A SIPI releases a vCPU that waits for it."""
        ...

    def msr_filter_changed(self, vcpu: "KvmVcpu") -> None:
        """Before the next entry: which MSRs leave the guest."""
        ...

    def vcpu_kick(self, vcpu: "KvmVcpu") -> None:
        """kvm_vcpu_kick(): a vCPU in the guest leaves it; one that sleeps looks again whether it
        must."""
        ...

    def complete_hypercall(self, vcpu: "KvmVcpu", ret: int) -> None:
        """Give the guest a hypercall's result: RAX, and RIP past the instruction."""
        ...

    # guest_memfd
    def gmem_prepare(self, kvm: "Kvm", pfn: Pfn, gfn: Gfn, npages: int, max_order: int) -> None:
        """Make pages guest-private before they are mapped.

        `npages` folios of order 0 (max_order 0), or the part of one folio of order `max_order`
        that holds pfn.
        """
        ...

    def gmem_invalidate(self, linux: "Linux", start: Pfn, end: Pfn) -> None:
        """Pages [start, end) leave guest_memfd: give them back to the host, whatever VM they
        served."""
        ...

    def gmem_max_mapping_level(self, kvm: "Kvm", pfn: Pfn, is_private: bool) -> int:
        """Largest level at which a pfn may be mapped; 0 is no opinion."""
        ...

    def gmem_mapping_run(self, kvm: "Kvm", pfn: Pfn, npages: int, is_private: bool) -> int:
        """How many of npages from pfn on share gmem_max_mapping_level()'s answer for pfn; at
        least 1."""
        ...

    # ioctls
    def mem_enc_ioctl(self, kvm: "Kvm", proc: "Process", argp: "UserPtr") -> Steps[int]: ...

    def mem_enc_register_region(
        self, kvm: "Kvm", proc: "Process", addr: int, size: int
    ) -> Steps[int]: ...

    def mem_enc_unregister_region(
        self, kvm: "Kvm", proc: "Process", addr: int, size: int
    ) -> Steps[int]: ...

    def vm_copy_enc_context_from(
        self, kvm: "Kvm", proc: "Process", source_fd: int
    ) -> Steps[int]: ...

    def vm_move_enc_context_from(
        self, kvm: "Kvm", proc: "Process", source_fd: int
    ) -> Steps[int]: ...

    def dev_get_attr(self, group: int, attr: int) -> int:
        """Value of a system device attribute of the vendor's groups; ENXIO."""
        ...

    def guest_memory_reclaimed(self, kvm: "Kvm") -> None:
        """Host memory that the guest may have used through the CPU caches is taken away (WBINVD
        for SEV)."""
        ...

    # registers that the vendor keeps
    def set_msr(self, vcpu: "KvmVcpu", index: int, value: int) -> bool:
        """True when the vendor owns this MSR and took the value."""
        ...

    def get_msr(self, vcpu: "KvmVcpu", index: int) -> "MsrValue":
        """The value, or None when the MSR is not the vendor's."""
        ...
