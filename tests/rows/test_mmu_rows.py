"""Rows 3.5, 4.0 to 4.5: hooks, levels, and the RMP against KVM's own mappings."""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EFAULT, EINVAL, EIO, ENOENT
from typing import Any

import pytest

from softcvm.abi.insn import Hlt, Load, Program, Pvalidate, Store
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KvmCreateGuestMemfd,
    KvmDirtyLog,
    KvmUserspaceMemoryRegion2,
    VmType,
)
from softcvm.abi.svm import PfErr
from softcvm.hw.events import NestedPageFault as HardwareFault
from softcvm.hw.events import RmpTransition
from softcvm.kernel.arch.x86.kvm.svm.gmem import sev_gmem_prepare
from softcvm.kernel.errors import KernelError
from softcvm.kernel.host import KvmBug
from softcvm.sim.addr import PAGE_SHIFT, Gfn, Pfn, PgLevel

KERNELS = ("6.12", "6.18", "7.3")
KEEP, PUNCH = 1, 3
LOG_DIRTY, GUEST_MEMFD = 1, 4
PAGE = 1 << PAGE_SHIFT
CHUNK = 512
"""Pages of 2M."""
ASSIGNED = 1
"""Bit 0 of a raw RMP entry."""


def region(vm: Any, npages: int, **fields: int) -> int:
    """KVM_SET_USER_MEMORY_REGION2 for the slot of Vm.memory(); errno."""
    values = {"flags": GUEST_MEMFD, "userspace_addr": vm.shared, "guest_memfd": vm.gmem}
    args = KvmUserspaceMemoryRegion2(memory_size=npages << PAGE_SHIFT, **{**values, **fields})
    return int(vm.user.errno(vm.fd, k.KVM_SET_USER_MEMORY_REGION2, args))


def level_at(vm: Any, gfn: int) -> PgLevel:
    leaf = vm.kvm.arch.npt.lookup(gfn)
    assert leaf is not None
    return PgLevel(leaf.level)


def rmp_of(vm: Any, gfn: int) -> Any:
    """The RMP entry that decides for the page mapped at gfn."""
    leaf = vm.kvm.arch.npt.lookup(gfn)
    assert leaf is not None
    return vm.host.machine.rmp.head(leaf.pfn + gfn - leaf.gfn)


@contextmanager
def rmp_events(host: Any) -> Iterator[dict[str, int]]:
    """4K pages that became assigned, and that became unassigned, meanwhile."""
    pages = {"private": 0, "shared": 0}

    def collect(event: object) -> None:
        if isinstance(event, RmpTransition) and event.status == "SUCCESS":
            before, after = bool(event.old_lo & ASSIGNED), bool(event.new_lo & ASSIGNED)
            if before != after:
                pages["private" if after else "shared"] += event.npages

    detach = host.machine.events.attach(collect)
    yield pages
    detach()


# 3.5


@pytest.mark.parametrize("in_place", [False, True])
def test_r3_5_two_gfns_of_a_vm_never_share_an_offset(boot: Any, in_place: bool) -> None:
    """One RMP entry names one GPA, and an index that converts in place can have one attribute."""
    host = boot(gmem_in_place=in_place)
    vm = host.vm()
    vm.npages = 8
    create = KvmCreateGuestMemfd(size=8 * PAGE, flags=int(in_place))
    vm.gmem = host.user.ioctl(vm.fd, k.KVM_CREATE_GUEST_MEMFD, create)
    vm.shared = host.user.mmap(8 * PAGE)
    assert region(vm, 4) == 0
    for size, offset in ((1, 0), (1, 3), (8, 0), (2, 3), (4, 2)):
        again = region(
            vm, size, slot=1, guest_phys_addr=64 * PAGE, guest_memfd_offset=offset * PAGE
        )
        assert again == EINVAL, (size, offset)
    assert region(vm, 4, slot=1, guest_phys_addr=64 * PAGE, guest_memfd_offset=4 * PAGE) == 0
    assert region(vm, 0) == 0  # who gives an index up may bind it elsewhere
    assert region(vm, 4, slot=2, guest_phys_addr=128 * PAGE) == 0


# 4.0


@pytest.mark.parametrize("missing", ["no slot", "a slot without gmem", "the gmem is closed"])
def test_r4_0_a_private_fault_without_backing_leaves_to_user_space(
    host: Any, missing: str
) -> None:
    def guest(_: int) -> Program:
        yield Load(0x10_0123, 4)

    host.guest(guest)
    vm = host.vm()
    vm.launch(16)
    if missing != "no slot":
        hva = host.user.mmap(PAGE)
        gmem = host.user.ioctl(vm.fd, k.KVM_CREATE_GUEST_MEMFD, KvmCreateGuestMemfd(size=PAGE))
        flags = GUEST_MEMFD if missing == "the gmem is closed" else 0
        fields = {"userspace_addr": hva, "guest_memfd": gmem, "flags": flags}
        assert region(vm, 1, slot=1, guest_phys_addr=0x10_0000, **fields) == 0
        host.user.sys.close(gmem)
    vm.attributes(0x100, 1, private=True)
    exits = host.machine.counters["kvm_exits"]
    for _ in range(2):  # the guest asks again until somebody helps
        assert vm.user.errno(vm.vcpus[0], k.KVM_RUN) == EFAULT
        seen = vm.kvm_run()
        assert seen.exit_reason == k.KVM_EXIT_MEMORY_FAULT
        assert (seen.memory_fault_gpa, seen.memory_fault_size) == (0x10_0000, PAGE)
        assert seen.memory_fault_flags == 8
    assert host.machine.counters["kvm_exits"] - exits == 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("order", "level"), [(0, PgLevel.PG_4K), (9, PgLevel.PG_2M)])
def test_r4_0_max_order_is_max_level(
    boot: Any, kernel: str, order: int, level: PgLevel
) -> None:
    vm = boot(kernel, order=order).vm()
    vm.launch(2 * CHUNK)
    assert vm.prefault(CHUNK, CHUNK) == 0
    assert {level_at(vm, CHUNK + i) for i in range(CHUNK)} == {level}
    assert rmp_of(vm, CHUNK).pagesize == (level is PgLevel.PG_2M)


# 4.1, 4.2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", [0, 9])
def test_r4_1_prepare_when_a_page_is_handed_out_and_invalidate_when_it_is_freed_are_symmetric(
    boot: Any, kernel: str, order: int
) -> None:
    """As merged: every page becomes private once and shared once, and nothing between touches it."""
    host = boot(kernel, order=order)
    vm = host.vm()
    vm.launch(2 * CHUNK)
    with rmp_events(host) as pages:
        host.user.sys.fallocate(vm.gmem, KEEP, CHUNK * PAGE, CHUNK * PAGE)
        assert pages == {"private": 0, "shared": 0}  # there, and nobody's yet
        assert vm.prefault(CHUNK, CHUNK) == 0
        assert pages == {"private": CHUNK, "shared": 0}
        for _ in range(3):
            assert region(vm, 0) == 0
            assert region(vm, 2 * CHUNK) == 0
            vm.attributes(CHUNK, CHUNK, private=False)
            vm.attributes(CHUNK, CHUNK, private=True)
            assert vm.prefault(CHUNK, CHUNK) == 0
        assert pages == {"private": CHUNK, "shared": 0}
        host.user.sys.fallocate(vm.gmem, PUNCH, CHUNK * PAGE, CHUNK * PAGE)
        assert pages == {"private": CHUNK, "shared": CHUNK}


def test_r4_2_assignment_follows_the_page_whatever_maps_it(host: Any) -> None:
    """Unmapped, bound at another GFN, its VM's ASID gone: the entry changes when the page is freed."""
    vm = host.vm()
    vm.launch(16)
    assert vm.prefault(0, 16) == 0
    entries = [rmp_of(vm, gfn) for gfn in range(16)]
    pfns = [vm.kvm.arch.npt.translate(gfn, 1).pfn for gfn in range(16)]
    rmp = host.machine.rmp

    def now() -> list[Any]:
        return [rmp.head(pfn) for pfn in pfns]

    assert [e.gpa >> PAGE_SHIFT for e in entries] == list(range(16))
    assert region(vm, 0) == 0
    assert now() == entries
    assert region(vm, 16, guest_phys_addr=64 * PAGE) == 0
    vm.attributes(64, 16, private=True)
    assert vm.prefault(64, 16) == 0  # mapped elsewhere: hardware will refuse the guest
    assert [vm.kvm.arch.npt.translate(64 + i, 1).pfn for i in range(16)] == pfns
    assert now() == entries
    sys = host.user.sys
    holder = sys.give(vm.gmem, other := host.machine.process())
    sys.exit()
    assert now() == entries
    other.close(holder)
    assert not any(entry.assigned for entry in now())


# 4.3


def mixed_guest(seen: list[bytes], shared: int) -> Program:
    """Accept 2M at 2M, fill its first and last page, wait, then read them: around a page that is shared."""
    done = yield Pvalidate(0x20_0000, 1, True)
    assert (done.code, done.cf) == (0, False)
    for gpa in (0x20_0000, 0x3F_F000):
        yield Store(gpa, gpa.to_bytes(4, "little"))
    yield Hlt()
    for gpa in (0x20_0000, 0x3F_F000):
        back = yield Load(gpa, 4)
        seen.append(back)
    yield Store(shared, b"for all", c=False)


KEPT = [gpa.to_bytes(4, "little") for gpa in (0x20_0000, 0x3F_F000)]


def test_r4_3_a_one_shared_page_leaves_the_rmp_at_2m_and_kvm_maps_4k_around_it(
    boot: Any,
) -> None:
    host = boot(order=9)
    seen: list[bytes] = []
    host.guest(lambda _: mixed_guest(seen, 0x30_0000))
    vm = host.vm()
    vm.launch(2 * CHUNK)
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert (level_at(vm, CHUNK), rmp_of(vm, CHUNK).pagesize) == (PgLevel.PG_2M, 1)
    vm.attributes(0x300, 1, private=False)  # and no hole is punched
    assert vm.prefault(CHUNK, 256) == 0
    assert vm.prefault(CHUNK + 257, 255) == 0
    assert {level_at(vm, gfn) for gfn in (CHUNK, 2 * CHUNK - 1)} == {PgLevel.PG_4K}
    assert rmp_of(vm, CHUNK).pagesize == 1
    assert host.machine.counters["psmash"] == 0
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert seen == KEPT
    assert host.machine.counters["psmash"] == 1  # when the guest came back to a 4K mapping
    assert host.user.sys.load(vm.shared + 0x30_0000, 7) == b"for all"


def test_r4_3_b_dirty_logging_is_refused_for_private_memory_so_the_levels_stay_at_2m(
    boot: Any,
) -> None:
    """The merged kernel's answer: no slot of a guest_memfd ever logs, so nothing maps it at 4K for that."""
    host = boot(order=9)
    seen: list[bytes] = []
    host.guest(lambda _: mixed_guest(seen, 0x30_0000))
    vm = host.vm()
    vm.launch(2 * CHUNK)
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    before = host.machine.counters
    assert region(vm, 2 * CHUNK, flags=GUEST_MEMFD | LOG_DIRTY) == EINVAL
    assert region(vm, 2 * CHUNK, flags=LOG_DIRTY) == EINVAL  # GUEST_MEMFD cannot be taken off
    log = KvmDirtyLog(slot=0, dirty_bitmap=host.user.mmap(PAGE))
    assert host.user.errno(vm.fd, k.KVM_GET_DIRTY_LOG, log) == ENOENT
    assert (level_at(vm, CHUNK), rmp_of(vm, CHUNK).pagesize) == (PgLevel.PG_2M, 1)
    after = host.machine.counters
    assert (after["zaps"], after["psmash"]) == (before["zaps"], 0)
    vm.attributes(0x300, 1, private=False)
    vm.run()
    assert seen == KEPT


def test_r4_3_c_512_memslots_on_one_2m_chunk(boot: Any) -> None:
    """One folio and one RMP entry of 2M; every slot is a page, so every mapping is 4K."""
    host = boot(order=9)
    seen: list[bytes] = []

    def guest(_: int) -> Program:
        yield Pvalidate(0x20_0000, 0, True)
        for gpa in range(0x20_0000, 0x40_0000, 64 * PAGE):
            if gpa != 0x20_0000:
                yield Pvalidate(gpa, 0, True)
            yield Store(gpa, gpa.to_bytes(4, "little"))
        for gpa in range(0x20_0000, 0x40_0000, 64 * PAGE):
            back = yield Load(gpa, 4)
            seen.append(back)

    host.guest(guest)
    vm = host.vm()
    vm.gmem = host.user.ioctl(
        vm.fd, k.KVM_CREATE_GUEST_MEMFD, KvmCreateGuestMemfd(size=CHUNK * PAGE)
    )
    vm.shared = host.user.mmap(CHUNK * PAGE)
    for i in range(CHUNK):
        at = {"slot": i, "guest_phys_addr": (CHUNK + i) * PAGE}
        assert region(vm, 1, guest_memfd_offset=i * PAGE, **at) == 0
    vm.attributes(CHUNK, CHUNK, private=True)
    vm.start()
    vm.vcpu()
    vm.finish()
    assert vm.prefault(CHUNK, CHUNK) == 0
    assert {level_at(vm, CHUNK + i) for i in range(CHUNK)} == {PgLevel.PG_4K}
    assert {rmp_of(vm, CHUNK + i).pagesize for i in range(CHUNK)} == {1}
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert seen == [g.to_bytes(4, "little") for g in range(0x20_0000, 0x40_0000, 64 * PAGE)]
    assert host.machine.counters["psmash"] == 1


# 4.4


@pytest.mark.parametrize("kernel", KERNELS)
def test_r4_4_the_level_is_clamped_to_the_rmps_by_a_hook_of_its_own(
    boot: Any, kernel: str
) -> None:
    """A launched page made the chunk's entries 4K: the folio would allow 2M, the hook does not."""
    host = boot(kernel, order=9)
    vm = host.vm()
    vm.memory(3 * CHUNK)
    vm.start()
    assert vm.update(CHUNK + 7, bytes(PAGE))[0] == 0
    vm.vcpu()
    vm.finish()
    assert vm.prefault(CHUNK, 2 * CHUNK) == 0
    assert {level_at(vm, CHUNK + i) for i in range(CHUNK)} == {PgLevel.PG_4K}
    assert rmp_of(vm, CHUNK).pagesize == 0
    assert (level_at(vm, 2 * CHUNK), rmp_of(vm, 2 * CHUNK).pagesize) == (PgLevel.PG_2M, 1)
    inode = host.user.sys.proc.files.lookup(vm.gmem).private.inode
    assert {inode.folios[CHUNK].order, inode.folios[2 * CHUNK].order} == {9}


def test_r4_4_without_the_clamp_hardware_refuses_the_mapping(boot: Any) -> None:
    """What the hook is for: a 2M mapping over 4K entries is an RMP fault, again and again."""
    host = boot(order=9)

    def guest(_: int) -> Program:
        yield Load((CHUNK + 7) * PAGE, 4)

    host.guest(guest)
    vm = host.vm()
    vm.memory(2 * CHUNK)
    vm.start()
    assert vm.update(CHUNK + 7, b"in".ljust(PAGE))[0] == 0
    vm.vcpu()
    vm.finish()
    assert vm.prefault(CHUNK, CHUNK) == 0
    leaf = vm.kvm.arch.npt.lookup(CHUNK)
    vm.kvm.arch.npt.set(CHUNK, leaf.pfn, CHUNK, PgLevel.PG_2M, writable=True)

    class Refused(Exception):
        """Two such faults in a row: nothing in the kernel will end them."""

    faults: list[HardwareFault] = []

    def stop(event: object) -> None:
        if isinstance(event, HardwareFault) and event.error_code & PfErr.RMP:
            faults.append(event)
            if len(faults) == 2:
                raise Refused

    host.machine.events.attach(stop)
    with pytest.raises(Refused):
        vm.run()
    assert {fault.gpa >> PAGE_SHIFT for fault in faults} == {CHUNK + 7}


def test_r4_4_a_vm_without_an_rmp_has_no_opinion(boot: Any) -> None:
    vm = boot(order=9).vm(VmType.SW_PROTECTED, init=False)
    vm.memory(2 * CHUNK)
    vm.vcpu()
    assert vm.prefault(0, 2 * CHUNK) == 0
    assert level_at(vm, CHUNK) is PgLevel.PG_2M


# 4.5


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_r4_5_no_lookup_is_needed_for_a_page_that_was_just_allocated(
    boot: Any, kernel: str
) -> None:
    """Where prepare runs once per page, the merged hook's lookups never find anything."""
    worlds = []
    for blindly in (False, True):
        host = boot(kernel)
        host.machine.linux.snp.prepare_blindly = blindly
        vm = host.vm()
        vm.launch(CHUNK)
        before = host.machine.counters
        with rmp_events(host) as pages:
            assert vm.prefault(0, CHUNK) == 0
            assert region(vm, 0) == 0
            assert region(vm, CHUNK) == 0
            assert vm.prefault(0, CHUNK) == 0
        after = host.machine.counters
        assert after["rmp_lookups"] - before["rmp_lookups"] == (0 if blindly else CHUNK)
        assert after["rmpupdate"] - before["rmpupdate"] == CHUNK
        assert pages == {"private": CHUNK, "shared": 0}
        worlds.append((host.machine.census(), [rmp_of(vm, gfn) for gfn in range(CHUNK)]))
    assert worlds[0] == worlds[1]


def test_r4_5_a_page_that_is_assigned_already_is_a_kernel_bug_and_reported(boot: Any) -> None:
    host = boot("6.18")
    host.machine.linux.snp.prepare_blindly = host.machine.linux.snp.reject_assigned = True
    vm = host.vm()
    vm.launch(16)
    bugs: list[KvmBug] = []
    host.machine.events.attach(lambda e: bugs.append(e) if isinstance(e, KvmBug) else None)
    assert vm.prefault(0, 4) == 0
    assert not bugs
    pfn = Pfn(vm.kvm.arch.npt.translate(3, 1).pfn)
    with pytest.raises(KernelError) as reported:  # a kernel that prepares a page a second time
        sev_gmem_prepare(vm.kvm, pfn, Gfn(9), 1, 0)
    assert reported.value.errno == EIO
    assert len(bugs) == 1
    assert f"{pfn:#x}" in bugs[0].why
    assert host.machine.rmp.head(pfn).gpa == 3 << PAGE_SHIFT
    assert vm.user.errno(vm.fd, k.KVM_CHECK_EXTENSION, 0) == EIO  # only close() works now


def test_r4_5_without_the_check_the_second_owner_takes_the_page_silently(boot: Any) -> None:
    """RMPUPDATE itself does not say that the entry was assigned: row 1.7's lookup has to."""
    host = boot("6.18")
    host.machine.linux.snp.prepare_blindly = True
    vm, other = host.vm(), host.vm()
    vm.launch(16)
    assert vm.prefault(0, 4) == 0
    pfn = Pfn(vm.kvm.arch.npt.translate(3, 1).pfn)
    sev_gmem_prepare(other.kvm, pfn, Gfn(9), 1, 0)
    assert host.machine.rmp.head(pfn).asid == other.kvm.arch.sev.asid
    assert not other.kvm.vm_dead
