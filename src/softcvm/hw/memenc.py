"""Memory encryption: what a memory controller turns a block into under one key.

AES-XTS with an address tweak (AES-128 on Milan, AES-256 on Genoa) [APM2-24593 §7.10, §15.34].  Block
cipher, address dependent, deterministic, no integrity: the same bytes at the same address under the same
key are the same ciphertext, and ciphertext moved anywhere else is noise.

AMD does not publish the tweak.  Here the tweak unit is 64 KiB, numbered from address 0; docs/support.md
lists it as the model's choice.
"""

from typing import Any

__all__ = ("TWEAK_UNIT", "Key")

TWEAK_UNIT = 1 << 16


class Key:
    """A key in a memory controller's slot.  Immutable; two keys with equal material are the same key.

    material: 32 bytes (AES-128) or 64 (AES-256), cipher key first, tweak key second.
    """

    __slots__ = ("_algorithm", "material")

    def __init__(self, material: bytes) -> None:
        if len(material) not in (32, 64):
            raise ValueError(f"an XTS key has 32 or 64 bytes, not {len(material)}")
        self.material = material
        self._algorithm: Any = None

    def encrypt(self, spa: int, data: bytes) -> bytes:
        """The bytes that DRAM holds for plaintext written at spa; both multiples of 16."""
        return self._xts(spa, data, decrypt=False)

    def decrypt(self, spa: int, data: bytes) -> bytes:
        """What this key makes of DRAM bytes at spa."""
        return self._xts(spa, data, decrypt=True)

    def _xts(self, spa: int, data: bytes, *, decrypt: bool) -> bytes:
        if (spa | len(data)) & 15:
            raise ValueError(f"{len(data)} bytes at {spa:#x} are not whole 16-byte blocks")
        from cryptography.hazmat.primitives.ciphers import (
            Cipher,
            algorithms,
            modes,
        )  # slow to import

        if self._algorithm is None:
            self._algorithm = algorithms.AES(self.material)
        out = []
        at = 0
        while at < len(data):
            unit, offset = divmod(spa + at, TWEAK_UNIT)
            piece = data[at : at + TWEAK_UNIT - offset]
            cipher = Cipher(self._algorithm, modes.XTS(unit.to_bytes(16, "little")))
            turn = cipher.decryptor() if decrypt else cipher.encryptor()
            # The mode cannot start inside a unit: bytes before the piece are turned and dropped.
            out.append(
                turn.update(bytes(offset) + piece)[offset:] if offset else turn.update(piece)
            )
            at += len(piece)
        return out[0] if len(out) == 1 else b"".join(out)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.material == other.material

    def __hash__(self) -> int:
        return hash(self.material)

    def __repr__(self) -> str:
        return f"Key({self.material[:4].hex()}...)"

    def __deepcopy__(self, memo: object) -> "Key":
        return self

    def state(self) -> tuple[bytes]:
        return (self.material,)
