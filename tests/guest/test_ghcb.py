"""guest/ghcb.py against a hypervisor that lies.  Values from [GHCB-56421] and arch/x86/coco/sev, v7.2."""

from collections.abc import Callable

import pytest

from softcvm.abi.ghcb import PscOp
from softcvm.guest.ghcb import (
    GhcbClient,
    PscRequest,
    hv_features,
    msr_page_state_change,
    negotiate,
)
from tests.guest.fake_host import Ended, FakeHost

GHCB = 0x9000
BUFFER = GHCB + 0x800
LINUX, PSC = 1, 1


def answers(value: int) -> Callable[[FakeHost], None]:
    def answer(host: FakeHost) -> None:
        host.msr = value

    return answer


def requests(count: int) -> list[PscRequest]:
    return [PscRequest(0x20_0000 * i, PscOp.PRIVATE, True) for i in range(count)]


def finish(host: FakeHost) -> None:
    """Do every entry of the buffer, as KVM would."""
    end = int.from_bytes(host.read(BUFFER + 2, 2), "little")
    host.write(BUFFER, (end + 1).to_bytes(2, "little"))


def test_versions_that_both_sides_know_are_agreed_on() -> None:
    host = FakeHost(answers(2 << 48 | 1 << 32 | 51 << 24 | 0x001))
    assert host.run(negotiate()) == 51


@pytest.mark.parametrize(("low", "high"), [(3, 4), (1, 1)])
def test_a_hypervisor_without_version_2_ends_the_guest(low: int, high: int) -> None:
    host = FakeHost(answers(high << 48 | low << 32 | 0x001))
    with pytest.raises(Ended) as ended:
        host.run(negotiate())
    assert (ended.value.reason_set, ended.value.reason) == (0, 1)


def test_a_hypervisor_without_snp_ends_the_guest() -> None:
    host = FakeHost(answers(0b10 << 12 | 0x081))
    with pytest.raises(Ended) as ended:
        host.run(hv_features())
    assert (ended.value.reason_set, ended.value.reason) == (0, 2)


def test_the_wrong_response_code_ends_the_guest() -> None:
    with pytest.raises(Ended):
        FakeHost(answers(0x011)).run(hv_features())


def test_a_page_state_change_by_msr_names_operation_and_frame() -> None:
    host = FakeHost(answers(0x015))
    host.run(msr_page_state_change(0x80_9000, PscOp.SHARED))
    assert host.ops[0].value == 2 << 52 | 0x80_9000 | 0x014


def test_a_page_state_change_by_msr_that_fails_ends_the_guest() -> None:
    with pytest.raises(Ended) as ended:
        FakeHost(answers(1 << 63 | 0x015)).run(msr_page_state_change(0x80_9000, PscOp.SHARED))
    assert (ended.value.reason_set, ended.value.reason) == (LINUX, PSC)


def test_r2_5_a_buffer_holds_253_entries_and_more_go_into_the_next() -> None:
    sizes = []

    def note(host: FakeHost) -> None:
        sizes.append(int.from_bytes(host.read(BUFFER + 2, 2), "little") + 1)
        finish(host)

    FakeHost(note).run(GhcbClient(GHCB).page_state_change(requests(600)))
    assert sizes == [253, 253, 94]


def test_r2_5_an_entry_has_frame_operation_and_size() -> None:
    host = FakeHost(finish)
    host.run(GhcbClient(GHCB).page_state_change([PscRequest(0x4000_0000, PscOp.SHARED, True)]))
    entry = int.from_bytes(host.read(BUFFER + 8, 8), "little")
    assert entry == 1 << 56 | 2 << 52 | 0x4_0000 << 12


def test_a_hypervisor_may_stop_early_and_is_asked_again() -> None:
    calls: list[int] = []

    def one_more(host: FakeHost) -> None:
        done = int.from_bytes(host.read(BUFFER, 2), "little")
        calls.append(done)
        host.write(BUFFER, (done + 1).to_bytes(2, "little"))

    FakeHost(one_more).run(GhcbClient(GHCB).page_state_change(requests(4)))
    assert calls == [0, 1, 2, 3]


def lie(change: Callable[[FakeHost], None]) -> Ended:
    """How the guest ends when a hypervisor finishes two entries, then does this on the third."""
    calls: list[None] = []

    def vmgexit(host: FakeHost) -> None:
        calls.append(None)
        if len(calls) == 1:
            host.write(BUFFER, (2).to_bytes(2, "little"))
        else:
            change(host)

    with pytest.raises(Ended) as ended:
        FakeHost(vmgexit).run(GhcbClient(GHCB).page_state_change(requests(4)))
    return ended.value


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(BUFFER, b"\x01\x00", id="progress goes backwards"),
        pytest.param(BUFFER + 2, b"\x09\x00", id="the end moves"),
        pytest.param(BUFFER + 4, b"\x01", id="a reserved bit is set"),
        pytest.param(GHCB + 0x3A0, b"\x01", id="an error is reported"),
        pytest.param(GHCB + 0x398, b"\x02", id="the request is refused"),
    ],
)
def test_r2_5_a_guest_ends_when_the_buffer_cannot_be_true(at: int, value: bytes) -> None:
    ended = lie(lambda host: host.write(at, value))
    assert (ended.reason_set, ended.reason) == (LINUX, PSC)


def test_a_registration_that_is_answered_with_another_frame_ends_the_guest() -> None:
    def vmgexit(host: FakeHost) -> None:
        preferred = host.msr & 0xFFF == 0x010
        host.msr = ((1 << 52) - 1) << 12 | 0x011 if preferred else 0xA000 | 0x013

    with pytest.raises(Ended) as ended:
        FakeHost(vmgexit).run(GhcbClient(GHCB).register())
    assert (ended.value.reason_set, ended.value.reason) == (LINUX, 0)
