"""Rows 1.1 (as merged) and 1.2: what a launch update takes, and a VMM that changes memory under it."""

from collections.abc import Callable
from errno import EFAULT, EINVAL, EIO
from functools import partial
from typing import Any

import pytest
from sevsnpmeasure.gctx import GCTX

from softcvm.abi.insn import Load, Program
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KvmCreateGuestMemfd,
    KvmMemoryAttributes,
    KvmUserspaceMemoryRegion2,
)
from softcvm.abi.layout import Layout
from softcvm.abi.rmp import PageState
from softcvm.abi.sev import KvmSevCmd, KvmSevSnpLaunchUpdate, SevCmdId
from softcvm.abi.svm import VC_NOT_VALIDATED, GuestException
from softcvm.invariants import check_all
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PAGE_SHIFT
from softcvm.sim.steps import Steps
from softcvm.uapi import dispatch
from tests.kernel.two_tasks import TaskRun, run_split, steps_of

KERNELS = ("6.12", "6.18", "7.3")
PAGE = 1 << PAGE_SHIFT
GUEST_MEMFD = 4


def region(npages: int, **fields: int) -> KvmUserspaceMemoryRegion2:
    values: Any = {"flags": GUEST_MEMFD, **fields}
    return KvmUserspaceMemoryRegion2(memory_size=npages << PAGE_SHIFT, **values)


# 1.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_r1_1_a_launch_update_names_host_address_and_gfn_apart(boot: Any, kernel: str) -> None:
    """The source may be any user memory: it is not looked up through the memslot's user address."""
    host = boot(kernel)
    seen: list[bytes] = []

    def guest(_: int) -> Program:
        seen.append((yield Load(5 * PAGE, 2 * PAGE)))

    host.guest(guest)
    vm = host.vm()
    vm.memory(16)
    vm.start()
    host.user.sys.store(vm.shared + 5 * PAGE, b"not this")
    elsewhere = host.user.mmap(4 * PAGE)
    contents = b"one".ljust(PAGE, b"1") + b"two".ljust(PAGE, b"2")
    host.user.sys.store(elsewhere + PAGE, contents)
    errno, _, back = vm.update(5, bytes(2 * PAGE), uaddr=elsewhere + PAGE)
    assert errno == 0
    assert (back.gfn_start, back.len, back.uaddr) == (7, 0, elsewhere + 3 * PAGE)
    outside = GCTX()
    outside.update_normal_pages(5 * PAGE, contents)
    assert vm.digest() == outside.ld()
    vm.vcpu()
    vm.finish()
    vm.run()
    assert seen == [contents]
    assert host.user.sys.load(elsewhere + PAGE, 2 * PAGE) == contents  # a copy was encrypted


@pytest.mark.parametrize("kernel", KERNELS)
def test_r1_1_as_merged_it_needs_a_private_gfn_of_a_gmem_memslot(
    boot: Any, kernel: str
) -> None:
    """Each thing that is missing, with its errno; what is complete works."""
    host = boot(kernel)
    vm = host.vm()
    assert vm.update(0, bytes(PAGE))[0] == EINVAL  # not started
    vm.start()
    digest = vm.digest()
    assert vm.update(0, bytes(PAGE))[0] == EINVAL  # no memslot
    hva = host.user.mmap(16 * PAGE)
    plain = region(16, slot=3, guest_phys_addr=64 * PAGE, userspace_addr=hva, flags=0)
    assert host.user.errno(vm.fd, k.KVM_SET_USER_MEMORY_REGION2, plain) == 0
    assert vm.update(64, bytes(PAGE))[0] == EINVAL  # a memslot without gmem
    vm.memory(16, private=False)
    errno, cmd, _ = vm.update(0, bytes(PAGE))
    assert (errno, cmd.error) == (EIO, 0)  # not private: firmware was not asked
    vm.attributes(0, 16, private=True)
    assert vm.digest() == digest
    assert vm.update(0, bytes(PAGE))[0] == 0
    assert vm.update(0, bytes(PAGE))[0] == EIO  # a page is launched once
    errno, _, back = vm.update(14, bytes(4 * PAGE))
    assert (errno, back.gfn_start, back.len) == (0, 16, 2 * PAGE)  # the slot ends: short
    outside = GCTX()
    outside.update_normal_pages(0, bytes(PAGE))
    outside.update_normal_pages(14 * PAGE, bytes(2 * PAGE))
    assert vm.digest() == outside.ld()


# 1.2


def errno_as_kernel_error(steps: Steps[int]) -> Steps[int]:
    """What two_tasks.TaskRun takes for the failure of a task."""
    try:
        return (yield from steps)
    except OSError as error:
        raise KernelError(error.errno or -1, str(error)) from error


class Scene:
    """An SNP VM in its launch; calls of two threads of its VMM as steps."""

    NPAGES = 3

    def __init__(
        self,
        boot: Callable[..., Any],
        kernel: str,
        guest: Callable[[int], Program] | None = None,
    ) -> None:
        self.host = boot(kernel, pages=1 << 13, guest=guest)
        self.vm = vm = self.host.vm()
        vm.memory(8)
        vm.start()
        self.proc = vm.user.sys.proc
        self.sys = vm.user.sys
        self.other_gmem = vm.user.ioctl(
            vm.fd, k.KVM_CREATE_GUEST_MEMFD, KvmCreateGuestMemfd(size=8 * PAGE)
        )
        self.source = vm.user.mmap(4 * PAGE)
        self.contents = b"".join(bytes([65 + i]) * PAGE for i in range(self.NPAGES))
        self.sys.store(self.source, self.contents)
        self.params = vm.user.mmap(PAGE)
        update = KvmSevSnpLaunchUpdate(
            gfn_start=1, uaddr=self.source, len=self.NPAGES * PAGE, type=1
        )
        self.sys.store(self.params, bytes(update))
        self.cmd = KvmSevCmd(
            id=SevCmdId.SNP_LAUNCH_UPDATE, data_ptr=self.params, sev_fd=self.host.dev_sev
        )
        self.private = KvmMemoryAttributes(address=0, size=8 * PAGE, attributes=8)

    def ioctl(self, request: int, arg: Layout) -> Steps[int]:
        return errno_as_kernel_error(
            dispatch.sys_ioctl(self.proc, self.vm.fd, request, arg.data)
        )

    def launch_update(self) -> Steps[int]:
        return self.ioctl(k.KVM_MEMORY_ENCRYPT_OP, self.cmd)

    def regions(self, *regions: KvmUserspaceMemoryRegion2) -> Steps[None]:
        for args in regions:
            yield from self.ioctl(k.KVM_SET_USER_MEMORY_REGION2, args)

    def delete(self) -> Steps[None]:
        return self.regions(region(0))

    def swap_gmem(self) -> Steps[None]:
        """The same GFNs with other memory behind them."""
        swapped = region(8, userspace_addr=self.vm.shared, guest_memfd=self.other_gmem)
        return self.regions(region(0), swapped)

    def move_window(self) -> Steps[None]:
        """The same memory at other GFNs, and then where it was."""
        memory = {"userspace_addr": self.vm.shared, "guest_memfd": self.vm.gmem}
        away = region(8, guest_phys_addr=64 * PAGE, **memory)
        return self.regions(region(0), away, region(0), region(8, **memory))

    def share(self) -> Steps[int]:
        args = KvmMemoryAttributes(address=2 * PAGE, size=PAGE, attributes=0)
        return self.ioctl(k.KVM_SET_MEMORY_ATTRIBUTES, args)

    def punch(self) -> Steps[None]:
        return dispatch.sys_fallocate(self.proc, self.vm.gmem, 3, 0, 8 * PAGE)

    def close(self) -> Steps[None]:
        return dispatch.sys_close(self.proc, self.vm.gmem)

    def measured(self) -> int:
        """How many pages the VMM is told were done."""
        back = KvmSevSnpLaunchUpdate(self.sys.load(self.params, KvmSevSnpLaunchUpdate.SIZE))
        assert back.gfn_start - 1 == self.NPAGES - back.len // PAGE
        return int(back.gfn_start - 1)

    def check(self, launch: TaskRun) -> int:
        """Firmware measured what the VMM was told, and pages and RMP agree with it."""
        done = self.measured()
        outside = GCTX()
        for i in range(done):
            outside.update_normal_pages(
                (1 + i) * PAGE, self.contents[i * PAGE : (i + 1) * PAGE]
            )
        assert self.vm.digest() == outside.ld()
        assert (launch.error is None) == (done > 0)
        if launch.error is not None:
            assert launch.error.errno in (EINVAL, EIO, EFAULT)
        assert not self.vm.kvm.vm_dead
        assert not self.host.linux.page_alloc.refs
        assert self.host.linux.leaked_pages == 0
        rmp = self.host.machine.rmp
        asid = self.vm.kvm.arch.sev.asid
        resident = {
            index + folio.delta
            for inode in self.host.linux.gmem_inodes
            for start, end, folio in inode.folios.held()
            for index in range(start, end)
        }
        owned = {
            pfn
            for start, end, _ in rmp.map.held()
            if rmp.head(start).assigned and rmp.head(start).asid == asid
            for pfn in range(start, end)
        }
        assert owned <= resident  # nothing of the guest's outside its memory
        assert {rmp.state(pfn) for pfn in owned} <= {PageState.GUEST_VALID}
        assert [c for c in check_all(self.host.machine) if c.violations] == []
        return done


RIVALS: dict[str, Callable[[Scene], Steps[Any]]] = {
    "the slot is deleted": Scene.delete,
    "other memory is bound to the GFNs": Scene.swap_gmem,
    "the memory moves to other GFNs and back": Scene.move_window,
    "a page is made shared": Scene.share,
    "the memory is punched out": Scene.punch,
    "the guest_memfd is closed": Scene.close,
}


@pytest.mark.parametrize("kernel", ["6.12", "7.3"])  # one lock for the range, or one per page
@pytest.mark.parametrize("rival", RIVALS)
def test_r1_2_memslot_updates_racing_with_a_launch_update_at_every_point(
    boot: Any, kernel: str, rival: str
) -> None:
    """Both ways round: the second thread steps in after each step of the first, as far as it gets."""
    outcomes: set[int] = set()
    for launch_first in (True, False):
        firsts = (Scene.launch_update, RIVALS[rival])
        first, second = firsts if launch_first else firsts[::-1]
        alone = Scene(boot, kernel)
        for split in range(steps_of(alone.host.linux, first(alone)) + 1):
            scene = Scene(boot, kernel)
            a, b = run_split(
                scene.host.linux, partial(first, scene), partial(second, scene), split
            )
            launch, other = (a, b) if launch_first else (b, a)
            assert other.error is None, other.error
            outcomes.add(scene.check(launch))
            scene.host.machine.teardown()
            assert set(scene.host.machine.census()) == {"HYPERVISOR", "HV_FIXED", "FIRMWARE"}
    assert Scene.NPAGES in outcomes  # undisturbed
    if rival in ("the slot is deleted", "the guest_memfd is closed"):
        assert 0 in outcomes  # and too late


def test_r1_2_what_a_guest_gets_after_the_race_is_what_was_measured(boot: Any) -> None:
    """Memory swapped under the launch: the guest faults in its GFNs and finds a page unvalidated."""
    caught: list[int] = []

    def guest(_: int) -> Program:
        try:
            yield Load(PAGE, 8)
        except GuestException as exception:
            caught.append(exception.error_code)

    scene = Scene(boot, "7.3", guest)
    launch, swap = run_split(scene.host.linux, scene.launch_update, scene.swap_gmem, 10_000)
    assert (launch.error, swap.error) == (None, None)
    assert scene.check(launch) == Scene.NPAGES
    scene.vm.vcpu()
    scene.vm.finish()
    assert scene.vm.run().exit_reason == k.KVM_EXIT_HLT
    assert caught == [VC_NOT_VALIDATED]
