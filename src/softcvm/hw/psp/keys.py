"""Key material of the AMD-SP, all of it from one seed: nothing is random.

Owns the derivations and ECDSA P-384 as reports and ID blocks use it.  Which key is whose is
gctx.py; what a key does to memory is hw/memenc.py.  AMD publishes the KDF and its label for
memory keys [ASPFW]; the roots below it are the model's own.
"""

import hmac
from hashlib import sha256, sha384
from typing import TYPE_CHECKING

from softcvm.abi.id_block import CURVE_P384, EcdsaPublicKey, EcdsaSignature
from softcvm.sim.state import State

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = (
    "Chip",
    "Trng",
    "kdf",
    "memory_key_material",
    "public_key",
    "sign",
    "verify",
)

_P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
    "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)
_WIRE_BYTES = 72


def kdf(key: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """NIST SP 800-108 in counter mode with HMAC-SHA-256."""
    tail = label + b"\0" + context + (length * 8).to_bytes(4, "big")
    out = b""
    for i in range(1, -(-length // 32) + 1):
        out += hmac.digest(key, i.to_bytes(4, "big") + tail, sha256)
    return out[:length]


def memory_key_material(vek_seed: bytes, length: int) -> bytes:
    """A guest's memory key, from the seed in its context.

    Hardware derives one per memory controller; the model has one controller, number 0.
    """
    return kdf(vek_seed, b"sev-vm-encryption-key-0", bytes(4), length)


class Trng(State):
    """The AMD-SP's source of random numbers: a stream that is fixed by the seed."""

    saved = ("seed", "drawn")

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self.drawn = 0
        """How often it was asked."""

    def draw(self, length: int) -> bytes:
        self.drawn += 1
        return kdf(self.seed, b"trng", self.drawn.to_bytes(8, "big"), length)


class Chip:
    """What is fused into one processor.  Immutable; two of one seed are the same chip."""

    def __init__(self, seed: int) -> None:
        self.secret = sha384(b"softcvm chip" + seed.to_bytes(16, "big", signed=True)).digest()

    def state(self) -> tuple[bytes]:
        return (self.secret,)

    @property
    def chip_id(self) -> bytes:
        """CHIP_ID of a report."""
        return kdf(self.secret, b"chip-id", b"", 64)

    def trng_seed(self) -> bytes:
        return kdf(self.secret, b"trng-seed", b"", 48)

    def firmware_key_material(self, length: int) -> bytes:
        """The key under which firmware keeps guest contexts in DRAM."""
        return kdf(self.secret, b"firmware-memory-key", b"", length)

    def vcek_seed(self, tcb: bytes) -> bytes:
        """The secret behind the Versioned Chip Endorsement Key: other TCB, other key."""
        return kdf(self.secret, b"vcek", tcb, 56)

    def vcek(self, tcb: bytes) -> int:
        """The VCEK's private number."""
        return int.from_bytes(self.vcek_seed(tcb), "big") % (_P384_ORDER - 1) + 1


def public_key(private: int) -> EcdsaPublicKey:
    """The public half of a private number, as AMD lays keys out."""
    point = _numbers(private)
    return EcdsaPublicKey(curve=CURVE_P384, qx=_wire(point.x), qy=_wire(point.y))


def sign(private: int, message: bytes) -> EcdsaSignature:
    """ECDSA P-384 with SHA-384 and the nonce of RFC 6979: equal messages sign equally."""
    digest = sha384(message).digest()
    z = int.from_bytes(digest, "big")
    v, k = b"\1" * 48, b"\0" * 48
    fixed = private.to_bytes(48, "big") + (z % _P384_ORDER).to_bytes(48, "big")
    k = hmac.digest(k, v + b"\0" + fixed, sha384)
    v = hmac.digest(k, v, sha384)
    k = hmac.digest(k, v + b"\1" + fixed, sha384)
    v = hmac.digest(k, v, sha384)
    while True:
        v = hmac.digest(k, v, sha384)
        nonce = int.from_bytes(v, "big")
        if 0 < nonce < _P384_ORDER:
            r = _numbers(nonce).x % _P384_ORDER
            s = pow(nonce, -1, _P384_ORDER) * (z + r * private) % _P384_ORDER
            if r and s:
                return EcdsaSignature(r=_wire(r), s=_wire(s))
        k = hmac.digest(k, v + b"\0", sha384)
        v = hmac.digest(k, v, sha384)


def verify(key: EcdsaPublicKey, signature: EcdsaSignature, message: bytes) -> bool:
    """Whether the key is a point of P-384 and signed this message."""
    from cryptography.exceptions import InvalidSignature  # slow to import
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    r, s = _number(signature.r), _number(signature.s)
    if key.curve != CURVE_P384 or not (0 < r < _P384_ORDER and 0 < s < _P384_ORDER):
        return False
    numbers = ec.EllipticCurvePublicNumbers(_number(key.qx), _number(key.qy), ec.SECP384R1())
    try:
        public = numbers.public_key()
    except ValueError:  # not on the curve
        return False
    try:
        public.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _numbers(private: int) -> "ec.EllipticCurvePublicNumbers":
    from cryptography.hazmat.primitives.asymmetric import ec  # slow to import

    return ec.derive_private_key(private, ec.SECP384R1()).public_key().public_numbers()


def _wire(number: int) -> bytes:
    return number.to_bytes(_WIRE_BYTES, "little")


def _number(wire: bytes) -> int:
    return int.from_bytes(wire, "little")
