"""AES-XTS by hand from the block cipher: IEEE 1619 with the tweak unit that docs/support.md states.

An outsider for hw/memenc.py: nothing of it is used, and of `cryptography` only AES on single blocks.
"""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

UNIT = 64 * 1024


def _aes(key: bytes, block: bytes, *, decrypt: bool = False) -> bytes:
    cipher = Cipher(algorithms.AES(key), modes.ECB())
    turn = cipher.decryptor() if decrypt else cipher.encryptor()
    return turn.update(block) + turn.finalize()


def _double(tweak: int) -> int:
    """Times alpha in GF(2^128), the tweak read as a little-endian integer."""
    tweak <<= 1
    if tweak >> 128:
        tweak = tweak & (1 << 128) - 1 ^ 0x87
    return tweak


def xts(material: bytes, spa: int, data: bytes, *, decrypt: bool = False) -> bytes:
    """Turn whole blocks at an address; material is the cipher key, then the tweak key."""
    half = len(material) // 2
    out = b""
    for at in range(spa, spa + len(data), 16):
        unit, offset = divmod(at, UNIT)
        tweak = int.from_bytes(_aes(material[half:], unit.to_bytes(16, "little")), "little")
        for _ in range(offset // 16):
            tweak = _double(tweak)
        mask = tweak.to_bytes(16, "little")
        block = data[at - spa : at - spa + 16]
        masked = bytes(a ^ b for a, b in zip(block, mask, strict=True))
        turned = _aes(material[:half], masked, decrypt=decrypt)
        out += bytes(a ^ b for a, b in zip(turned, mask, strict=True))
    return out
