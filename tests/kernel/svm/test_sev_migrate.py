"""Several VMs and one encryption context: MOVE and COPY, what they refuse, mirrors, crossings, teardown.

What the kernel's selftests sev_migrate_tests and sev_init2_tests ask for is asked here through the same system
calls, and then what they do not look at.
"""

from collections.abc import Callable
from errno import EBADF, EBUSY, EINVAL, EIO, ENOTTY
from functools import partial
from typing import Any

import pytest

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.sev import KvmSevCmd, KvmSevGuestStatus, KvmSevInit, SevCmdId
from softcvm.kernel.arch.x86.kvm.svm.sev_migrate import (
    sev_vm_copy_enc_context_from,
    sev_vm_move_enc_context_from,
)
from softcvm.kernel.errors import Unmodelled
from softcvm.sim.state import unlisted
from softcvm.sim.steps import Steps
from softcvm.uapi import dispatch
from tests.kernel.svm.conftest import User
from tests.kernel.svm.sev_vms import (
    COPY,
    MOVE,
    PAGE,
    SevVm,
    holds,
    launched,
    nothing_left,
    plain_vm,
)
from tests.kernel.two_tasks import run_split, steps_of

INIT2 = SevCmdId.INIT2
ALLOWED_FROM_MIRROR = (4, 16, 17, 18)
VCPUS = 4


# INIT2, as sev_init2_tests asks


@pytest.mark.parametrize("vm_type", [VmType.SEV, VmType.SEV_ES])
def test_init2_starts_the_types_it_is_for(host: Any, vm_type: VmType) -> None:
    vm = SevVm(host, vm_type, init=False)
    assert vm.cmd(INIT2, KvmSevInit()) == 0
    assert vm.cmd(INIT2, KvmSevInit()) == EINVAL  # once


@pytest.mark.parametrize("vm_type", [VmType.DEFAULT, VmType.SW_PROTECTED])
def test_init2_is_not_for_other_types(host: Any, vm_type: VmType) -> None:
    assert SevVm(host, vm_type, init=False).cmd(INIT2, KvmSevInit()) == EINVAL


@pytest.mark.parametrize("vm_type", [VmType.SEV, VmType.SEV_ES])
def test_init2_knows_no_flag_and_the_features_that_the_device_attribute_tells(
    host: Any, vm_type: VmType
) -> None:
    for bit in range(32):
        vm = SevVm(host, vm_type, init=False)
        assert vm.cmd(INIT2, KvmSevInit(flags=1 << bit)) == EINVAL
        vm.close()
    supported = host.linux.kvm_x86_ops.dev_get_attr(1, 0) if vm_type is VmType.SEV_ES else 0
    for bit in range(64):
        vm = SevVm(host, vm_type, init=False)
        ok = supported >> bit & 1
        assert vm.cmd(INIT2, KvmSevInit(vmsa_features=1 << bit)) == (0 if ok else EINVAL)
        vm.close()


# MOVE


@pytest.mark.parametrize("es", [False, True])
def test_r0_3_a_guest_moves_from_vm_to_vm_under_its_asid(host: Any, es: bool) -> None:
    with nothing_left(host):
        vms = [launched(host, es=es, vcpus=VCPUS)]
        first = vms[0]
        asid, handle, digest = (
            first.sev.asid,
            first.sev.handle,
            first.in_firmware.launch_digest.digest(),
        )
        for _ in range(3):
            vms.append(plain_vm(host, vcpus=VCPUS))
            assert vms[-1].move_from(vms[-2]) == 0
        last = vms[-1]
        assert (last.sev.asid, last.sev.handle) == (asid, handle)
        assert last.in_firmware.launch_digest.digest() == digest
        for dead in vms[:-1]:
            assert (dead.sev.active, dead.sev.asid, dead.kvm.vm_dead) == (False, 0, True)
            assert dead.user.errno(dead.fd, k.KVM_CHECK_EXTENSION, 0) == EIO
            for _ in range(2):  # for good: 8cd280282d12
                assert dead.user.errno(dead.vcpus[0], k.KVM_RUN) == EIO
        assert first.move_from(last) == EIO  # a dead VM is no destination
        # The ASID is freed once, by the VM that has it now.
        for vm in vms[:-1]:
            vm.close()
        assert host.linux.kvm_x86_ops.asids.reclaim == set()
        last.close()
        assert host.linux.kvm_x86_ops.asids.reclaim == {asid}


def test_a_move_takes_the_regions_and_their_count_along(host: Any) -> None:
    with nothing_left(host):
        source, target = launched(host), plain_vm(host)
        page = source.user.mmap(2 * PAGE)
        assert source.region(page, 2 * PAGE) == 0
        assert target.move_from(source) == 0
        assert (target.sev.pages_locked, source.sev.pages_locked) == (2, 0)
        source.close()
        assert len(host.linux.page_alloc.refs) == 1  # still pinned
        assert target.region(page, 2 * PAGE, register=False) == 0
        assert host.linux.page_alloc.refs == []


def test_a_move_forgets_the_descriptor_and_a_copy_does_not(host: Any) -> None:
    source, target, mirror = launched(host), plain_vm(host), plain_vm(host)
    assert mirror.mirror(source) == 0
    assert mirror.status().handle == source.sev.handle
    assert target.move_from(source) == 0
    assert target.cmd(SevCmdId.GUEST_STATUS, KvmSevGuestStatus()) == EBADF
    assert mirror.status().handle == target.sev.handle


def test_a_move_does_not_count_as_init2(host: Any) -> None:
    """Linux leaves need_init set, so that the vCPUs of the destination cannot run."""
    source, target = SevVm(host), SevVm(host, init=False)
    source.start()
    assert target.move_from(source) == 0
    target.vcpu()
    assert target.user.errno(target.vcpus[0], k.KVM_RUN) == EINVAL
    assert target.cmd(INIT2, KvmSevInit()) == EINVAL


def test_moves_go_from_process_to_process(host: Any) -> None:
    """What the capability is for: a new VMM takes over the guest of an old one, which then exits."""
    with nothing_left(host):
        source = launched(host, es=True, vcpus=2)
        other = User(host.machine.process())
        target = plain_vm(host, vcpus=2, user=other)
        given = source.sys.give(source.fd, other.sys)
        vmsas = [vcpu.arch.svm.vmsa for vcpu in source.kvm.vcpus]
        assert target.enable(MOVE, given) == 0
        other.sys.close(given)
        source.sys.exit()
        assert [vcpu.arch.svm.vmsa for vcpu in target.kvm.vcpus] == vmsas
        assert all(vcpu.arch.guest_state_protected for vcpu in target.kvm.vcpus)


def test_moving_flushes_for_the_source_from_2026_on(boot: Any) -> None:
    for kernel, flushes in (("6.12", 0), ("6.18", 0), ("7.3", 1)):
        host = boot(kernel)
        source, target = launched(host), plain_vm(host)
        before = host.soc.counters.wbinvd
        assert target.move_from(source) == 0
        assert host.soc.counters.wbinvd - before == flushes * host.soc.profile.cpus


@pytest.mark.parametrize("cap", [MOVE, COPY])
def test_the_source_is_a_vm_and_another_one(host: Any, cap: int) -> None:
    vm, sev = plain_vm(host), launched(host)
    for fd in (-1, 0, 99, vm.sev_fd, sev.vcpu()):
        assert vm.enable(cap, fd) == EBADF
    assert vm.enable(cap, vm.fd) == EINVAL
    assert sev.enable(cap, sev.fd) == EINVAL


def test_move_refuses(host: Any) -> None:
    empty, four = plain_vm(host), plain_vm(host, vcpus=VCPUS)
    sev, es = launched(host, vcpus=VCPUS), launched(host, es=True, vcpus=VCPUS)
    unmeasured = SevVm(host, VmType.DEFAULT, init=False)
    assert unmeasured.cmd(SevCmdId.ES_INIT) == 0
    unmeasured.vcpu(1)
    for target, source, why in (
        (empty, four, "the source is not SEV"),
        (sev, es, "the destination is SEV"),
        (es, sev, "the destination is SEV-ES"),
        (empty, es, "SEV-ES needs as many vCPUs"),
        (plain_vm(host, vcpus=1), unmeasured, "SEV-ES needs its VMSAs encrypted"),
        (SevVm(host, VmType.SEV, init=False), sev, "the types differ"),
        (SevVm(host, VmType.SEV_ES, init=False), es, "the types differ"),
    ):
        assert target.move_from(source) == EINVAL, why
        assert not target.sev.migration_in_progress
        assert not source.sev.migration_in_progress
    assert empty.move_from(sev) == 0, "plain SEV moves to any number of vCPUs"


def test_move_refuses_while_a_vcpu_is_being_created(host: Any) -> None:
    source, target = launched(host), plain_vm(host)
    for vm in (source, target):
        vm.kvm.created_vcpus += 1
        assert target.move_from(source) == EBUSY
        vm.kvm.created_vcpus -= 1
    assert target.move_from(source) == 0


@pytest.mark.parametrize("cap", [MOVE, COPY])
@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_snp_vms_are_neither_moved_nor_mirrored(boot: Any, cap: int, kernel: str) -> None:
    host = boot(kernel)
    source, target = SevVm(host, VmType.SNP), SevVm(host, VmType.SNP, init=False)
    if kernel == "6.18":  # CVE-2026-72286: it was let through, with half of the state
        with pytest.raises(Unmodelled, match="CVE-2026-72286"):
            target.enable(cap, source.fd)
    else:
        assert target.enable(cap, source.fd) == EINVAL
    assert not source.kvm.lock.busy


# COPY


@pytest.mark.parametrize("es", [False, True])
def test_r0_3_a_mirror_runs_under_its_owners_asid_and_may_do_four_things(
    host: Any, es: bool
) -> None:
    with nothing_left(host):
        owner, mirror = launched(host, es=es, vcpus=VCPUS), plain_vm(host)
        assert mirror.mirror(owner) == 0
        assert mirror.sev.asid == owner.sev.asid
        for _ in range(VCPUS):
            mirror.vcpu()
        assert mirror.cmd(SevCmdId.LAUNCH_UPDATE_VMSA) == (0 if es else ENOTTY)
        for command in range(SevCmdId.INIT2 + 1):
            if command not in ALLOWED_FROM_MIRROR:
                assert mirror.cmd(command) == EINVAL, command
        assert mirror.status().state == 1
        # What the owner encrypted, the mirror reads: it is the same guest to firmware.
        addr = owner.data(bytes(range(256)) * 16)
        back = mirror.user.mmap(PAGE)
        assert mirror.debug(addr, back, PAGE) == 0
        assert mirror.sys.load(back, PAGE) == bytes(range(256)) * 16


def test_copy_refuses(host: Any) -> None:
    sev, es = launched(host), launched(host, es=True)
    mirror = plain_vm(host)
    assert mirror.mirror(sev) == 0
    for target, source, why in (
        (plain_vm(host), plain_vm(host, vcpus=1), "the source is not SEV"),
        (plain_vm(host, vcpus=1), sev, "the destination has vCPUs"),
        (sev, es, "the destination is SEV"),
        (es, sev, "the destination is SEV-ES"),
        (plain_vm(host), mirror, "the source is a mirror"),
        (mirror, sev, "the destination is a mirror already"),
    ):
        assert target.mirror(source) == EINVAL, why


def test_copy_asks_for_no_vm_type(host: Any) -> None:
    """Only MOVE compares them: a VM of type SEV that waits for INIT2 may mirror one of type 0."""
    owner, mirror = launched(host), SevVm(host, VmType.SEV_ES, init=False)
    assert mirror.mirror(owner) == 0
    assert (mirror.sev.need_init, mirror.sev.es_active) == (False, False)


def test_a_mirror_keeps_its_owner_alive(host: Any) -> None:
    with nothing_left(host):
        owner, mirror = launched(host), plain_vm(host)
        assert mirror.mirror(owner) == 0
        asid, kvm = owner.sev.asid, owner.kvm
        assert kvm.users_count == 2
        owner.close()
        assert kvm in host.linux.vm_list
        assert (
            mirror.cmd(SevCmdId.GUEST_STATUS, KvmSevGuestStatus()) == EBADF
        )  # owner closed it
        mirror.close()
        assert kvm not in host.linux.vm_list
        assert host.linux.kvm_x86_ops.asids.reclaim == {asid}


def test_mirrors_follow_their_owner_with_their_references(host: Any) -> None:
    """Bugs of 2021 and 2026: a mirror that went on pointing at, or kept alive, the VM that was."""
    with nothing_left(host):
        owner, mirrors = launched(host), [plain_vm(host) for _ in range(3)]
        for mirror in mirrors:
            assert mirror.mirror(owner) == 0
        target = plain_vm(host)
        source, heir = owner.kvm, target.kvm
        assert target.move_from(owner) == 0
        assert [mirror.sev.enc_context_owner for mirror in mirrors] == [heir] * 3
        assert heir.arch.sev.mirror_vms == [mirror.kvm for mirror in mirrors]
        assert (heir.users_count, source.users_count) == (4, 1)
        owner.close()
        assert source not in host.linux.vm_list


def test_a_mirror_that_moves_takes_its_place_along(host: Any) -> None:
    """A bug of 2021: the destination took itself for the owner and freed the ASID."""
    with nothing_left(host):
        owner, mirror, target = launched(host), plain_vm(host), plain_vm(host)
        assert mirror.mirror(owner) == 0
        assert target.move_from(mirror) == 0
        assert owner.sev.mirror_vms == [target.kvm]
        assert mirror.sev.enc_context_owner is None
        assert owner.kvm.users_count == 2
        assert target.cmd(SevCmdId.LAUNCH_START) == EINVAL  # a mirror itself now
        mirror.close()
        target.close()
        assert owner.kvm.users_count == 1
        assert host.linux.kvm_x86_ops.asids.reclaim == set()


@pytest.mark.parametrize("mirrors_first", [False, True])
def test_chains_of_moves_of_owners_and_mirrors_end_in_any_order(
    host: Any, mirrors_first: bool
) -> None:
    with nothing_left(host):
        owners = [launched(host), *(plain_vm(host, vcpus=VCPUS) for _ in range(3))]
        mirrors = [plain_vm(host) for _ in range(4)]
        assert mirrors[0].mirror(owners[0]) == 0
        for i in range(3):
            first, second = (mirrors, owners) if i % 2 == 0 else (owners, mirrors)
            assert first[i + 1].move_from(first[i]) == 0
            assert second[i + 1].move_from(second[i]) == 0
            holds(host)
        assert owners[3].sev.mirror_vms == [mirrors[3].kvm]
        asid = owners[3].sev.asid
        for vm in (*mirrors, *owners) if mirrors_first else (*owners, *mirrors):
            vm.close()
        assert host.linux.kvm_x86_ops.asids.reclaim == {asid}


def test_snapshots_carry_mirrors_regions_and_guests(host: Any) -> None:
    owner, mirror = launched(host, es=True, vcpus=1), plain_vm(host)
    assert mirror.mirror(owner) == 0
    page = owner.user.mmap(PAGE)
    assert owner.region(page, PAGE) == 0
    for part in (owner.sev, mirror.sev, host.soc.psp, owner.in_firmware):
        assert unlisted(part) == set()
    copy = host.machine.snapshot()
    before = host.machine.fingerprint()
    assert copy.fingerprint() == before
    target = plain_vm(host, vcpus=1)
    assert target.move_from(owner) == 0
    assert copy.fingerprint() == before
    assert host.machine.fingerprint() != before


# Interleavings


def _move(target: SevVm, source: SevVm) -> Steps[int]:
    lock = target.host.linux.kvm_x86_ops.sev_mirror_lock
    return sev_vm_move_enc_context_from(lock, target.kvm, target.sys.proc, source.fd)


def _copy(target: SevVm, source: SevVm) -> Steps[int]:
    lock = target.host.linux.kvm_x86_ops.sev_mirror_lock
    return sev_vm_copy_enc_context_from(lock, target.kvm, target.sys.proc, source.fd)


Pair = tuple[Callable[[], Steps[Any]], Callable[[], Steps[Any]]]


def _points(boot: Any, tasks: Callable[[Any], Pair]) -> range:
    host = boot()
    return range(steps_of(host.linux, tasks(host)[0]()) + 1)


def test_crossing_moves_never_wait_for_each_other(boot: Any) -> None:
    """Each wants what the other has: somebody gets EBUSY, or EINVAL when the other was done first."""

    def tasks(host: Any) -> Pair:
        a, b = launched(host), launched(host)
        return partial(_move, a, b), partial(_move, b, a)

    for split in _points(boot, lambda host: (partial(_cross, host), partial(_cross, host))):
        host = boot()
        errors = [
            task.error.errno if task.error else 0
            for task in run_split(host.linux, *tasks(host), split)
        ]
        assert set(errors) <= {EBUSY, EINVAL}, (split, errors)


def _cross(host: Any) -> Steps[int]:
    return _move(plain_vm(host), launched(host))


@pytest.mark.parametrize("second", [_move, _copy])
def test_r0_3_two_takers_of_one_context_get_it_once(
    boot: Any, second: Callable[[SevVm, SevVm], Steps[int]]
) -> None:
    outcomes = set()
    for split in _points(boot, lambda host: (partial(_cross, host), partial(_cross, host))):
        host = boot()
        source, a, b = launched(host), plain_vm(host), plain_vm(host)
        asid = source.sev.asid
        one, two = run_split(
            host.linux, partial(_move, a, source), partial(second, b, source), split
        )
        outcome = tuple(task.error.errno if task.error else 0 for task in (one, two))
        outcomes.add(outcome)
        owners = [
            vm for vm in (source, a, b) if vm.sev.active and vm.sev.enc_context_owner is None
        ]
        assert len(owners) == 1
        assert owners[0].sev.asid == asid
        mirrors = [vm.kvm for vm in (source, a, b) if vm.sev.enc_context_owner is not None]
        assert owners[0].sev.mirror_vms == mirrors
        assert owners[0].kvm.users_count == 1 + len(mirrors)
        for vm in (a, b, source):
            vm.close()
        assert host.linux.kvm_x86_ops.asids.reclaim == {asid}
    assert (0, EBUSY) in outcomes
    assert (0, EINVAL) in outcomes or (0, 0) in outcomes


def test_a_mirror_that_goes_while_its_owner_moves_puts_the_right_reference(boot: Any) -> None:
    """CVE-2026-74607: the list of mirrors and their owner, under a lock of their own."""
    for split in range(20):
        host = boot()
        owner, mirror, target = launched(host), plain_vm(host), plain_vm(host)
        assert mirror.mirror(owner) == 0
        mirror.sys.close(mirror.sev_fd)
        move, close = run_split(
            host.linux,
            partial(_move, target, owner),
            partial(dispatch.sys_close, mirror.sys.proc, mirror.fd),
            split,
        )
        assert (move.error, close.error) == (None, None)
        assert target.sev.mirror_vms == []
        assert (target.kvm.users_count, owner.kvm.users_count) == (1, 1)


def test_every_vm_moves_at_once_and_nobody_waits_forever(boot: Any) -> None:
    """The locking test of the selftest: each of three VMs takes each, from every state they get into."""
    for split in range(0, 12, 2):
        host = boot()
        vms = [launched(host) for _ in range(3)]
        for target, source, other in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)):
            run_split(
                host.linux,
                partial(_move, vms[target], vms[source]),
                partial(_move, vms[source], vms[other]),
                split,
            )
        assert all(vm.sev.active for vm in vms)  # each was SEV: nothing could move anywhere


def _init2(vm: SevVm) -> Steps[int]:
    params = vm.user.mmap(PAGE)
    vm.sys.store(params, bytes(KvmSevInit()))
    cmd = KvmSevCmd(id=INIT2, data_ptr=params)
    return dispatch.sys_ioctl(vm.sys.proc, vm.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd.data)


@pytest.mark.parametrize("split", range(40))
def test_deactivate_waits_for_a_flush_of_asids_under_way(host: Any, split: int) -> None:
    """sev_deactivate_lock: a DEACTIVATE between WBINVD and DF_FLUSH would make firmware ask for WBINVD again."""
    host.linux.kvm_x86_ops.asids.max_sev_asid = host.linux.kvm_x86_ops.asids.min_sev_asid + 1
    first, second = SevVm(host), SevVm(host)
    for vm in (first, second):
        vm.start()
        vm.measure()
        assert vm.cmd(SevCmdId.LAUNCH_FINISH) == 0
    asid = first.sev.asid
    first.close()
    newcomer = SevVm(host, init=False)
    init, close = run_split(
        host.linux,
        partial(_init2, newcomer),
        partial(dispatch.sys_close, second.sys.proc, second.fd),
        split,
    )
    assert (init.error, close.error, init.result) == (None, None, 0)
    assert newcomer.sev.asid in (asid, asid + 1)
    newcomer.start()
    holds(host)


@pytest.mark.parametrize("split", range(24))
def test_a_region_is_unregistered_once_and_not_while_it_is_registered(
    host: Any, split: int
) -> None:
    """Bugs of 2024 and 2026: all of it is done under kvm->lock."""
    vm = SevVm(host)
    page = vm.user.mmap(PAGE)
    ops, proc = host.linux.kvm_x86_ops, vm.sys.proc
    register, unregister = run_split(
        host.linux,
        partial(ops.mem_enc_register_region, vm.kvm, proc, page, PAGE),
        partial(ops.mem_enc_unregister_region, vm.kvm, proc, page, PAGE),
        split,
    )
    assert register.error is None
    assert unregister.error is None or unregister.error.errno == EINVAL
    left = unregister.error is not None
    assert (len(vm.sev.regions), vm.sev.pages_locked) == (left, left)
    assert len(host.linux.page_alloc.refs) == left
