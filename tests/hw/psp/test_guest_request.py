"""GUEST_REQUEST as a guest sees it.  The guest here encrypts, decodes and verifies on its own:
field offsets and the signature check share no code with the firmware.
"""

import struct

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.snp_firmware import SnpCmd, SnpGuestRequest, SnpLaunchFinish, SnpStatus
from softcvm.abi.snp_platform import SnpConfig, TcbVersion
from softcvm.hw.psp.keys import public_key
from softcvm.sim.errors import Unmodelled
from tests.hw.psp.host import OK, POLICY, Host, filled

REPORT_REQ, REPORT_RSP = 5, 6
KEY_REQ, KEY_RSP = 3, 4
HEADER = struct.Struct("<32sQ8xBBHBBHIB35x")


class Guest:
    """A running guest with its secrets page, and pages on the host to carry its messages."""

    def __init__(self, host: Host, **finish: int) -> None:
        self.host = host
        self.gctx = host.launching()
        assert host.update(self.gctx, host.pre_guest(1, 0, b"code" * 1024)) is OK
        page = host.pre_guest(1, 0x80_D000)
        assert host.update(self.gctx, page, LaunchPageType.SECRETS) is OK
        secrets = host.plain(page, 1)
        self.keys = [secrets[0x20 + 32 * i : 0x40 + 32 * i] for i in range(4)]
        cmd = SnpLaunchFinish(gctx_paddr=self.gctx, host_data=b"H" * 32)
        assert host.run(SnpCmd.LAUNCH_FINISH, filled(cmd, finish)) is OK
        self.request, self.response = host.page(), host.firmware()
        self.seqno = [1, 1, 1, 1]

    def message(self, msg_type: int, payload: bytes, vmpck: int = 0, **change: int) -> bytes:
        fields = {
            "seqno": self.seqno[vmpck],
            "algo": 1,
            "version": 1,
            "size": 0x60,
            "msg_version": 1,
            "length": len(payload),
            **change,
        }
        header = bytearray(
            HEADER.pack(
                bytes(32),
                fields["seqno"],
                fields["algo"],
                fields["version"],
                fields["size"],
                msg_type,
                fields["msg_version"],
                fields["length"],
                0,
                vmpck,
            )
        )
        iv = fields["seqno"].to_bytes(12, "little")
        sealed = AESGCM(self.keys[vmpck & 3]).encrypt(iv, payload, bytes(header[0x30:0x60]))
        header[0:16] = sealed[-16:]
        return bytes(header) + sealed[:-16]

    def send(self, message: bytes) -> SnpStatus:
        self.host.soc.host_write(self.request, message)
        cmd = SnpGuestRequest(
            gctx_paddr=self.gctx, req_paddr=self.request, res_paddr=self.response
        )
        return self.host.run(SnpCmd.GUEST_REQUEST, cmd)

    def ask(self, msg_type: int, payload: bytes, vmpck: int = 0) -> tuple[int, bytes]:
        """Send and open the answer: its type and payload."""
        assert self.send(self.message(msg_type, payload, vmpck)) is OK
        raw = self.host.raw(self.response)
        tag, seqno, _, _, _, answer_type, _, length, _, key = HEADER.unpack(raw[:0x60])
        assert (seqno, key) == (self.seqno[vmpck] + 1, vmpck)
        sealed = raw[0x60 : 0x60 + length] + tag[:16]
        iv = seqno.to_bytes(12, "little")
        self.seqno[vmpck] += 2
        return answer_type, AESGCM(self.keys[vmpck]).decrypt(iv, sealed, raw[0x30:0x60])

    def report(self, vmpl: int = 0, key_sel: int = 0, vmpck: int = 0) -> tuple[int, bytes]:
        payload = struct.pack("<64sII24x", b"nonce" * 8, vmpl, key_sel)
        kind, answer = self.ask(REPORT_REQ, payload, vmpck)
        status, size = struct.unpack_from("<II", answer)
        assert (kind, size) == (REPORT_RSP, 0x4A0)
        return status, answer[0x20:0x4C0]

    def key(self, select: int = 0, fields: int = 0, vmpl: int = 0, svn: int = 0) -> bytes:
        payload = struct.pack("<IIQII8s", select, 0, fields, vmpl, svn, bytes(8))
        kind, answer = self.ask(KEY_REQ, payload)
        assert kind == KEY_RSP
        assert struct.unpack_from("<I", answer)[0] == 0
        return answer[0x20:0x40]


@pytest.fixture
def guest(host: Host) -> Guest:
    return Guest(host)


def signed_by_vcek(host: Host, report: bytes) -> bool:
    wire = bytes(public_key(host.psp.chip.vcek(host.psp.reported_tcb)))
    x, y = (int.from_bytes(wire[at : at + 72], "little") for at in (4, 76))
    key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    r, s = (int.from_bytes(report[at : at + 72], "little") for at in (0x2A0, 0x2E8))
    key.verify(encode_dss_signature(r, s), report[:0x2A0], ec.ECDSA(hashes.SHA384()))
    return True


def test_a_report_carries_the_guests_identity_and_the_vceks_signature(guest: Guest) -> None:
    status, report = guest.report(vmpl=2)
    context = guest.host.psp.gctx(guest.gctx)
    assert status == 0
    assert len(report) == 0x4A0
    version, _, policy = struct.unpack_from("<IIQ", report)
    assert (version, policy) == (2, POLICY)
    assert struct.unpack_from("<II", report, 0x30) == (2, 1)
    assert report[0x50:0x90] == (b"nonce" * 8).ljust(64, b"\0")
    assert report[0x90:0xC0] == context.ld
    assert report[0xC0:0xE0] == b"H" * 32
    assert report[0x140:0x160] == context.report_id
    assert report[0x160:0x180] == b"\xff" * 32
    assert (
        report[0x38:0x40] == report[0x180:0x188] == report[0x1E0:0x1E8] == report[0x1F0:0x1F8]
    )
    assert report[0x1E8:0x1EB] == bytes([38, 55, 1])
    assert any(report[0x1A0:0x1E0])
    assert signed_by_vcek(guest.host, report)


def test_the_tcb_that_is_reported_chooses_the_key(guest: Guest) -> None:
    older = TcbVersion(guest.host.psp.tcb)
    older.microcode -= 1
    _, before = guest.report()
    assert guest.host.run(SnpCmd.CONFIG, SnpConfig(reported_tcb=bytes(older))) is OK
    _, after = guest.report()
    assert after[0x180:0x188] == bytes(older) != before[0x180:0x188]
    assert signed_by_vcek(guest.host, after)


def test_masks_hide_chip_and_signature(guest: Guest) -> None:
    assert guest.host.run(SnpCmd.CONFIG, SnpConfig(mask_chip_id=1, mask_chip_key=1)) is OK
    status, report = guest.report()
    assert status == 0
    assert report[0x1A0:0x1E0] == bytes(64)
    assert report[0x2A0:] == bytes(512)
    assert report[0x48] == 0b11110  # MASK_CHIP_KEY, SIGNING_KEY none


def test_a_guest_may_not_ask_for_a_more_privileged_report(guest: Guest) -> None:
    status, report = guest.report(vmpl=1, vmpck=2)
    assert status == SnpStatus.INVALID_PARAM
    assert report == bytes(0x4A0)
    assert guest.report(vmpl=2, vmpck=2)[0] == 0


def test_without_a_vlek_only_the_vcek_signs(host: Host) -> None:
    guest = Guest(host)
    assert guest.report(key_sel=1)[0] == 0
    assert guest.report(key_sel=2)[0] == SnpStatus.INVALID_KEY
    assert guest.report(key_sel=3)[0] == SnpStatus.INVALID_KEY
    assert guest.report(key_sel=4)[0] == SnpStatus.INVALID_PARAM


def test_vcek_dis_leaves_a_guest_without_a_key(host: Host) -> None:
    assert Guest(host, vcek_disabled=1).report()[0] == SnpStatus.INVALID_KEY


def test_sequence_numbers_count_messages_per_key(guest: Guest) -> None:
    guest.report()
    guest.report(vmpck=1, vmpl=1)
    guest.report()
    context = guest.host.psp.gctx(guest.gctx)
    assert [context.msg_count(i) for i in range(4)] == [4, 2, 0, 0]
    replayed = guest.message(REPORT_REQ, bytes(96), seqno=3)
    assert guest.send(replayed) is SnpStatus.AEAD_OFLOW
    skipped = guest.message(REPORT_REQ, bytes(96), seqno=7)
    assert guest.send(skipped) is SnpStatus.AEAD_OFLOW


HEADERS: list[tuple[dict[str, int], SnpStatus]] = [
    ({"version": 2}, SnpStatus.INVALID_PARAM),
    ({"size": 0x50}, SnpStatus.INVALID_PARAM),
    ({"algo": 2}, SnpStatus.INVALID_PARAM),
    ({"length": 0}, SnpStatus.INVALID_PARAM),
    ({"length": 95}, SnpStatus.INVALID_PARAM),
    ({"length": 4096}, SnpStatus.INVALID_PARAM),
    ({"length": 80}, SnpStatus.BAD_MEASUREMENT),
    ({"msg_version": 0}, SnpStatus.INVALID_PARAM),
    ({"msg_version": 2}, SnpStatus.INVALID_PARAM),
]


@pytest.mark.parametrize(("change", "status"), HEADERS)
def test_a_bad_header_is_the_commands_fault(
    guest: Guest, change: dict[str, int], status: SnpStatus
) -> None:
    assert guest.send(guest.message(REPORT_REQ, bytes(96), **change)) is status
    assert guest.host.psp.gctx(guest.gctx).msg_count(0) == 0


def test_a_message_that_was_touched_does_not_open(guest: Guest) -> None:
    message = bytearray(guest.message(REPORT_REQ, bytes(96)))
    message[0x70] ^= 1
    assert guest.send(bytes(message)) is SnpStatus.BAD_MEASUREMENT


def test_message_types(guest: Guest) -> None:
    assert guest.send(guest.message(0, bytes(96))) is SnpStatus.INVALID_PARAM
    assert guest.send(guest.message(REPORT_RSP, bytes(96))) is SnpStatus.INVALID_PARAM
    assert guest.send(guest.message(REPORT_REQ, bytes(80))) is SnpStatus.INVALID_PARAM
    with pytest.raises(Unmodelled, match="TSC_INFO_REQ"):
        guest.send(guest.message(17, bytes(128)))


def test_derived_keys_follow_what_is_mixed_in(guest: Guest) -> None:
    keys = [
        guest.key(),
        guest.key(select=1),
        guest.key(fields=1 << 0),
        guest.key(fields=1 << 3),
        guest.key(vmpl=1),
    ]
    assert len(set(keys)) == len(keys)
    assert guest.key() == keys[0]
    assert guest.key(fields=1 << 3) == keys[3]


def test_a_key_request_may_not_exceed_the_guests_svn_or_name_unknown_fields(
    guest: Guest,
) -> None:
    for fields, svn in ((1 << 4, 1), (1 << 6, 0)):
        payload = struct.pack("<IIQII8s", 0, 0, fields, 0, svn, bytes(8))
        _, answer = guest.ask(KEY_REQ, payload)
        assert struct.unpack_from("<I", answer)[0] == SnpStatus.INVALID_PARAM
        assert answer[0x20:] == bytes(32)


def test_another_guest_on_another_chip_gets_another_key() -> None:
    keys = {Guest(Host(seed=seed).init()).key() for seed in range(3)}
    assert len(keys) == 3


def test_the_host_side_checks_in_order(guest: Guest) -> None:
    host = guest.host
    cmd = SnpGuestRequest(
        gctx_paddr=guest.gctx, req_paddr=guest.request, res_paddr=guest.request
    )
    assert host.run(SnpCmd.GUEST_REQUEST, cmd) is SnpStatus.INVALID_PAGE_STATE
    large = host.rmp(host.page(512), assigned=1, immutable=1, pagesize=1)
    cmd.res_paddr = large
    assert host.run(SnpCmd.GUEST_REQUEST, cmd) is SnpStatus.INVALID_PAGE_SIZE
    cmd.res_paddr = guest.response
    cmd.gctx_paddr = host.launching(asid=2)
    assert host.run(SnpCmd.GUEST_REQUEST, cmd) is SnpStatus.INVALID_GUEST_STATE
    cmd.gctx_paddr = guest.response
    assert host.run(SnpCmd.GUEST_REQUEST, cmd) is SnpStatus.INVALID_GUEST
