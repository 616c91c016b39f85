"""A VMM without manners: random SEV commands, moves, mirrors, regions and closes over several VMs.

Whatever it does, every invariant holds, no errno is one that KVM has not, and in the end nothing is left.
"""

from errno import EBADF, EBUSY, EINVAL, EIO, ENOMEM, ENOTTY, EPERM
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.sev import (
    KvmSevGuestStatus,
    KvmSevInit,
    KvmSevLaunchMeasure,
    KvmSevLaunchStart,
    SevCmdId,
)
from softcvm.machine import Machine
from tests.kernel.svm.conftest import Host
from tests.kernel.svm.sev_vms import ES, PAGE, SevVm, holds

KNOWN = {0, EBADF, EBUSY, EINVAL, EIO, ENOMEM, ENOTTY, EPERM}
VM = st.integers(0, 5)
TYPES = st.sampled_from([VmType.DEFAULT, VmType.SEV, VmType.SEV_ES, VmType.SNP])
LAUNCH = st.sampled_from(
    [SevCmdId.LAUNCH_UPDATE_VMSA, SevCmdId.LAUNCH_FINISH, SevCmdId.SNP_LAUNCH_UPDATE]
)


class Hostile(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.host = Host(Machine("7.3", "genoa", 64 << 20))
        self.census = self.host.machine.census()
        self.free = self.host.linux.page_alloc.free_pages
        self.vms: list[SevVm] = []
        self.page = self.host.user.mmap(8 * PAGE)

    def vm(self, index: int) -> SevVm:
        if not self.vms:
            self.create(VmType.SEV, 1)
        return self.vms[index % len(self.vms)]

    def seen(self, errno: Any) -> None:
        assert errno in KNOWN, errno

    @rule(vm_type=TYPES, init=st.sampled_from([None, 0, 1, 22]))
    def create(self, vm_type: VmType, init: int | None) -> None:
        if len(self.vms) < 6:
            self.vms.append(SevVm(self.host, vm_type, init=False))
            if init is not None:
                self.seen(self.vms[-1].cmd(init, KvmSevInit()))

    @rule(vm=VM, policy=st.sampled_from([0, ES, ES | 1]), handle=st.sampled_from([0, 0, 1, 2]))
    def start(self, vm: int, policy: int, handle: int) -> None:
        params = KvmSevLaunchStart(policy=policy, handle=handle)
        self.seen(self.vm(vm).cmd(SevCmdId.LAUNCH_START, params))

    @rule(
        vm=VM, offset=st.integers(0, 5 * PAGE), length=st.sampled_from([0, 5, 16, PAGE, 9000])
    )
    def update(self, vm: int, offset: int, length: int) -> None:
        self.seen(self.vm(vm).update(self.page + (offset & ~15), length))

    @rule(vm=VM, command=LAUNCH)
    def launch(self, vm: int, command: SevCmdId) -> None:
        self.seen(self.vm(vm).cmd(command))

    @rule(vm=VM, length=st.sampled_from([0, 47, 48, 5000]))
    def measure(self, vm: int, length: int) -> None:
        params = KvmSevLaunchMeasure(uaddr=self.page + 6 * PAGE, len=length)
        self.seen(self.vm(vm).cmd(SevCmdId.LAUNCH_MEASURE, params))

    @rule(vm=VM)
    def status(self, vm: int) -> None:
        self.seen(self.vm(vm).cmd(SevCmdId.GUEST_STATUS, KvmSevGuestStatus()))

    @rule(vm=VM, src=st.integers(0, PAGE), dst=st.integers(0, PAGE), decrypt=st.booleans())
    def debug(self, vm: int, src: int, dst: int, decrypt: bool) -> None:
        at = self.page + src, self.page + 3 * PAGE + dst
        self.seen(self.vm(vm).debug(*at, 5000, decrypt=decrypt))

    @rule(vm=VM, pages=st.integers(0, 9), register=st.booleans())
    def region(self, vm: int, pages: int, register: bool) -> None:
        self.seen(self.vm(vm).region(self.page, pages * PAGE, register=register))

    @rule(vm=VM)
    def vcpu(self, vm: int) -> None:
        it = self.vm(vm)
        try:
            it.vcpu()
        except OSError as error:
            self.seen(error.errno)

    @rule(to=VM, fro=VM, move=st.booleans())
    def take(self, to: int, fro: int, move: bool) -> None:
        target, source = self.vm(to), self.vm(fro)
        self.seen(target.move_from(source) if move else target.mirror(source))

    @rule(vm=VM)
    def close(self, vm: int) -> None:
        self.vm(vm).close()
        self.vms.remove(self.vm(vm))

    @rule(vm=VM)
    def reopen_dev_sev(self, vm: int) -> None:
        """The number that KVM remembers may be another file's by now, or nobody's."""
        it = self.vm(vm)
        it.sys.close(it.sev_fd)
        it.sev_fd = it.sys.open("/dev/sev")

    @rule(vm=VM)
    def plain_ioctl(self, vm: int) -> None:
        self.seen(self.vm(vm).user.errno(self.vm(vm).fd, k.KVM_CHECK_EXTENSION, 1))

    @invariant()
    def every_invariant_holds(self) -> None:
        holds(self.host)
        assert not self.host.linux.lockdep.current.held

    def teardown(self) -> None:
        self.host.machine.teardown()
        assert self.host.machine.census() == self.census
        assert self.host.linux.page_alloc.free_pages == self.free
        assert self.host.soc.psp.sev_guests == {}
        holds(self.host)


TestHostile = Hostile.TestCase
TestHostile.settings = settings(max_examples=15, stateful_step_count=40)
