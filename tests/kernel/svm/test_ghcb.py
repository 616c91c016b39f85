"""#VMGEXIT: the MSR protocol, what KVM refuses in a GHCB, and the exits that reach user space."""

from collections.abc import Generator
from errno import EINVAL
from typing import Any

import pytest

from softcvm.abi.ghcb import (
    GHCB_SHARED_BUFFER,
    GHCB_VALID,
    ApCreation,
    Ghcb,
    GhcbError,
    GhcbExit,
    cpuid_request,
    gpa_request,
    termination_request,
    valid_mask,
)
from softcvm.abi.insn import Load, Program, Rdmsr, Store, Vmgexit, Wrmsr
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KVM_HC_MAP_GPA_RANGE
from softcvm.abi.kvm.vcpu import KvmCpuidEntry2
from softcvm.abi.sev import KvmSevInit, SevCmdId
from softcvm.abi.svm import Msr

GPA = 0x1000
ALWAYS = ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2")


def ghcb(code: int, info_1: int = 0, info_2: int = 0, **fields: int) -> Ghcb:
    """A request with these fields set and marked as supplied."""
    request = Ghcb(sw_exit_code=code, sw_exit_info_1=info_1, sw_exit_info_2=info_2)
    for name, value in fields.items():
        setattr(request, name, value)
    marked = valid_mask(*ALWAYS, *(name for name in fields if name in GHCB_VALID))
    request.valid_bitmap = marked.to_bytes(16, "little")
    return request


def msr(value: int, out: list[int]) -> Program:
    yield Wrmsr(Msr.SEV_ES_GHCB, value)
    yield Vmgexit()
    out.append((yield Rdmsr(Msr.SEV_ES_GHCB)))


def page(request: Ghcb, out: list[Ghcb], *, register: bool = True) -> Generator[Any, Any, None]:
    if register:
        yield Wrmsr(Msr.SEV_ES_GHCB, gpa_request(GPA >> 12))
        yield Vmgexit()
    yield Wrmsr(Msr.SEV_ES_GHCB, GPA)
    yield Store(GPA, bytes(request), c=False)
    yield Vmgexit()
    out.append(Ghcb((yield Load(GPA, 4096, c=False))))


def launched(host: Any, guest: Any, *, init: KvmSevInit | None = None) -> Any:
    host.guest(lambda _: guest)
    vm = host.vm(init=False)
    vm.op(SevCmdId.INIT2, init or KvmSevInit())
    vm.launch(16)
    vm.attributes(1, 3, private=False)
    return vm


def exchange(host: Any, request: Ghcb, **kwargs: Any) -> Ghcb:
    """The GHCB after one request that needs nobody in user space."""
    out: list[Ghcb] = []
    vm = launched(host, page(request, out), **kwargs)
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    return out[0]


# MSR protocol


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (0x002, 0x0002_0001_3300_0001),  # SEV information: versions 2 to 1, C-bit 51
        (0x080, 0x3 << 12 | 0x081),  # features: SNP, AP creation
        (0x010, 0xFFFF_FFFF_FFFF_F011),  # no preferred GHCB GPA
        (gpa_request(0x123), 0x123 << 12 | 0x013),
        (0x016, 0x016),  # run VMPL: unknown to KVM, the request stays
        (0x3FF, 0x3FF),
    ],
)
def test_requests_by_msr(host: Any, request_: int, answer: int) -> None:
    out: list[int] = []
    launched(host, msr(request_, out)).run()
    assert out == [answer]


def test_the_msr_begins_with_sev_information_after_reset(host: Any) -> None:
    out: list[int] = []

    def guest() -> Program:
        out.append((yield Rdmsr(Msr.SEV_ES_GHCB)))

    launched(host, guest()).run()
    assert out == [0x0002_0001_3300_0001]


def test_cpuid_by_msr_answers_from_the_table_user_space_gave(host: Any) -> None:
    answers: list[int] = []

    def guest() -> Program:
        for register in range(4):
            yield from msr(cpuid_request(0x8000_001F, register), answers)
        yield from msr(cpuid_request(0x4000_0099, 0), answers)

    host.guest(lambda _: guest())
    vm = host.vm()
    vm.memory(16)
    vm.start()
    vcpu = vm.vcpu()
    entry = KvmCpuidEntry2(function=0x8000_001F, eax=1, ebx=2, ecx=3, edx=0xFFFF_FFFF)
    vm.kvm.vcpus[0].arch.cpuid_entries = [entry]
    vm.finish()
    vm.run()
    assert vcpu
    assert [a >> 32 for a in answers] == [1, 2, 3, 0xFFFF_FFFF, 0]
    assert [a & 0xFFF for a in answers] == [5] * 5
    assert [a >> 30 & 3 for a in answers] == [0, 1, 2, 3, 0]


def test_a_termination_request_becomes_a_system_event(host: Any) -> None:
    value = termination_request(1, 2)
    seen = launched(host, msr(value, [])).run()
    assert seen.exit_reason == k.KVM_EXIT_SYSTEM_EVENT
    assert seen.system_event_type == k.KVM_SYSTEM_EVENT_SEV_TERM
    assert seen.system_event_ndata == 1
    assert seen.system_event_data[:8] == value.to_bytes(8, "little")


def test_reset_hold_waits_in_user_space_without_an_irqchip(host: Any) -> None:
    out: list[int] = []
    vm = launched(host, msr(0x006, out))
    assert vm.run().exit_reason == k.KVM_EXIT_AP_RESET_HOLD
    vm.run()
    assert out == [0x007]  # bits 63:12 zero: not released by a SIPI


# What KVM refuses


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ghcb(GhcbExit.HV_FEATURES, ghcb_usage=1), GhcbError.INVALID_USAGE),
        (ghcb(0x8000_1234), GhcbError.INVALID_EVENT),
        (ghcb(GhcbExit.RUN_VMPL), GhcbError.INVALID_EVENT),
        (ghcb(GhcbExit.HV_DOORBELL), GhcbError.INVALID_EVENT),
        (ghcb(GhcbExit.CPUID, rax=0), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.CPUID, rax=0xD, rcx=0), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.MSR), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.MSR, 1, rcx=0, rax=0), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.IOIO, 0x10), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.IOIO, 0x14, rax=0), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.VMMCALL, rax=0), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.WRITE_DR7), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.RDPMC), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.MONITOR, rax=0, rcx=0), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.MWAIT, rax=0), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.MMIO_READ, 0xFE00_0000, 4), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.PSC), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.AP_CREATION, ApCreation.CREATE), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.GUEST_REQUEST, 0x2000, 0x2000), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.GUEST_REQUEST, 0x2001, 0x3000), GhcbError.MISSING_INPUT),
        (ghcb(GhcbExit.PSC, sw_scratch=0), GhcbError.INVALID_SCRATCH_AREA),
        (ghcb(GhcbExit.PSC, sw_scratch=0x2000), GhcbError.INVALID_SCRATCH_AREA),
        (ghcb(GhcbExit.PSC, sw_scratch=GPA + 0x7FF), GhcbError.INVALID_SCRATCH_AREA),
        (ghcb(GhcbExit.PSC, sw_scratch=GPA + 0xFE9), GhcbError.INVALID_SCRATCH_AREA),
        (ghcb(GhcbExit.PSC, sw_scratch=(1 << 64) - 8), GhcbError.INVALID_SCRATCH_AREA),
        (
            ghcb(GhcbExit.MMIO_READ, 0xFE00_0000, 9, sw_scratch=GPA + GHCB_SHARED_BUFFER),
            GhcbError.INVALID_INPUT,
        ),
        (ghcb(GhcbExit.AP_JUMP_TABLE, 2), GhcbError.INVALID_INPUT),
        (ghcb(GhcbExit.EXT_GUEST_REQUEST, 0x2000, 0x2000), GhcbError.MISSING_INPUT),
    ],
)
def test_a_mistake_is_answered_to_the_guest(
    host: Any, request_: Ghcb, reason: GhcbError
) -> None:
    answer = exchange(host, request_)
    assert (answer.sw_exit_info_1, answer.sw_exit_info_2) == (2, reason)


@pytest.mark.parametrize("missing", ALWAYS)
def test_exit_code_and_both_infos_must_be_marked_valid(host: Any, missing: str) -> None:
    request = ghcb(GhcbExit.HV_FEATURES)
    bitmap = int.from_bytes(request.valid_bitmap, "little") & ~(1 << GHCB_VALID[missing])
    request.valid_bitmap = bitmap.to_bytes(16, "little")
    assert exchange(host, request).sw_exit_info_2 == GhcbError.MISSING_INPUT


@pytest.mark.parametrize(
    ("kernel", "answered"), [("6.12", False), ("6.18", False), ("7.3", True)]
)
def test_an_unregistered_ghcb_killed_the_vm_until_2026(
    boot: Any, kernel: str, answered: bool
) -> None:
    host = boot(kernel)
    out: list[Ghcb] = []
    vm = launched(host, page(ghcb(GhcbExit.HV_FEATURES), out, register=False))
    if answered:
        assert vm.run().exit_reason == k.KVM_EXIT_HLT
        assert (out[0].sw_exit_info_1, out[0].sw_exit_info_2) == (2, GhcbError.NOT_REGISTERED)
    else:
        assert vm.user.errno(vm.vcpus[0], k.KVM_RUN) == EINVAL


def test_without_a_page_there_is_no_answer(host: Any) -> None:
    after: list[int] = []

    def guest() -> Program:
        yield Wrmsr(Msr.SEV_ES_GHCB, 0)
        yield Vmgexit()
        yield Wrmsr(Msr.SEV_ES_GHCB, 1 << 40)  # no memslot
        yield Vmgexit()
        after.append(1)

    assert launched(host, guest()).run().exit_reason == k.KVM_EXIT_HLT
    assert after == [1]


def test_an_event_the_guest_cannot_handle_ends_kvm_run(host: Any) -> None:
    vm = launched(host, page(ghcb(GhcbExit.UNSUPPORTED_EVENT), []))
    assert vm.user.errno(vm.vcpus[0], k.KVM_RUN) == EINVAL


# What KVM does


def test_features_by_page_and_valid_marks_cleared(host: Any) -> None:
    answer = exchange(host, ghcb(GhcbExit.HV_FEATURES, rax=7))
    assert (answer.sw_exit_info_1, answer.sw_exit_info_2) == (0, 3)
    assert answer.rax == 7
    marked = int.from_bytes(answer.valid_bitmap, "little")
    assert marked == valid_mask("sw_exit_info_1", "sw_exit_info_2", "rax", "rbx", "rcx", "rdx")


def test_the_jump_table_is_kept_for_the_vm(host: Any) -> None:
    out: list[Ghcb] = []

    def guest() -> Program:
        yield from page(ghcb(GhcbExit.AP_JUMP_TABLE, 0, 0x7000), out)
        yield from page(ghcb(GhcbExit.AP_JUMP_TABLE, 1), out)

    launched(host, guest()).run()
    assert out[1].sw_exit_info_2 == 0x7000


@pytest.mark.parametrize(
    "code", [GhcbExit.INVD, GhcbExit.WBINVD, GhcbExit.READ_DR7, GhcbExit.NMI_COMPLETE]
)
def test_no_ops(host: Any, code: GhcbExit) -> None:
    assert exchange(host, ghcb(code)).sw_exit_info_1 == 0


def test_out_and_in_reach_user_space(host: Any) -> None:
    out: list[Ghcb] = []

    def guest() -> Program:
        yield from page(ghcb(GhcbExit.IOIO, 0x402 << 16 | 1 << 4, rax=0x1141), out)
        yield from page(
            ghcb(GhcbExit.IOIO, 0x60 << 16 | 1 << 5 | 1, rax=0xAAAA_BBBB_CCCC_DDDD), out
        )

    vm = launched(host, guest())
    seen = vm.run()
    assert (seen.exit_reason, seen.io_port, seen.io_size) == (k.KVM_EXIT_IO, 0x402, 1)
    assert (seen.io_direction, seen.io_count) == (1, 1)
    assert vm.user.sys.load(vm.runs[0] + seen.io_data_offset, 1) == b"A"
    seen = vm.run()
    assert (seen.io_port, seen.io_direction, seen.io_size) == (0x60, 0, 2)
    vm.user.sys.store(vm.runs[0] + seen.io_data_offset, b"\x34\x12")
    vm.run()
    assert out[1].rax == 0xAAAA_BBBB_CCCC_1234  # two bytes are merged


def test_mmio_reaches_user_space_through_the_scratch_area(host: Any) -> None:
    out: list[Ghcb] = []
    scratch = GPA + GHCB_SHARED_BUFFER + 16
    write = ghcb(GhcbExit.MMIO_WRITE, 0xFE00_0000, 4, sw_scratch=scratch)
    write.data[0x810:0x814] = b"wxyz"

    def guest() -> Program:
        yield from page(write, out)
        yield from page(ghcb(GhcbExit.MMIO_READ, 0xFE00_0008, 8, sw_scratch=scratch), out)

    vm = launched(host, guest())
    seen = vm.run()
    assert (seen.exit_reason, seen.mmio_phys_addr, seen.mmio_len) == (
        k.KVM_EXIT_MMIO,
        0xFE00_0000,
        4,
    )
    assert (seen.mmio_is_write, seen.mmio_data[:4]) == (1, b"wxyz")
    seen = vm.run()
    assert (seen.mmio_phys_addr, seen.mmio_is_write) == (0xFE00_0008, 0)
    vm.user.sys.store(vm.runs[0] + 40, b"12345678")
    vm.run()
    assert out[1].shared_buffer[16:24] == b"12345678"


def test_a_vmmcall_for_map_gpa_range_leaves_with_the_guest_s_words(host: Any) -> None:
    out: list[Ghcb] = []
    request = ghcb(
        GhcbExit.VMMCALL, rax=KVM_HC_MAP_GPA_RANGE, rbx=0x3000, rcx=2, rdx=0x10, cpl=0
    )
    vm = launched(host, page(request, out))
    vm.exit_hypercalls()
    seen = vm.run()
    assert (seen.exit_reason, seen.hypercall_nr) == (k.KVM_EXIT_HYPERCALL, KVM_HC_MAP_GPA_RANGE)
    assert [seen.hypercall_args[i] for i in (1, 8, 16)] == [0x30, 2, 0x10]
    vm.answer(0)
    vm.run()
    assert out[0].rax == 0


def test_a_guest_request_reaches_firmware_and_its_refusal_the_guest(host: Any) -> None:
    """An empty page is no message that firmware accepts; the status comes back beside the response."""
    answer = exchange(host, ghcb(GhcbExit.GUEST_REQUEST, 0x2000, 0x3000))
    assert answer.sw_exit_info_1 == 0
    assert answer.sw_exit_info_2 >> 32 == 0
    assert answer.sw_exit_info_2 & 0xFFFF_FFFF != 0


def test_scratch_outside_the_page_is_version_1(boot: Any) -> None:
    """Linux 6.12 lets an SNP guest negotiate it; a copy of 8 bytes has room for no entry."""
    host = boot("6.12")
    answer = exchange(
        host, ghcb(GhcbExit.PSC, sw_scratch=0x2000), init=KvmSevInit(ghcb_version=1)
    )
    assert answer.sw_exit_info_2 == 0x100 << 32  # MAP_GPA_RANGE exits are not enabled
