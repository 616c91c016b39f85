"""Guest requests: messages that a guest exchanges with firmware (arch/x86/kvm/svm/sev.c, v7.2).

The guest names two shared pages; firmware is given bounce pages of KVM's instead, because it writes only
to Firmware pages and a guest could name anything.  KVM cannot read the messages.  Certificates, which go
with a report, are user space's; it is asked for them where it said that it wants to be (7.0).

Lock: sev->guest_req_mutex, one request of a VM at a time.
"""

from errno import EAGAIN, EINVAL, EIO, ENOSPC
from typing import TYPE_CHECKING

from softcvm.abi.ghcb import GhcbError, GuestRequestError
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.snp_firmware import SnpCmd, SnpGuestRequest
from softcvm.kernel.arch.x86.kvm.svm.ghcb_page import kvm_read_guest, kvm_vcpu_write_guest
from softcvm.kernel.arch.x86.kvm.svm.sev import sev_issue_cmd
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info
from softcvm.kernel.drivers.crypto.ccp.sev_dev import SevFwError
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PAGE_MASK, PAGE_SIZE, Gpa, pfn_to_spa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("snp_handle_ext_guest_req", "snp_handle_guest_req")

_MSG_TYPE_OFFSET = 0x34
_MSG_REPORT_REQ = 5
_CERT_TABLE_END = bytes(24)


def snp_handle_guest_req(vcpu: "KvmVcpu") -> Steps[int]:
    """Pass one request on; firmware's status goes to the guest.  EIO: its pages cannot be reached."""
    kvm, sev_es = vcpu.kvm, vcpu.arch.svm.sev_es
    sev, linux = sev_info(kvm), kvm.linux
    assert sev.guest_req_buf is not None
    assert sev.guest_resp_buf is not None
    assert sev.snp_context is not None
    assert vcpu.proc is not None
    fw_err = 0
    yield from sev.guest_req_mutex.acquire()
    try:
        request = yield from _read(vcpu, vcpu.arch.svm.vmcb.exit_info_1, PAGE_SIZE)
        linux.soc.host_write(
            pfn_to_spa(sev.guest_req_buf),
            request,
            linux.snp.direct_map.level(sev.guest_req_buf),
        )
        data = SnpGuestRequest(
            gctx_paddr=pfn_to_spa(sev.snp_context),
            req_paddr=pfn_to_spa(sev.guest_req_buf),
            res_paddr=pfn_to_spa(sev.guest_resp_buf),
        )
        try:
            yield from sev_issue_cmd(kvm, vcpu.proc, sev.fd, SnpCmd.GUEST_REQUEST, data, None)
        except SevFwError as error:
            fw_err = int(error.fw_error)
        response = linux.soc.host_read(pfn_to_spa(sev.guest_resp_buf), PAGE_SIZE)
        try:
            yield from kvm_vcpu_write_guest(vcpu, Gpa(vcpu.arch.svm.vmcb.exit_info_2), response)
        except KernelError as error:
            raise KernelError(EIO, error.why) from error
    finally:
        sev.guest_req_mutex.release()
    assert sev_es.ghcb is not None
    sev_es.ghcb.set(sw_exit_info_2=fw_err)
    return 1


def snp_handle_ext_guest_req(vcpu: "KvmVcpu") -> Steps[int]:
    """A report request with certificates: KVM has none to give and answers with an empty table.

    After KVM_SEV_SNP_ENABLE_REQ_CERTS user space is asked to fill RBX pages at RAX first.
    """
    from softcvm.kernel.arch.x86.kvm.svm.ghcb import ghcb_reply_error

    sev_es, regs = vcpu.arch.svm.sev_es, vcpu.arch.regs
    [msg_type] = yield from _read(vcpu, vcpu.arch.svm.vmcb.exit_info_1 + _MSG_TYPE_OFFSET, 1)
    if msg_type == _MSG_REPORT_REQ:
        if not sev_es.is_valid("rax", "rbx") or regs.rax & PAGE_MASK:
            return ghcb_reply_error(vcpu, GhcbError.INVALID_INPUT)
        if sev_info(vcpu.kvm).snp_certs_enabled:
            run = vcpu.run
            run.exit_reason = KvmExit.SNP_REQ_CERTS
            run.snp_req_certs_gpa, run.snp_req_certs_npages = regs.rax, regs.rbx
            run.snp_req_certs_ret = 0
            vcpu.arch.complete_userspace_io = _complete_req_certs
            return 0
        if regs.rbx:
            try:
                yield from kvm_vcpu_write_guest(vcpu, Gpa(regs.rax), _CERT_TABLE_END)
            except KernelError as error:
                raise KernelError(EIO, error.why) from error
    return (yield from snp_handle_guest_req(vcpu))


_CERTS_REFUSED = {
    ENOSPC: GuestRequestError.INVALID_LENGTH,
    EAGAIN: GuestRequestError.BUSY,
    EIO: GuestRequestError.GENERIC,
}


def _complete_req_certs(vcpu: "KvmVcpu") -> Steps[int]:
    """User space has filled in the certificates, or says why not.  EINVAL: anything else it says."""
    run, sev_es = vcpu.run, vcpu.arch.svm.sev_es
    ret = run.snp_req_certs_ret
    if not ret:
        return (yield from snp_handle_guest_req(vcpu))
    if ret not in _CERTS_REFUSED:
        raise KernelError(EINVAL, f"snp_req_certs.ret {ret:#x}")
    if ret == ENOSPC:
        vcpu.arch.regs.rbx = run.snp_req_certs_npages
    assert sev_es.ghcb is not None
    sev_es.ghcb.set(sw_exit_info_2=_CERTS_REFUSED[ret] << 32)
    return 1


def _read(vcpu: "KvmVcpu", gpa: int, length: int) -> Steps[bytes]:
    try:
        return (yield from kvm_read_guest(vcpu.kvm, Gpa(gpa), length))
    except KernelError as error:
        raise KernelError(EIO, error.why) from error
