"""Rows 0.1, 0.4, 0.6, 0.7, 3.1: what a guest_memfd keeps, for whom and for how long.

What a row says is said in REQUIREMENTS of the five documents; what is expected here follows from
its sentence, not from a run.
"""

from errno import EFAULT, EINVAL, ENOTTY
from typing import Any

import pytest

from softcvm import HostSignal
from softcvm.abi.insn import Hlt, Load, Program, Pvalidate, Store
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KVM_LINK_GUEST_MEMFD,
    KvmCreateGuestMemfd,
    KvmLinkGuestMemfd,
    KvmUserspaceMemoryRegion2,
    VmType,
)
from softcvm.abi.rmp import PageState
from softcvm.hw.events import RmpTransition
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.compaction import compact_memory, reclaim_memory
from softcvm.kernel.virt.kvm.gmem_inode import kvm_gmem_migrate_folio
from softcvm.sim.addr import PAGE_SHIFT

KEEP, PUNCH = 1, 3
PAGE = 1 << PAGE_SHIFT


def region(vm: Any, npages: int, **fields: int) -> None:
    """KVM_SET_USER_MEMORY_REGION2 for the slot of Vm.memory(), which is slot 0 at GFN 0."""
    values = {"flags": 4, "userspace_addr": vm.shared, "guest_memfd": vm.gmem, **fields}
    args = KvmUserspaceMemoryRegion2(memory_size=npages << PAGE_SHIFT, **values)
    vm.user.ioctl(vm.fd, k.KVM_SET_USER_MEMORY_REGION2, args)


def mapped(vm: Any) -> int:
    """4K pages in the VM's nested page table."""
    return sum(m.npages for m in vm.kvm.arch.npt.mappings())


def pfn_of(vm: Any, gfn: int) -> int:
    leaf = vm.kvm.arch.npt.lookup(gfn)
    assert leaf is not None
    return int(leaf.pfn + gfn - leaf.gfn)


# 3.1


def test_r3_1_a_guest_uses_memory_that_was_created_and_bound_and_nothing_else(
    host: Any,
) -> None:
    """The life that the checks are for: create, bind at an offset, use, delete, bind again."""
    seen: list[bytes] = []

    def guest(_: int) -> Program:
        yield Pvalidate(0x1000, 0, True)
        yield Store(0x1000, b"mine")
        yield Hlt()
        seen.append((yield Load(0x1000, 4)))

    host.guest(guest)
    vm = host.vm()
    create = KvmCreateGuestMemfd(size=8 * PAGE)
    vm.gmem = host.user.ioctl(vm.fd, k.KVM_CREATE_GUEST_MEMFD, create)
    vm.shared = host.user.mmap(8 * PAGE)
    region(vm, 4, guest_memfd_offset=4 * PAGE)
    vm.attributes(0, 4, private=True)
    vm.start()
    vm.vcpu()
    vm.finish()
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    inode = host.user.sys.proc.files.lookup(vm.gmem).private.inode
    assert [(s, e) for s, e, _ in inode.folios.held()] == [(5, 6)]  # GFN 1 at offset 4
    region(vm, 0)
    assert vm.user.errno(vm.vcpus[0], k.KVM_RUN) == EFAULT  # private, and no slot
    region(vm, 4, guest_memfd_offset=4 * PAGE)
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert seen == [b"mine"]


# 0.1


def test_r0_1_closing_the_file_unmaps_the_vm_and_the_inode_lives_on_in_a_mapping(
    host: Any,
) -> None:
    """A mapping holds the file as a descriptor does: memory and RMP state stay until it goes."""
    vm = host.vm()
    vm.npages = 16
    create = KvmCreateGuestMemfd(size=16 * PAGE, flags=1)
    vm.gmem = host.user.ioctl(vm.fd, k.KVM_CREATE_GUEST_MEMFD, create)
    vm.shared = host.user.mmap(16 * PAGE)
    region(vm, 16)
    vm.attributes(0, 16, private=True)
    vm.start()
    vm.vcpu()
    vm.finish()
    assert vm.prefault(0, 16) == 0
    asid, rmp = vm.kvm.arch.sev.asid, host.machine.rmp
    view = host.user.mmap(16 * PAGE, 1, vm.gmem)
    host.user.sys.close(vm.gmem)
    assert (mapped(vm), rmp.asid_pages[asid]) == (16, 17)  # 16 pages and a VMSA
    pfns = [pfn_of(vm, gfn) for gfn in range(16)]
    with pytest.raises(HostSignal):
        host.user.sys.load(view, 1)  # private memory stays out of reach
    host.user.sys.munmap(view, 16 * PAGE)  # the last reference
    assert mapped(vm) == 0
    assert {rmp.state(pfn) for pfn in pfns} == {PageState.HYPERVISOR}
    assert rmp.asid_pages[asid] == 1


@pytest.mark.parametrize("holder", ["a second descriptor", "another process"])
def test_r0_1_rmp_state_is_the_inodes_not_a_descriptors(host: Any, holder: str) -> None:
    vm = host.vm()
    vm.launch(16)
    assert vm.prefault(0, 16) == 0
    pfns = [pfn_of(vm, gfn) for gfn in range(16)]
    rmp, sys = host.machine.rmp, host.user.sys
    if holder == "a second descriptor":
        held_by, held = sys, sys.dup(vm.gmem)
    else:
        held_by = host.machine.process()
        held = sys.give(vm.gmem, held_by)
    sys.close(vm.gmem)
    assert mapped(vm) == 16
    assert {rmp.state(pfn) for pfn in pfns} == {PageState.GUEST_INVALID}
    if held_by is not sys:
        sys.exit()  # the VMM is gone; its VM is held by the gmem alone
        assert len(host.linux.vm_list) == 1
        assert {rmp.state(pfn) for pfn in pfns} == {PageState.GUEST_INVALID}
    held_by.close(held)
    assert {rmp.state(pfn) for pfn in pfns} == {PageState.HYPERVISOR}
    if held_by is not sys:
        assert not host.linux.vm_list


def linked(boot: Any) -> tuple[Any, Any, Any]:
    """Two SNP VMs with a file each of one inode; both map all 16 pages, the first owns them."""
    host = boot(gmem_link=True)
    first, second = host.vm(), host.vm()
    first.launch(16)
    second.gmem = host.user.ioctl(
        second.fd, KVM_LINK_GUEST_MEMFD, KvmLinkGuestMemfd(fd=first.gmem)
    )
    second.shared = host.user.mmap(16 * PAGE)
    region(second, 16)
    second.attributes(0, 16, private=True)
    second.start()
    second.vcpu()
    second.finish()
    assert first.prefault(0, 16) == 0
    assert second.prefault(0, 16) == 0
    return host, first, second


@pytest.mark.parametrize("goes", [0, 1])
def test_r0_1_closing_one_of_two_files_unmaps_its_vm_only(boot: Any, goes: int) -> None:
    """Each file is one VM's view (KVM_LINK_GUEST_MEMFD as proposed); pages and RMP are the inode's."""
    host, first, second = linked(boot)
    rmp = host.machine.rmp
    owner = first.kvm.arch.sev.asid
    pfns = [pfn_of(first, gfn) for gfn in range(16)]
    assert [pfn_of(second, gfn) for gfn in range(16)] == pfns
    going, staying = (first, second) if goes == 0 else (second, first)
    host.user.sys.close(going.gmem)
    assert (mapped(going), mapped(staying)) == (0, 16)
    assert {rmp.head(pfn).asid for pfn in pfns} == {owner}
    assert staying.prefault(0, 16) == 0
    assert going.prefault(0, 1) == EFAULT  # its slot has lost its file
    host.user.sys.close(staying.gmem)
    assert mapped(staying) == 0
    assert {rmp.state(pfn) for pfn in pfns} == {PageState.HYPERVISOR}


def test_r0_1_the_inode_outlives_the_vm_that_its_pages_are_assigned_to(boot: Any) -> None:
    host, first, second = linked(boot)
    rmp, sys = host.machine.rmp, host.user.sys
    owner = first.kvm.arch.sev.asid
    pfns = [pfn_of(first, gfn) for gfn in range(16)]
    sys.munmap(first.runs[0], 3 * PAGE)
    for fd in (first.gmem, *first.vcpus, first.fd):
        sys.close(fd)
    assert len(host.linux.vm_list) == 1
    assert {rmp.head(pfn).asid for pfn in pfns} == {owner}  # nobody has this ASID any more
    sys.fallocate(second.gmem, PUNCH, 0, 16 * PAGE)  # the free hook needs no VM
    assert {rmp.state(pfn) for pfn in pfns} == {PageState.HYPERVISOR}
    assert second.prefault(0, 16) == 0
    heads = [rmp.head(pfn_of(second, gfn)) for gfn in range(16)]
    assert {head.asid for head in heads} == {second.kvm.arch.sev.asid}


# 0.4


@pytest.mark.parametrize("order", [0, 9])
@pytest.mark.parametrize("zap", ["the slot is deleted", "shared and private again"])
def test_r0_4_private_mappings_are_zapped_and_mapped_again_with_nothing_lost(
    boot: Any, order: int, zap: str
) -> None:
    """Contents and validation live in DRAM and RMP: the guest accepts once and sees no #VC."""
    seen: list[bytes] = []
    host = boot(order=order)
    size = 1 if order else 0

    def guest(_: int) -> Program:
        for gpa in range(0x20_0000, 0x20_1000 if size else 0x20_8000, PAGE):
            done = yield Pvalidate(gpa, size, True)
            assert (done.code, done.cf) == (0, False)
        for gpa in range(0x20_0000, 0x20_8000, PAGE):
            yield Store(gpa, gpa.to_bytes(8, "little"))
        yield Hlt()
        for gpa in range(0x20_0000, 0x20_8000, PAGE):
            back = yield Load(gpa, 8)
            seen.append(back)

    host.guest(guest)
    vm = host.vm()
    vm.launch(1024)
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    pfn = pfn_of(vm, 0x200)
    assert host.machine.rmp.state(pfn) is PageState.GUEST_VALID
    before = host.machine.counters
    transitions: list[RmpTransition] = []
    host.machine.events.attach(
        lambda event: transitions.append(event) if isinstance(event, RmpTransition) else None
    )
    if zap == "the slot is deleted":
        region(vm, 0)
        region(vm, 1024)
    else:
        vm.attributes(0x200, 8, private=False)
        vm.attributes(0x200, 8, private=True)
    assert vm.kvm.arch.npt.lookup(0x200) is None
    assert host.machine.counters["zaps"] > before["zaps"]
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert seen == [gpa.to_bytes(8, "little") for gpa in range(0x20_0000, 0x20_8000, PAGE)]
    after = host.machine.counters
    assert pfn_of(vm, 0x200) == pfn
    assert transitions == []
    for same in ("pvalidate", "vc_unvalidated", "rmpupdate", "psmash", "bytes_zeroed"):
        assert after[same] == before[same], same
    assert after["npf"] > before["npf"]


# 0.6


def test_r0_6_migration_compaction_and_reclaim_are_refused_and_counted(boot: Any) -> None:
    """Not pinned (no reference is held), and still neither moved nor written out."""
    host = boot(order=9)
    vm = host.vm()
    vm.launch(1024)
    assert vm.prefault(512, 512) == 0
    pages, linux = host.linux.page_alloc, host.linux
    assert pages.refs == []
    pfns = [pfn_of(vm, gfn) for gfn in range(512, 1024)]
    free, census = pages.free_pages, host.machine.census()

    def refused() -> int:
        return int(host.machine.counters["migration_refused"])

    assert compact_memory(linux) == refused() == 512
    assert reclaim_memory(linux, 100) == 100
    assert refused() == 612
    inode = host.user.sys.proc.files.lookup(vm.gmem).private.inode
    with pytest.raises(KernelError) as moved:
        kvm_gmem_migrate_folio(inode, 700)
    assert moved.value.errno == EINVAL
    assert refused() == 613
    assert [pfn_of(vm, gfn) for gfn in range(512, 1024)] == pfns
    assert (pages.free_pages, host.machine.census(), pages.refs) == (free, census, [])


def test_r0_6_memory_that_was_freed_is_nobodys_to_refuse(host: Any) -> None:
    vm = host.vm()
    vm.launch(16)
    assert vm.prefault(0, 16) == 0
    host.user.sys.fallocate(vm.gmem, PUNCH, 0, 15 * PAGE)
    assert compact_memory(host.linux) == 1
    host.user.sys.close(vm.gmem)
    assert compact_memory(host.linux) == 0
    assert host.machine.counters["migration_refused"] == 1


# 0.7


def test_r0_7_every_page_of_a_gmem_is_known_to_be_the_asids_or_still_shared(host: Any) -> None:
    """Allocated is not assigned: fallocate leaves pages shared, handing them out assigns them."""
    vm = host.vm()
    vm.launch(16)
    rmp, asid = host.machine.rmp, vm.kvm.arch.sev.asid
    inode = host.user.sys.proc.files.lookup(vm.gmem).private.inode

    def owners() -> list[int]:
        return [
            rmp.head(index + folio.delta).asid if rmp.head(index + folio.delta).assigned else 0
            for start, end, folio in inode.folios.held()
            for index in range(start, end)
        ]

    host.user.sys.fallocate(vm.gmem, KEEP, 0, 8 * PAGE)
    assert owners() == [0] * 8
    assert vm.prefault(2, 4) == 0
    assert owners() == [0, 0, asid, asid, asid, asid, 0, 0]
    host.user.sys.fallocate(vm.gmem, PUNCH, 3 * PAGE, PAGE)
    assert owners() == [0, 0, asid, asid, asid, 0, 0]
    vm.attributes(2, 1, private=False)  # an attribute is the VMM's wish, not the page's state
    assert owners() == [0, 0, asid, asid, asid, 0, 0]
    before = host.machine.counters
    assert vm.prefault(4, 2) == 0
    assert host.machine.counters["rmpupdate"] == before["rmpupdate"]  # KVM knew


def test_r0_7_a_vm_without_an_asid_never_assigns(host: Any) -> None:
    vm = host.vm(VmType.SW_PROTECTED, init=False)
    vm.memory(16)
    vm.vcpu()
    before = host.machine.counters["rmpupdate"]
    assert vm.prefault(0, 16) == 0
    assert host.machine.counters["rmpupdate"] == before
    assert {host.machine.rmp.state(pfn_of(vm, gfn)) for gfn in range(16)} == {
        PageState.HYPERVISOR
    }


# KVM_LINK_GUEST_MEMFD, which 0.1 needs for its second file


@pytest.mark.parametrize(
    ("why", "fields", "errno"),
    [
        ("a flag", {"flags": 1}, EINVAL),
        ("a descriptor that is not open", {"fd": 99}, EINVAL),
        ("no guest_memfd", {"fd": 3}, EINVAL),
        ("nothing wrong, and reserved is not looked at", {"reserved": b"\xff" * 48}, 0),
    ],
)
def test_linking_a_guest_memfd_is_refused_for(
    boot: Any, why: str, fields: dict[str, Any], errno: int
) -> None:
    host = boot(gmem_link=True)
    first, second = host.vm(), host.vm()
    first.memory(16)
    link = KvmLinkGuestMemfd(**{"fd": first.gmem, **fields})
    assert host.user.errno(second.fd, KVM_LINK_GUEST_MEMFD, link) == errno, why
    same = KvmLinkGuestMemfd(fd=first.gmem)
    assert host.user.errno(first.fd, KVM_LINK_GUEST_MEMFD, same) == EINVAL  # its own already


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_no_release_links(boot: Any, kernel: str) -> None:
    host = boot(kernel)
    first, second = host.vm(), host.vm()
    first.memory(16)
    link = KvmLinkGuestMemfd(fd=first.gmem)
    assert host.user.errno(second.fd, KVM_LINK_GUEST_MEMFD, link) == ENOTTY


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_converting_in_place_needs_a_kernel_that_knows_what_is_initialised(
    boot: Any, kernel: str
) -> None:
    with pytest.raises(ValueError, match="in place"):
        boot(kernel, gmem_in_place=True)
