"""Several VMs and one encryption context: MOVE and COPY of KVM_ENABLE_CAP (arch/x86/kvm/svm/sev.c, v7.2).

MOVE (KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM) hands a guest from one VM to another on the same host, usually of
another process: ASID, firmware's handle, pinned regions, encrypted VMSAs and mirrors change hands, and the
source is dead.  Neither the number of the /dev/sev descriptor nor the GHCB version goes along, and a VM type
that waits for KVM_SEV_INIT2 goes on waiting, so that its vCPUs do not run: all as in Linux.
COPY (KVM_CAP_VM_COPY_ENC_CONTEXT_FROM) makes a mirror: a second VM that runs under the ASID of its owner and
holds a reference to it; how it lets go is sev_vm_destroy() in sev.py.

Locks, outermost first: migration_in_progress of destination and source, which only ever fail (EBUSY), so
that crossing migrations cannot wait for each other; kvm->lock of the destination, then of the source; for
MOVE the mutex of every vCPU in the same order; sev_mirror_lock around the list of mirrors and their owner.
"""

from errno import EBADF, EBUSY, EINVAL
from typing import TYPE_CHECKING

from softcvm.kernel.arch.x86.kvm.svm.ghcb import VcpuSevEs
from softcvm.kernel.arch.x86.kvm.svm.sev_info import (
    is_mirroring_enc_context,
    sev_es_guest,
    sev_guest,
    sev_info,
    sev_snp_guest,
)
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.fs.file import FileKind, fput
from softcvm.kernel.virt.kvm.kvm_main import Kvm
from softcvm.sim.addr import Asid
from softcvm.sim.steps import Mutex, Steps

if TYPE_CHECKING:
    from softcvm.kernel.fs.file import File
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("sev_vm_copy_enc_context_from", "sev_vm_move_enc_context_from")


def sev_vm_move_enc_context_from(
    mirror_lock: Mutex, kvm: Kvm, proc: "Process", source_fd: int
) -> Steps[int]:
    """EBADF: no VM behind the descriptor.  EINVAL: the same VM; types differ; the destination is SEV, the
    source is not, or is SNP; SEV-ES with unlike numbers of vCPUs or one that is not encrypted yet.
    EBUSY: either is in a migration, or creates a vCPU.
    """
    file, source = _source(proc, source_fd)
    try:
        yield from _lock_two_vms(kvm, source)
        locked: list[KvmVcpu] = []
        try:
            if (
                kvm.arch.vm_type is not source.arch.vm_type
                or sev_guest(kvm)
                or not sev_guest(source)
            ):
                raise KernelError(EINVAL, f"VM {source.id} cannot move to VM {kvm.id}")
            _refuse_snp(source)
            for vcpu in (*kvm.vcpus, *source.vcpus):
                yield from vcpu.mutex.acquire()
                locked.append(vcpu)
            _check_source_vcpus(kvm, source)
            if kvm.linux.profile.sev_move_flushes_source:
                kvm.linux.soc.caches.wbinvd_on_all_cpus()
            yield from _migrate_from(mirror_lock, kvm, source)
            source.vm_dead = True
        finally:
            for vcpu in reversed(locked):
                vcpu.mutex.release()
            _unlock_two_vms(kvm, source)
    finally:
        yield from fput(file)
    return 0


def sev_vm_copy_enc_context_from(
    mirror_lock: Mutex, kvm: Kvm, proc: "Process", source_fd: int
) -> Steps[int]:
    """EBADF, EBUSY as MOVE.  EINVAL: the same VM; the destination is SEV or has vCPUs; the source is not
    SEV, is SNP, or is itself a mirror.
    """
    file, source = _source(proc, source_fd)
    try:
        yield from _lock_two_vms(kvm, source)
        try:
            if (
                sev_guest(kvm)
                or not sev_guest(source)
                or is_mirroring_enc_context(source)
                or kvm.created_vcpus
            ):
                raise KernelError(EINVAL, f"VM {kvm.id} cannot mirror VM {source.id}")
            _refuse_snp(source)
            mirror, owner = sev_info(kvm), sev_info(source)
            yield from mirror_lock.acquire()
            owner.mirror_vms.append(kvm)
            mirror.enc_context_owner = source.get()
            mirror_lock.release()
            mirror.active = True
            mirror.asid = owner.asid
            mirror.fd = owner.fd
            mirror.es_active = owner.es_active
            mirror.need_init = False
            mirror.handle = owner.handle
        finally:
            _unlock_two_vms(kvm, source)
    finally:
        yield from fput(file)
    return 0


def _source(proc: "Process", source_fd: int) -> "tuple[File, Kvm]":
    """The VM behind a descriptor, and its file with a reference that the caller puts."""
    file = proc.files.lookup(source_fd & 0xFFFF_FFFF)
    if file.kind is not FileKind.VM or not isinstance(file.private, Kvm):
        raise KernelError(EBADF, f"fd {source_fd} is not a VM")
    return file.get(), file.private


def _lock_two_vms(dst: Kvm, src: Kvm) -> Steps[None]:
    """sev_lock_two_vms(): the flags are compared and set, never waited for."""
    if dst is src:
        raise KernelError(EINVAL, f"VM {dst.id} is both source and destination")
    ours, theirs = sev_info(dst), sev_info(src)
    if ours.migration_in_progress:
        raise KernelError(EBUSY, f"VM {dst.id} is in a migration")
    ours.migration_in_progress = True
    if theirs.migration_in_progress:
        ours.migration_in_progress = False
        raise KernelError(EBUSY, f"VM {src.id} is in a migration")
    theirs.migration_in_progress = True
    yield from dst.lock.acquire()
    yield from src.lock.acquire()


def _unlock_two_vms(dst: Kvm, src: Kvm) -> None:
    dst.lock.release()
    src.lock.release()
    sev_info(dst).migration_in_progress = False
    sev_info(src).migration_in_progress = False


def _refuse_snp(source: Kvm) -> None:
    if not sev_snp_guest(source):
        return
    if source.linux.profile.snp_no_intra_host_migration:
        raise KernelError(EINVAL, f"VM {source.id} is SNP")
    raise Unmodelled(
        "moving or mirroring an SNP VM before CVE-2026-72286 was fixed: state is left behind"
    )


def _check_source_vcpus(dst: Kvm, src: Kvm) -> None:
    """sev_check_source_vcpus()"""
    for vm in (src, dst):
        if vm.created_vcpus != vm.online_vcpus:
            raise KernelError(EBUSY, f"VM {vm.id} is creating a vCPU")
    if not sev_es_guest(src):
        return
    if src.online_vcpus != dst.online_vcpus:
        raise KernelError(EINVAL, f"{src.online_vcpus} vCPUs cannot move to {dst.online_vcpus}")
    for vcpu in src.vcpus:
        if not vcpu.arch.guest_state_protected:
            raise KernelError(EINVAL, f"the VMSA of vCPU {vcpu.vcpu_id} is not encrypted")


def _migrate_from(mirror_lock: Mutex, dst_kvm: Kvm, src_kvm: Kvm) -> Steps[None]:
    """sev_migrate_from(): past every check."""
    dst, src = sev_info(dst_kvm), sev_info(src_kvm)
    dst.active, src.active = True, False
    dst.asid, src.asid = src.asid, Asid(0)
    dst.handle, src.handle = src.handle, 0
    dst.pages_locked, src.pages_locked = src.pages_locked, 0
    dst.es_active, src.es_active = src.es_active, False
    dst.vmsa_features = src.vmsa_features
    dst.regions, src.regions = src.regions, []

    yield from mirror_lock.acquire()
    dst.mirror_vms, src.mirror_vms = src.mirror_vms, []
    for mirror in dst.mirror_vms:
        sev_info(mirror).enc_context_owner = dst_kvm.get()
        yield from src_kvm.put()  # never the last one: the caller holds the source's file
    if src.enc_context_owner is not None:
        owner = src.enc_context_owner
        dst.enc_context_owner, src.enc_context_owner = owner, None
        mirrors = sev_info(owner).mirror_vms
        mirrors.remove(src_kvm)
        mirrors.append(dst_kvm)
    mirror_lock.release()

    if dst.es_active:
        for new, old in zip(dst_kvm.vcpus, src_kvm.vcpus, strict=True):
            _move_vcpu(new, old)


def _move_vcpu(new: "KvmVcpu", old: "KvmVcpu") -> None:
    """VMSA and GHCB state; what the source keeps is that of a vCPU that never was SEV-ES."""
    to, fro = new.arch.svm, old.arch.svm
    to.sev_es, fro.sev_es = fro.sev_es, VcpuSevEs(old.kvm.linux.lockdep)
    to.vmsa, fro.vmsa = fro.vmsa, None
    to.vmcb.ghcb_gpa, fro.vmcb.ghcb_gpa = fro.vmcb.ghcb_gpa, (1 << 64) - 1
    to.vmcb.vmsa_pa, fro.vmcb.vmsa_pa = fro.vmcb.vmsa_pa, None
    new.arch.guest_state_protected = True
    old.arch.guest_state_protected = False
