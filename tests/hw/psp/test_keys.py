"""Key derivation and signatures against outsiders: SP 800-108, RFC 6979, `cryptography`."""

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from softcvm.abi.id_block import EcdsaSignature
from softcvm.hw.psp.keys import Chip, Trng, kdf, public_key, sign, verify


@pytest.mark.parametrize("length", [16, 32, 48, 64])
def test_the_kdf_is_sp_800_108_in_counter_mode(length: int) -> None:
    outsider = KBKDFHMAC(
        algorithm=hashes.SHA256(),
        mode=Mode.CounterMode,
        length=length,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=b"label",
        context=b"context",
        fixed=None,
    )
    assert kdf(b"k" * 32, b"label", b"context", length) == outsider.derive(b"k" * 32)


@pytest.mark.parametrize("private", [1, 2, 0xC0FFEE << 300])
def test_signatures_are_those_of_rfc_6979(private: int) -> None:
    message = b"sample"
    key = ec.derive_private_key(private, ec.SECP384R1())
    try:
        algorithm = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)
    except UnsupportedAlgorithm:
        pytest.skip("needs OpenSSL 3.2 or newer behind cryptography")
    r, s = decode_dss_signature(key.sign(message, algorithm))
    ours = sign(private, message)
    assert (int.from_bytes(ours.r, "little"), int.from_bytes(ours.s, "little")) == (r, s)


def test_rfc_6979_a_2_6_sample() -> None:
    """The published vector for P-384, SHA-384, message "sample"."""
    private = int(
        "6B9D3DAD2E1B8C1C05B19875B6659F4DE23C3B667BF297BA"
        "9AA47740787137D896D5724E4C70A825F872C9EA60D2EDF5",
        16,
    )
    r = int.from_bytes(sign(private, b"sample").r, "little")
    assert r == int(
        "94EDBB92A5ECB8AAD4736E56C691916B3F88140666CE9FA7"
        "3D64C4EA95AD133C81A648152E44ACF96E36DD1E80FABE46",
        16,
    )


def test_verify_takes_only_what_was_signed() -> None:
    key, signature = public_key(7), sign(7, b"message")
    assert verify(key, signature, b"message")
    assert not verify(key, signature, b"massage")
    assert not verify(public_key(8), signature, b"message")
    assert not verify(key, EcdsaSignature(), b"message")
    key.curve = 1
    assert not verify(key, signature, b"message")


def test_nothing_is_drawn_twice() -> None:
    trng = Trng(Chip(0).trng_seed())
    drawn = [trng.draw(32) for _ in range(100)]
    assert len(set(drawn)) == 100
    again = Trng(Chip(0).trng_seed())
    assert again.draw(32) == drawn[0]
    assert Trng(Chip(1).trng_seed()).draw(32) != drawn[0]
