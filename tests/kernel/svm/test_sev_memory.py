"""Memory of SEV guests through system calls: debugging, registered regions, flushes, and ASIDs used again."""

from errno import EBADF, EBUSY, EFAULT, EINVAL, ENOMEM, ENOTTY
from typing import Any

import pytest

from softcvm.abi.kvm.memory import VmType
from softcvm.abi.sev import KvmSevDbg, KvmSevInit, SevCmdId
from softcvm.abi.snp_firmware import SnpStatus
from tests.kernel.svm.sev_vms import PAGE, SevVm, launched, nothing_left, plain_vm

TEXT = bytes(range(256)) * 16


# Debugging


@pytest.mark.parametrize(
    ("offset", "length"), [(0, PAGE), (0, 16), (5, 16), (16, 5), (7, 3 * PAGE), (4090, 12)]
)
def test_debugging_reads_any_bytes_of_the_guest(host: Any, offset: int, length: int) -> None:
    with nothing_left(host):
        vm = SevVm(host)
        vm.start()
        addr = vm.data(TEXT * 4)
        back = vm.user.mmap(5 * PAGE)
        for dst in (back, back + 16, back + 3):
            assert vm.debug(addr + offset, dst, length) == 0
            assert vm.sys.load(dst, length) == (TEXT * 4)[offset : offset + length]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, PAGE), (32, 16), (48, 5), (0, 3 * PAGE), (4080, 32)]
)
@pytest.mark.parametrize("shift", [0, 3])
def test_debugging_writes_bytes_of_the_guest(
    host: Any, offset: int, length: int, shift: int
) -> None:
    vm = SevVm(host)
    vm.start()
    addr = vm.data(TEXT * 4)
    source, back = vm.user.mmap(5 * PAGE), vm.user.mmap(4 * PAGE)
    vm.sys.store(source + shift, b"\xee" * length)
    assert vm.debug(source + shift, addr + offset, length, decrypt=False) == 0
    assert vm.debug(addr, back, 4 * PAGE) == 0
    want = bytearray(TEXT * 4)
    want[offset : offset + length] = b"\xee" * length
    assert vm.sys.load(back, 4 * PAGE) == want


def test_a_debug_write_that_starts_inside_a_block_loses_what_rounding_cuts_off(
    host: Any,
) -> None:
    """KVM rounds the length up to blocks without the offset: 16 bytes at offset 5 are one block, not two."""
    vm = SevVm(host)
    vm.start()
    addr = vm.data(TEXT)
    source, back = vm.user.mmap(PAGE), vm.user.mmap(PAGE)
    vm.sys.store(source, b"\xee" * 16)
    assert vm.debug(source, addr + 5, 16, decrypt=False) == 0
    assert vm.debug(addr, back, PAGE) == 0
    assert vm.sys.load(back, PAGE) == TEXT[:5] + b"\xee" * 11 + TEXT[16:]


def test_debugging_refuses_in_order(host: Any) -> None:
    command = SevCmdId.DBG_DECRYPT
    assert plain_vm(host).cmd(command) == ENOTTY
    vm = SevVm(host)
    assert vm.cmd(command) == EFAULT
    page = vm.user.mmap(PAGE)
    for src, dst, length, errno in (
        (page, page, 0, EINVAL),
        ((1 << 64) - 8, page, 8, EINVAL),
        (page, 0, 8, EINVAL),
        (1, page, 8, ENOMEM),
        (page, 1, 8, ENOMEM),
        (page, page, 16, EBADF),
    ):
        assert vm.debug(src, dst, length) == errno
    vm.start(policy=1)
    refused = vm.fw_error(command, KvmSevDbg(src_uaddr=page, dst_uaddr=page, len=16))
    assert refused == SnpStatus.POLICY_FAILURE
    assert (host.linux.page_alloc.refs, vm.sev.pages_locked) == ([], 0)


# Regions


def test_regions_refuse_in_order(host: Any) -> None:
    plain, vm = plain_vm(host), SevVm(host)
    page = vm.user.mmap(PAGE)
    assert plain.region(page, PAGE) == ENOTTY
    mirror = plain_vm(host)
    vm.start()
    assert mirror.mirror(vm) == 0
    assert mirror.region(page, PAGE) == EINVAL
    assert mirror.region(page, PAGE, register=False) == EINVAL
    assert vm.region(page, 0) == EINVAL
    assert vm.region((1 << 64) - PAGE, PAGE) == EINVAL
    assert vm.region(page, 1 << 44) == EINVAL  # more pages than fit an int
    assert vm.region(page, 2 * PAGE) == ENOMEM
    assert vm.region(page, PAGE, register=False) == EINVAL
    assert vm.region(page, PAGE) == 0
    assert vm.region(page, PAGE) == 0  # the same again
    assert vm.region(page, PAGE - 1, register=False) == EINVAL
    wbinvd = host.soc.counters.wbinvd
    assert vm.region(page, PAGE, register=False) == 0
    assert host.soc.counters.wbinvd == wbinvd + host.soc.profile.cpus
    assert vm.region(page, PAGE, register=False) == 0
    assert vm.region(page, PAGE, register=False) == EINVAL


def test_a_registered_page_stays_after_munmap_until_it_is_unregistered(host: Any) -> None:
    vm = SevVm(host)
    page = vm.user.mmap(4 * PAGE)
    assert vm.region(page + 8, 4 * PAGE - 8) == 0
    assert vm.sev.pages_locked == 4
    free = host.linux.page_alloc.free_pages
    vm.sys.munmap(page, 4 * PAGE)
    assert host.linux.page_alloc.free_pages == free
    assert vm.region(page + 8, 4 * PAGE - 8, register=False) == 0
    assert host.linux.page_alloc.free_pages == free + 4


def test_regions_and_guest_go_with_the_vm(host: Any) -> None:
    with nothing_left(host):
        vm = launched(host, es=True, vcpus=2)
        page = vm.user.mmap(4 * PAGE)
        assert vm.region(page, 4 * PAGE) == 0
        vm.measure()
        assert vm.cmd(SevCmdId.LAUNCH_FINISH) == 0
        asid = vm.sev.asid
        vm.close()
        assert host.soc.psp.sev_guests == {}
        assert host.linux.page_alloc.refs == []
        assert asid in host.soc.psp.asids.dirty  # it could run, so its lines may be anywhere
        assert host.linux.kvm_x86_ops.asids.reclaim == {asid}


@pytest.mark.parametrize(
    ("vm_type", "flushes"), [(VmType.SEV, 1), (VmType.SEV_ES, 1), (VmType.DEFAULT, 0)]
)
def test_memory_that_is_taken_away_is_flushed_if_it_may_be_encrypted(
    host: Any, vm_type: VmType, flushes: int
) -> None:
    """683412ccf612: lines that the guest wrote may still be in a cache when the host has the page again."""
    vm = SevVm(host, vm_type, init=vm_type is not VmType.DEFAULT)
    addr = vm.slot(4)
    vm.sys.store(addr, TEXT)
    before = host.soc.counters.wbinvd
    vm.sys.munmap(addr, PAGE)
    assert host.soc.counters.wbinvd - before == flushes * host.soc.profile.cpus


# ASIDs


def test_sev_asids_are_used_again_after_a_flush_that_firmware_agrees_to(boot: Any) -> None:
    host = boot(cpu="milan")
    profile = host.soc.profile
    count = profile.max_asid - profile.min_sev_asid + 1
    vms = [SevVm(host) for _ in range(count)]
    assert {vm.sev.asid for vm in vms} == set(range(profile.min_sev_asid, profile.max_asid + 1))
    refused = SevVm(host, init=False)
    assert refused.cmd(SevCmdId.INIT2, KvmSevInit()) == EBUSY
    vms[0].start()
    vms[0].measure()
    assert vms[0].cmd(SevCmdId.LAUNCH_FINISH) == 0
    asid = vms[0].sev.asid
    vms[0].close()
    flushes = host.soc.counters.df_flush
    assert refused.cmd(SevCmdId.INIT2, KvmSevInit()) == 0
    assert refused.sev.asid == asid
    assert host.soc.counters.df_flush == flushes + 1
    refused.start()  # ACTIVATE finds it clean
