"""Guest requests through the whole path: script, GHCB, KVM's bounce pages, firmware, and back.

The guest encrypts, decodes and verifies on its own; it shares no code with the firmware.
"""

import struct
from errno import EAGAIN, EINVAL, EIO, ENOSPC
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from softcvm.abi.ghcb import Ghcb, GhcbError, GhcbExit
from softcvm.abi.insn import Load, Program, Store
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.run import KvmExit, KvmRun
from softcvm.abi.sev import SevCmdId
from tests.hw.psp.test_guest_request import HEADER, REPORT_REQ, REPORT_RSP, signed_by_vcek
from tests.kernel.svm.test_ap_creation import call, register
from tests.kernel.svm.test_ghcb import ghcb

REQUEST, RESPONSE, CERTS = 0x2000, 0x3000, 0x4000
SECRETS_GFN, SECRETS = 8, 5


def sealed(key: bytes, seqno: int = 1, msg_type: int = REPORT_REQ) -> bytes:
    """A message as the guest puts it into its request page."""
    payload = struct.pack("<64sII24x", b"nonce" * 8, 0, 0)
    fields = (bytes(32), seqno, 1, 1, 0x60, msg_type, 1, len(payload), 0, 0)
    header = bytearray(HEADER.pack(*fields))
    secret = AESGCM(key).encrypt(seqno.to_bytes(12, "little"), payload, bytes(header[0x30:]))
    header[:16] = secret[-16:]
    return bytes(header) + secret[:-16]


def opened(key: bytes, raw: bytes, seqno: int = 2) -> tuple[int, bytes]:
    tag, got, *_, kind, _, length, _, _ = HEADER.unpack(raw[:0x60])
    assert got == seqno
    secret = raw[0x60 : 0x60 + length] + tag[:16]
    return kind, AESGCM(key).decrypt(seqno.to_bytes(12, "little"), secret, raw[0x30:0x60])


def asks(out: list[Any], code: int = GhcbExit.GUEST_REQUEST, **fields: int) -> Program:
    """Read the key from the secrets page, ask for a report, keep GHCB, response and certificates."""
    yield from register()
    secrets = yield Load(SECRETS_GFN << 12, 4096)
    key = secrets[0x20:0x40]
    yield Store(REQUEST, sealed(key), c=False)
    yield Store(CERTS, b"\xff" * 64, c=False)
    answer = yield from call(ghcb(code, REQUEST, RESPONSE, **fields))
    out += [answer, key, (yield Load(RESPONSE, 4096, c=False))]
    out.append((yield Load(CERTS, 64, c=False)))


def launched(host: Any, guest: Program, *, certs: bool = False) -> Any:
    host.guest(lambda _: guest)
    vm = host.vm()
    if certs:
        vm.op(SevCmdId.SNP_ENABLE_REQ_CERTS)
    vm.memory(16)
    vm.start()
    vm.vcpu()
    assert vm.update(SECRETS_GFN, bytes(4096), SECRETS)[0] == 0
    vm.finish()
    vm.attributes(1, 4, private=False)
    return vm


def ended(vm: Any) -> bool:
    return bool(vm.run().exit_reason == k.KVM_EXIT_HLT)


class Signed:
    """What signed_by_vcek() wants of a host."""

    def __init__(self, host: Any) -> None:
        self.psp = host.soc.psp


def test_a_guest_gets_its_attestation_report(host: Any) -> None:
    out: list[Any] = []
    vm = launched(host, asks(out))
    assert ended(vm)
    answer, key, raw, _ = out
    assert (answer.sw_exit_info_1, answer.sw_exit_info_2) == (0, 0)
    kind, message = opened(key, raw)
    assert (kind, struct.unpack_from("<II", message)) == (REPORT_RSP, (0, 0x4A0))
    report = message[0x20:0x4C0]
    assert report[0x50:0x78] == b"nonce" * 8
    assert report[0x90:0xC0] == vm.digest()
    assert signed_by_vcek(Signed(host), report)  # type: ignore[arg-type]


def test_the_same_message_again_is_refused_by_firmware(host: Any) -> None:
    """Firmware counts; its status goes to the guest and KVM_RUN goes on."""
    answers: list[Ghcb] = []

    def twice() -> Program:
        yield from register()
        secrets = yield Load(SECRETS_GFN << 12, 4096)
        yield Store(REQUEST, sealed(secrets[0x20:0x40]), c=False)
        request = ghcb(GhcbExit.GUEST_REQUEST, REQUEST, RESPONSE)
        answers.append((yield from call(request)))
        answers.append((yield from call(request)))

    assert ended(launched(host, twice()))
    assert answers[0].sw_exit_info_2 == 0
    assert answers[1].sw_exit_info_2 >> 32 == 0
    assert answers[1].sw_exit_info_2 != 0


def test_bug_57_guest_requests_leave_no_page_behind(host: Any) -> None:
    out: list[Any] = []
    before = host.machine.census()
    frames = list(host.linux.page_alloc.frames.runs(0, host.soc.memory_pages))
    vm = launched(host, asks(out))
    assert ended(vm)
    host.machine.teardown()
    assert out[0].sw_exit_info_2 == 0
    assert (host.machine.census(), host.linux.leaked_pages) == (before, 0)
    assert list(host.linux.page_alloc.frames.runs(0, host.soc.memory_pages)) == frames


def test_without_certificates_the_table_is_empty(host: Any) -> None:
    out: list[Any] = []
    guest = asks(out, GhcbExit.EXT_GUEST_REQUEST, rax=CERTS, rbx=1)
    assert ended(launched(host, guest))
    assert out[0].sw_exit_info_2 == 0
    assert opened(out[1], out[2])[0] == REPORT_RSP
    assert out[3] == bytes(24) + b"\xff" * 40


@pytest.mark.parametrize("fields", [{}, {"rax": CERTS}, {"rax": CERTS + 8, "rbx": 1}])
def test_an_extended_request_names_whole_pages(host: Any, fields: dict[str, int]) -> None:
    out: list[Any] = []
    assert ended(launched(host, asks(out, GhcbExit.EXT_GUEST_REQUEST, **fields)))
    assert (out[0].sw_exit_info_1, out[0].sw_exit_info_2) == (2, GhcbError.INVALID_INPUT)


def certs_answer(vm: Any, ret: int, npages: int | None = None) -> None:
    store, run = vm.user.sys.store, vm.runs[0]
    store(run + KvmRun.snp_req_certs_ret.offset, ret.to_bytes(8, "little"))
    if npages is not None:
        store(run + KvmRun.snp_req_certs_npages.offset, npages.to_bytes(8, "little"))


def test_user_space_is_asked_for_certificates_when_it_wants_to_be(host: Any) -> None:
    out: list[Any] = []
    guest = asks(out, GhcbExit.EXT_GUEST_REQUEST, rax=CERTS, rbx=2)
    vm = launched(host, guest, certs=True)
    seen = vm.run()
    assert seen.exit_reason == KvmExit.SNP_REQ_CERTS
    assert (seen.snp_req_certs_gpa, seen.snp_req_certs_npages) == (CERTS, 2)
    vm.user.sys.store(vm.shared + CERTS, b"C" * 64)
    certs_answer(vm, 0)
    assert ended(vm)
    assert out[0].sw_exit_info_2 == 0
    assert (opened(out[1], out[2])[0], out[3]) == (REPORT_RSP, b"C" * 64)


@pytest.mark.parametrize(
    ("ret", "vmm_error", "rbx"), [(ENOSPC, 1, 5), (EAGAIN, 2, 2), (EIO, 1 << 31, 2)]
)
def test_user_space_says_why_there_are_no_certificates(
    host: Any, ret: int, vmm_error: int, rbx: int
) -> None:
    """INVALID_LEN with the pages it takes, BUSY, GENERIC; firmware is not asked."""
    out: list[Any] = []
    guest = asks(out, GhcbExit.EXT_GUEST_REQUEST, rax=CERTS, rbx=2)
    vm = launched(host, guest, certs=True)
    vm.run()
    commands = host.soc.counters.firmware_commands
    certs_answer(vm, ret, 5 if ret == ENOSPC else None)
    assert ended(vm)
    assert (out[0].sw_exit_info_2, out[0].rbx) == (vmm_error << 32, rbx)
    assert host.soc.counters.firmware_commands == commands


def test_any_other_word_of_user_space_fails_kvm_run(host: Any) -> None:
    guest = asks([], GhcbExit.EXT_GUEST_REQUEST, rax=CERTS, rbx=2)
    vm = launched(host, guest, certs=True)
    vm.run()
    certs_answer(vm, EINVAL)
    with pytest.raises(OSError, match="KVM_RUN") as refused:
        vm.run()
    assert refused.value.errno == EINVAL


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_certificate_requests_came_with_7_0(boot: Any, kernel: str) -> None:
    vm = boot(kernel).vm()
    assert vm.sev_cmd(SevCmdId.SNP_ENABLE_REQ_CERTS)[0] == EINVAL


def test_certificate_requests_are_chosen_before_the_first_vcpu(host: Any) -> None:
    vm = host.vm()
    vm.vcpu()
    assert vm.sev_cmd(SevCmdId.SNP_ENABLE_REQ_CERTS)[0] == EINVAL


def test_a_request_page_without_memory_is_user_spaces_problem(host: Any) -> None:
    def guest() -> Program:
        yield from register()
        yield from call(ghcb(GhcbExit.GUEST_REQUEST, 0x10_0000, RESPONSE))

    vm = launched(host, guest())
    with pytest.raises(OSError, match="KVM_RUN") as refused:
        vm.run()
    assert refused.value.errno == EIO
