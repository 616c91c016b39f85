"""kvm_amd: the vCPU on AMD, its run loop, and kvm_x86_ops (arch/x86/kvm/svm/svm.c, v7.2).

Owns VcpuSvm, one entry into the guest with the dispatch of its exit, and SvmOps, through which generic KVM
reaches everything in this folder.
"""

from collections.abc import Callable
from errno import EINVAL, ENXIO
from typing import TYPE_CHECKING

from softcvm.abi.ghcb import GhcbExit
from softcvm.abi.insn import Hlt, Program
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.sev import KVM_X86_GRP_SEV, KVM_X86_SEV_VMSA_FEATURES
from softcvm.abi.svm import ExitCode, NestedCtl, PfErr
from softcvm.hw.cpu.core import Core
from softcvm.hw.cpu.scripted import ScriptedCore
from softcvm.hw.cpu.vmcb import Vmcb
from softcvm.kernel.arch.x86.kvm.cpuid_runtime import KVM_X86_DISABLE_EXITS_HLT
from softcvm.kernel.arch.x86.kvm.emulate import x86_emulate_mmio
from softcvm.kernel.arch.x86.kvm.lapic import kvm_apic_has_pending_init_or_sipi
from softcvm.kernel.arch.x86.kvm.svm import gmem
from softcvm.kernel.arch.x86.kvm.svm.ap import (
    sev_es_init_vmcb,
    sev_snp_init_protected_guest_state,
    sev_vcpu_deliver_sipi_vector,
)
from softcvm.kernel.arch.x86.kvm.svm.asid import SevAsids
from softcvm.kernel.arch.x86.kvm.svm.emulate import (
    kvm_emulate_halt,
    kvm_emulate_xsetbv,
    svm_invoke_exit_handler,
    svm_skip_emulated_instruction,
)
from softcvm.kernel.arch.x86.kvm.svm.ghcb import (
    VcpuSevEs,
    sev_es_unmap_ghcb,
    sev_es_vcpu_reset,
    sev_handle_vmgexit,
)
from softcvm.kernel.arch.x86.kvm.svm.msr import svm_msr_filter_changed
from softcvm.kernel.arch.x86.kvm.svm.save_area import enter_save_area, leave_save_area
from softcvm.kernel.arch.x86.kvm.svm.sev import (
    sev_mem_enc_ioctl,
    sev_vm_destroy,
    supported_vmsa_features,
)
from softcvm.kernel.arch.x86.kvm.svm.sev_info import (
    KvmSevInfo,
    sev_es_guest,
    sev_guest,
    sev_info,
    sev_snp_guest,
)
from softcvm.kernel.arch.x86.kvm.svm.sev_migrate import (
    sev_vm_copy_enc_context_from,
    sev_vm_move_enc_context_from,
)
from softcvm.kernel.arch.x86.kvm.svm.sev_regions import (
    sev_mem_enc_register_region,
    sev_mem_enc_unregister_region,
)
from softcvm.kernel.arch.x86.kvm.svm.vmsa import sev_free_vcpu, sev_vcpu_create
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.locks import Rank
from softcvm.sim.addr import Gfn, Gpa, Pfn
from softcvm.sim.state import State
from softcvm.sim.steps import Lockdep, Mutex, Steps, preempt

if TYPE_CHECKING:
    from softcvm.hw.npt import Npt
    from softcvm.hw.soc import Soc
    from softcvm.kernel.arch.x86.kvm.vcpu import MsrValue
    from softcvm.kernel.host import Linux
    from softcvm.kernel.mm.uaccess import UserPtr
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = ("NewCore", "SvmOps", "VcpuSvm")

_GUEST_ENC, _PRIVATE_ACCESS = int(PfErr.GUEST_ENC), int(PfErr.PRIVATE_ACCESS)
_RMP = int(PfErr.RMP)
NewCore = Callable[["Soc", int], Core]
"""What executes a vCPU: given the silicon and the vCPU's id."""


def _halted() -> Program:
    """A guest without code."""
    yield Hlt()


class VcpuSvm(State):
    """struct vcpu_svm.

    vmsa: the page KVM allocated for the registers; None where the guest is not SEV-ES or SNP.
    cpl: of the exit under way, as the guest gave it in the GHCB.
    """

    saved = ("vmcb", "vmsa", "sev_es", "cpl", "ran", "asid_generation", "core")
    derived = {"entered_with": "kept, to be made anew when what it was made from has changed"}

    def __init__(self, npt: "Npt", core: Core, lockdep: Lockdep) -> None:
        self.vmcb = Vmcb(0, npt)
        self.vmsa: Pfn | None = None
        self.sev_es = VcpuSevEs(lockdep)
        self.cpl = 0
        self.ran = False
        """Entered at least once: its translations were flushed then (pre_sev_run())."""
        self.asid_generation = 0
        self.core = core
        self.entered_with: tuple[object, bytes] | None = None
        """The save area of the last entry and what it was made from (save_area.py)."""


class SvmOps(State):
    """kvm_x86_ops of kvm_amd, and what the module keeps once per host.

    new_core: what the vCPUs of the VMs created from now on run on.
    """

    saved = ("asids",)
    derived = {
        "linux": "the host",
        "sev_mirror_lock": "free at quiescent points",
        "new_core": "guests' code comes from outside",
        "_cores": "as new_core",
    }

    def __init__(self, linux: "Linux") -> None:
        self.linux = linux
        self.asids = SevAsids(linux)
        self.sev_mirror_lock = Mutex(linux.lockdep, "sev_mirror_lock", Rank.SEV_MIRROR_LOCK)
        """Around every VM's mirror_vms and enc_context_owner."""
        self.new_core: NewCore = lambda soc, _: ScriptedCore(soc, _halted)
        self._cores: dict[int, NewCore] = {}

    def supported_vm_types(self) -> int:
        types = 1 << VmType.SEV | 1 << VmType.SEV_ES
        if self.linux.sev_dev.snp_initialized:
            types |= 1 << VmType.SNP
        return types

    # VM and vCPU life

    def vm_init(self, kvm: "Kvm") -> None:
        arch = kvm.arch
        arch.sev = KvmSevInfo(self.linux.lockdep)
        if arch.vm_type in (VmType.SEV, VmType.SEV_ES, VmType.SNP):
            arch.has_protected_state = arch.vm_type is not VmType.SEV
            arch.has_private_mem = arch.vm_type is VmType.SNP
            arch.pre_fault_allowed = not arch.has_private_mem
            arch.sev.need_init = True
        self._cores[kvm.id] = self.new_core

    def vm_destroy(self, kvm: "Kvm") -> Steps[None]:
        self._cores.pop(kvm.id, None)
        yield from sev_vm_destroy(self.asids, self.sev_mirror_lock, kvm)

    def vcpu_precreate(self, kvm: "Kvm") -> None:
        """sev_vcpu_precreate() has nothing to refuse; INIT2 does not come after vCPUs."""

    def vcpu_create(self, vcpu: "KvmVcpu") -> Steps[None]:
        """ENOMEM."""
        yield from ()
        kvm = vcpu.kvm
        core = self._cores[kvm.id](self.linux.soc, vcpu.vcpu_id)
        vcpu.arch.svm = VcpuSvm(kvm.arch.npt, core, self.linux.lockdep)
        sev_vcpu_create(vcpu)
        vcpu.arch.svm.vmcb.hlt_exits = not kvm.arch.disabled_exits & KVM_X86_DISABLE_EXITS_HLT
        svm_msr_filter_changed(vcpu)
        if sev_es_guest(kvm):
            sev_es_vcpu_reset(vcpu)

    def vcpu_free(self, vcpu: "KvmVcpu") -> Steps[None]:
        yield from ()
        sev_es = vcpu.arch.svm.sev_es
        sev_free_vcpu(vcpu)
        if sev_es.ghcb is not None:
            sev_es.ghcb.unmap()
            sev_es.ghcb = None

    def vcpu_run(self, vcpu: "KvmVcpu") -> Steps[int]:
        return (yield from svm_vcpu_run(self.asids, vcpu))

    def vcpu_pre_run(self, vcpu: "KvmVcpu") -> None:
        """svm_vcpu_pre_run().  EINVAL: a VM of an SEV type that had no KVM_SEV_INIT2."""
        if sev_info(vcpu.kvm).need_init:
            raise KernelError(EINVAL, f"KVM_SEV_INIT2 is due on VM {vcpu.kvm.id}")

    def vcpu_reset(self, vcpu: "KvmVcpu") -> Steps[None]:
        """svm_vcpu_reset() at INIT"""
        yield from sev_snp_init_protected_guest_state(vcpu)
        sev_es_init_vmcb(vcpu)

    def vcpu_deliver_sipi_vector(self, vcpu: "KvmVcpu") -> None:
        if not sev_es_guest(vcpu.kvm):
            raise Unmodelled("SIPI to a vCPU whose registers KVM sets")
        sev_vcpu_deliver_sipi_vector(vcpu)

    def msr_filter_changed(self, vcpu: "KvmVcpu") -> None:
        svm_msr_filter_changed(vcpu)

    def vcpu_kick(self, vcpu: "KvmVcpu") -> None:
        """A reschedule interrupt to the processor that runs the vCPU, if one does."""
        if vcpu.arch.in_guest:
            vcpu.arch.svm.vmcb.intr = True
            vcpu.arch.svm.core.interrupt()

    def complete_hypercall(self, vcpu: "KvmVcpu", ret: int) -> None:
        """RAX reaches an SEV-ES guest through the GHCB."""
        vcpu.arch.regs.rax = ret & (1 << 64) - 1
        svm_skip_emulated_instruction(vcpu)

    # guest_memfd

    def gmem_prepare(self, kvm: "Kvm", pfn: Pfn, gfn: Gfn, npages: int, max_order: int) -> None:
        gmem.sev_gmem_prepare(kvm, pfn, gfn, npages, max_order)

    def gmem_invalidate(self, linux: "Linux", start: Pfn, end: Pfn) -> None:
        gmem.sev_gmem_invalidate(linux, start, end)

    def gmem_max_mapping_level(self, kvm: "Kvm", pfn: Pfn, is_private: bool) -> int:
        return gmem.sev_gmem_max_mapping_level(kvm, pfn, is_private)

    def gmem_mapping_run(self, kvm: "Kvm", pfn: Pfn, npages: int, is_private: bool) -> int:
        return gmem.sev_gmem_mapping_run(kvm, pfn, npages, is_private)

    # ioctls

    def mem_enc_ioctl(self, kvm: "Kvm", proc: "Process", argp: "UserPtr") -> Steps[int]:
        return (yield from sev_mem_enc_ioctl(self.asids, kvm, proc, argp))

    def mem_enc_register_region(
        self, kvm: "Kvm", proc: "Process", addr: int, size: int
    ) -> Steps[int]:
        return (yield from sev_mem_enc_register_region(kvm, proc, addr, size))

    def mem_enc_unregister_region(
        self, kvm: "Kvm", proc: "Process", addr: int, size: int
    ) -> Steps[int]:
        return (yield from sev_mem_enc_unregister_region(kvm, addr, size))

    def vm_copy_enc_context_from(
        self, kvm: "Kvm", proc: "Process", source_fd: int
    ) -> Steps[int]:
        return (
            yield from sev_vm_copy_enc_context_from(self.sev_mirror_lock, kvm, proc, source_fd)
        )

    def vm_move_enc_context_from(
        self, kvm: "Kvm", proc: "Process", source_fd: int
    ) -> Steps[int]:
        return (
            yield from sev_vm_move_enc_context_from(self.sev_mirror_lock, kvm, proc, source_fd)
        )

    def dev_get_attr(self, group: int, attr: int) -> int:
        """The SEV group has the VMSA features that INIT2 takes.  ENXIO for the rest."""
        if group != KVM_X86_GRP_SEV or attr != KVM_X86_SEV_VMSA_FEATURES:
            raise KernelError(ENXIO, f"no attribute {attr} in group {group}")
        return supported_vmsa_features(self.linux)

    def guest_memory_reclaimed(self, kvm: "Kvm") -> None:
        """WBINVD for SEV and SEV-ES; private memory of SNP is flushed when guest_memfd frees it."""
        if sev_guest(kvm) and not sev_snp_guest(kvm):
            self.linux.soc.caches.wbinvd_on_all_cpus()

    # MSRs

    def set_msr(self, vcpu: "KvmVcpu", index: int, value: int) -> bool:
        return False

    def get_msr(self, vcpu: "KvmVcpu", index: int) -> "MsrValue":
        return None


# The run loop's body


def svm_vcpu_run(asids: SevAsids, vcpu: "KvmVcpu") -> Steps[int]:
    """Enter the guest once and deal with its exit.

    1: enter again.  0: user space must act.  KernelError: KVM_RUN fails with it.
    """
    svm, kvm = vcpu.arch.svm, vcpu.kvm
    yield from sev_es_unmap_ghcb(vcpu)
    vcpu.arch.in_guest = True
    try:
        if _exit_request(vcpu):
            return 1
        refuses = kvm.linux.profile.refuse_vmrun_without_vmsa
        if refuses and sev_es_guest(kvm) and svm.vmcb.vmsa_pa is None:
            return _fail_entry(vcpu)
        _pre_svm_run(asids, vcpu)
        # Interrupts are off: a kick from here on is delivered when the guest runs.
        kvm.srcu.release_read()  # memslots may change while the guest runs
        yield from preempt("VMRUN")
        vcpu.arch.exception_injected = False
        yield from _enter_exit(vcpu)
    finally:
        vcpu.arch.in_guest = False
        svm.vmcb.intr = False
    yield from kvm.srcu.acquire_read()
    code = svm.vmcb.exit_code
    if code == ExitCode.INVALID:
        return _fail_entry(vcpu)
    match code:
        case ExitCode.NPF:
            return (yield from _npf_interception(vcpu))
        case ExitCode.VMGEXIT:
            return (yield from sev_handle_vmgexit(vcpu))
        case ExitCode.HLT:
            return kvm_emulate_halt(vcpu)
        case ExitCode.XSETBV:
            return kvm_emulate_xsetbv(vcpu)
        case ExitCode.INTR:
            return 1
        case ExitCode.SHUTDOWN:
            vcpu.run.exit_reason = KvmExit.SHUTDOWN
            return 0
        case _ if code in GhcbExit._value2member_map_:
            return (yield from svm_invoke_exit_handler(vcpu, GhcbExit(code)))
        case _:
            raise Unmodelled(f"#VMEXIT {code:#x}")


def _enter_exit(vcpu: "KvmVcpu") -> Steps[None]:
    """svm_vcpu_enter_exit(): the registers of a guest without SEV-ES go into the guest, and come back."""
    svm = vcpu.arch.svm
    if sev_es_guest(vcpu.kvm):
        yield from svm.core.vmrun(svm.vmcb)
        return
    svm.vmcb.save = save = enter_save_area(vcpu)
    try:
        yield from svm.core.vmrun(svm.vmcb)
        leave_save_area(vcpu, save)
    finally:
        svm.vmcb.save = None


def _exit_request(vcpu: "KvmVcpu") -> bool:
    """kvm_vcpu_exit_request(): something came up since the run loop looked."""
    return (
        vcpu.kvm.vm_dead or bool(vcpu.arch.requests) or kvm_apic_has_pending_init_or_sipi(vcpu)
    )


def _pre_svm_run(asids: SevAsids, vcpu: "KvmVcpu") -> None:
    """pre_svm_run(), pre_sev_run(): the ASID and what the guest has of SEV.

    A VM with SEV has one ASID, whose translations are flushed when another VMCB may have used it here; any
    other vCPU takes one of its own, behind those for SEV.
    """
    svm, kvm, vmcb = vcpu.arch.svm, vcpu.kvm, vcpu.arch.svm.vmcb
    vmcb.nested_ctl = NestedCtl.NP_ENABLE
    if sev_guest(kvm):
        vmcb.nested_ctl |= NestedCtl.SEV_ENABLE
        vmcb.asid = sev_info(kvm).asid
    elif svm.asid_generation != asids.asid_generation:
        vmcb.asid = asids.new_plain()
        svm.asid_generation = asids.asid_generation
    if sev_es_guest(kvm):
        vmcb.nested_ctl |= NestedCtl.SEV_ES_ENABLE
    if not svm.ran:
        svm.ran = True
        kvm.linux.soc.flush_tlb(vmcb.asid)


def _fail_entry(vcpu: "KvmVcpu") -> int:
    run = vcpu.run
    run.exit_reason = KvmExit.FAIL_ENTRY
    run.fail_entry_hardware_entry_failure_reason = int(ExitCode.INVALID)
    run.fail_entry_cpu = 0
    return 0


def _npf_interception(vcpu: "KvmVcpu") -> Steps[int]:
    """#NPF: C-bit set means a private access; map what is missing, then mend the RMP if it was the RMP."""
    from softcvm.kernel.arch.x86.kvm.mmu.mmu import RetPf, kvm_mmu_page_fault

    svm = vcpu.arch.svm
    gpa, error_code = Gpa(svm.vmcb.exit_info_2), svm.vmcb.exit_info_1
    if sev_snp_guest(vcpu.kvm) and error_code & _GUEST_ENC:
        error_code |= _PRIVATE_ACCESS
    result = yield from kvm_mmu_page_fault(vcpu, gpa, error_code)
    if result is RetPf.EMULATE:
        if sev_es_guest(vcpu.kvm):
            raise Unmodelled(f"emulating a shared access to GPA {gpa:#x}, which has no memory")
        return x86_emulate_mmio(vcpu, gpa, svm.vmcb.insn_bytes)
    if error_code & _RMP:
        yield from gmem.sev_handle_rmp_fault(vcpu, gpa, error_code)
    return 1
