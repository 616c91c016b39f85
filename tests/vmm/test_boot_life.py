"""A guest's memory from launch to teardown: what it says, what the hardware counted, what is left behind."""

from collections import Counter
from collections.abc import Callable

import pytest

from softcvm.abi.board import DEBUGCON_PORT
from softcvm.abi.ghcb import GhcbExit, IoioInfo, PscOp
from softcvm.abi.insn import Load, Program, Pvalidate, PvalidateOut, Store
from softcvm.abi.rmp import RmpPageSize
from softcvm.abi.svm import VC_NOT_VALIDATED, GuestException
from softcvm.cli.boot_run import boot_info
from softcvm.guest.boot_info import BootInfo, Extent
from softcvm.guest.checks import Check
from softcvm.guest.ghcb import GuestSteps, PscRequest, TermSet, msr_cpuid, terminate
from softcvm.guest.memory import PMD_SIZE
from softcvm.guest.programs.memory_life import lab, memory_life
from softcvm.guest.programs.sharing import keeps, rejoin, write_patterns
from softcvm.guest.programs.vcpu import Vcpu, bring_up
from softcvm.hw.events import NestedPageFault, RmpTransition
from softcvm.invariants import check_all
from softcvm.kernel.arch.x86.kvm.svm.ap import SnpApCreation
from softcvm.machine import Machine
from softcvm.sim.addr import PAGE_SIZE
from softcvm.vmm.errors import VmmError
from softcvm.vmm.run import ExitPolicy, Termination
from softcvm.vmm.vmm import GuestConfig, Vmm
from tests.vmm.guests import MIB, booted, config, machine

PASSED = Termination(TermSet.SOFTCVM, Check.PASSED)
Scene = Callable[[Vcpu], GuestSteps[None]]


def play(
    scene: Scene, subject: GuestConfig | None = None, host: Machine | None = None
) -> tuple[Termination, list[str], Machine]:
    """Boot a guest whose program is one scene after all memory of the lab was accepted."""
    subject = subject or config()
    host = host or machine()
    info = boot_info(subject)

    def program(vcpu_id: int) -> Program:
        vcpu = yield from bring_up(info, vcpu_id)
        yield from vcpu.memory.set_private([lab(info)])
        yield from scene(vcpu)
        yield from terminate(TermSet.SOFTCVM, Check.PASSED)

    host.vm_guest(program)
    lines: list[str] = []
    with Vmm(host.process(), subject) as vmm:
        vmm.launch()
        ended = vmm.run(lines.append)
    return ended, lines, host


def first_2m(info: BootInfo) -> int:
    return lab(info).start


@pytest.mark.parametrize(
    ("kernel", "cpu", "order"),
    [
        ("6.12", "milan", 0),
        ("6.12", "genoa", 9),
        ("6.18", "milan", 9),
        ("6.18", "genoa", 0),
        ("7.3", "milan", 0),
        ("7.3", "genoa", 9),
    ],
)
def test_the_default_guest_lives_and_leaves_nothing(kernel: str, cpu: str, order: int) -> None:
    host = machine(kernel, cpu, order)
    before = host.census()
    result, lines = booted(config(vcpus=2), host)
    assert result.good, [claim for claim in result.claims if not claim.held]
    assert lines[-1] == "done"
    assert host.census() == before
    assert result.leaked_pages == 0
    assert not host.linux.vm_list
    assert host.linux.counters.warnings == 0


@pytest.mark.parametrize("vcpus", [1, 4, 64])
def test_guests_of_many_vcpus_live_and_leave_nothing(vcpus: int) -> None:
    result, _ = booted(config(vcpus=vcpus))
    assert result.good, [claim for claim in result.claims if not claim.held]
    assert result.pages["after_teardown"].keys() == {"HYPERVISOR", "HV_FIXED", "FIRMWARE"}


def test_at_the_peak_the_guest_has_every_page_that_it_was_given() -> None:
    result, _ = booted(config(memory=64 * MIB, vcpus=3))
    owned = sum(result.pages["peak"].get(name, 0) for name in ("GUEST_VALID", "GUEST_INVALID"))
    firmware, vmsas = 16, 3
    assert owned == 64 * MIB // PAGE_SIZE + firmware + vmsas
    # Not validated: in the first 2M, what belongs to video and BIOS, and a GHCB per vCPU.
    assert result.pages["peak"]["GUEST_INVALID"] == 0x60 + 3


def test_at_launch_only_what_was_launched_is_the_guests() -> None:
    result, _ = booted(config(vcpus=2))
    launched = 16 + 0x9 + 0x3 + 1 + 1 + 1 + 1 + 0xF  # the image, then its sections
    assert result.pages["launch"]["GUEST_VALID"] == launched + 2  # and a VMSA per vCPU


def test_counters_agree_with_the_events() -> None:
    host = machine()
    before = host.counters
    done: Counter[str] = Counter()

    def collect(event: tuple[object, ...]) -> None:
        if isinstance(event, RmpTransition) and event.status == "SUCCESS":
            huge = (event.old_lo | event.new_lo) >> 1 & 1
            done[event.agent] += event.npages // (512 if huge else 1)

    host.events.attach(collect)
    result, _ = booted(config(), host)
    for agent, name in (("RMPUPDATE", "rmpupdate"), ("PSMASH", "psmash")):
        assert result.counters[name] - before[name] == done[agent], agent


def test_two_boots_on_one_machine_are_one_after_the_other_and_clean() -> None:
    host = machine()
    digests = set()
    for _ in range(2):
        result, _ = booted(config(), host)
        assert result.good
        digests.add(result.launch_digest)
    assert len(digests) == 1


def test_r2_5_full_buffers_of_4k_entries_convert_every_page_they_name() -> None:
    """253 entries to a buffer, more pages than one buffer holds, none of them neighbours."""

    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        start = first_2m(vcpu.info)
        odd = [Extent(gpa, gpa + PAGE_SIZE) for gpa in range(start, start + 4 * PMD_SIZE, 8192)]
        even = [extent.start + PAGE_SIZE for extent in odd]
        yield from write_patterns(even)
        yield from vcpu.memory.set_shared(odd)
        for extent in odd[::64]:
            yield Store(extent.start, b"shared", c=False)
        yield from keeps(vcpu, even, Check.NEIGHBOURS_KEEP_DATA)
        yield from vcpu.memory.set_private(odd)
        yield from write_patterns(extent.start for extent in odd)
        yield from keeps(vcpu, even, Check.NEIGHBOURS_KEEP_DATA)

    host = machine()
    before = host.census()
    ended, lines, _ = play(scene, host=host)
    assert ended == PASSED, lines
    assert host.soc.counters.clflush_pages >= 1024
    assert host.linux.counters.direct_map_splits > 0
    assert host.census() == before


def test_r2_5_each_entry_is_done_by_the_vmm_which_calls_back_with_attributes() -> None:
    """Entries that are no neighbours are exits of their own; neighbours of one kind are one."""

    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        start = first_2m(vcpu.info)
        apart = [PscRequest(start + i * 2 * PAGE_SIZE, PscOp.SHARED) for i in range(10)]
        together = [PscRequest(start + (100 + i) * PAGE_SIZE, PscOp.SHARED) for i in range(10)]
        for request in (*apart, *together):
            yield Pvalidate(request.gpa, RmpPageSize.PG_4K, False)
        yield from vcpu.ghcb.page_state_change([*apart, *together])

    def nothing(vcpu: Vcpu) -> GuestSteps[None]:
        yield from ()

    def ioctls(scene: Scene) -> int:
        host = machine()
        names: list[str] = []
        host.events.attach(lambda event: names.append(str(getattr(event, "name", ""))))
        ended, lines, _ = play(scene, host=host)
        assert ended == PASSED, lines
        return names.count("KVM_SET_MEMORY_ATTRIBUTES")

    assert ioctls(scene) == ioctls(nothing) + 10 + 1


def test_r2_6_sharing_half_of_a_2m_page_smashes_it_and_returning_all_rejoins_it() -> None:
    sizes: list[int] = []

    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        page = first_2m(vcpu.info)
        half = Extent(page, page + PMD_SIZE // 2)
        kept = range(half.end, page + PMD_SIZE, 64 * PAGE_SIZE)
        yield from write_patterns(kept)
        out: PvalidateOut = yield Pvalidate(page, RmpPageSize.PG_2M, True)
        sizes.append(out.code)
        yield from vcpu.memory.set_shared([half])
        yield from vcpu.memory.set_private([half])
        yield from keeps(vcpu, kept, Check.NEIGHBOURS_KEEP_DATA)
        out = yield Pvalidate(page, RmpPageSize.PG_2M, True)
        sizes.append(out.code)
        yield from rejoin(vcpu, page)
        out = yield Pvalidate(page, RmpPageSize.PG_2M, True)
        sizes.append(out.code)

    ended, lines, host = play(scene)
    assert ended == PASSED, lines
    assert sizes == [0, 6, 0]
    assert host.soc.counters.psmash == 1


def test_r2_6_a_guest_may_ask_for_smash_and_unsmash_and_keeps_its_data() -> None:
    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        page = first_2m(vcpu.info)
        yield from write_patterns([page, page + PMD_SIZE - PAGE_SIZE])
        for op in (PscOp.PSMASH, PscOp.UNSMASH):
            yield from vcpu.ghcb.page_state_change([PscRequest(page, op, huge=True)])
        yield from keeps(vcpu, [page, page + PMD_SIZE - PAGE_SIZE], Check.SMASH_KEEPS_DATA)

    ended, lines, host = play(scene)
    assert ended == PASSED, lines
    assert host.soc.counters.psmash == 0  # KVM takes both as hints


def test_r2_6_a_4k_pvalidate_in_a_2m_page_has_the_hypervisor_smash_it() -> None:
    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        yield Pvalidate(first_2m(vcpu.info), RmpPageSize.PG_4K, True)

    host = machine()
    faults: list[NestedPageFault] = []

    def collect(event: tuple[object, ...]) -> None:
        if isinstance(event, NestedPageFault) and event.check == "SZ":
            faults.append(event)

    host.events.attach(collect)
    play(scene, host=host)
    assert host.soc.counters.psmash == 1
    assert faults[0].error_code >> 35 & 1  # SIZEM
    assert faults[0].error_code >> 31 & 1  # RMP


def test_r1_5_a_page_that_was_taken_away_comes_back_unvalidated() -> None:
    """Validated memory that the host unassigns and assigns again raises #VC at the guest's next access."""
    caught: list[int] = []

    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        gpa = first_2m(vcpu.info)
        yield from vcpu.ghcb.page_state_change([PscRequest(gpa, PscOp.SHARED)])
        yield from vcpu.ghcb.page_state_change([PscRequest(gpa, PscOp.PRIVATE)])
        try:
            yield Load(gpa, 8)
        except GuestException as exception:
            caught.append(exception.error_code)

    ended, _, _ = play(scene)
    assert caught == [VC_NOT_VALIDATED]
    assert ended == PASSED


def test_r2_9_without_implicit_conversion_the_vmm_gives_up_and_says_where() -> None:
    exits = ExitPolicy(implicit_conversion=False)
    result, lines = booted(config(exits=exits))
    assert "implicit conversion is off" in result.failure
    assert not result.good
    assert lines[-1].startswith("survived")
    assert result.pages["after_teardown"].keys() == {"HYPERVISOR", "HV_FIXED", "FIRMWARE"}


def test_without_prefault_memory_comes_by_page_faults_and_nothing_else_changes() -> None:
    runs = [
        booted(config(exits=ExitPolicy(prefault=prefault)), machine())[0]
        for prefault in (True, False)
    ]
    assert all(result.good for result in runs)
    assert runs[1].counters["npf"] > runs[0].counters["npf"]
    assert runs[1].pages["peak"] == runs[0].pages["peak"]


def test_a_guest_that_uses_memory_where_there_is_none_is_given_up() -> None:
    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        yield Load(1 << 40, 8)

    with pytest.raises(VmmError, match="where there is no memory"):
        play(scene)


def test_a_guest_that_asks_for_memory_where_there_is_none_is_told_so() -> None:
    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        yield from vcpu.ghcb.page_state_change([PscRequest(1 << 40, PscOp.PRIVATE)])

    ended, _, _ = play(scene)
    assert ended == Termination(TermSet.LINUX, 1)


def test_a_vcpu_type_newer_than_the_processor_is_refused_by_firmware() -> None:
    host = machine(cpu="milan")
    before = host.census()
    with (
        pytest.raises(VmmError, match="firmware corrected Fn00000001_x0"),
        Vmm(host.process(), config(cpu_type="EPYC-Genoa")) as vmm,
    ):
        vmm.launch()
    assert host.census() == before


def test_the_host_sees_ciphertext_of_private_memory_and_plaintext_of_shared() -> None:
    secret = b"the guest's own affair, all of it"
    host = machine()
    subject = config()
    info = boot_info(subject)
    private, shared = first_2m(info), first_2m(info) + PMD_SIZE
    seen: list[bytes] = []

    def program(vcpu_id: int) -> Program:
        vcpu = yield from bring_up(info, vcpu_id)
        yield from vcpu.memory.set_private([lab(info)])
        yield from vcpu.memory.set_shared([Extent(shared, shared + PAGE_SIZE)])
        yield Store(private, secret)
        yield Store(shared, secret, c=False)
        yield from vcpu.console.line("look")
        yield from terminate(TermSet.SOFTCVM, Check.PASSED)

    def look(_: str) -> None:
        (kvm,) = host.linux.vm_list
        for gpa in (private, shared):
            found = kvm.arch.npt.lookup(gpa >> 12)
            assert found is not None
            spa = (found.pfn << 12) + gpa - (found.gfn << 12)
            seen.append(host.soc.host_read(spa, len(secret)))

    host.vm_guest(program)
    with Vmm(host.process(), subject) as vmm:
        vmm.launch()
        vmm.run(look)
    assert seen[0] != secret
    assert seen[1] == secret


def test_invariants_hold_after_each_exit() -> None:
    host = machine()
    subject = config()
    host.vm_guest(memory_life(boot_info(subject)))
    broken: list[str] = []
    with Vmm(host.process(), subject) as vmm:
        vmm.launch()
        vmm.run(
            lambda _: None,
            lambda _: broken.extend(c.name for c in check_all(host) if not c.held),
        )
    assert not broken


def test_a_guest_that_dies_of_an_exception_is_given_up_with_its_exit() -> None:
    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        gpa = first_2m(vcpu.info)
        yield Pvalidate(gpa, RmpPageSize.PG_4K, False)
        yield Load(gpa, 1)

    with pytest.raises(VmmError, match="KVM_EXIT_SHUTDOWN"):
        play(scene)


def test_string_input_fills_the_guests_buffer_from_the_port() -> None:
    read: list[bytes] = []

    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        scratch = yield from vcpu.ghcb.write_buffer(bytes(8))
        info = DEBUGCON_PORT << 16 | IoioInfo.IN | IoioInfo.STRING | IoioInfo.REP | 1 << 4
        yield from vcpu.ghcb.checked_call(GhcbExit.IOIO, info, 5, sw_scratch=scratch)
        read.append((yield from vcpu.ghcb.read_buffer(8)))

    play(scene)
    assert read == [b"\xe9" * 5 + bytes(3)]


def test_the_console_gets_each_line_in_one_exit() -> None:
    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        yield from vcpu.console.line("first")
        yield from vcpu.console.line("x" * 3000)

    _, lines, host = play(scene)
    assert lines == ["first", "x" * 2031]
    quiet = play(lambda vcpu: vcpu.console.line(""))[2]
    assert host.linux.counters.kvm_exits == quiet.linux.counters.kvm_exits + 1


def test_cpuid_by_msr_is_what_the_vmm_told_kvm() -> None:
    seen: list[tuple[int, int, int, int]] = []

    def scene(vcpu: Vcpu) -> GuestSteps[None]:
        seen.append((yield from msr_cpuid(0x8000_001F)))
        entry = vcpu.cpuid.leaf(0x8000_001F)
        seen.append((entry.eax, entry.ebx, entry.ecx, entry.edx))

    play(scene)
    assert seen[0] == seen[1]
    assert seen[0][1] & 0x3F == 51


@pytest.mark.parametrize(("kernel", "vcpus"), [("6.12", 2), ("7.3", 5)])
def test_the_other_vcpus_run_from_the_guests_own_vmsas_and_are_stopped(
    kernel: str, vcpus: int
) -> None:
    host = machine(kernel)
    seen: list[object] = []
    host.events.attach(seen.append)
    result, lines = booted(config(vcpus=vcpus, features=0x21), host)
    assert result.good, [claim for claim in result.claims if not claim.held]
    assert f"started and stopped {vcpus - 1} more vCPUs" in lines
    asked = [event for event in seen if isinstance(event, SnpApCreation)]
    others = list(range(1, vcpus))
    assert [event.target for event in asked] == [*others, *others]
    assert not any(event.refused for event in asked)
