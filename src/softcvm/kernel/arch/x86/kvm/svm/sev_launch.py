"""Launching SEV and SEV-ES guests: START, UPDATE_DATA, UPDATE_VMSA, MEASURE, SECRET, FINISH, and
GUEST_STATUS (arch/x86/kvm/svm/sev.c, v7.2).

A guest's first contents lie in the VMM's own memory, which is the guest's: firmware encrypts it where it is,
and the host reads ciphertext there from then on.  There is no copy and no second buffer, unlike SNP's
launch.py.  The pages are pinned for the length of a command; they stay in place because user space registers
them as a region (sev_regions.py).

Locks: kvm->lock held by the caller; the mutex of each vCPU around its VMSA.
"""

from errno import EBUSY, EINVAL, ENOTTY
from typing import TYPE_CHECKING

from softcvm.abi.sev import (
    SEV_FW_BLOB_MAX_SIZE,
    KvmSevCmd,
    KvmSevGuestStatus,
    KvmSevLaunchMeasure,
    KvmSevLaunchSecret,
    KvmSevLaunchStart,
    KvmSevLaunchUpdateData,
)
from softcvm.abi.sev_firmware import (
    SevActivate,
    SevGuestStatus,
    SevLaunchFinish,
    SevLaunchMeasure,
    SevLaunchSecret,
    SevLaunchStart,
    SevLaunchUpdateData,
    SevLaunchUpdateVmsa,
)
from softcvm.abi.snp_firmware import SevCmd
from softcvm.kernel.arch.x86.kvm.svm.asid import SevAsids
from softcvm.kernel.arch.x86.kvm.svm.sev import sev_decommission, sev_issue_cmd, sev_unbind_asid
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_es_guest, sev_guest, sev_info
from softcvm.kernel.arch.x86.kvm.svm.sev_regions import (
    sev_clflush_pages,
    sev_pin_memory,
    sev_unpin_memory,
)
from softcvm.kernel.arch.x86.kvm.svm.vmsa import sev_es_sync_vmsa
from softcvm.kernel.drivers.crypto.ccp.legacy_buffers import get_order
from softcvm.kernel.drivers.crypto.ccp.sev_dev import (
    SevFwError,
    psp_copy_user_blob,
    sev_do_cmd,
)
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import UserPtr, copy_to_user
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Hva, Pfn, pfn_to_spa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = (
    "require_sev",
    "sev_guest_status",
    "sev_launch_finish",
    "sev_launch_measure",
    "sev_launch_secret",
    "sev_launch_start",
    "sev_launch_update_data",
    "sev_launch_update_vmsa",
)


def require_sev(kvm: "Kvm", cmd: KvmSevCmd) -> None:
    """ENOTTY."""
    if not sev_guest(kvm):
        raise KernelError(ENOTTY, f"SEV command {cmd.id} on a VM that is not SEV")


def sev_launch_start(
    asids: SevAsids, kvm: "Kvm", proc: "Process", cmd: KvmSevCmd
) -> Steps[None]:
    """Create the guest in firmware and bind the VM's ASID to it; undone when a later step fails.

    ENOTTY.  EFAULT.  EINVAL: length of a blob.  EBADF: sev_fd is not /dev/sev.  EIO: firmware.  A second
    LAUNCH_START makes a second guest, which the ASID cannot be bound to.
    """
    sev = sev_info(kvm)
    require_sev(kvm, cmd)
    argp = UserPtr(proc.mm, cmd.data_ptr)
    params = KvmSevLaunchStart((yield from argp.read(KvmSevLaunchStart.SIZE)))
    start = SevLaunchStart(handle=params.handle, policy=params.policy)
    blobs: list[tuple[Pfn, int]] = []
    try:
        if params.dh_uaddr:
            blobs.append((yield from psp_copy_user_blob(proc, params.dh_uaddr, params.dh_len)))
            start.dh_cert_address = pfn_to_spa(blobs[-1][0])
            start.dh_cert_len = params.dh_len
        if params.session_uaddr:
            blobs.append(
                (yield from psp_copy_user_blob(proc, params.session_uaddr, params.session_len))
            )
            start.session_address = pfn_to_spa(blobs[-1][0])
            start.session_len = params.session_len
        yield from sev_issue_cmd(kvm, proc, cmd.sev_fd, SevCmd.LAUNCH_START, start, cmd)
        yield from _sev_bind_asid(kvm, start.handle, cmd)
        params.handle = start.handle
        try:
            yield from argp.write(params.data)
        except KernelError:
            yield from sev_unbind_asid(asids, kvm.linux, start.handle)
            raise
    finally:
        _free(kvm, blobs)
    sev.handle = start.handle
    sev.fd = cmd.sev_fd


def _sev_bind_asid(kvm: "Kvm", handle: int, cmd: KvmSevCmd) -> Steps[None]:
    """ACTIVATE; a guest that cannot have the ASID is decommissioned.  No descriptor is asked for."""
    activate = SevActivate(handle=handle, asid=sev_info(kvm).asid)
    try:
        yield from sev_do_cmd(kvm.linux, SevCmd.ACTIVATE, activate)
    except KernelError as error:
        if isinstance(error, SevFwError):
            cmd.error = error.fw_error
        yield from sev_decommission(kvm.linux, handle)
        raise
    cmd.error = 0


def sev_launch_update_data(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """Encrypt user memory in place, one firmware command for each run of frames that lie together.

    ENOTTY.  EFAULT.  EINVAL and ENOMEM as sev_pin_memory().  EBADF, EIO: runs before the failure stay
    encrypted and measured.
    """
    require_sev(kvm, cmd)
    argp = UserPtr(proc.mm, cmd.data_ptr)
    params = KvmSevLaunchUpdateData((yield from argp.read(KvmSevLaunchUpdateData.SIZE)))
    sev = sev_info(kvm)
    runs = yield from sev_pin_memory(kvm, proc, params.uaddr, params.len, write=True)
    try:
        sev_clflush_pages(kvm, runs)
        offset, left = params.uaddr & PAGE_MASK, params.len
        for pfn, npages in runs:
            length = min((npages << PAGE_SHIFT) - offset, left)
            data = SevLaunchUpdateData(
                handle=sev.handle, address=pfn_to_spa(pfn) + offset, len=length
            )
            yield from sev_issue_cmd(kvm, proc, sev.fd, SevCmd.LAUNCH_UPDATE_DATA, data, cmd)
            offset = 0
            left -= length
    finally:
        sev_unpin_memory(kvm, runs)


def sev_launch_update_vmsa(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """Write, measure and encrypt every vCPU's registers, in the order the vCPUs were created.

    ENOTTY: not SEV-ES.  EBUSY: a vCPU is being created.  EINVAL: under debugging, or encrypted already, so
    that after a failure behind the first vCPU no retry succeeds.
    """
    if not sev_es_guest(kvm):
        raise KernelError(ENOTTY, "LAUNCH_UPDATE_VMSA on a VM that is not SEV-ES")
    if kvm.created_vcpus != kvm.online_vcpus:
        raise KernelError(EBUSY, "a vCPU is being created")
    at_once = kvm.linux.profile.sync_vmsa_locks_all_vcpus
    locked: list[KvmVcpu] = []
    try:
        for vcpu in kvm.vcpus if at_once else ():
            yield from vcpu.mutex.acquire()
            locked.append(vcpu)
        for vcpu in kvm.vcpus:
            if not at_once:
                yield from vcpu.mutex.acquire()
                locked.append(vcpu)
            yield from _update_vmsa(kvm, proc, cmd, vcpu)
            if not at_once:
                locked.pop().mutex.release()
    finally:
        for vcpu in reversed(locked):
            vcpu.mutex.release()


def _update_vmsa(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd, vcpu: "KvmVcpu") -> Steps[None]:
    """__sev_launch_update_vmsa()"""
    sev, vmsa = sev_info(kvm), vcpu.arch.svm.vmsa
    sev_es_sync_vmsa(vcpu)
    assert vmsa is not None
    kvm.linux.soc.caches.clflush(1)
    data = SevLaunchUpdateVmsa(handle=sev.handle, address=pfn_to_spa(vmsa), len=PAGE_SIZE)
    yield from sev_issue_cmd(kvm, proc, sev.fd, SevCmd.LAUNCH_UPDATE_VMSA, data, cmd)
    vcpu.arch.guest_state_protected = True


def sev_launch_measure(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """Close the measurement and hand it out.  len 0 asks for its length, which is written back though
    firmware, and so the call, fails.

    ENOTTY.  EFAULT.  EINVAL: len above 16K.  ENOMEM.  EBADF, EIO.
    """
    require_sev(kvm, cmd)
    sev, linux = sev_info(kvm), kvm.linux
    argp = UserPtr(proc.mm, cmd.data_ptr)
    params = KvmSevLaunchMeasure((yield from argp.read(KvmSevLaunchMeasure.SIZE)))
    asked = params.len
    data = SevLaunchMeasure(handle=sev.handle)
    blob: Pfn | None = None
    order = 0
    if asked and params.uaddr:
        if asked > SEV_FW_BLOB_MAX_SIZE:
            raise KernelError(EINVAL, f"a measurement of {asked:#x} bytes")
        order = get_order(asked)
        blob = linux.page_alloc.alloc_pages(order)
        linux.page_alloc.clear_pages(blob, 1 << order)
        data.address, data.len = pfn_to_spa(blob), asked
    failed: KernelError | None = None
    try:
        try:
            yield from sev_issue_cmd(kvm, proc, sev.fd, SevCmd.LAUNCH_MEASURE, data, cmd)
        except KernelError as error:
            if asked:
                raise
            failed = error
        if blob is not None:
            try:
                measured = linux.soc.host_read(pfn_to_spa(blob), asked)
                yield from copy_to_user(proc.mm, Hva(params.uaddr), measured)
            except KernelError as error:
                failed = error
        params.len = data.len
        yield from argp.write(params.data)  # EFAULT here wins
    finally:
        if blob is not None:
            linux.page_alloc.free_run(blob, 1 << order)
    if failed:
        raise failed


def sev_launch_secret(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """Decrypt the owner's packet into guest memory, which must lie in frames that follow one another.

    ENOTTY.  EFAULT.  EINVAL and ENOMEM as sev_pin_memory(); EINVAL: frames apart, length of a blob.
    """
    require_sev(kvm, cmd)
    argp = UserPtr(proc.mm, cmd.data_ptr)
    params = KvmSevLaunchSecret((yield from argp.read(KvmSevLaunchSecret.SIZE)))
    sev = sev_info(kvm)
    runs = yield from sev_pin_memory(
        kvm, proc, params.guest_uaddr, params.guest_len, write=True
    )
    blobs: list[tuple[Pfn, int]] = []
    try:
        sev_clflush_pages(kvm, runs)
        if len(runs) != 1:
            raise KernelError(EINVAL, f"the secret's memory is {len(runs)} runs of frames")
        blobs.append(
            (yield from psp_copy_user_blob(proc, params.trans_uaddr, params.trans_len))
        )
        blobs.append((yield from psp_copy_user_blob(proc, params.hdr_uaddr, params.hdr_len)))
        data = SevLaunchSecret(
            handle=sev.handle,
            guest_address=pfn_to_spa(runs[0][0]) + (params.guest_uaddr & PAGE_MASK),
            guest_len=params.guest_len,
            trans_address=pfn_to_spa(blobs[0][0]),
            trans_len=params.trans_len,
            hdr_address=pfn_to_spa(blobs[1][0]),
            hdr_len=params.hdr_len,
        )
        yield from sev_issue_cmd(kvm, proc, sev.fd, SevCmd.LAUNCH_SECRET, data, cmd)
    finally:
        _free(kvm, blobs)
        sev_unpin_memory(kvm, runs)


def sev_launch_finish(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """ENOTTY.  EBADF, EIO."""
    require_sev(kvm, cmd)
    sev = sev_info(kvm)
    data = SevLaunchFinish(handle=sev.handle)
    yield from sev_issue_cmd(kvm, proc, sev.fd, SevCmd.LAUNCH_FINISH, data, cmd)


def sev_guest_status(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    """ENOTTY.  EBADF, EIO.  EFAULT."""
    require_sev(kvm, cmd)
    sev = sev_info(kvm)
    data = SevGuestStatus(handle=sev.handle)
    yield from sev_issue_cmd(kvm, proc, sev.fd, SevCmd.GUEST_STATUS, data, cmd)
    params = KvmSevGuestStatus(handle=data.handle, policy=data.policy, state=data.state)
    yield from UserPtr(proc.mm, cmd.data_ptr).write(params.data)


def _free(kvm: "Kvm", blobs: list[tuple[Pfn, int]]) -> None:
    for pfn, npages in blobs:
        kvm.linux.page_alloc.free_run(pfn, npages)
