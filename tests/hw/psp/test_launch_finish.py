"""LAUNCH_FINISH and the ID block, which `cryptography` signs here as an owner would."""

from hashlib import sha384

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from softcvm.abi.snp_firmware import Gstate, SnpCmd, SnpLaunchFinish, SnpStatus
from tests.hw.psp.host import OK, POLICY, Host, filled

OWNER = ec.derive_private_key(0x1234567, ec.SECP384R1())
AUTHOR = ec.derive_private_key(0x7654321, ec.SECP384R1())


def wire_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A public key in 0x404 bytes: curve 2, then X and Y little-endian in 72 bytes each."""
    point = key.public_key().public_numbers()
    body = point.x.to_bytes(72, "little") + point.y.to_bytes(72, "little")
    return ((2).to_bytes(4, "little") + body).ljust(0x404, b"\0")


def wire_signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384())))
    return (r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(512, b"\0")


def id_block(ld: bytes, policy: int = POLICY) -> bytes:
    """ld, family id, image id, version, guest svn, policy."""
    tail = (1).to_bytes(4, "little") + (9).to_bytes(4, "little") + policy.to_bytes(8, "little")
    return ld + b"family".ljust(16, b"\0") + b"image".ljust(16, b"\0") + tail


def id_auth(block: bytes, signer: ec.EllipticCurvePrivateKey = OWNER) -> bytearray:
    page = bytearray(4096)
    page[0:4] = page[4:8] = (1).to_bytes(4, "little")
    page[0x040:0x240] = wire_signature(signer, block)
    page[0x240:0x644] = wire_key(OWNER)
    page[0x680:0x880] = wire_signature(AUTHOR, wire_key(OWNER))
    page[0x880:0xC84] = wire_key(AUTHOR)
    return page


def finish(
    host: Host, gctx: int, block: bytes, auth: bytes | bytearray, **fields: int
) -> SnpStatus:
    block_page, auth_page = host.page(), host.page()
    host.soc.host_write(block_page, block)
    host.soc.host_write(auth_page, bytes(auth))
    cmd = SnpLaunchFinish(
        gctx_paddr=gctx,
        id_block_paddr=block_page,
        id_auth_paddr=auth_page,
        id_block_en=1,
        host_data=b"\xaa" * 32,
    )
    return host.run(SnpCmd.LAUNCH_FINISH, filled(cmd, fields))


@pytest.fixture
def gctx(host: Host) -> int:
    gctx = host.launching()
    assert host.update(gctx, host.pre_guest(1, 0, b"\1" * 4096)) is OK
    return gctx


def test_a_good_id_block_is_kept_with_the_digests_of_its_keys(host: Host, gctx: int) -> None:
    block = id_block(host.psp.gctx(gctx).ld)
    assert finish(host, gctx, block, id_auth(block), auth_key_en=1) is OK
    context = host.psp.gctx(gctx)
    assert context.state == Gstate.RUNNING
    assert context.id_block == block
    assert context.host_data == b"\xaa" * 32
    assert context.id_key_digest == sha384(wire_key(OWNER)).digest()
    assert context.author_key_digest == sha384(wire_key(AUTHOR)).digest()


def test_without_an_author_key_its_digest_stays_zero(host: Host, gctx: int) -> None:
    block = id_block(host.psp.gctx(gctx).ld)
    auth = id_auth(block)
    auth[4:8] = bytes(4)  # AUTH_KEY_ALGO is not looked at
    assert finish(host, gctx, block, auth) is OK
    assert host.psp.gctx(gctx).author_key_digest == bytes(48)


# Faults in the order in which firmware meets them.
FAULTS = [
    ("digest", SnpStatus.BAD_MEASUREMENT),
    ("policy", SnpStatus.POLICY_FAILURE),
    ("algorithm", SnpStatus.INVALID_PARAM),
    ("signature", SnpStatus.BAD_SIGNATURE),
    ("author", SnpStatus.BAD_SIGNATURE),
]


@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for i, (a, _) in enumerate(FAULTS) for b, _ in FAULTS[i:]]
)
def test_the_first_fault_of_an_id_block_decides(
    host: Host, gctx: int, first: str, second: str
) -> None:
    faults = {first, second}
    ld = bytes(48) if "digest" in faults else host.psp.gctx(gctx).ld
    block = id_block(ld, POLICY | 1 << 19 if "policy" in faults else POLICY)
    auth = id_auth(block, AUTHOR if "signature" in faults else OWNER)
    if "algorithm" in faults:
        auth[0] = 2
    if "author" in faults:
        auth[0x680] ^= 1
    assert finish(host, gctx, block, auth, auth_key_en=1) is dict(FAULTS)[first]
    context = host.psp.gctx(gctx)
    assert (context.state, context.id_key_digest) == (Gstate.LAUNCH, bytes(48))
    assert not host.psp.asid_runnable(1)


def test_a_key_off_the_curve_or_of_another_curve_signs_nothing(host: Host, gctx: int) -> None:
    block = id_block(host.psp.gctx(gctx).ld)
    for offset in (0x240, 0x244):
        auth = id_auth(block)
        auth[offset] ^= 1
        assert finish(host, gctx, block, auth) is SnpStatus.BAD_SIGNATURE


def test_finish_wants_a_launching_active_guest(host: Host) -> None:
    cmd = SnpLaunchFinish(gctx_paddr=host.launching(asid=None))
    assert host.run(SnpCmd.LAUNCH_FINISH, cmd) is SnpStatus.INACTIVE
    cmd.gctx_paddr = host.gctx()
    assert host.run(SnpCmd.LAUNCH_FINISH, cmd) is SnpStatus.INVALID_GUEST_STATE
    cmd.gctx_paddr = host.running(asid=2)
    assert host.run(SnpCmd.LAUNCH_FINISH, cmd) is SnpStatus.INVALID_GUEST_STATE
    cmd.data[24] = 0x80
    assert host.run(SnpCmd.LAUNCH_FINISH, cmd) is SnpStatus.INVALID_PARAM
