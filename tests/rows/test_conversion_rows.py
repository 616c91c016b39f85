"""Rows 2.1, 2.3, 2.7, 3.4: conversions with the documents' meanings, what they cost, what the host loses.

explicit: an enlightened guest asks the VMM by a hypercall.  implicit: the VMM reacts to a page fault
whose access and attribute differ.  destructive: the contents are lost.  non-destructive: they are
preserved.
"""

import struct
from collections.abc import Callable
from errno import EFAULT, EIO
from functools import partial
from typing import Any, NamedTuple

import pytest

from softcvm import HostSignal, Machine
from softcvm.abi.ghcb import (
    GHCB_SHARED_BUFFER,
    PSC_MAX_ENTRIES,
    Ghcb,
    GhcbExit,
    PscOp,
    gpa_request,
    psc_entry,
    psc_request,
    valid_mask,
)
from softcvm.abi.insn import Hlt, Load, Program, Pvalidate, Store, Vmgexit, Wrmsr
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KvmCreateGuestMemfd,
    KvmMemoryAttributes,
    KvmUserspaceMemoryRegion2,
    MapGpaRange,
    VmType,
)
from softcvm.abi.svm import VC_NOT_VALIDATED, GuestException, Msr
from softcvm.cli.boot_run import boot_info
from softcvm.guest.boot_info import Extent
from softcvm.guest.checks import Check
from softcvm.guest.ghcb import GuestSteps, TermSet, terminate
from softcvm.guest.memory import PMD_SIZE
from softcvm.guest.programs.memory_life import lab
from softcvm.guest.programs.vcpu import Vcpu, bring_up
from softcvm.hw.events import RmpTransition
from softcvm.invariants import check_all, watch
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.memory import BadAccess, store
from softcvm.kernel.mm.mmap import MmStruct
from softcvm.sim.addr import PAGE_SHIFT, PgLevel
from softcvm.sim.steps import Steps
from softcvm.uapi import dispatch
from softcvm.vmm.vmm import Vmm
from tests.kernel.two_tasks import run_split, steps_of
from tests.vmm.guests import config, machine

KERNELS = ("6.12", "6.18", "7.3")
PAGE = 1 << PAGE_SHIFT
PUNCH = 3
DONTNEED = 4
SIGSEGV = 11
GUEST_MEMFD, MMAP = 4, 1
PSC_GPA = 0x5000


def convert(vm: Any, gfn: int, npages: int, *, private: bool, discard: bool) -> None:
    """What a VMM of two pools does: the attribute, and then the memory that is not used any more."""
    vm.attributes(gfn, npages, private=private)
    if discard and private:
        vm.user.sys.madvise(vm.shared + (gfn << PAGE_SHIFT), npages << PAGE_SHIFT, DONTNEED)
    elif discard:
        vm.user.sys.fallocate(vm.gmem, PUNCH, gfn << PAGE_SHIFT, npages << PAGE_SHIFT)


def serve(vm: Any, *, discard: bool = True) -> dict[str, list[tuple[int, int, bool]]]:
    """Run until HLT; conversions by the way they were asked for: gfn, pages, to private."""
    asked: dict[str, list[tuple[int, int, bool]]] = {"hypercall": [], "fault": []}
    while True:
        seen = vm.run()
        if seen.exit_reason == k.KVM_EXIT_HLT:
            return asked
        if seen.exit_reason == k.KVM_EXIT_HYPERCALL:
            gpa, npages, attrs = struct.unpack_from("<3Q", seen.hypercall_args)
            wanted = gpa >> PAGE_SHIFT, npages, bool(attrs & MapGpaRange.ENCRYPTED)
            asked["hypercall"].append(wanted)
        else:
            assert seen.exit_reason == k.KVM_EXIT_MEMORY_FAULT
            gpa, size = seen.memory_fault_gpa, seen.memory_fault_size
            private = bool(seen.memory_fault_flags & 8)
            wanted = gpa >> PAGE_SHIFT, size >> PAGE_SHIFT, private
            asked["fault"].append(wanted)
        convert(vm, wanted[0], wanted[1], private=wanted[2], discard=discard)
        if seen.exit_reason == k.KVM_EXIT_HYPERCALL:
            vm.answer(0)


def ask(gfn: int, op: PscOp) -> GuestSteps[None]:
    """Explicitly, by the MSR protocol: one 4K page."""
    yield Wrmsr(Msr.SEV_ES_GHCB, psc_request(gfn, op))
    yield Vmgexit()


def started(boot: Callable[..., Any], kernel: str, guest: Callable[[int], Program]) -> Any:
    host = boot(kernel)
    host.guest(guest)
    vm = host.vm()
    vm.launch(16)
    vm.exit_hypercalls()
    return vm


# 2.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_1_an_explicit_conversion_is_a_hypercall_and_takes_no_fault(
    boot: Any, kernel: str
) -> None:
    seen: list[bytes] = []

    def guest(_: int) -> Program:
        yield from ask(5, PscOp.SHARED)
        yield Store(5 * PAGE, b"to the host", c=False)
        yield Hlt()
        seen.append((yield Load(5 * PAGE, 11, c=False)))

    vm = started(boot, kernel, guest)
    assert serve(vm) == {"hypercall": [(5, 1, False)], "fault": []}
    assert vm.user.sys.load(vm.shared + 5 * PAGE, 11) == b"to the host"
    vm.user.sys.store(vm.shared + 5 * PAGE, b"to the guest")
    assert serve(vm) == {"hypercall": [], "fault": []}
    assert seen == [b"to the gues"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_1_an_explicit_request_changes_nothing_by_itself(boot: Any, kernel: str) -> None:
    """KVM only asks; a VMM that says yes and does nothing meets the fault behind it."""

    def guest(_: int) -> Program:
        yield from ask(5, PscOp.SHARED)
        yield Store(5 * PAGE, b"x", c=False)

    vm = started(boot, kernel, guest)
    assert vm.run().exit_reason == k.KVM_EXIT_HYPERCALL
    vm.answer(0)
    seen = vm.run()
    assert (seen.exit_reason, seen.memory_fault_gpa) == (k.KVM_EXIT_MEMORY_FAULT, 5 * PAGE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_1_an_implicit_conversion_is_the_answer_to_a_fault_and_the_access_runs_again(
    boot: Any, kernel: str
) -> None:
    seen: list[bytes] = []

    def guest(_: int) -> Program:
        yield Store(5 * PAGE, b"to the host", c=False)  # private so far, and nobody asked
        seen.append((yield Load(5 * PAGE, 11, c=False)))

    vm = started(boot, kernel, guest)
    assert serve(vm) == {"hypercall": [], "fault": [(5, 1, False)]}
    assert seen == [b"to the host"]
    assert vm.user.sys.load(vm.shared + 5 * PAGE, 11) == b"to the host"


@pytest.mark.parametrize("how", ["explicit", "implicit"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_1_conversion_by_two_pools_is_destructive_both_ways(
    boot: Any, kernel: str, how: str
) -> None:
    """Nothing of one pool is ever in the other, and what was discarded is gone from its own."""
    seen: list[Any] = []

    def guest(_: int) -> Program:
        yield Pvalidate(5 * PAGE, 0, True)
        yield Store(5 * PAGE, b"private")
        if how == "explicit":
            yield Pvalidate(5 * PAGE, 0, False)
            yield from ask(5, PscOp.SHARED)
        # A shared read of what is mapped private gives ciphertext and no fault: hardware checks writes.
        yield Store(5 * PAGE + 64, b"shared!", c=False)
        seen.append((yield Load(5 * PAGE, 7, c=False)))
        if how == "explicit":
            yield from ask(5, PscOp.PRIVATE)
        try:
            yield Load(5 * PAGE, 7)
        except GuestException as exception:
            seen.append(exception.error_code)
        yield Pvalidate(5 * PAGE, 0, True)
        seen.append((yield Load(5 * PAGE, 7)))

    vm = started(boot, kernel, guest)
    asked = serve(vm)
    kind = "hypercall" if how == "explicit" else "fault"
    assert asked[kind] == [(5, 1, False), (5, 1, True)]
    assert sum(map(len, asked.values())) == 2
    fresh = seen.pop()
    assert seen == [bytes(7), VC_NOT_VALIDATED]  # fresh shared memory; accepted anew
    assert fresh not in (b"private", bytes(7))
    assert vm.user.sys.load(vm.shared + 5 * PAGE + 64, 7) == bytes(7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_1_conversion_without_discarding_preserves_each_pool(boot: Any, kernel: str) -> None:
    """Attributes alone move no page: each side comes back with its contents, and validated."""
    seen: list[bytes] = []

    def guest(_: int) -> Program:
        yield Pvalidate(5 * PAGE, 0, True)
        yield Store(5 * PAGE, b"private")
        yield Store(5 * PAGE, b"shared!", c=False)
        seen.append((yield Load(5 * PAGE, 7)))
        yield Store(5 * PAGE + 7, b"?", c=False)
        seen.append((yield Load(5 * PAGE, 8, c=False)))

    vm = started(boot, kernel, guest)
    assert len(serve(vm, discard=False)["fault"]) == 3
    assert seen == [b"private", b"shared!?"]


def in_place_vm(host: Any, vm_type: VmType) -> tuple[Any, int]:
    """A VM whose memslot's user address is a mapping of its own guest_memfd."""
    vm = host.vm(vm_type, init=vm_type is VmType.SNP)
    create = KvmCreateGuestMemfd(size=16 * PAGE, flags=MMAP)
    vm.gmem = host.user.ioctl(vm.fd, k.KVM_CREATE_GUEST_MEMFD, create)
    vm.shared = host.user.mmap(16 * PAGE, 1, vm.gmem)
    region = KvmUserspaceMemoryRegion2(
        flags=GUEST_MEMFD,
        memory_size=16 * PAGE,
        userspace_addr=vm.shared,
        guest_memfd=vm.gmem,
    )
    host.user.ioctl(vm.fd, k.KVM_SET_USER_MEMORY_REGION2, region)
    return vm, vm.shared


def test_r2_1_conversion_in_place_is_non_destructive_where_nothing_encrypts(boot: Any) -> None:
    host = boot(gmem_in_place=True)
    vm, view = in_place_vm(host, VmType.SW_PROTECTED)
    vm.vcpu()
    sys = host.user.sys
    sys.store(view + 3 * PAGE, b"from the host")
    vm.attributes(0, 16, private=True)
    assert vm.prefault(0, 16) == 0
    pfn = vm.kvm.arch.npt.translate(3, 1).pfn
    assert host.soc.host_read(pfn << PAGE_SHIFT, 13) == b"from the host"  # the very same page
    vm.attributes(0, 16, private=False)
    assert sys.load(view + 3 * PAGE, 13) == b"from the host"


def test_r2_1_conversion_in_place_is_destructive_under_snp(boot: Any) -> None:
    """Same page, other key, and RMPUPDATE took the acceptance away."""
    host = boot(gmem_in_place=True)
    seen: list[Any] = []

    def guest(_: int) -> Program:
        seen.append((yield Load(3 * PAGE, 13, c=False)))
        yield Hlt()
        try:
            yield Load(3 * PAGE, 13)
        except GuestException as exception:
            seen.append(exception.error_code)
        yield Pvalidate(3 * PAGE, 0, True)
        seen.append((yield Load(3 * PAGE, 13)))
        yield Store(3 * PAGE, b"the guest's")

    host.guest(guest)
    vm, view = in_place_vm(host, VmType.SNP)
    vm.start()
    vm.vcpu()
    vm.finish()
    sys = host.user.sys
    sys.store(view + 3 * PAGE, b"from the host")
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    vm.attributes(0, 16, private=True)
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert seen[:2] == [b"from the host", VC_NOT_VALIDATED]
    assert seen[2] != b"from the host"
    vm.attributes(0, 16, private=False)
    assert sys.load(view + 3 * PAGE, 11) != b"the guest's"


# 3.4


def touch(mm: MmStruct, address: int) -> Steps[None]:
    """A store of the process; SIGSEGV is EFAULT to two_tasks.TaskRun."""
    try:
        yield from store(mm, address, b"x")
    except BadAccess as bad:
        raise KernelError(EFAULT if bad.signo == SIGSEGV else EIO, bad.why) from bad


def test_r3_4_private_parts_lose_their_host_mappings_sigsegv_for_the_process_efault_for_a_call(
    boot: Any,
) -> None:
    host = boot(gmem_in_place=True)
    vm, view = in_place_vm(host, VmType.SNP)
    sys = host.user.sys
    sys.store(view, b"a" * 8 * PAGE)
    argument = bytes(KvmCreateGuestMemfd(size=PAGE))
    sys.store(view + 4 * PAGE, argument)
    fd = sys.ioctl(vm.fd, k.KVM_CREATE_GUEST_MEMFD, view + 4 * PAGE)  # read from guest memory
    sys.close(fd)
    vm.attributes(4, 4, private=True)
    for page in range(4, 8):
        with pytest.raises(HostSignal) as read:
            sys.load(view + page * PAGE, 1)
        with pytest.raises(HostSignal) as written:
            sys.store(view + page * PAGE, b"x")
        assert (read.value.signo, written.value.signo) == (SIGSEGV, SIGSEGV)
    assert host.user.errno(vm.fd, k.KVM_CREATE_GUEST_MEMFD, view + 4 * PAGE) == EFAULT
    assert sys.load(view, 4 * PAGE) == b"a" * 4 * PAGE  # the shared parts are as they were
    with pytest.raises(HostSignal):
        sys.load(view + 4 * PAGE - 1, 2)  # an access that reaches in
    vm.attributes(4, 1, private=False)
    # The guest never used it, so nobody encrypted it.
    assert sys.load(view + 4 * PAGE, len(argument)) == argument
    with pytest.raises(HostSignal):
        sys.load(view + 5 * PAGE, 1)


def test_r3_4_every_process_that_maps_it_loses_the_private_part(boot: Any) -> None:
    host = boot(gmem_in_place=True)
    vm, view = in_place_vm(host, VmType.SNP)
    other = host.machine.process()
    gmem = host.user.sys.give(vm.gmem, other)
    theirs = other.mmap(16 * PAGE, 3, 1, gmem)
    other.store(theirs, b"both see this")
    assert host.user.sys.load(view, 13) == b"both see this"
    vm.attributes(0, 1, private=True)
    for sys, at in ((host.user.sys, view), (other, theirs)):
        with pytest.raises(HostSignal) as signal:
            sys.load(at, 1)
        assert signal.value.signo == SIGSEGV
    assert other.load(theirs + PAGE, 1) == b"\0"


def test_r3_4_a_touch_that_races_with_the_conversion_never_keeps_a_mapping(boot: Any) -> None:
    """At every point of either: the touch comes first, or it gets SIGSEGV; nothing stays mapped."""
    orders: set[tuple[bool, bool]] = set()
    for touch_first in (True, False):
        first, second, host = _rivals(boot, touch_first)
        for split in range(steps_of(host.linux, first()) + 1):
            first, second, host = _rivals(boot, touch_first)
            a, b = run_split(host.linux, first, second, split)
            touched, converted = (a, b) if touch_first else (b, a)
            assert converted.error is None
            assert touched.error is None or touched.error.errno == EFAULT
            orders.add((touch_first, touched.error is None))
            mm = host.user.sys.proc.mm
            assert not any(
                vma.file is not None and mm.pages.held(vma.start, vma.end) for vma in mm.vmas
            )
            assert [c.sentence for c in check_all(host.machine) if not c.held] == []
    assert orders == {(True, True), (True, False), (False, True), (False, False)}


Task = Callable[[], Steps[Any]]


def _rivals(boot: Any, touch_first: bool) -> tuple[Task, Task, Any]:
    """A store to the first page of a mapping, and that page becoming private."""
    host = boot(gmem_in_place=True, pages=1 << 13)
    vm, view = in_place_vm(host, VmType.SW_PROTECTED)
    proc = host.user.sys.proc
    private = KvmMemoryAttributes(address=0, size=2 * PAGE, attributes=8)
    request = k.KVM_SET_MEMORY_ATTRIBUTES
    tasks: tuple[Task, Task] = (
        partial(touch, proc.mm, view),
        partial(dispatch.sys_ioctl, proc, vm.fd, request, private.data),
    )
    return (*tasks, host) if touch_first else (*tasks[::-1], host)


@pytest.mark.parametrize("kernel", KERNELS)
def test_r3_4_as_merged_the_vmm_takes_the_shared_side_away_itself(
    boot: Any, kernel: str
) -> None:
    """An attribute is nothing to the anonymous memory beside it; munmap() is, with the same signs."""
    vm = boot(kernel).vm()
    vm.memory(16, private=False)
    sys = vm.user.sys
    sys.store(vm.shared, b"stays")
    vm.attributes(0, 16, private=True)
    assert sys.load(vm.shared, 5) == b"stays"
    sys.munmap(vm.shared + 4 * PAGE, 4 * PAGE)
    with pytest.raises(HostSignal) as signal:
        sys.load(vm.shared + 4 * PAGE, 1)
    assert signal.value.signo == SIGSEGV
    gone = vm.shared + 4 * PAGE
    assert vm.user.errno(vm.fd, k.KVM_SET_MEMORY_ATTRIBUTES, gone) == EFAULT


# 2.7


def request(entries: list[int]) -> GuestSteps[int]:
    """One page-state-change request through the GHCB at PSC_GPA; its result."""
    buffer = struct.pack("<HHI", 0, len(entries) - 1, 0)
    buffer += b"".join(entry.to_bytes(8, "little") for entry in entries)
    ghcb = Ghcb(
        sw_exit_code=GhcbExit.PSC,
        sw_scratch=PSC_GPA + GHCB_SHARED_BUFFER,
        protocol_version=2,
        valid_bitmap=valid_mask(
            "sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", "sw_scratch"
        ).to_bytes(16, "little"),
    )
    ghcb.data[GHCB_SHARED_BUFFER : GHCB_SHARED_BUFFER + len(buffer)] = buffer
    yield Store(PSC_GPA, bytes(ghcb), c=False)
    yield Vmgexit()
    return Ghcb((yield Load(PSC_GPA, PAGE, c=False))).sw_exit_info_2


def with_ghcb(body: Callable[[], GuestSteps[None]]) -> Callable[[int], Program]:
    def guest(_: int) -> Program:
        yield Wrmsr(Msr.SEV_ES_GHCB, gpa_request(PSC_GPA >> PAGE_SHIFT))
        yield Vmgexit()
        yield Wrmsr(Msr.SEV_ES_GHCB, PSC_GPA)
        yield from body()

    return guest


def exits_of(boot: Any, kernel: str, entries: list[int], *, each: bool = False) -> Any:
    """Convert to private by entries, in one request or `each` in its own: exits, and the state after."""
    results: list[int] = []

    def body() -> GuestSteps[None]:
        for batch in [[entry] for entry in entries] if each else [entries]:
            result = yield from request(batch)
            results.append(result)

    host = boot(kernel, order=9)
    host.guest(with_ghcb(body))
    vm = host.vm()
    vm.memory(4 * 512, private=False)
    vm.start()
    vm.vcpu()
    vm.finish()
    vm.exit_hypercalls()
    before = host.machine.counters
    exits = []
    while (seen := vm.run()).exit_reason == k.KVM_EXIT_HYPERCALL:
        gpa, npages, attrs = struct.unpack_from("<3Q", seen.hypercall_args)
        vm.attributes(gpa >> PAGE_SHIFT, npages, private=True)
        assert vm.prefault(gpa >> PAGE_SHIFT, npages) == 0
        exits.append((gpa >> PAGE_SHIFT, npages, attrs & ~MapGpaRange.ENCRYPTED))
        vm.answer(0)
    assert set(results) == {0}
    cost = {name: host.machine.counters[name] - before[name] for name in before}
    state = vm.kvm.mem_attr.held(), host.machine.census(), vm.kvm.arch.npt.mappings()
    return exits, cost, state


def small(gfn: int) -> int:
    return psc_entry(gfn, PscOp.PRIVATE, huge=False)


def huge(gfn: int) -> int:
    return psc_entry(gfn, PscOp.PRIVATE, huge=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_7_one_request_over_a_contiguous_range_instead_of_n(boot: Any, kernel: str) -> None:
    """253 pages: as merged one exit and one attribute call, per entry 253 of each; the same state."""
    entries = [small(512 + i) for i in range(PSC_MAX_ENTRIES)]
    merged, cheap, state = exits_of(boot, kernel, entries)
    single, dear, same = exits_of(boot, kernel, entries, each=True)
    assert merged == [(512, PSC_MAX_ENTRIES, 0)]
    assert single == [(512 + i, 1, 0) for i in range(PSC_MAX_ENTRIES)]
    assert state[0] == same[0]
    for name, one, many in (
        ("kvm_exits", 2, PSC_MAX_ENTRIES + 1),  # and HLT
        ("rmpupdate", cheap["rmpupdate"], cheap["rmpupdate"]),
    ):
        assert (cheap[name], dear[name]) == (one, many)
    # KVM_RUN, KVM_SET_MEMORY_ATTRIBUTES, KVM_PRE_FAULT_MEMORY for each
    assert dear["ioctls"] - cheap["ioctls"] == 3 * (PSC_MAX_ENTRIES - 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_7_coalescing_keeps_the_4k_versus_2m_information(boot: Any, kernel: str) -> None:
    """The same 1024 pages named as two 2M entries or as 4K ones arrive as what they were named."""
    named_2m, _, whole = exits_of(boot, kernel, [huge(512), huge(1024)])
    assert named_2m == [(512, 1024, MapGpaRange.PAGE_SZ_2M)]
    assert {m.level for m in whole[2] if m.gfn >= 512} == {PgLevel.PG_2M}  # below: the GHCB
    mixed, _, _ = exits_of(
        boot, kernel, [huge(512), small(1024), small(1025), huge(1536), small(1026)]
    )
    assert mixed == [  # neighbours of another size are not joined, gaps neither
        (512, 512, MapGpaRange.PAGE_SZ_2M),
        (1024, 2, 0),
        (1536, 512, MapGpaRange.PAGE_SZ_2M),
        (1026, 1, 0),
    ]


# 2.3


class Cost(NamedTuple):
    """The columns by which designs are compared."""

    exits: int
    ioctls: int
    rmpupdate: int
    psmash: int
    pvalidate: int
    zaps: int
    bytes_zeroed: int


def measured(work: Callable[[Vcpu, int], GuestSteps[None]], host: Machine) -> tuple[Cost, Any]:
    """Boot a guest of the default VMM and do `work` on accepted memory, between two lines of output.

    What the lines themselves cost is taken off by the caller, with work that does nothing.
    """
    subject = config()
    info = boot_info(subject)
    samples: list[dict[str, int]] = []
    levels: list[set[PgLevel]] = []

    def program(vcpu_id: int) -> Program:
        vcpu = yield from bring_up(info, vcpu_id)
        yield from vcpu.memory.set_private([lab(info)])
        yield from vcpu.console.line("start")
        yield from work(vcpu, lab(info).start)
        yield from vcpu.console.line("ended")
        yield from terminate(TermSet.SOFTCVM, Check.PASSED)

    def sample(_: str) -> None:
        samples.append(host.counters)
        (kvm,) = host.linux.vm_list
        first = lab(info).start >> PAGE_SHIFT
        levels.append({m.level for m in kvm.arch.npt.mappings(first, first + 512)})
        levels.append({m.level for m in kvm.arch.npt.mappings(first + 512, first + 1024)})

    host.vm_guest(program)
    watched = watch(host)
    with Vmm(host.process(), subject) as vmm:
        vmm.launch()
        vmm.run(sample)
    assert [c.sentence for c in check_all(host, watched) if not c.held] == []
    start, end = samples[-2:]
    names = ("kvm_exits", "ioctls", "rmpupdate", "psmash", "pvalidate", "zaps", "bytes_zeroed")
    return Cost(*(end[name] - start[name] for name in names)), levels[-2:]


def nothing(_: Vcpu, __: int) -> GuestSteps[None]:
    yield from ()


def workload(vcpu: Vcpu, page: int) -> GuestSteps[None]:
    """A page of a 2M page is lent to the host and taken back; the next 2M page as a whole."""
    one = [Extent(page, page + PAGE)]
    whole = [Extent(page + PMD_SIZE, page + 2 * PMD_SIZE)]
    for extents in (one, whole):
        yield from vcpu.memory.set_shared(extents)
        yield from vcpu.memory.set_private(extents)


@pytest.mark.parametrize("kernel", KERNELS)
def test_r2_3_what_one_workload_costs_in_the_merged_design(kernel: str) -> None:
    """Memory attributes and gmem: the line of the table that the other designs are compared with."""
    idle, _ = measured(nothing, machine(kernel))
    host = machine(kernel)
    transitions: list[RmpTransition] = []
    host.events.attach(
        lambda e: transitions.append(e) if isinstance(e, RmpTransition) else None
    )
    busy, (first, second) = measured(workload, host)
    cost = Cost(*(b - i for b, i in zip(busy, idle, strict=True)))
    assert cost.exits == 4  # a request each way for each extent, however large
    # KVM_RUN and KVM_SET_MEMORY_ATTRIBUTES for each, KVM_PRE_FAULT_MEMORY for those to private.
    assert cost.ioctls == 4 * 2 + 2
    assert cost.rmpupdate == 4  # 4K shared, 4K private, 2M shared, 2M private
    assert cost.psmash == 1  # the first 2M page comes apart
    # Rescind and accept of 4K and of 2M; the first finds 2M, leaves, and is executed again.
    assert cost.pvalidate in (4, 5)
    assert cost.bytes_zeroed == PAGE + PMD_SIZE  # fresh memory for what was given up
    assert cost.zaps > 0
    assert first == {PgLevel.PG_4K}  # not kept
    assert second == {PgLevel.PG_2M}  # kept: coalesced with its size all the way down
