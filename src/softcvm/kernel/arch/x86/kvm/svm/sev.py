"""SEV in KVM: KVM_MEMORY_ENCRYPT_OP, initialising a VM for it, and taking it down (arch/x86/kvm/svm/sev.c, v7.2).

Owns the order of checks of the ioctl and the life of a guest context.  SNP's launch commands are launch.py,
those of SEV and SEV-ES sev_launch.py and sev_dbg.py, their memory sev_regions.py, several VMs on one ASID
sev_migrate.py, ASIDs asid.py, guest_memfd's hooks gmem.py, VMSA pages vmsa.py.  SEND, RECEIVE and attestation
reports of SEV are Unmodelled.

Locks: kvm->lock around every command; below it sev_bitmap_lock, sev_deactivate_lock, sev_cmd_mutex.
"""

from contextlib import suppress
from errno import EBADF, EINVAL, EIO, ENOTTY, EPERM
from typing import TYPE_CHECKING

from softcvm.abi.ghcb import GHCB_VERSION_DEFAULT, GHCB_VERSION_MAX, GHCB_VERSION_MIN
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.layout import Layout
from softcvm.abi.sev import KvmSevCmd, KvmSevInit, SevCmdId
from softcvm.abi.sev_firmware import SevDeactivate, SevDecommission
from softcvm.abi.snp_firmware import SevCmd, SnpAddr, SnpCmd, SnpPageReclaim
from softcvm.abi.svm import SevFeatures
from softcvm.kernel.arch.x86.kvm.svm.asid import SevAsids
from softcvm.kernel.arch.x86.kvm.svm.sev_info import (
    KvmSevInfo,
    is_mirroring_enc_context,
    sev_guest,
    sev_info,
    sev_snp_guest,
)
from softcvm.kernel.arch.x86.kvm.svm.sev_regions import sev_unpin_regions
from softcvm.kernel.arch.x86.virt.svm.sev import rmp_make_shared, snp_leak_pages
from softcvm.kernel.drivers.crypto.ccp.firmware_pages import (
    snp_alloc_firmware_pages,
    snp_free_firmware_pages,
)
from softcvm.kernel.drivers.crypto.ccp.sev_dev import SevFwError, sev_do_cmd, sev_platform_init
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.fs.file import FileKind
from softcvm.sim.addr import Asid, Pfn, PgLevel, pages_per_level, pfn_to_spa
from softcvm.sim.steps import Mutex, Steps

if TYPE_CHECKING:
    from softcvm.kernel.host import Linux
    from softcvm.kernel.mm.uaccess import UserPtr
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = (
    "KvmSevInfo",
    "kvm_rmp_make_shared",
    "sev_decommission",
    "sev_issue_cmd",
    "sev_mem_enc_ioctl",
    "sev_unbind_asid",
    "sev_vm_destroy",
    "snp_context_create",
    "snp_decommission_context",
    "snp_page_reclaim",
    "supported_vmsa_features",
)


# KVM_MEMORY_ENCRYPT_OP


def sev_mem_enc_ioctl(
    asids: SevAsids, kvm: "Kvm", proc: "Process", argp: "UserPtr"
) -> Steps[int]:
    """Dispatch a struct kvm_sev_cmd; a known command's struct is copied back even when it fails.

    0 for a NULL argument (how user space probes for SEV).  EINVAL: not for a mirror VM.  EPERM: a SEV
    command on an SNP VM.  EINVAL: no such command.
    """
    if argp.is_null:
        return 0
    cmd = KvmSevCmd((yield from argp.read(KvmSevCmd.SIZE)))
    yield from kvm.lock.acquire()
    try:
        if is_mirroring_enc_context(kvm) and cmd.id not in _ALLOWED_FROM_MIRROR:
            raise KernelError(EINVAL, f"SEV command {cmd.id} on a mirror VM")
        if sev_snp_guest(kvm) and cmd.id < SevCmdId.SNP_LAUNCH_START:
            raise KernelError(EPERM, f"SEV command {cmd.id} on an SNP VM")
        failed: KernelError | None = None
        try:
            yield from _dispatch(asids, kvm, proc, cmd)
        except _UnknownCommand as unknown:
            raise KernelError(EINVAL, str(unknown)) from unknown
        except KernelError as error:
            failed = error
        yield from argp.write(cmd.data)  # EFAULT here wins
        if failed:
            raise failed
        return 0
    finally:
        kvm.lock.release()


class _UnknownCommand(Exception):
    """An id without a command: refused before anything is copied back."""


_NO_COMMAND = (
    SevCmdId.SEND_UPDATE_VMSA,
    SevCmdId.RECEIVE_UPDATE_VMSA,
    SevCmdId.CERT_EXPORT,
)
"""In the header, and never implemented."""


_ALLOWED_FROM_MIRROR = (
    SevCmdId.LAUNCH_UPDATE_VMSA,
    SevCmdId.GUEST_STATUS,
    SevCmdId.DBG_DECRYPT,
    SevCmdId.DBG_ENCRYPT,
)
"""is_cmd_allowed_from_mirror()"""


def _dispatch(asids: SevAsids, kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[None]:
    from softcvm.kernel.arch.x86.kvm.svm import launch, sev_dbg, sev_launch

    known = cmd.id in SevCmdId.__members__.values() and cmd.id not in _NO_COMMAND
    if not known or (
        cmd.id == SevCmdId.SNP_ENABLE_REQ_CERTS and not kvm.linux.profile.snp_req_certs
    ):
        raise _UnknownCommand(f"SEV command {cmd.id} does not exist")
    match SevCmdId(cmd.id):
        case SevCmdId.INIT | SevCmdId.ES_INIT:
            yield from _sev_guest_init(asids, kvm, cmd)
        case SevCmdId.INIT2:
            yield from _sev_guest_init2(asids, kvm, proc, cmd)
        case SevCmdId.SNP_LAUNCH_START:
            yield from launch.snp_launch_start(asids, kvm, proc, cmd)
        case SevCmdId.SNP_LAUNCH_UPDATE:
            yield from launch.snp_launch_update(kvm, proc, cmd)
        case SevCmdId.SNP_LAUNCH_FINISH:
            yield from launch.snp_launch_finish(kvm, proc, cmd)
        case SevCmdId.SNP_ENABLE_REQ_CERTS if not sev_snp_guest(kvm) or kvm.created_vcpus:
            raise KernelError(EINVAL, "certificate requests are for SNP VMs without vCPUs")
        case SevCmdId.SNP_ENABLE_REQ_CERTS:
            sev_info(kvm).snp_certs_enabled = True
        case SevCmdId.LAUNCH_START:
            yield from sev_launch.sev_launch_start(asids, kvm, proc, cmd)
        case SevCmdId.LAUNCH_UPDATE_DATA:
            yield from sev_launch.sev_launch_update_data(kvm, proc, cmd)
        case SevCmdId.LAUNCH_UPDATE_VMSA:
            yield from sev_launch.sev_launch_update_vmsa(kvm, proc, cmd)
        case SevCmdId.LAUNCH_MEASURE:
            yield from sev_launch.sev_launch_measure(kvm, proc, cmd)
        case SevCmdId.LAUNCH_SECRET:
            yield from sev_launch.sev_launch_secret(kvm, proc, cmd)
        case SevCmdId.LAUNCH_FINISH:
            yield from sev_launch.sev_launch_finish(kvm, proc, cmd)
        case SevCmdId.GUEST_STATUS:
            yield from sev_launch.sev_guest_status(kvm, proc, cmd)
        case SevCmdId.DBG_DECRYPT | SevCmdId.DBG_ENCRYPT:
            decrypt = cmd.id == SevCmdId.DBG_DECRYPT
            yield from sev_dbg.sev_dbg_crypt(kvm, proc, cmd, decrypt=decrypt)
        case other if not sev_guest(kvm):
            raise KernelError(ENOTTY, f"{other.name} on a VM that is not SEV")
        case other:
            raise Unmodelled(f"KVM_MEMORY_ENCRYPT_OP {other.name}")


# Initialisation


def _sev_guest_init(asids: SevAsids, kvm: "Kvm", cmd: KvmSevCmd) -> Steps[None]:
    """KVM_SEV_INIT and KVM_SEV_ES_INIT: only for VMs of type 0, which they turn into SEV ones."""
    if kvm.arch.vm_type is not VmType.DEFAULT:
        raise KernelError(EINVAL, f"KVM_SEV_INIT on a VM of type {kvm.arch.vm_type.name}")
    data = KvmSevInit()
    vm_type = VmType.SEV
    if cmd.id == SevCmdId.ES_INIT:
        vm_type = VmType.SEV_ES
        data.ghcb_version = GHCB_VERSION_MIN
    yield from _guest_init(asids, kvm, cmd, data, vm_type)


def _sev_guest_init2(
    asids: SevAsids, kvm: "Kvm", proc: "Process", cmd: KvmSevCmd
) -> Steps[None]:
    if not sev_info(kvm).need_init:
        raise KernelError(EINVAL, "KVM_SEV_INIT2 is not due on this VM")
    data = KvmSevInit((yield from _read(proc, cmd, KvmSevInit.SIZE)))
    yield from _guest_init(asids, kvm, cmd, data, kvm.arch.vm_type)


def _guest_init(
    asids: SevAsids, kvm: "Kvm", cmd: KvmSevCmd, data: KvmSevInit, vm_type: VmType
) -> Steps[None]:
    """__sev_guest_init()"""
    sev = sev_info(kvm)
    es_active = vm_type is not VmType.SEV
    _check_init(kvm, data, vm_type, es_active=es_active)
    sev.active = True
    sev.es_active = es_active
    sev.vmsa_features = data.vmsa_features
    sev.ghcb_version = data.ghcb_version
    if es_active and not sev.ghcb_version:
        sev.ghcb_version = GHCB_VERSION_DEFAULT
    if vm_type is VmType.SNP:
        sev.vmsa_features |= int(SevFeatures.SNP_ACTIVE)
    try:
        sev.asid = yield from asids.new(es_active=es_active)
        try:
            yield from sev_platform_init(kvm.linux)
            if vm_type is VmType.SNP:
                yield from _snp_guest_req_init(kvm)
        except KernelError as error:
            cmd.error = error.fw_error if isinstance(error, SevFwError) else 0
            yield from asids.free(sev.asid)
            sev.asid = Asid(0)
            raise
    except KernelError:
        sev.vmsa_features = 0
        sev.es_active = False
        sev.active = False
        raise
    sev.need_init = False


def _check_init(kvm: "Kvm", data: KvmSevInit, vm_type: VmType, *, es_active: bool) -> None:
    if kvm.created_vcpus:
        raise KernelError(EINVAL, "vCPUs exist already")
    if data.flags:
        raise KernelError(EINVAL, f"INIT2 flags {data.flags:#x}")
    valid = supported_vmsa_features(kvm.linux) if es_active else 0
    if data.vmsa_features & ~valid:
        raise KernelError(
            EINVAL, f"VMSA features {data.vmsa_features:#x}, supported {valid:#x}"
        )
    if data.ghcb_version > GHCB_VERSION_MAX or (not es_active and data.ghcb_version):
        raise KernelError(EINVAL, f"GHCB version {data.ghcb_version}")
    lowest = kvm.linux.profile.snp_min_ghcb_version
    if vm_type is VmType.SNP and 0 < data.ghcb_version < lowest:
        raise KernelError(EINVAL, f"GHCB version {data.ghcb_version}, SNP needs {lowest}")
    if sev_info(kvm).active:
        raise KernelError(EINVAL, "the VM is SEV already")


def supported_vmsa_features(linux: "Linux") -> int:
    """sev_supported_vmsa_features: what user space may ask for; SNP_ACTIVE is KVM's own."""
    return int(SevFeatures.DEBUG_SWAP) if linux.soc.profile.debug_swap else 0


def _snp_guest_req_init(kvm: "Kvm") -> Steps[None]:
    """Bounce pages for guest requests: firmware must never write a page that the guest named."""
    sev, linux = sev_info(kvm), kvm.linux
    request = linux.page_alloc.alloc_pages()
    linux.page_alloc.clear_pages(request, 1)
    try:
        sev.guest_resp_buf = yield from snp_alloc_firmware_pages(linux, zero=True)
    except KernelError as error:
        linux.page_alloc.free_run(request, 1)
        raise KernelError(EIO, error.why) from error
    sev.guest_req_buf = request


def _snp_guest_req_cleanup(kvm: "Kvm") -> Steps[None]:
    sev = sev_info(kvm)
    if sev.guest_resp_buf is not None:
        yield from snp_free_firmware_pages(kvm.linux, sev.guest_resp_buf)
    if sev.guest_req_buf is not None:
        kvm.linux.page_alloc.free_run(sev.guest_req_buf, 1)
    sev.guest_req_buf = sev.guest_resp_buf = None


# Firmware commands on behalf of a VM


def _read(proc: "Process", cmd: KvmSevCmd, size: int) -> Steps[bytes]:
    from softcvm.kernel.mm.uaccess import UserPtr

    return (yield from UserPtr(proc.mm, cmd.data_ptr).read(size))


def sev_issue_cmd(
    kvm: "Kvm",
    proc: "Process",
    fd: int,
    command: SnpCmd | SevCmd,
    data: Layout,
    cmd: KvmSevCmd | None,
) -> Steps[None]:
    """__sev_issue_cmd(): the caller proves by a /dev/sev file that it may talk to firmware.

    EBADF: no such file.  SevFwError: firmware refused.  Firmware's status goes to cmd.error, 0 included.
    """
    if proc.files.lookup(fd).kind is not FileKind.DEV_SEV:
        raise KernelError(EBADF, f"fd {fd} is not /dev/sev")
    try:
        yield from sev_do_cmd(kvm.linux, command, data)
    except SevFwError as error:
        if cmd is not None:
            cmd.error = error.fw_error
        raise
    if cmd is not None:
        cmd.error = 0


def sev_decommission(linux: "Linux", handle: int) -> Steps[None]:
    """Let firmware forget a SEV guest.  Linux does not look at the result."""
    if not handle:
        return
    with suppress(KernelError):
        yield from sev_do_cmd(linux, SevCmd.DECOMMISSION, SevDecommission(handle=handle))


def sev_unbind_asid(asids: SevAsids, linux: "Linux", handle: int) -> Steps[None]:
    """DEACTIVATE and DECOMMISSION.  DEACTIVATE takes back the WBINVD that a flush of ASIDs relies on, so it
    waits for one; its result is not looked at either.
    """
    if not handle:
        return
    yield from asids.sev_deactivate_lock.acquire_read()
    try:
        with suppress(KernelError):
            yield from sev_do_cmd(linux, SevCmd.DEACTIVATE, SevDeactivate(handle=handle))
    finally:
        asids.sev_deactivate_lock.release_read()
    yield from sev_decommission(linux, handle)


def snp_context_create(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd) -> Steps[Pfn]:
    """A page for firmware to keep the guest's context in.  ENOTTY for every failure."""
    try:
        context = yield from snp_alloc_firmware_pages(kvm.linux)
    except KernelError as error:
        raise KernelError(ENOTTY, error.why) from error
    try:
        yield from sev_issue_cmd(
            kvm,
            proc,
            cmd.sev_fd,
            SnpCmd.GCTX_CREATE,
            SnpAddr(address=pfn_to_spa(context)),
            cmd,
        )
    except KernelError as error:
        yield from snp_free_firmware_pages(kvm.linux, context)
        raise KernelError(ENOTTY, error.why) from error
    return context


def snp_decommission_context(asids: SevAsids, kvm: "Kvm") -> Steps[None]:
    """Let firmware forget the guest, which unbinds its ASID; nothing to do without a context.

    KernelError: firmware refused, and the context stays.
    """
    sev, linux = sev_info(kvm), kvm.linux
    if sev.snp_context is None:
        return
    yield from asids.sev_deactivate_lock.acquire_write()
    try:
        yield from sev_do_cmd(
            linux, SnpCmd.DECOMMISSION, SnpAddr(address=pfn_to_spa(sev.snp_context))
        )
    except KernelError as error:
        linux.warn("snp_decommission_context", error.why)
        raise
    finally:
        asids.sev_deactivate_lock.release_write()
    yield from snp_free_firmware_pages(linux, sev.snp_context)
    sev.snp_context = None


# Pages that come back


def kvm_rmp_make_shared(kvm: "Kvm", pfn: Pfn, level: PgLevel) -> None:
    """Take a page back; if that fails the VM is dead and the page is leaked.  EIO."""
    try:
        rmp_make_shared(kvm.linux, pfn, level)
    except KernelError as error:
        bug = kvm.bug(f"rmp_make_shared: {error.why}")
        snp_leak_pages(kvm.linux, pfn, pages_per_level(level))
        raise bug from error


def snp_page_reclaim(kvm: "Kvm", pfn: Pfn) -> Steps[None]:
    """Take a Pre-Guest page back: firmware first, then the RMP.  If that fails, as above.  EIO."""
    try:
        yield from sev_do_cmd(
            kvm.linux, SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=pfn_to_spa(pfn))
        )
    except KernelError as error:
        bug = kvm.bug(f"failed to reclaim PFN {pfn:#x}: {error.why}")
        snp_leak_pages(kvm.linux, pfn, 1)
        raise bug from error
    kvm_rmp_make_shared(kvm, pfn, PgLevel.PG_4K)


# Teardown


def sev_vm_destroy(asids: SevAsids, mirror_lock: Mutex, kvm: "Kvm") -> Steps[None]:
    """After the vCPUs are gone: flush, unpin, let firmware forget the guest, free the ASID.

    A mirror has nothing but its reference to the owner, whose the ASID is.

    guest_memfd pages may outlive this with RMP entries of the ASID; if firmware does not let go of the
    guest the ASID is leaked.  Linux from 6.17 flushes only CPUs that ran the VM; vCPUs of the model are
    not bound to CPUs, so all of them are flushed.
    """
    sev = sev_info(kvm)
    if not sev.active:
        return
    if sev.mirror_vms:
        kvm.linux.warn("sev_vm_destroy", f"VM {kvm.id} still has mirrors")
    if is_mirroring_enc_context(kvm):
        yield from _drop_mirror(mirror_lock, kvm)
        return
    kvm.linux.soc.caches.wbinvd_on_all_cpus()
    sev_unpin_regions(kvm)
    if sev_snp_guest(kvm):
        yield from _snp_guest_req_cleanup(kvm)
        try:
            yield from snp_decommission_context(asids, kvm)
        except KernelError:
            return  # warned of above
    else:
        yield from sev_unbind_asid(asids, kvm.linux, sev.handle)
    yield from asids.free(sev.asid)


def _drop_mirror(mirror_lock: Mutex, kvm: "Kvm") -> Steps[None]:
    """A mirror leaves its owner's list and puts its reference, perhaps the owner's last."""
    sev = sev_info(kvm)
    yield from mirror_lock.acquire()
    owner = sev.enc_context_owner
    assert owner is not None
    sev_info(owner).mirror_vms.remove(kvm)
    sev.enc_context_owner = None
    mirror_lock.release()
    yield from owner.put()
