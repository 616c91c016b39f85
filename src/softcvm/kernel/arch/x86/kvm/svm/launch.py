"""Launching an SNP guest: LAUNCH_START, UPDATE, FINISH (arch/x86/kvm/svm/sev.c, v7.2).

A launch update fills guest_memfd pages of a private GFN range from user memory, one 4K page at a time: the
page is looked up and must be unassigned, filled, made Pre-Guest, and handed to firmware, which measures and
encrypts it in place.  LAUNCH_FINISH does the same to every vCPU's VMSA page before firmware closes the
measurement.

Locks: kvm->lock held by the caller; slots_lock across an update, so that neither memslots nor attributes
change under it; below it what guest_memfd takes.
"""

from contextlib import suppress
from dataclasses import dataclass
from errno import EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENOTTY
from typing import TYPE_CHECKING

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.sev import (
    INITIAL_VMSA_GPA,
    KVM_SEV_SNP_ID_AUTH_SIZE,
    KVM_SEV_SNP_ID_BLOCK_SIZE,
    SEV_USER_PAGE_TYPES,
    KvmSevCmd,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmSevSnpLaunchUpdate,
)
from softcvm.abi.snp_firmware import (
    SnpActivate,
    SnpCmd,
    SnpLaunchFinish,
    SnpLaunchStart,
    SnpLaunchUpdate,
    SnpStatus,
)
from softcvm.abi.snp_policy import GuestPolicy
from softcvm.kernel.arch.x86.kvm.svm.asid import SevAsids
from softcvm.kernel.arch.x86.kvm.svm.sev import (
    sev_issue_cmd,
    snp_context_create,
    snp_decommission_context,
    snp_page_reclaim,
)
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info, sev_snp_guest
from softcvm.kernel.arch.x86.kvm.svm.vmsa import sev_es_sync_vmsa
from softcvm.kernel.arch.x86.virt.svm.sev import rmp_make_private, snp_lookup_rmpentry
from softcvm.kernel.drivers.crypto.ccp.sev_dev import SevFwError, psp_copy_user_blob
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import UserPtr
from softcvm.kernel.virt.kvm.gmem_pfn import PopulateSource, kvm_gmem_populate
from softcvm.sim.addr import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Gfn,
    Gpa,
    Hva,
    Pfn,
    PgLevel,
    gfn_to_gpa,
    pfn_to_spa,
)
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "GmemPopulateArgs",
    "sev_gmem_post_populate",
    "snp_launch_finish",
    "snp_launch_start",
    "snp_launch_update",
    "snp_launch_update_revert",
)

_POLICY_VALID = 0xFFFF | int(
    GuestPolicy.SMT | GuestPolicy.RSVD_MBO | GuestPolicy.DEBUG | GuestPolicy.SINGLE_SOCKET
)
"""Policy bits KVM lets through on this firmware; from 6.19 on it adds those that firmware 1.58 knows."""


def snp_launch_start(
    asids: SevAsids, kvm: "Kvm", proc: "Process", cmd: KvmSevCmd
) -> Steps[None]:
    """Create the guest's context and bind its ASID; all undone when a step fails.

    ENOTTY: not an SNP VM, or no context.  EFAULT.  EINVAL: started before, flags, policy.
    """
    sev = sev_info(kvm)
    if not sev_snp_guest(kvm):
        raise KernelError(ENOTTY, "SNP_LAUNCH_START on a VM that is not SNP")
    argp = UserPtr(proc.mm, cmd.data_ptr)
    params = KvmSevSnpLaunchStart((yield from argp.read(KvmSevSnpLaunchStart.SIZE)))
    if sev.snp_context is not None:
        raise KernelError(EINVAL, "the launch has started already")
    if params.flags:
        raise KernelError(EINVAL, f"LAUNCH_START flags {params.flags:#x}")
    _check_policy(params.policy)
    sev.snp_context = yield from snp_context_create(kvm, proc, cmd)
    gctx = pfn_to_spa(sev.snp_context)
    try:
        start = SnpLaunchStart(gctx_paddr=gctx, policy=params.policy, gosvw=params.gosvw)
        yield from sev_issue_cmd(kvm, proc, cmd.sev_fd, SnpCmd.LAUNCH_START, start, cmd)
        sev.fd = cmd.sev_fd
        activate = SnpActivate(gctx_paddr=gctx, asid=sev.asid)
        yield from sev_issue_cmd(kvm, proc, sev.fd, SnpCmd.ACTIVATE, activate, cmd)
    except KernelError:
        with suppress(KernelError):  # warned of there; the first error is the one to report
            yield from snp_decommission_context(asids, kvm)
        raise


def _check_policy(policy: int) -> None:
    if policy & ~_POLICY_VALID:
        raise KernelError(EINVAL, f"policy {policy:#x} has bits that KVM does not know")
    if not policy & GuestPolicy.RSVD_MBO or not policy & GuestPolicy.SMT:
        raise KernelError(EINVAL, f"policy {policy:#x} lacks SMT or the bit that must be one")
    if policy & GuestPolicy.SINGLE_SOCKET:
        raise KernelError(EINVAL, f"policy {policy:#x} asks for a single socket")


# LAUNCH_UPDATE


@dataclass(slots=True)
class GmemPopulateArgs:
    """One LAUNCH_UPDATE as its pages see it (struct sev_gmem_populate_args) and what firmware said last."""

    proc: "Process"
    slot: "KvmMemorySlot"
    gfn_start: Gfn
    npages: int
    type: LaunchPageType
    sev_fd: int
    fw_error: int = 0


def snp_launch_update(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """Measure and encrypt a GFN range; user space calls again until len is 0.

    A failure after the first page is a short success, of which only gfn_start, len and uaddr tell.
    EINVAL: not SNP, not started, alignment, type, no guest_memfd.  EFAULT.  EIO: the first page failed,
    and cmd.error is firmware's status if it was asked.
    """
    sev = sev_info(kvm)
    if not sev_snp_guest(kvm) or sev.snp_context is None:
        raise KernelError(EINVAL, "SNP_LAUNCH_UPDATE before SNP_LAUNCH_START")
    argp = UserPtr(proc.mm, cmd.data_ptr)
    params = KvmSevSnpLaunchUpdate((yield from argp.read(KvmSevSnpLaunchUpdate.SIZE)))
    _check_update(kvm, params)
    npages = params.len >> PAGE_SHIFT
    zero = params.type == LaunchPageType.ZERO
    yield from kvm.slots_lock.acquire()
    try:
        slot = kvm.gfn_to_memslot(Gfn(params.gfn_start))
        if slot is None or not slot.can_be_private:
            raise KernelError(EINVAL, f"GFN {params.gfn_start:#x} has no guest_memfd")
        args = GmemPopulateArgs(
            proc=proc,
            slot=slot,
            gfn_start=Gfn(params.gfn_start),
            npages=npages,
            type=LaunchPageType(params.type),
            sev_fd=cmd.sev_fd,
        )

        def post_populate(
            kvm: "Kvm", gfn: Gfn, pfn: Pfn, source: PopulateSource | None
        ) -> Steps[None]:
            return sev_gmem_post_populate(kvm, gfn, pfn, source, args)

        try:
            count = yield from kvm_gmem_populate(
                kvm,
                proc,
                args.gfn_start,
                None if zero or not params.uaddr else Hva(params.uaddr),
                npages,
                post_populate,
                write_source=params.type == LaunchPageType.CPUID,
            )
        except KernelError as error:
            cmd.error = args.fw_error
            raise KernelError(
                EIO, f"LAUNCH_UPDATE of GFN {params.gfn_start:#x}: {error.why}"
            ) from error
        params.gfn_start += count
        params.len -= count << PAGE_SHIFT
        if not zero:
            params.uaddr += count << PAGE_SHIFT
        yield from argp.write(params.data)
    finally:
        kvm.slots_lock.release()


def _check_update(kvm: "Kvm", params: KvmSevSnpLaunchUpdate) -> None:
    profile = kvm.linux.profile
    if params.len & PAGE_MASK or params.flags or params.type not in SEV_USER_PAGE_TYPES:
        raise KernelError(
            EINVAL, f"len {params.len:#x} flags {params.flags:#x} type {params.type}"
        )
    if not params.len and profile.snp_launch_update_refuses_empty:
        raise KernelError(EINVAL, "len is 0")
    if (
        params.uaddr & PAGE_MASK
        and params.type != LaunchPageType.ZERO
        and profile.populate_per_page
    ):
        raise KernelError(EINVAL, f"uaddr {params.uaddr:#x} is not page aligned")


def sev_gmem_post_populate(
    kvm: "Kvm", gfn: Gfn, pfn: Pfn, source: PopulateSource | None, args: GmemPopulateArgs
) -> Steps[None]:
    """Put one page of a launch update in place.

    EINVAL: no source for a type that has contents, no RMP entry.  EEXIST: the page is assigned already.
    EFAULT: reading the source, RMPUPDATE.  EIO: firmware refused.
    """
    if source is None and args.type is not LaunchPageType.ZERO:
        raise KernelError(EINVAL, f"{args.type.name} page without contents")
    linux, sev = kvm.linux, sev_info(kvm)
    try:
        assigned = snp_lookup_rmpentry(linux, pfn).assigned
    except KernelError as error:
        raise KernelError(EINVAL, error.why) from error
    if assigned:
        raise KernelError(EEXIST, f"GFN {gfn:#x}: PFN {pfn:#x} is assigned already")
    if source is not None:
        contents = yield from source.read()
        linux.soc.host_write(pfn_to_spa(pfn), contents, linux.snp.direct_map.level(pfn))
    rmp_make_private(linux, pfn, gfn_to_gpa(gfn), PgLevel.PG_4K, sev.asid, immutable=True)
    assert sev.snp_context is not None
    update = SnpLaunchUpdate(
        gctx_paddr=pfn_to_spa(sev.snp_context), address=pfn_to_spa(pfn), page_type=args.type
    )
    try:
        yield from sev_issue_cmd(
            kvm, args.proc, args.sev_fd, SnpCmd.LAUNCH_UPDATE, update, None
        )
    except KernelError as error:
        if isinstance(error, SevFwError):
            args.fw_error = error.fw_error
        yield from snp_launch_update_revert(kvm, pfn, args)
        if args.type is LaunchPageType.CPUID and args.fw_error == SnpStatus.INVALID_PARAM:
            yield from _write_back_cpuid(kvm, pfn, source)
        raise


def snp_launch_update_revert(kvm: "Kvm", pfn: Pfn, args: GmemPopulateArgs) -> Steps[None]:
    """Take back only the page that was changed for nothing.

    Pages before it are the guest's for good; pages after it were not touched, and may be somebody else's.
    The one place that unwinds, so that a defect can be put here.  EIO with the VM dead when firmware
    keeps the page.
    """
    yield from snp_page_reclaim(kvm, pfn)


def _write_back_cpuid(kvm: "Kvm", pfn: Pfn, source: PopulateSource | None) -> Steps[None]:
    """Firmware left the values it would accept in the page, in plain: give them to user space, if it goes."""
    assert source is not None
    corrected = kvm.linux.soc.host_read(pfn_to_spa(pfn), PAGE_SIZE)
    try:
        yield from source.write(corrected)
    except KernelError as error:
        if error.errno != EFAULT:
            raise


# LAUNCH_FINISH


def snp_launch_finish(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """Measure the VMSAs and close the launch; from then on private pages may be faulted in.

    ENOTTY: not SNP.  EINVAL: not started, flags, a VMSA that is encrypted already.  EBUSY: a vCPU is being
    created.  After a failure behind the first VMSA no retry succeeds.
    """
    sev = sev_info(kvm)
    if not sev_snp_guest(kvm):
        raise KernelError(ENOTTY, "SNP_LAUNCH_FINISH on a VM that is not SNP")
    if sev.snp_context is None:
        raise KernelError(EINVAL, "SNP_LAUNCH_FINISH before SNP_LAUNCH_START")
    argp = UserPtr(proc.mm, cmd.data_ptr)
    params = KvmSevSnpLaunchFinish((yield from argp.read(KvmSevSnpLaunchFinish.SIZE)))
    if params.flags:
        raise KernelError(EINVAL, f"LAUNCH_FINISH flags {params.flags:#x}")
    yield from _snp_launch_update_vmsa(kvm, proc, cmd)
    data = SnpLaunchFinish(
        gctx_paddr=pfn_to_spa(sev.snp_context),
        vcek_disabled=params.vcek_disabled & 1,
        host_data=params.host_data,
    )
    blobs: list[Pfn] = []
    try:
        if params.id_block_en:
            data.id_block_en = 1
            block = yield from _copy_user_blob(
                proc, params.id_block_uaddr, KVM_SEV_SNP_ID_BLOCK_SIZE, blobs
            )
            data.id_block_paddr = pfn_to_spa(block)
            auth = yield from _copy_user_blob(
                proc, params.id_auth_uaddr, KVM_SEV_SNP_ID_AUTH_SIZE, blobs
            )
            data.id_auth_paddr = pfn_to_spa(auth)
            data.auth_key_en = int(bool(params.auth_key_en))
        yield from sev_issue_cmd(kvm, proc, sev.fd, SnpCmd.LAUNCH_FINISH, data, cmd)
    finally:
        for pfn in blobs:
            kvm.linux.page_alloc.free_run(pfn, 1)
    kvm.arch.pre_fault_allowed = True


def _snp_launch_update_vmsa(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """snp_launch_update_vmsa(): every vCPU, in the order of their creation."""
    if kvm.created_vcpus != kvm.online_vcpus:
        raise KernelError(EBUSY, "a vCPU is being created")
    locked: list[KvmVcpu] = []
    try:
        if kvm.linux.profile.sync_vmsa_locks_all_vcpus:
            for vcpu in kvm.vcpus:
                yield from vcpu.mutex.acquire()
                locked.append(vcpu)
        for vcpu in kvm.vcpus:
            yield from _measure_vmsa(kvm, proc, cmd, vcpu)
    finally:
        for vcpu in reversed(locked):
            vcpu.mutex.release()


def _measure_vmsa(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd, vcpu: "KvmVcpu") -> Steps[None]:
    sev, vmsa = sev_info(kvm), vcpu.arch.svm.vmsa
    assert vmsa is not None
    assert sev.snp_context is not None
    sev_es_sync_vmsa(vcpu)
    rmp_make_private(
        kvm.linux, vmsa, Gpa(INITIAL_VMSA_GPA), PgLevel.PG_4K, sev.asid, immutable=True
    )
    update = SnpLaunchUpdate(
        gctx_paddr=pfn_to_spa(sev.snp_context),
        address=pfn_to_spa(vmsa),
        page_type=LaunchPageType.VMSA,
    )
    try:
        yield from sev_issue_cmd(kvm, proc, cmd.sev_fd, SnpCmd.LAUNCH_UPDATE, update, cmd)
    except KernelError as error:
        try:
            yield from snp_page_reclaim(kvm, vmsa)
        except KernelError as lost:
            kvm.linux.warn(
                "snp_launch_update_vmsa", lost.why
            )  # the page is leaked, the VM dead
        raise error
    vcpu.arch.guest_state_protected = True


def _copy_user_blob(proc: "Process", uaddr: int, size: int, blobs: list[Pfn]) -> Steps[Pfn]:
    pfn, _ = yield from psp_copy_user_blob(proc, uaddr, size)
    blobs.append(pfn)
    return pfn
