"""KVM_MEMORY_ENCRYPT_OP, its initialisation commands, /dev/sev, ASIDs and teardown, through system calls."""

from errno import EBUSY, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY, ENXIO, EPERM
from typing import Any

import pytest

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmEncRegion, VmType
from softcvm.abi.kvm.vcpu import KvmDeviceAttr
from softcvm.abi.rmp import PageState
from softcvm.abi.sev import SEV_ISSUE_CMD, KvmSevCmd, KvmSevInit, SevCmdId, SevIssueCmd
from softcvm.abi.snp_platform import SevPlatformStatus, SnpPlatformStatusBuffer
from softcvm.kernel.errors import Unmodelled
from softcvm.sim.choice import Scripted

INIT2 = SevCmdId.INIT2


def test_a_null_argument_is_the_probe_idiom(host: Any) -> None:
    vm = host.vm(init=False)
    assert vm.user.ioctl(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, 0) == 0
    assert vm.user.errno(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, 0x1000) == EFAULT


@pytest.mark.parametrize("command", [c for c in SevCmdId if c < 100])
def test_an_snp_vm_takes_no_sev_command(host: Any, command: SevCmdId) -> None:
    errno, cmd = host.vm().sev_cmd(command, KvmSevInit(), error=0x77)
    assert (errno, cmd.error) == (EPERM, 0x77)


@pytest.mark.parametrize("command", [10, 14, 19, 23, 99, 104, 1 << 31])
def test_ids_without_a_command_are_einval(host: Any, command: int) -> None:
    assert host.vm(VmType.SEV).sev_cmd(command)[0] == EINVAL


def test_certificate_requests_are_for_7_0_and_snp(boot: Any) -> None:
    assert boot("6.18").vm().sev_cmd(SevCmdId.SNP_ENABLE_REQ_CERTS)[0] == EINVAL
    host = boot("7.3")
    assert host.vm(VmType.SEV_ES).sev_cmd(SevCmdId.SNP_ENABLE_REQ_CERTS)[0] == EINVAL
    assert host.vm().sev_cmd(SevCmdId.SNP_ENABLE_REQ_CERTS)[0] == 0
    with_vcpu = host.vm()
    with_vcpu.vcpu()
    assert with_vcpu.sev_cmd(SevCmdId.SNP_ENABLE_REQ_CERTS)[0] == EINVAL


@pytest.mark.parametrize("command", [2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 18, 20, 21])
def test_sev_commands_on_a_vm_that_is_not_sev_are_enotty(host: Any, command: int) -> None:
    assert host.vm(VmType.DEFAULT, init=False).sev_cmd(command)[0] == ENOTTY


@pytest.mark.parametrize(
    ("kernel", "vm_type", "fields", "errno"),
    [
        ("7.3", VmType.SNP, {}, 0),
        ("7.3", VmType.SNP, {"flags": 1}, EINVAL),
        ("7.3", VmType.SNP, {"vmsa_features": 1}, EINVAL),  # SNP_ACTIVE is KVM's own
        ("7.3", VmType.SNP, {"vmsa_features": 1 << 5}, 0),
        ("7.3", VmType.SEV, {"vmsa_features": 1 << 5}, EINVAL),
        ("7.3", VmType.SNP, {"ghcb_version": 3}, EINVAL),
        ("7.3", VmType.SNP, {"ghcb_version": 2}, 0),
        ("7.3", VmType.SNP, {"ghcb_version": 1}, EINVAL),
        ("6.18", VmType.SNP, {"ghcb_version": 1}, EINVAL),
        ("6.12", VmType.SNP, {"ghcb_version": 1}, 0),
        ("7.3", VmType.SEV_ES, {"ghcb_version": 1}, 0),
        ("7.3", VmType.SEV, {"ghcb_version": 1}, EINVAL),
        ("7.3", VmType.SEV, {"pad1": 0xFFFF, "pad2": b"x" * 32}, 0),
        ("7.3", VmType.DEFAULT, {}, EINVAL),
    ],
)
def test_init2_checks(
    boot: Any, kernel: str, vm_type: VmType, fields: dict[str, Any], errno: int
) -> None:
    vm = boot(kernel).vm(vm_type, init=False)
    assert vm.sev_cmd(INIT2, KvmSevInit(**fields))[0] == errno


def test_init2_order_and_once_only(host: Any) -> None:
    vm = host.vm(init=False)
    assert vm.sev_cmd(INIT2)[0] == EFAULT
    vm.op(INIT2, KvmSevInit())
    assert vm.sev_cmd(INIT2, KvmSevInit())[0] == EPERM
    with_vcpu = host.vm(init=False)
    with_vcpu.vcpu()
    assert with_vcpu.sev_cmd(INIT2, KvmSevInit())[0] == EINVAL
    legacy = host.vm(VmType.DEFAULT, init=False)
    legacy.op(SevCmdId.ES_INIT)
    assert legacy.kvm.arch.sev.ghcb_version == 1
    assert legacy.sev_cmd(SevCmdId.INIT)[0] == EINVAL
    assert host.vm(init=False).sev_cmd(SevCmdId.INIT)[0] == EINVAL


def test_milan_has_no_debug_swap(boot: Any) -> None:
    vm = boot(cpu="milan").vm(init=False)
    assert vm.sev_cmd(INIT2, KvmSevInit(vmsa_features=1 << 5))[0] == EINVAL


def test_device_attributes_tell_the_vmsa_features(host: Any) -> None:
    addr = host.user.mmap(4096)
    attr = KvmDeviceAttr(group=1, attr=0, addr=addr)
    assert host.user.ioctl(host.dev_kvm, k.KVM_GET_DEVICE_ATTR, attr) == 0
    assert host.user.sys.load(addr, 8) == (1 << 5).to_bytes(8, "little")
    for group, number in ((1, 9), (2, 0)):
        attr = KvmDeviceAttr(group=group, attr=number, addr=addr)
        assert host.user.errno(host.dev_kvm, k.KVM_HAS_DEVICE_ATTR, attr) == ENXIO


def test_regions_need_an_encrypted_vm(host: Any) -> None:
    region = KvmEncRegion(addr=0x1000, size=4096)
    plain, snp = host.vm(VmType.DEFAULT, init=False), host.vm()
    for request in (k.KVM_MEMORY_ENCRYPT_REG_REGION, k.KVM_MEMORY_ENCRYPT_UNREG_REGION):
        assert plain.user.errno(plain.fd, request, region) == ENOTTY
    assert snp.user.errno(snp.fd, k.KVM_MEMORY_ENCRYPT_UNREG_REGION, region) == EINVAL
    assert snp.user.errno(snp.fd, k.KVM_MEMORY_ENCRYPT_REG_REGION, region) == ENOMEM
    region.addr = snp.user.mmap(4096)
    assert snp.user.errno(snp.fd, k.KVM_MEMORY_ENCRYPT_REG_REGION, region) == 0


# /dev/sev


def test_platform_status_speaks_of_the_firmware_that_runs(host: Any) -> None:
    addr, profile = host.user.mmap(4096), host.soc.profile

    def issue(command: int) -> bytes:
        request = SevIssueCmd(cmd=command, data_ptr=addr, error=5)
        assert host.user.ioctl(host.dev_sev, SEV_ISSUE_CMD, request) == 0
        data: bytes = host.user.sys.load(addr, 32)
        return data

    sev = SevPlatformStatus(issue(1)[: SevPlatformStatus.SIZE])
    snp = SnpPlatformStatusBuffer(issue(9))
    for api in ((sev.api_major, sev.api_minor), (snp.api_major, snp.api_minor)):
        assert api == (profile.api_major, profile.api_minor)
    assert (sev.state, snp.state, snp.is_rmp_initialized) == (1, 1, 1)
    # The buffers are the hypervisor's again: only TMR, RMP and guests' pages stay out of its hands.
    assert host.soc.rmp.state(host.linux.sev_dev.cmd_buf) is PageState.HYPERVISOR


@pytest.mark.parametrize(
    ("request_", "command", "addr", "errno"),
    [
        (SEV_ISSUE_CMD + 1, 1, 0, EINVAL),
        (SEV_ISSUE_CMD, 13, 0, EINVAL),
        (SEV_ISSUE_CMD, 99, 0, EINVAL),
        (SEV_ISSUE_CMD, 9, 0, EINVAL),
        (SEV_ISSUE_CMD, 9, 0x1000, EFAULT),
        (SEV_ISSUE_CMD, 1, 0x1000, EFAULT),
    ],
)
def test_dev_sev_refuses(host: Any, request_: int, command: int, addr: int, errno: int) -> None:
    request = SevIssueCmd(cmd=command, data_ptr=addr)
    assert host.user.errno(host.dev_sev, request_, request) == errno


def test_other_dev_sev_commands_are_unmodelled_by_name(host: Any) -> None:
    with pytest.raises(Unmodelled, match="PDH_CERT_EXPORT"):
        host.user.ioctl(host.dev_sev, SEV_ISSUE_CMD, SevIssueCmd(cmd=5))


# ASIDs and teardown


def test_a_freed_asid_is_used_again_only_after_wbinvd_and_df_flush(host: Any) -> None:
    last = host.soc.profile.min_sev_asid - 1
    vms = [host.vm() for _ in range(last)]
    assert [vm.kvm.arch.sev.asid for vm in vms] == list(range(1, last + 1))
    refused = host.vm(init=False)
    assert refused.sev_cmd(INIT2, KvmSevInit())[0] == EBUSY
    assert refused.kvm.arch.sev.active is False
    for vm in (vms[10], vms[20]):
        vm.user.sys.close(vm.fd)
    counters = host.soc.counters
    flushes, wbinvd = counters.df_flush, counters.wbinvd
    again = host.vm()
    assert again.kvm.arch.sev.asid == 11
    assert counters.df_flush == flushes + 1
    assert counters.wbinvd == wbinvd + host.soc.profile.cpus
    assert host.vm().kvm.arch.sev.asid == 21  # the same flush freed both
    assert counters.df_flush == flushes + 1


def test_sev_and_sev_es_asids_come_from_different_ranges(host: Any) -> None:
    assert host.vm(VmType.SEV).kvm.arch.sev.asid == host.soc.profile.min_sev_asid
    assert host.vm(VmType.SEV_ES).kvm.arch.sev.asid == 1


@pytest.mark.parametrize("order", [0, 9])
def test_closing_everything_gives_every_page_back_to_the_hypervisor(
    boot: Any, order: int
) -> None:
    host = boot(order=order)
    empty = host.machine.census()
    free = host.linux.page_alloc.free_pages
    vm = host.vm()
    vm.launch(2048, vcpus=3)
    assert vm.prefault(0, 2048) == 0
    census = host.machine.census()
    assert census["GUEST_INVALID"] == 2048
    assert census["GUEST_VALID"] == 3
    assert census["CONTEXT"] == 1
    host.machine.teardown()
    assert host.machine.census() == empty
    assert host.linux.page_alloc.free_pages == free
    assert host.linux.leaked_pages == 0


def test_private_memory_may_outlive_its_asid(host: Any) -> None:
    """The free hook knows no VM: it takes back what the RMP says is assigned."""
    vm = host.vm()
    vm.launch(64)
    assert vm.prefault(0, 64) == 0
    asid = vm.kvm.arch.sev.asid
    sys = vm.user.sys
    for fd in (vm.fd, *vm.vcpus):
        sys.close(fd)
    assert host.soc.rmp.asid_pages[asid] == 65  # the guest_memfd holds the VM: nothing went
    flushed = host.soc.counters.clflush_pages
    sys.munmap(vm.runs[0], 3 * 4096)
    sys.close(vm.gmem)
    assert asid not in host.soc.rmp.asid_pages
    assert host.soc.counters.clflush_pages - flushed == 64 + 1  # and the VMSA page


def test_an_allocation_that_fails_leaves_the_vm_uninitialised(boot: Any) -> None:
    """INIT2's bounce buffers cannot be had: the ASID is given back, and waits for a flush."""
    picks = Scripted({})
    host = boot(choices=picks)
    vm = host.vm(init=False)
    params = host.user.mmap(4096)
    host.user.sys.store(params, bytes(KvmSevInit()))
    cmd = KvmSevCmd(id=INIT2, data_ptr=params)
    picks._picks["alloc_pages"] = [1]
    assert host.user.errno(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd) == ENOMEM
    assert (vm.kvm.arch.sev.asid, vm.kvm.arch.sev.active) == (0, False)
    picks._picks["alloc_pages"] = [0, 1]
    assert host.user.errno(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd) == EIO
    assert host.user.errno(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd) == 0
    assert vm.kvm.arch.sev.asid == 3
