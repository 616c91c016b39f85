"""guest_memfd from the outside: creation, fallocate, punch hole, mmap, lifetimes.

Expected values: virt/kvm/guest_memfd.c v6.12 and v7.2 and fs/open.c v6.12, read; what an
unprivileged process can ask of a real 6.18 kernel was asked (docs/sources.md).
"""

from functools import partial

import pytest

from softcvm import HostSignal, Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.kernel.task import Rlimits
from tests.uapi.calls import (
    KEEP_SIZE,
    MIB,
    PAGE,
    PRIVATE,
    PRIVATE_ANON,
    PUNCH_HOLE,
    RW,
    SHARED,
    VmCalls,
    errno_of,
)

SIGBUS, SIGSEGV = 7, 11
MMAP, INIT_SHARED = 1, 2


def vm(kernel: str = "7.3", vm_type: int = VmType.SW_PROTECTED) -> VmCalls:
    return VmCalls(Machine(kernel=kernel, memory=256 * MIB).process(), vm_type)


@pytest.mark.parametrize(
    ("why", "size", "flags", "expected"),
    [
        ("flags come before the size", 0, 1 << 5, "EINVAL"),
        ("no size", 0, 0, "EINVAL"),
        ("not a whole number of pages", PAGE + 1, 0, "EINVAL"),
        ("negative", 1 << 63, 0, "EINVAL"),
        ("negative and aligned", -PAGE, 0, "EINVAL"),
        ("the largest there is", (1 << 63) - PAGE, 0, "0"),
        ("INIT_SHARED for a VM with private memory", PAGE, INIT_SHARED, "EINVAL"),
        ("MMAP for a VM with private memory", PAGE, MMAP, "0"),
    ],
)
def test_r3_1_creation_is_refused_for(why: str, size: int, flags: int, expected: str) -> None:
    calls = vm()
    assert errno_of(lambda: calls.gmem(size, flags)) == expected, why


def test_r3_1_flags_begin_with_6_18() -> None:
    for kernel, flags in (("6.12", 0), ("6.18", 3), ("7.3", 3)):
        calls = vm(kernel, VmType.DEFAULT)
        told = calls.sys.ioctl(calls.fd, k.KVM_CHECK_EXTENSION, k.KVM_CAP_GUEST_MEMFD_FLAGS)
        assert told == flags
        assert errno_of(partial(calls.gmem, PAGE, MMAP | INIT_SHARED)) == (
            "0" if flags else "EINVAL"
        )


def test_r3_1_the_fd_table_is_full() -> None:
    machine = Machine(memory=256 * MIB)
    calls = VmCalls(machine.process(Rlimits(nofile=6)))
    calls.gmem()
    assert errno_of(calls.gmem) == "EMFILE"
    assert errno_of(lambda: calls.gmem(size=1)) == "EINVAL"  # arguments first


@pytest.mark.parametrize(
    ("mode", "offset", "length", "expected"),
    [
        (KEEP_SIZE, -1, PAGE, "EINVAL"),  # the VFS, before the mode
        (0x100, -PAGE, PAGE, "EINVAL"),
        (KEEP_SIZE, 0, 0, "EINVAL"),
        (KEEP_SIZE, 0, -PAGE, "EINVAL"),
        (0x100, 0, PAGE, "EOPNOTSUPP"),
        (4, 0, PAGE, "EOPNOTSUPP"),
        (0, 0, PAGE, "EOPNOTSUPP"),
        (PUNCH_HOLE, 0, PAGE, "EOPNOTSUPP"),
        (KEEP_SIZE | 0x10, 0, PAGE, "EOPNOTSUPP"),
        (KEEP_SIZE | PUNCH_HOLE, (1 << 63) - PAGE, PAGE, "EFBIG"),
        (KEEP_SIZE, 1, PAGE, "EINVAL"),
        (KEEP_SIZE, 0, 1, "EINVAL"),
        (KEEP_SIZE, 0, 4 * MIB, "0"),
        (KEEP_SIZE, 0, 4 * MIB + PAGE, "EINVAL"),
        (KEEP_SIZE, 4 * MIB, PAGE, "EINVAL"),
        (KEEP_SIZE | PUNCH_HOLE, 0, 8 * MIB, "0"),  # may span the end
        (KEEP_SIZE | PUNCH_HOLE, 8 * MIB, PAGE, "0"),  # and lie beyond it
        (KEEP_SIZE | PUNCH_HOLE, 0, 1, "EINVAL"),
    ],
)
def test_fallocate_answers(mode: int, offset: int, length: int, expected: str) -> None:
    calls = vm()
    gmem = calls.gmem(4 * MIB)
    assert errno_of(lambda: calls.sys.fallocate(gmem, mode, offset, length)) == expected


def test_fallocate_of_what_is_no_file() -> None:
    calls = vm()
    assert errno_of(lambda: calls.sys.fallocate(calls.fd, KEEP_SIZE, 0, PAGE)) == "ENODEV"
    assert errno_of(lambda: calls.sys.fallocate(99, KEEP_SIZE, 0, PAGE)) == "EBADF"


def test_pages_come_and_go_and_allocation_neither_zeroes_nor_prepares() -> None:
    calls = vm()
    counters = calls.sys.machine.counters  # type: ignore[attr-defined]
    free = calls.sys.machine.linux.page_alloc.free_pages  # type: ignore[attr-defined]
    gmem = calls.gmem(4 * MIB)
    calls.sys.fallocate(gmem, KEEP_SIZE, 0, MIB)
    calls.sys.fallocate(gmem, KEEP_SIZE, MIB // 2, MIB)
    now = calls.sys.machine  # type: ignore[attr-defined]
    assert free - now.linux.page_alloc.free_pages == 3 * MIB // 2 // PAGE
    assert now.counters["bytes_zeroed"] == counters["bytes_zeroed"]
    calls.sys.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, PAGE, 2 * MIB)
    assert free - now.linux.page_alloc.free_pages == 1
    calls.sys.close(gmem)
    assert free == now.linux.page_alloc.free_pages


@pytest.mark.parametrize("order", [0, 9])
def test_when_memory_runs_out_the_pages_so_far_stay(order: int) -> None:
    machine = Machine(memory=64 * MIB, gmem_max_order=order)
    calls = VmCalls(machine.process())
    gmem = calls.gmem(128 * MIB)
    assert errno_of(lambda: calls.sys.fallocate(gmem, KEEP_SIZE, 0, 128 * MIB)) == "ENOMEM"
    assert machine.linux.page_alloc.free_pages == 0
    calls.sys.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, 0, 128 * MIB)
    assert errno_of(lambda: calls.sys.fallocate(gmem, KEEP_SIZE, 64 * MIB, 16 * MIB)) == "0"


def test_a_gmem_of_a_private_vm_can_be_mapped_but_not_touched() -> None:
    calls = vm()
    assert errno_of(lambda: calls.sys.mmap(PAGE, RW, SHARED, calls.gmem(PAGE))) == "ENODEV"
    gmem = calls.gmem(PAGE, MMAP)
    assert errno_of(lambda: calls.sys.mmap(PAGE, RW, 2, gmem)) == "EINVAL"  # MAP_PRIVATE
    address = calls.sys.mmap(PAGE, RW, SHARED, gmem)
    with pytest.raises(HostSignal) as touched:
        calls.sys.load(address, 1)
    assert touched.value.signo == SIGBUS


def test_init_shared_memory_is_zero_at_first_and_gone_after_a_punch() -> None:
    calls = vm(vm_type=VmType.DEFAULT)
    gmem = calls.gmem(4 * PAGE, MMAP | INIT_SHARED)
    address = calls.sys.mmap(6 * PAGE, RW, SHARED, gmem)
    assert calls.sys.load(address, 4 * PAGE) == bytes(4 * PAGE)
    calls.sys.store(address + PAGE - 2, b"over the edge")
    assert calls.sys.load(address + PAGE - 2, 13) == b"over the edge"
    with pytest.raises(HostSignal) as beyond:
        calls.sys.load(address + 4 * PAGE, 1)
    assert beyond.value.signo == SIGBUS
    calls.sys.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, 0, PAGE)
    assert calls.sys.load(address + PAGE - 2, 13) == b"\0\0er the edge"


def test_r0_1_an_open_gmem_keeps_the_vm_and_a_slot_does_not_keep_the_gmem() -> None:
    machine = Machine(memory=256 * MIB)
    calls = VmCalls(machine.process())
    gmem = calls.private_slot()
    vcpu = calls.vcpu()
    calls.prefault(vcpu, 0, MIB)
    twin = calls.sys.dup(gmem)  # type: ignore[attr-defined]
    calls.sys.close(gmem)
    assert calls.prefault(vcpu, 0, MIB) == ("0", MIB, 0)
    zaps = machine.counters["zaps"]
    calls.sys.close(twin)
    assert machine.counters["zaps"] - zaps == MIB // PAGE
    assert calls.prefault(vcpu, 0, MIB)[0] == "EFAULT"  # the slot has lost its memory


def test_closing_in_any_order_gives_every_page_back() -> None:
    machine = Machine(memory=256 * MIB)
    free = machine.linux.page_alloc.free_pages
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        calls = VmCalls(machine.process())
        gmem = calls.private_slot()
        vcpu = calls.vcpu()
        calls.prefault(vcpu, 0, 4 * MIB)
        fds = (calls.kvm, calls.fd, gmem, vcpu)
        for i in order:
            calls.sys.close(fds[i])
        assert not machine.linux.vm_list
    machine.teardown()
    assert machine.linux.page_alloc.free_pages == free
    assert set(machine.census()) == {"HYPERVISOR", "HV_FIXED", "FIRMWARE"}


def test_a_passed_gmem_lives_on_but_another_process_cannot_use_the_vm() -> None:
    machine = Machine(memory=256 * MIB)
    owner, other = machine.process(), machine.process()
    calls = VmCalls(owner)
    gmem = calls.private_slot()
    theirs = owner.give(gmem, other)
    vm_fd = owner.give(calls.fd, other)
    assert errno_of(lambda: other.ioctl(vm_fd, k.KVM_CHECK_EXTENSION, 0)) == "EIO"
    other.fallocate(theirs, KEEP_SIZE, 0, MIB)
    owner.exit()
    other.fallocate(theirs, KEEP_SIZE | PUNCH_HOLE, 0, MIB)
    assert errno_of(lambda: other.ioctl(vm_fd, k.KVM_SET_MEMORY_ATTRIBUTES, 0)) == "EIO"
    other.exit()
    assert not machine.linux.vm_list


def test_a_hole_below_a_private_mapping_is_zapped_and_refilled_with_zeroes() -> None:
    calls = vm()
    gmem = calls.private_slot()
    machine = calls.sys.machine  # type: ignore[attr-defined]
    vcpu = calls.vcpu()
    calls.prefault(vcpu, 0, 4 * MIB)
    zeroed, zaps = machine.counters["bytes_zeroed"], machine.counters["zaps"]
    calls.sys.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, MIB, MIB)
    assert machine.counters["zaps"] - zaps == MIB // PAGE
    calls.prefault(vcpu, 0, 4 * MIB)
    assert machine.counters["bytes_zeroed"] - zeroed == MIB


def test_the_gmem_fd_is_inherited_and_the_vm_fd_is_not() -> None:
    calls = vm()
    gmem = calls.gmem()
    closed = calls.sys.proc.files.close_on_exec  # type: ignore[attr-defined]
    assert calls.fd in closed
    assert gmem not in closed


def test_r0_6_nobody_moves_a_gmem_page() -> None:
    from softcvm.kernel.errors import KernelError
    from softcvm.kernel.virt.kvm.gmem_inode import kvm_gmem_migrate_folio

    calls = vm()
    gmem = calls.gmem()
    inode = calls.sys.proc.files.lookup(gmem).private.inode  # type: ignore[attr-defined]
    with pytest.raises(KernelError):
        kvm_gmem_migrate_folio(inode, 0)
    assert calls.sys.machine.counters["migration_refused"] == 1  # type: ignore[attr-defined]


def test_unmapped_memory_is_sigsegv_to_the_process_and_efault_to_a_system_call() -> None:
    calls = vm()
    with pytest.raises(HostSignal) as touched:
        calls.sys.load(0x1000, 1)
    assert touched.value.signo == SIGSEGV
    assert errno_of(lambda: calls.sys.ioctl(calls.fd, k.KVM_SET_MEMORY_ATTRIBUTES, 0x1000)) == (
        "EFAULT"
    )
    address = calls.sys.mmap(PAGE, RW, PRIVATE_ANON)
    calls.sys.store(address, MIB.to_bytes(16, "little")[::-1])
    assert errno_of(lambda: calls.attributes(0, MIB, PRIVATE)) == "0"


def test_poisoned_memory_is_zapped_and_refused_but_stays() -> None:
    from softcvm.kernel.virt.kvm.gmem_inode import kvm_gmem_error_folio
    from softcvm.sim.steps import run

    calls = vm()
    gmem = calls.private_slot()
    machine = calls.sys.machine  # type: ignore[attr-defined]
    vcpu = calls.vcpu()
    calls.prefault(vcpu, 0, MIB)
    inode = calls.sys.proc.files.lookup(gmem).private.inode  # type: ignore[attr-defined]
    free = machine.linux.page_alloc.free_pages
    run(kvm_gmem_error_folio(inode, 3))
    assert calls.prefault(vcpu, 0, MIB) == ("0", 3 * PAGE, MIB - 3 * PAGE)
    assert calls.prefault(vcpu, 3 * PAGE, PAGE)[0] == "EHWPOISON"
    assert machine.linux.page_alloc.free_pages == free
    calls.sys.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, 3 * PAGE, PAGE)
    assert calls.prefault(vcpu, 3 * PAGE, PAGE)[0] == "0"
