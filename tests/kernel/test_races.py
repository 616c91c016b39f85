"""Faults against everything that takes pages away, with the second task let in at every single
point.

Rows R1, R2, R3, R4, R5, R7 and R9 of the windows that Linux closes (virt/kvm/guest_memfd.c,
kvm_main.c, mmu.c).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from softcvm import Machine
from softcvm.abi.kvm.memory import KvmMemoryAttributes, KvmPreFaultMemory
from softcvm.kernel.arch.x86.kvm.mmu.mmu import kvm_arch_vcpu_pre_fault_memory
from softcvm.kernel.virt.kvm.gmem_inode import GmemInode, kvm_gmem_fallocate
from softcvm.kernel.virt.kvm.kvm_main import Kvm
from softcvm.kernel.virt.kvm.mem_attributes import (
    kvm_mem_is_private,
    kvm_vm_ioctl_set_mem_attributes,
)
from softcvm.sim.addr import Gfn, PgLevel
from softcvm.sim.steps import Steps
from tests.kernel.two_tasks import TaskRun, run_split, steps_of
from tests.uapi.calls import KEEP_SIZE, MIB, PAGE, PRIVATE, PUNCH_HOLE, VmCalls

SIZE = 4 * MIB


class Scene:
    """A private VM with one slot, and the calls on it as steps."""

    def __init__(self, order: int = 0, kernel: str = "7.3") -> None:
        self.machine = Machine(kernel=kernel, memory=64 * MIB, gmem_max_order=order)
        self.linux = self.machine.linux
        self.calls = VmCalls(self.machine.process())
        self.gmem = self.calls.private_slot(size=SIZE)
        self.calls.vcpu()
        (self.kvm,) = self.linux.vm_list
        self.proc = self.linux.processes[0]
        gmem: Any = self.proc.files.lookup(self.gmem).private
        self.inode: GmemInode = gmem.inode

    def fault(self, gpa: int = 0, size: int = PAGE) -> Steps[None]:
        args = KvmPreFaultMemory(gpa=gpa, size=size)
        return kvm_arch_vcpu_pre_fault_memory(self.kvm.vcpus[0], self.proc, args)

    def punch(self, offset: int = 0, length: int = SIZE) -> Steps[None]:
        mode = KEEP_SIZE | PUNCH_HOLE
        return kvm_gmem_fallocate(self.inode, self.proc, mode, offset, length)

    def share(self, gpa: int = 0, size: int = PAGE) -> Steps[None]:
        return kvm_vm_ioctl_set_mem_attributes(
            self.kvm, KvmMemoryAttributes(address=gpa, size=size, attributes=0)
        )

    def close_gmem(self) -> Steps[None]:
        return self.proc.files.close(self.gmem)

    def delete_slot(self) -> Steps[None]:
        from softcvm.abi.kvm.memory import KvmUserspaceMemoryRegion2
        from softcvm.kernel.virt.kvm.memslots import kvm_set_memory_region

        return kvm_set_memory_region(
            self.kvm, self.proc, KvmUserspaceMemoryRegion2(slot=0, flags=4, memory_size=0)
        )


def check(scene: Scene) -> None:
    """What must hold whenever nothing runs."""
    kvm: Kvm = scene.kvm
    assert kvm.mmu_invalidate_in_progress == 0
    assert not scene.linux.page_alloc.refs
    assert not scene.linux.page_alloc.waiting.held()
    for mapping in kvm.arch.npt.mappings():
        slot = kvm.gfn_to_memslot(Gfn(mapping.gfn))
        assert slot is not None
        assert not slot.invalid
        for i in range(mapping.npages):
            gfn = Gfn(mapping.gfn + i)
            private = kvm_mem_is_private(kvm, gfn)
            if mapping.level == PgLevel.PG_2M:
                assert kvm.mem_attr.uniform(gfn - gfn % 512, gfn - gfn % 512 + 512)
            if private:
                assert slot.gmem_file is not None
                folio = scene.inode.folios[gfn - slot.base_gfn + slot.gmem_pgoff]
                assert folio is not None, f"GFN {gfn:#x} maps a page that is gone"
                index = gfn - slot.base_gfn + slot.gmem_pgoff
                assert mapping.pfn + i == index + folio.delta


def every_split(
    make: Callable[[], Scene],
    first: Callable[[Scene], Steps[Any]],
    second: Callable[[Scene], Steps[Any]],
) -> Iterator[tuple[Scene, TaskRun, TaskRun]]:
    alone = make()
    for split in range(steps_of(alone.linux, first(alone)) + 1):
        scene = make()
        a, b = run_split(scene.linux, partial(first, scene), partial(second, scene), split)
        check(scene)
        yield scene, a, b


def test_r1_a_fault_never_maps_a_page_that_was_punched() -> None:
    retried = 0
    for order in (0, 9):
        for scene, fault, punch in every_split(
            partial(Scene, order),
            lambda s: s.fault(0, SIZE),
            lambda s: s.punch(),
        ):
            assert fault.error is None
            assert punch.error is None
            retried += scene.linux.counters.mmu_retries
    assert retried > 0


def test_r1_a_page_that_was_punched_while_a_fault_held_it_is_free_afterwards() -> None:
    for scene, _, _ in every_split(Scene, lambda s: s.fault(), lambda s: s.punch()):
        held = sum(end - start for start, end, _ in scene.inode.folios.held())
        scene.calls.close()
        scene.machine.teardown()
        assert held in (0, 1)  # the fault may have brought a fresh page back
        assert scene.linux.page_alloc.frames[0x1000] == 0


def test_r2_a_fault_that_loses_against_a_conversion_maps_nothing_of_the_old_kind() -> None:
    mapped, refused = 0, 0
    for scene, fault, _ in every_split(
        Scene, lambda s: s.fault(0, 2 * PAGE), lambda s: s.share(0, PAGE)
    ):
        if fault.error is not None:
            refused += 1
        elif scene.kvm.arch.npt.lookup(0) is not None:
            mapped += 1
    assert refused or mapped


def test_r3_a_2m_mapping_is_not_installed_over_a_page_that_is_being_converted() -> None:
    """9129633d568e: the fault is for a neighbour whose attribute does not change."""
    for first, second in ((0, 1), (1, 0)):
        tasks: tuple[Callable[[Scene], Steps[Any]], ...] = (
            lambda s: s.fault(MIB, PAGE),
            lambda s: s.share(PAGE, PAGE),
        )
        for scene, _, _ in every_split(partial(Scene, 9), tasks[first], tasks[second]):
            leaf = scene.kvm.arch.npt.lookup(MIB // PAGE)
            assert leaf is None or leaf.level == PgLevel.PG_4K


def test_r4_a_deleted_slot_waits_for_the_faults_that_use_it() -> None:
    for kernel in ("6.18", "7.3"):
        for scene, fault, delete in every_split(
            partial(Scene, kernel=kernel),
            lambda s: s.fault(),
            lambda s: s.delete_slot(),
        ):
            assert delete.error is None
            assert not scene.kvm.arch.npt.mappings()
            assert fault.error is None or fault.error.errno in (11, 14)


def test_r5_r7_a_gmem_that_is_closed_under_a_fault_leaves_no_mapping() -> None:
    for first, second in ((0, 1), (1, 0)):
        tasks: tuple[Callable[[Scene], Steps[Any]], ...] = (
            lambda s: s.fault(),
            lambda s: s.close_gmem(),
        )
        for scene, a, b in every_split(Scene, tasks[first], tasks[second]):
            assert not scene.kvm.arch.npt.mappings()
            assert all(r.error is None or r.error.errno == 14 for r in (a, b))
            assert not scene.inode.folios.held()


def test_r6_a_slot_that_is_deleted_while_its_gmem_is_being_closed() -> None:
    """ae431059e75d: unbind finds a dying file and clears its bindings itself."""
    for first, second in ((0, 1), (1, 0)):
        tasks: tuple[Callable[[Scene], Steps[Any]], ...] = (
            lambda s: s.close_gmem(),
            lambda s: s.delete_slot(),
        )
        for scene, a, b in every_split(Scene, tasks[first], tasks[second]):
            assert a.error is None
            assert b.error is None
            assert not scene.inode.files
            assert not scene.kvm.memslots[0].all()


def test_r2_1_two_conversions_of_one_range_follow_each_other() -> None:
    for scene, _, _ in every_split(
        Scene,
        lambda s: s.share(0, MIB),
        lambda s: kvm_vm_ioctl_set_mem_attributes(
            s.kvm, KvmMemoryAttributes(address=PAGE, size=MIB, attributes=PRIVATE)
        ),
    ):
        assert not kvm_mem_is_private(scene.kvm, Gfn(0))
