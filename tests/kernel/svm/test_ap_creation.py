"""AP creation: one vCPU of a guest starts and stops another (GHCB exit 0x80000013)."""

from collections.abc import Generator
from errno import EAGAIN, EINTR
from typing import Any

import pytest

from softcvm.abi.ghcb import Ghcb, GhcbError, GhcbExit, gpa_request
from softcvm.abi.insn import (
    Load,
    Program,
    Pvalidate,
    Rmpadjust,
    StartState,
    Store,
    Vmgexit,
    Wrmsr,
)
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.vcpu import KvmCpuidEntry2, KvmEnableCap, KvmMpState, MpState
from softcvm.abi.svm import Msr
from softcvm.abi.vmsa import Vmsa
from softcvm.kernel.arch.x86.kvm.svm.ap import SnpApCreation, SnpVmsaReloaded
from softcvm.kernel.arch.x86.kvm.vcpu import KvmRequest
from tests.kernel.svm.test_ghcb import ghcb

GHCB = 0x1000
VMSA = 0x5000
ON_INIT, CREATE, DESTROY = 0, 1, 2
SNP_ACTIVE = 1
INVALID_INPUT = (2, GhcbError.INVALID_INPUT)
Steps = Generator[Any, Any, Any]


def register(gpa: int = GHCB) -> Steps:
    yield Wrmsr(Msr.SEV_ES_GHCB, gpa_request(gpa >> 12))
    yield Vmgexit()


def call(request: Ghcb, gpa: int = GHCB) -> Steps:
    """One exit through the page; what KVM left there."""
    yield Wrmsr(Msr.SEV_ES_GHCB, gpa)
    yield Store(gpa, bytes(request), c=False)
    yield Vmgexit()
    return Ghcb((yield Load(gpa, 4096, c=False)))


def make_vmsa(gpa: int = VMSA, *, rip: int = 0x1234) -> Steps:
    """Accept a page, write registers there, and declare it a VMSA of VMPL 0."""
    yield Pvalidate(gpa, 0, True)
    image = Vmsa(rip=rip, efer=1 << 12, sev_features=SNP_ACTIVE)
    yield Store(gpa, bytes(image))
    assert (yield Rmpadjust(gpa, 0, 1, 0, vmsa=True)) == 0


def ap(request: int, gpa: int = VMSA, target: int = 1, features: int = SNP_ACTIVE) -> Steps:
    """SW_EXITINFO1 and 2 of an AP creation request."""
    fields = {} if request == DESTROY else {"rax": features}
    answer = yield from call(ghcb(GhcbExit.AP_CREATION, request | target << 32, gpa, **fields))
    return answer.sw_exit_info_1, answer.sw_exit_info_2


def launch(host: Any, bsp: Any, other: Any = None, *, apic: bool = False) -> Any:
    """A guest of two vCPUs: bsp() on the first, other() whenever the second is started."""

    def nothing() -> Program:
        yield StartState()

    programs = {0: bsp, 1: other or nothing}
    host.guest(lambda vcpu_id: programs[vcpu_id]())
    vm = host.vm()
    if apic:
        cap = KvmEnableCap(cap=k.KVM_CAP_SPLIT_IRQCHIP, arg0=24)
        vm.user.ioctl(vm.fd, k.KVM_ENABLE_CAP, cap)
    vm.launch(16, vcpus=2)
    vm.attributes(GHCB >> 12, 2, private=False)
    return vm


def mp_state(vm: Any, vcpu: int = 1) -> MpState:
    state = KvmMpState()
    vm.user.ioctl(vm.vcpus[vcpu], k.KVM_GET_MP_STATE, state)
    return MpState(state.mp_state)


def set_mp_state(vm: Any, state: MpState, vcpu: int = 1) -> None:
    vm.user.ioctl(vm.vcpus[vcpu], k.KVM_SET_MP_STATE, KvmMpState(mp_state=state))


def target(vm: Any) -> Any:
    return vm.kvm.vcpus[1].arch


# A request that is right


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_a_guest_starts_its_second_vcpu_from_a_vmsa_of_its_own(boot: Any, kernel: str) -> None:
    answers: list[Any] = []
    started: list[Vmsa] = []

    def bsp() -> Program:
        yield from register()
        yield from make_vmsa(rip=0xABC)
        answers.append((yield from ap(CREATE)))

    def second() -> Program:
        started.append((yield StartState()))
        yield Pvalidate(0x6000, 0, True)
        yield Store(0x6000, b"the second vCPU was here")

    host = boot(kernel)
    vm = launch(host, bsp, second)
    seen: list[Any] = []
    host.machine.events.attach(seen.append)
    assert vm.run(0).exit_reason == k.KVM_EXIT_HLT
    assert answers == [(0, 0)]
    assert vm.run(1).exit_reason == k.KVM_EXIT_HLT
    assert [state.rip for state in started] == [0xABC]
    assert target(vm).svm.sev_es.snp_guest_vmsa_gpa == VMSA
    entry = host.soc.rmp.entry(target(vm).svm.vmcb.vmsa_pa >> 12)
    assert (entry.vmsa, entry.gpa, entry.validated) == (True, VMSA, True)
    created = [e for e in seen if isinstance(e, SnpApCreation)]
    reloaded = [e for e in seen if isinstance(e, SnpVmsaReloaded)]
    assert [(e.target, e.request, e.refused) for e in created] == [(1, CREATE, "")]
    assert [(e.vcpu, e.gpa) for e in reloaded] == [(1, VMSA)]


def test_kvm_keeps_no_reference_to_the_vmsa_page(host: Any) -> None:
    def bsp() -> Program:
        yield from register()
        yield from make_vmsa()
        yield from ap(CREATE)

    vm = launch(host, bsp)
    vm.run(0)
    before = list(host.linux.page_alloc.refs)
    vm.run(1)
    assert target(vm).svm.sev_es.snp_guest_vmsa_gpa == VMSA
    assert list(host.linux.page_alloc.refs) == before


def test_a_new_vmsa_starts_the_script_anew_and_the_old_one_would_go_on(host: Any) -> None:
    started: list[int] = []

    def bsp() -> Program:
        yield from register()
        yield from make_vmsa(0x5000, rip=1)
        yield from ap(CREATE, 0x5000)
        yield from call(ghcb(GhcbExit.MMIO_READ, 0xFE00_0000, 4, sw_scratch=GHCB + 0x800))
        yield from make_vmsa(0x6000, rip=2)
        yield from ap(CREATE, 0x6000)

    def second() -> Program:
        started.append((yield StartState()).rip)

    vm = launch(host, bsp, second)
    vm.run(0)
    vm.run(1)
    vm.run(0)
    vm.run(1)
    assert started == [1, 2]


# A request that is wrong


@pytest.mark.parametrize(
    ("request_", "gpa", "who", "features"),
    [
        (CREATE, VMSA, 7, SNP_ACTIVE),  # no such APIC ID
        (3, VMSA, 1, SNP_ACTIVE),  # no such request
        (CREATE | 1 << 16, VMSA, 1, SNP_ACTIVE),  # for VMPL 1
        (CREATE, VMSA + 8, 1, SNP_ACTIVE),
        (CREATE, 1 << 36, 1, SNP_ACTIVE),  # beyond what the guest's CPUID says
        (CREATE, 0, 1, SNP_ACTIVE),  # the first page of a 2M region
        (ON_INIT, 0x20_0000, 1, SNP_ACTIVE),
        (CREATE, VMSA, 1, SNP_ACTIVE | 1 << 3),  # restricted injection
        (CREATE, VMSA, 1, SNP_ACTIVE | 1 << 4),  # alternate injection
    ],
)
@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
def test_bug_18_a_wrong_request_is_invalid_input_and_leaves_the_target_alone(
    boot: Any, kernel: str, request_: int, gpa: int, who: int, features: int
) -> None:
    answers: list[Any] = []

    def bsp() -> Program:
        yield from register()
        answers.append((yield from ap(request_, gpa, who, features)))

    vm = launch(boot(kernel), bsp)
    before = target(vm).svm.vmcb.vmsa_pa
    assert vm.run(0).exit_reason == k.KVM_EXIT_HLT
    assert answers == [INVALID_INPUT]
    assert not target(vm).requests
    assert not target(vm).svm.sev_es.snp_ap_waiting_for_reset
    assert (target(vm).mp_state, target(vm).svm.vmcb.vmsa_pa) == (MpState.RUNNABLE, before)


@pytest.mark.parametrize(("kernel", "answer"), [("6.12", (0, 0)), ("6.18", INVALID_INPUT)])
def test_bug_19_all_of_sev_features_must_match_since_6_15(
    boot: Any, kernel: str, answer: tuple[int, int]
) -> None:
    """DebugSwap is no injection mode: 6.12 does not look at it."""
    answers: list[Any] = []

    def bsp() -> Program:
        yield from register()
        yield from make_vmsa()
        answers.append((yield from ap(CREATE, features=SNP_ACTIVE | 1 << 5)))

    vm = launch(boot(kernel), bsp)
    vm.run(0)
    assert answers == [answer]


def test_features_must_be_supplied_except_to_destroy(host: Any) -> None:
    answers: list[Any] = []

    def bsp() -> Program:
        yield from register()
        for request in (CREATE, DESTROY):
            page = yield from call(ghcb(GhcbExit.AP_CREATION, request | 1 << 32, VMSA))
            answers.append((page.sw_exit_info_1, page.sw_exit_info_2))

    vm = launch(host, bsp)
    vm.run(0)
    assert answers == [(2, GhcbError.MISSING_INPUT), (0, 0)]


# When the target acts on it


def test_create_on_init_waits_for_the_init(host: Any) -> None:
    started: list[int] = []

    def bsp() -> Program:
        yield from register()
        yield from make_vmsa(rip=0x77)
        yield from ap(ON_INIT)

    def second() -> Program:
        started.append((yield StartState()).rip)

    vm = launch(host, bsp, second, apic=True)
    vm.user.sys.signal()
    with pytest.raises(OSError, match="KVM_RUN") as waiting:
        vm.run(1)
    assert waiting.value.errno == EINTR
    with pytest.raises(OSError, match="KVM_RUN"):
        vm.run(0)  # halted in the kernel
    assert target(vm).requests == KvmRequest(0)
    assert target(vm).svm.sev_es.snp_ap_waiting_for_reset
    arch = target(vm)
    arch.apic_init = True
    with pytest.raises(OSError, match="KVM_RUN") as again:
        vm.run(1)
    assert again.value.errno == EAGAIN
    assert mp_state(vm) is MpState.INIT_RECEIVED
    assert arch.svm.sev_es.snp_guest_vmsa_gpa == VMSA
    set_mp_state(vm, MpState.SIPI_RECEIVED)
    assert mp_state(vm) is MpState.RUNNABLE  # reading the state takes the SIPI
    with pytest.raises(OSError, match="KVM_RUN"):
        vm.run(1)
    assert started == [0x77]


def test_create_does_not_wake_a_vcpu_that_never_had_an_init(host: Any) -> None:
    """KVM_RUN of an uninitialised vCPU takes INIT and SIPI only: EAGAIN, again and again."""

    def bsp() -> Program:
        yield from register()
        yield from make_vmsa()
        yield from ap(CREATE)

    vm = launch(host, bsp, apic=True)
    with pytest.raises(OSError, match="KVM_RUN"):
        vm.run(0)
    for _ in range(3):
        with pytest.raises(OSError, match="KVM_RUN") as again:
            vm.run(1)
        assert again.value.errno == EAGAIN
    assert mp_state(vm) is MpState.UNINITIALIZED


def test_destroy_halts_the_target_and_a_halted_vcpu_sleeps_until_a_signal(host: Any) -> None:
    def bsp() -> Program:
        yield from register()
        yield from make_vmsa()
        yield from ap(CREATE)
        yield from call(ghcb(GhcbExit.MMIO_READ, 0xFE00_0000, 4, sw_scratch=GHCB + 0x800))
        yield from ap(DESTROY)

    vm = launch(host, bsp)
    vm.run(0)
    vm.run(1)
    vm.run(0)
    with pytest.raises(OSError, match="KVM_RUN") as asleep:
        vm.run(1)
    assert asleep.value.errno == EINTR
    assert vm.kvm_run(1).exit_reason == k.KVM_EXIT_INTR
    assert mp_state(vm) is MpState.HALTED
    assert target(vm).svm.vmcb.vmsa_pa is None


def test_a_vcpu_that_had_no_vmsa_of_the_guests_gets_kvms_back_when_destroyed(host: Any) -> None:
    """init_vmcb() at the INIT of the request: snp_has_guest_vmsa is not set yet."""

    def bsp() -> Program:
        yield from register()
        yield from ap(DESTROY)

    vm = launch(host, bsp)
    kvms = target(vm).svm.vmcb.vmsa_pa
    vm.run(0)
    with pytest.raises(OSError, match="KVM_RUN"):
        vm.run(1)
    assert (mp_state(vm), target(vm).svm.vmcb.vmsa_pa) == (MpState.HALTED, kvms)


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_bug_17_entering_without_a_vmsa_fails_instead_of_hanging(
    boot: Any, kernel: str
) -> None:
    """A second VMSA where there is no memory: runnable, and no page to run from."""

    def bsp() -> Program:
        yield from register()
        yield from make_vmsa()
        yield from ap(CREATE)
        yield from call(ghcb(GhcbExit.MMIO_READ, 0xFE00_0000, 4, sw_scratch=GHCB + 0x800))
        yield from ap(CREATE, 0x10_1000)

    vm = launch(boot(kernel), bsp)
    vm.run(0)
    vm.run(1)
    vm.run(0)
    seen = vm.run(1)
    assert seen.exit_reason == k.KVM_EXIT_FAIL_ENTRY
    assert seen.fail_entry_hardware_entry_failure_reason == (1 << 64) - 1
    assert mp_state(vm) is MpState.RUNNABLE
    assert vm.run(1).exit_reason == k.KVM_EXIT_FAIL_ENTRY


def test_a_page_that_the_guest_did_not_declare_a_vmsa_fails_the_entry(host: Any) -> None:
    def bsp() -> Program:
        yield from register()
        yield Pvalidate(VMSA, 0, True)
        yield from ap(CREATE)

    vm = launch(host, bsp)
    vm.run(0)
    assert vm.run(1).exit_reason == k.KVM_EXIT_FAIL_ENTRY


def test_a_vmsa_that_was_punched_out_fails_the_entry_and_is_nobodys(host: Any) -> None:
    """No invalidation reaches the VMSA: its frame is free while KVM still names it."""

    def bsp() -> Program:
        yield from register()
        yield from make_vmsa()
        yield from ap(CREATE)

    vm = launch(host, bsp)
    vm.run(0)
    vm.run(1)
    pfn = target(vm).svm.vmcb.vmsa_pa >> 12
    vm.user.sys.fallocate(vm.gmem, 3, VMSA, 0x1000)
    assert not host.soc.rmp.entry(pfn).assigned
    assert vm.run(1).exit_reason == k.KVM_EXIT_FAIL_ENTRY


def test_a_vcpu_may_create_itself(host: Any) -> None:
    started: list[int] = []

    def bsp() -> Program:
        started.append((yield StartState()).rip)
        if started[-1] == 0x99:
            return
        yield from register()
        yield from make_vmsa(rip=0x99)
        yield from ap(CREATE, target=0)

    vm = launch(host, bsp)
    assert vm.run(0).exit_reason == k.KVM_EXIT_HLT
    assert started == [0xFFF0, 0x99]


# AP reset hold


@pytest.mark.parametrize("by_page", [False, True])
def test_a_sipi_releases_a_vcpu_from_its_reset_hold(host: Any, by_page: bool) -> None:
    released: list[int] = []

    def second() -> Program:
        if by_page:
            yield from register(0x2000)
            held = yield from call(ghcb(GhcbExit.AP_RESET_HOLD), 0x2000)
            released.append(held.sw_exit_info_2)
        else:
            yield Wrmsr(Msr.SEV_ES_GHCB, 0x006)
            released.append((yield Vmgexit()))

    def bsp() -> Program:
        yield StartState()

    vm = launch(host, bsp, second, apic=True)
    set_mp_state(vm, MpState.SIPI_RECEIVED)  # the first SIPI: as the VMM set it up
    with pytest.raises(OSError, match="KVM_RUN") as held:
        vm.run(1)
    assert held.value.errno == EINTR
    assert (mp_state(vm), released) == (MpState.AP_RESET_HOLD, [])
    set_mp_state(vm, MpState.SIPI_RECEIVED)
    with pytest.raises(OSError, match="KVM_RUN"):
        vm.run(1)
    assert released == [1 if by_page else 1 << 12 | 0x007]


def test_without_an_apic_in_the_kernel_a_reset_hold_leaves_to_user_space(host: Any) -> None:
    def bsp() -> Program:
        yield Wrmsr(Msr.SEV_ES_GHCB, 0x006)
        yield Vmgexit()

    vm = launch(host, bsp)
    assert vm.run(0).exit_reason == k.KVM_EXIT_AP_RESET_HOLD


# INIT and SIPI by x2APIC


def wrmsr(index: int, value: int) -> Steps:
    page = yield from call(
        ghcb(GhcbExit.MSR, 1, rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    )
    return page.sw_exit_info_1, page.sw_exit_info_2


GP = (1, 0x8000_030D)


def test_a_guest_sends_init_and_sipi_through_its_x2apic(host: Any) -> None:
    answers: list[Any] = []
    started: list[int] = []

    def bsp() -> Program:
        yield from register()
        answers.append((yield from wrmsr(0x830, 1 << 32 | 0x4500)))  # still in xAPIC mode
        page = yield from call(ghcb(GhcbExit.MSR, rcx=0x1B))
        answers.append((yield from wrmsr(0x1B, page.rax | 1 << 10)))
        answers.append((yield from wrmsr(0x830, 1 << 32 | 0x4500 | 1 << 13)))
        answers.append((yield from wrmsr(0x830, 1 << 32 | 0x4500)))
        answers.append((yield from wrmsr(0x830, 1 << 32 | 0x4600)))
        answers.append((yield from wrmsr(0xC000_0081, 0)))  # STAR is the guest's own

    def second() -> Program:
        started.append((yield StartState()).rip)

    vm = launch(host, bsp, second, apic=True)
    vm.kvm.vcpus[0].arch.cpuid_entries = [KvmCpuidEntry2(function=1, ecx=1 << 21)]
    with pytest.raises(OSError, match="KVM_RUN"):
        vm.run(0)
    assert answers == [GP, (0, 0), GP, (0, 0), (0, 0), GP]
    with pytest.raises(OSError, match="KVM_RUN") as again:
        vm.run(1)
    assert (again.value.errno, mp_state(vm)) == (EAGAIN, MpState.RUNNABLE)
    with pytest.raises(OSError, match="KVM_RUN"):
        vm.run(1)
    assert started == [0xFFF0]
