"""SEV and SEV-ES launches through system calls: errnos in KVM's order, firmware's statuses, contents, digests."""

from errno import EBADF, EBUSY, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sevsnpmeasure import guest as measure
from sevsnpmeasure.sev_mode import SevMode

from softcvm.abi.cpu_types import CPU_SIGNATURES
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.sev import (
    KvmSevCmd,
    KvmSevGuestStatus,
    KvmSevLaunchMeasure,
    KvmSevLaunchStart,
    KvmSevLaunchUpdateData,
    SevCmdId,
)
from softcvm.abi.snp_firmware import SnpStatus
from softcvm.guest import firmware
from softcvm.kernel.task import Rlimits
from softcvm.uapi import dispatch
from softcvm.vmm.ovmf import read
from softcvm.vmm.reset import reset_regs, reset_sregs
from tests.kernel.svm.conftest import User
from tests.kernel.svm.sev_vms import ES, PAGE, SevVm, nothing_left, plain_vm
from tests.kernel.two_tasks import TaskRun

TEXT = bytes(range(256)) * 16
BLOCK = 16


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "firmware.fd"
    path.write_bytes(firmware.build())
    return path


def at_reset(vm: SevVm, image: Path, vcpus: int, cpu_type: str) -> None:
    """vCPUs as QEMU resets them."""
    ap_eip = read(str(image)).ap_reset_eip
    for vcpu_id in range(vcpus):
        eip = 0xFFFF_FFF0 if vcpu_id == 0 else ap_eip
        fd = vm.vcpu(vcpu_id)
        vm.user.ioctl(fd, k.KVM_SET_SREGS, reset_sregs(eip, bsp=vcpu_id == 0))
        vm.user.ioctl(fd, k.KVM_SET_REGS, reset_regs(eip, CPU_SIGNATURES[cpu_type]))


# The digest


def test_the_sev_launch_digest_is_that_of_sev_snp_measure(host: Any, image: Path) -> None:
    vm = SevVm(host)
    vm.start()
    vm.data(image.read_bytes())
    theirs = measure.calc_launch_digest(SevMode.SEV, 1, 0, str(image), None, None, None, 0)
    assert vm.in_firmware.launch_digest.digest() == theirs
    assert vm.measured(theirs, policy=0)


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("cpu_type", ["EPYC-Milan", "EPYC-v4"])
def test_the_sev_es_launch_digest_is_that_of_sev_snp_measure(
    host: Any, image: Path, vcpus: int, cpu_type: str
) -> None:
    vm = SevVm(host, VmType.SEV_ES)
    at_reset(vm, image, vcpus, cpu_type)
    vm.start(ES)
    vm.data(image.read_bytes())
    assert vm.cmd(SevCmdId.LAUNCH_UPDATE_VMSA) == 0
    theirs = measure.calc_launch_digest(
        SevMode.SEV_ES, vcpus, CPU_SIGNATURES[cpu_type], str(image), None, None, None, 0
    )
    assert vm.measured(theirs, policy=ES)


def test_an_update_in_pieces_measures_as_one_and_addresses_do_not_count(host: Any) -> None:
    digests = set()
    for sizes in ((3 * PAGE,), (PAGE, 2 * PAGE), (BLOCK, 3 * PAGE - BLOCK)):
        vm = SevVm(host)
        vm.start()
        addr = vm.user.mmap(4 * PAGE)
        vm.sys.store(addr, TEXT * 3)
        for size in sizes:
            assert vm.update(addr, size) == 0
            addr += size
        digests.add(vm.in_firmware.launch_digest.digest())
    assert digests == {sha256(TEXT * 3).digest()}


# What is in memory


def test_r2_2_sev_puts_its_payload_in_place_by_encrypting_it_where_it_lies(host: Any) -> None:
    """No second buffer: the VMM's own memory is the guest's, and the host reads ciphertext afterwards."""
    vm = SevVm(host)
    vm.start()
    addr = vm.slot(4)
    vm.sys.store(addr, TEXT * 4)
    assert vm.update(addr + PAGE, 2 * PAGE) == 0
    assert vm.sys.load(addr, PAGE) == TEXT
    assert vm.sys.load(addr + 3 * PAGE, PAGE) == TEXT
    cipher = vm.sys.load(addr + PAGE, 2 * PAGE)
    assert cipher[:PAGE] != TEXT != cipher[PAGE:]
    assert cipher[:PAGE] != cipher[PAGE:]  # the address goes into the cipher
    # The guest's own key, at the frames behind these user pages, gives the plain text.
    key = host.soc.key(vm.sev.asid)
    pages = vm.sys.proc.mm.pages
    for i in (1, 2):
        page = (addr >> 12) + i
        assert host.soc.dram.read((page + pages[page]) << 12, PAGE, key) == TEXT
    # A second update of the same page encrypts what lies there, which is ciphertext.
    assert vm.update(addr + PAGE, PAGE) == 0
    back = vm.user.mmap(PAGE)
    assert vm.debug(addr + PAGE, back, PAGE) == 0
    assert vm.sys.load(back, PAGE) == cipher[:PAGE]


def test_the_pages_are_the_hosts_again_after_an_update(host: Any) -> None:
    with nothing_left(host):
        census = host.machine.census()
        vm = SevVm(host)
        vm.start()
        addr = vm.data(TEXT * 8)
        assert host.machine.census() == census
        vm.sys.store(addr, TEXT)  # the host may write over it; the guest would read noise
        assert vm.sys.load(addr, PAGE) == TEXT


def test_r0_3_guests_that_share_a_key_read_each_others_pages(host: Any) -> None:
    """LAUNCH_START with another guest's handle: one key, two ASIDs, if the policies are equal and allow it."""
    first = SevVm(host)
    handle = first.start().handle
    second, third = SevVm(host), SevVm(host)
    second.start(handle=handle)
    assert second.sev.asid != first.sev.asid
    assert host.soc.key(first.sev.asid) == host.soc.key(second.sev.asid)
    refuse = KvmSevLaunchStart(handle=handle, policy=8)
    assert third.fw_error(SevCmdId.LAUNCH_START, refuse) == SnpStatus.POLICY_FAILURE
    nobody = KvmSevLaunchStart(handle=99)
    assert third.fw_error(SevCmdId.LAUNCH_START, nobody) == SnpStatus.INVALID_GUEST
    third.start(policy=2)
    fourth = SevVm(host)
    no_sharing = KvmSevLaunchStart(handle=third.sev.handle, policy=2)
    assert fourth.fw_error(SevCmdId.LAUNCH_START, no_sharing) == SnpStatus.POLICY_FAILURE


# Life


def test_a_launch_goes_through_its_states(host: Any) -> None:
    vm = SevVm(host)
    assert vm.cmd(SevCmdId.GUEST_STATUS, KvmSevGuestStatus()) == EBADF  # no descriptor yet
    assert vm.start(policy=0x20).handle == 1
    vm.data(TEXT)
    status = vm.status()
    assert (status.handle, status.policy, status.state) == (1, 0x20, 1)
    state = SnpStatus.INVALID_GUEST_STATE
    assert vm.fw_error(SevCmdId.LAUNCH_FINISH) == state
    vm.measure()
    assert vm.status().state == 2
    assert vm.fw_error(SevCmdId.LAUNCH_MEASURE, KvmSevLaunchMeasure(uaddr=1, len=48)) == state
    addr = vm.user.mmap(PAGE)
    vm.sys.store(addr, TEXT)
    assert vm.update(addr, PAGE) == EIO
    assert not host.soc.psp.asid_runnable(vm.sev.asid)
    assert vm.cmd(SevCmdId.LAUNCH_FINISH) == 0
    assert vm.status().state == 3
    assert host.soc.psp.asid_runnable(vm.sev.asid)


def test_a_second_launch_start_cannot_have_the_asid_and_leaves_no_guest(host: Any) -> None:
    vm = SevVm(host)
    vm.start()
    status = vm.fw_error(SevCmdId.LAUNCH_START, KvmSevLaunchStart())
    assert status == SnpStatus.ASID_OWNED
    assert (list(host.soc.psp.sev_guests), vm.sev.handle) == ([1], 1)


def test_policy_and_vm_type_have_to_agree_about_the_asids_range(host: Any) -> None:
    """KVM takes the ASID from the range of the VM type; firmware asks the policy."""
    vm = SevVm(host, VmType.SEV_ES)
    assert vm.fw_error(SevCmdId.LAUNCH_START, KvmSevLaunchStart()) == SnpStatus.INVALID_ASID
    assert host.soc.psp.sev_guests == {}
    vm.start(ES)


def test_the_launch_is_taken_back_when_its_handle_cannot_be_returned(host: Any) -> None:
    vm = SevVm(host)
    readonly = vm.sys.mmap(PAGE, 1, 0x22)
    cmd = KvmSevCmd(id=SevCmdId.LAUNCH_START, data_ptr=readonly, sev_fd=vm.sev_fd)
    assert vm.user.errno(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd) == EFAULT
    assert host.soc.psp.sev_guests == {}
    vm.start()


# Errnos, in KVM's order


def test_launch_start_refuses_in_order(host: Any) -> None:
    vm = SevVm(host)
    start = SevCmdId.LAUNCH_START
    assert plain_vm(host).cmd(start) == ENOTTY
    assert vm.cmd(start) == EFAULT
    for fields, errno in (
        ({"dh_uaddr": 1}, EINVAL),
        ({"dh_uaddr": 1, "dh_len": 0x4001}, EINVAL),
        ({"dh_uaddr": 1, "dh_len": 0x4000}, EFAULT),
        ({"session_uaddr": 1, "session_len": 0x4001}, EINVAL),
        ({"session_uaddr": 1, "session_len": 8}, EFAULT),
    ):
        assert vm.cmd(start, KvmSevLaunchStart(None, **fields)) == errno
    for fd in (0, 99, vm.fd):
        errno, cmd = vm.issue(start, KvmSevLaunchStart(), sev_fd=fd)
        assert (errno, cmd.error) == (EBADF, 0x77)  # firmware did not run
    blob = vm.user.mmap(PAGE)
    short = KvmSevLaunchStart(dh_uaddr=blob, dh_len=8, session_uaddr=blob, session_len=128)
    assert vm.fw_error(start, short) == SnpStatus.INVALID_LENGTH


def test_later_commands_look_the_descriptors_number_up_again(host: Any) -> None:
    vm = SevVm(host)
    vm.start()
    vm.sys.close(vm.sev_fd)
    status = KvmSevGuestStatus()
    assert vm.cmd(SevCmdId.GUEST_STATUS, status) == EBADF
    again = vm.sys.open("/dev/kvm")
    assert again == vm.sev_fd  # the number is in use again, for something else
    assert vm.cmd(SevCmdId.GUEST_STATUS, status) == EBADF
    vm.sys.close(again)
    assert vm.sys.open("/dev/sev") == vm.sev_fd
    assert vm.cmd(SevCmdId.GUEST_STATUS, status) == 0
    assert vm.issue(SevCmdId.GUEST_STATUS, status, sev_fd=99)[0] == 0  # not asked for


def test_launch_update_data_refuses_in_order(host: Any) -> None:
    vm = SevVm(host)
    assert plain_vm(host).update(0, 0) == ENOTTY
    assert vm.cmd(SevCmdId.LAUNCH_UPDATE_DATA) == EFAULT
    page = vm.user.mmap(2 * PAGE)
    vm.sys.munmap(page + PAGE, PAGE)
    readonly = vm.sys.mmap(PAGE, 1, 0x22)
    top = (1 << 64) - PAGE
    for addr, length, errno in (
        (page, 0, EINVAL),
        (top, PAGE, EINVAL),  # wraps
        (top, 16, ENOMEM),
        (page, PAGE + 1, ENOMEM),
        (readonly, PAGE, ENOMEM),
    ):
        assert vm.update(addr, length) == errno, hex(addr)
    # Before LAUNCH_START there is no descriptor but 0, the terminal, which is not /dev/sev.
    assert vm.update(page, PAGE) == EBADF
    vm.start()
    for addr, length, status in (
        (page + 8, 16, SnpStatus.INVALID_ADDRESS),
        (page, 8, SnpStatus.INVALID_LENGTH),
        (page + 16, 16, None),
        (page, PAGE, None),
    ):
        errno, cmd = vm.issue(
            SevCmdId.LAUNCH_UPDATE_DATA, KvmSevLaunchUpdateData(uaddr=addr, len=length)
        )
        assert (errno, cmd.error) == ((EIO, status) if status else (0, 0))
    assert vm.sev.pages_locked == 0


def test_r1_10_pages_of_an_update_are_released_on_every_path(host: Any) -> None:
    vm = SevVm(host)
    vm.start()
    page = vm.user.mmap(PAGE)
    assert vm.update(page, PAGE) == 0
    assert vm.update(page + 8, 16) == EIO
    assert (host.linux.page_alloc.refs, vm.sev.pages_locked) == ([], 0)


def test_an_update_is_one_command_for_each_run_of_frames(host: Any) -> None:
    vm = SevVm(host)
    vm.start()
    low, high = vm.user.mmap(PAGE), vm.user.mmap(2 * PAGE)
    vm.sys.store(high + PAGE, TEXT)  # frames in descending order of their addresses
    vm.sys.store(high, TEXT)
    vm.sys.store(low, TEXT)
    before = host.soc.counters.firmware_commands
    assert vm.update(high, 2 * PAGE) == 0
    # Two updates, and for each its page back from firmware.
    assert host.soc.counters.firmware_commands - before == 4


def test_an_unaligned_update_over_frames_apart_takes_exactly_its_bytes(host: Any) -> None:
    vm = SevVm(host)
    vm.start()
    addr = vm.user.mmap(3 * PAGE)
    for i in (2, 1, 0):  # frames in descending order of their addresses
        vm.sys.store(addr + i * PAGE, TEXT)
    assert vm.update(addr + 0x800, 2 * PAGE) == 0
    digest = vm.in_firmware.launch_digest.digest()
    assert digest == sha256((TEXT * 3)[0x800 : 0x800 + 2 * PAGE]).digest()
    assert vm.sys.load(addr, 0x800) == TEXT[:0x800]
    assert vm.sys.load(addr + 2 * PAGE + 0x800, 0x800) == TEXT[0x800:]


def test_rlimit_memlock_counts_what_is_pinned_now(host: Any) -> None:
    rlimits = Rlimits(memlock=4 * PAGE, cap_ipc_lock=False)
    user = User(host.machine.process(rlimits))
    vm = SevVm(host, user=user)
    vm.start()
    addr = user.mmap(8 * PAGE)
    assert vm.update(addr, 5 * PAGE) == ENOMEM
    assert vm.update(addr, 4 * PAGE) == 0
    assert vm.region(addr, 2 * PAGE) == 0
    assert vm.update(addr, 3 * PAGE) == ENOMEM
    assert vm.update(addr + 8, 2 * PAGE) == ENOMEM  # unaligned: three pages
    assert vm.update(addr, 2 * PAGE) == 0
    assert vm.region(addr, 2 * PAGE, register=False) == 0
    assert vm.update(addr, 3 * PAGE) == 0


def test_launch_update_vmsa_refuses_in_order(host: Any) -> None:
    command = SevCmdId.LAUNCH_UPDATE_VMSA
    assert SevVm(host).cmd(command) == ENOTTY
    vm = SevVm(host, VmType.SEV_ES)
    vm.vcpu()
    assert vm.cmd(command) == EBADF
    vm.start(ES)
    vm.kvm.created_vcpus += 1
    assert vm.cmd(command) == EBUSY
    vm.kvm.created_vcpus -= 1
    assert vm.cmd(command) == 0
    assert vm.cmd(command) == EINVAL  # encrypted already
    assert vm.kvm.vcpus[0].arch.guest_state_protected


def test_in_6_12_launch_update_vmsa_can_be_repeated(boot: Any) -> None:
    vm = SevVm(boot("6.12"), VmType.SEV_ES)
    vm.vcpu()
    vm.start(ES)
    assert vm.cmd(SevCmdId.LAUNCH_UPDATE_VMSA) == 0
    assert vm.cmd(SevCmdId.LAUNCH_UPDATE_VMSA) == 0


@pytest.mark.parametrize(("kernel", "first_done"), [("6.12", True), ("7.3", False)])
def test_vmsas_are_written_with_every_vcpu_locked_from_2026_on(
    boot: Any, kernel: str, first_done: bool
) -> None:
    """Someone is in an ioctl of the second vCPU: before, the first VMSA was encrypted meanwhile."""
    host = boot(kernel)
    vm = SevVm(host, VmType.SEV_ES)
    vm.vcpu()
    vm.vcpu()
    vm.start(ES)
    vcpus, linux = vm.kvm.vcpus, host.linux
    other = TaskRun(linux, "other", vcpus[1].mutex.acquire())
    while not other.done:
        other.step()
    cmd = KvmSevCmd(id=SevCmdId.LAUNCH_UPDATE_VMSA, sev_fd=vm.sev_fd)
    steps = dispatch.sys_ioctl(vm.sys.proc, vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd.data)
    update = TaskRun(linux, "update", steps)
    while not update.blocked:
        update.step()
    assert [vcpu.arch.guest_state_protected for vcpu in vcpus] == [first_done, False]
    linux.lockdep.current, current = other.task, linux.lockdep.current
    vcpus[1].mutex.release()
    linux.lockdep.current = current
    while not update.done:
        update.step()
    assert update.result == 0
    assert [vcpu.arch.guest_state_protected for vcpu in vcpus] == [True, True]


def test_launch_measure_refuses_in_order(host: Any) -> None:
    vm = SevVm(host)
    command = SevCmdId.LAUNCH_MEASURE
    assert plain_vm(host).cmd(command) == ENOTTY
    assert vm.cmd(command) == EFAULT
    assert vm.cmd(command, KvmSevLaunchMeasure(uaddr=1, len=0x4001)) == EINVAL
    assert vm.cmd(command, KvmSevLaunchMeasure(uaddr=1, len=48)) == EBADF
    vm.start()
    query = KvmSevLaunchMeasure()
    assert vm.fw_error(command, query) == SnpStatus.INVALID_LENGTH
    assert query.len == 48
    short = KvmSevLaunchMeasure(uaddr=vm.user.mmap(PAGE), len=47)
    assert vm.fw_error(command, short) == SnpStatus.INVALID_LENGTH
    assert short.len == 47  # only a query is answered
    nowhere = KvmSevLaunchMeasure(uaddr=1, len=48)
    assert vm.cmd(command, nowhere) == EFAULT
    assert vm.status().state == 2  # firmware had measured by then


def test_a_longer_measurement_buffer_is_written_to_its_end(host: Any) -> None:
    vm = SevVm(host)
    vm.start()
    assert vm.measured(sha256(b"").digest(), policy=0, length=0x1000)


# Secrets


def test_a_secret_lands_in_guest_memory_and_nowhere_else(host: Any) -> None:
    with nothing_left(host):
        vm = SevVm(host)
        vm.start()
        addr = vm.data(TEXT)
        found = vm.measure()
        plain = b"disk key, 32 bytes of it, padded"
        params = vm.secret(addr + 0x100, plain, found.measure)
        assert vm.cmd(SevCmdId.LAUNCH_SECRET, params) == 0
        assert plain not in vm.sys.load(addr, PAGE)
        back = vm.user.mmap(PAGE)
        assert vm.debug(addr, back, PAGE) == 0
        assert vm.sys.load(back, PAGE) == TEXT[:0x100] + plain + TEXT[0x100 + len(plain) :]


def test_launch_secret_refuses_in_order(host: Any) -> None:
    command = SevCmdId.LAUNCH_SECRET
    assert plain_vm(host).cmd(command) == ENOTTY
    vm = SevVm(host)
    assert vm.cmd(command) == EFAULT
    vm.start()
    addr = vm.data(TEXT)
    plain = bytes(32)

    def refused(measure_: bytes = bytes(32), **fields: int) -> int:
        params = vm.secret(addr, plain, measure_)
        for name, value in fields.items():
            setattr(params, name, value)
        errno, cmd = vm.issue(command, params)
        return int(cmd.error) if errno == EIO else -errno

    apart = vm.user.mmap(2 * PAGE)
    vm.sys.store(apart + PAGE, b"1")
    vm.sys.store(apart, b"2")
    assert refused(guest_len=0) == -EINVAL
    assert refused(guest_uaddr=1) == -ENOMEM
    assert refused(guest_uaddr=apart, guest_len=2 * PAGE) == -EINVAL
    assert refused(trans_len=0) == -EINVAL
    assert refused(trans_uaddr=1) == -EFAULT
    assert refused(hdr_len=0x4001) == -EINVAL
    assert refused(hdr_uaddr=1) == -EFAULT
    assert refused(guest_uaddr=addr + 8) == SnpStatus.INVALID_ADDRESS
    assert refused(hdr_len=51) == SnpStatus.INVALID_LENGTH
    assert refused(trans_len=16) == SnpStatus.INVALID_LENGTH
    assert refused() == SnpStatus.INVALID_GUEST_STATE  # not measured yet
    found = vm.measure()
    assert refused(bytes(32)) == SnpStatus.BAD_MEASUREMENT
    compressed = vm.secret(addr, plain, found.measure, flags=1)
    assert vm.fw_error(command, compressed) == SnpStatus.UNSUPPORTED
    assert refused(found.measure) == 0
    assert (host.linux.page_alloc.refs, vm.sev.pages_locked) == ([], 0)
