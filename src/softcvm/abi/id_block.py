"""The ID block and its authentication: the guest's owner says what may be launched.

[ABI-56860 r1.58 SNP_LAUNCH_FINISH].  Signatures and keys are ECDSA P-384 in the AMD-SP's form:
numbers little-endian in 72 bytes.  Linux passes both through unseen
(KVM_SEV_SNP_LAUNCH_FINISH).
"""

from softcvm.abi.layout import U32, U64, Bytes, Layout

__all__ = (
    "ALGO_ECDSA_P384_SHA384",
    "CURVE_P384",
    "EcdsaPublicKey",
    "EcdsaSignature",
    "IdAuth",
    "IdBlock",
)

ALGO_ECDSA_P384_SHA384 = 1
"""ID_KEY_ALGO: ECDSA with P-384 and SHA-384, the only one."""
CURVE_P384 = 2
"""The curve's number in a public key."""


class EcdsaPublicKey(Layout, size=0x404):
    """A public key; its digest in a report is SHA-384 of all 0x404 bytes."""

    curve = U32(0)
    qx = Bytes(0x004, 72)
    qy = Bytes(0x04C, 72)


class EcdsaSignature(Layout, size=512):
    """A signature; the bytes after R and S are zero."""

    r = Bytes(0x00, 72)
    s = Bytes(0x48, 72)


class IdBlock(Layout, size=96):
    """What the owner expects; signed by the ID key."""

    ld = Bytes(0x00, 48)
    family_id = Bytes(0x30, 16)
    image_id = Bytes(0x40, 16)
    version = U32(0x50)
    guest_svn = U32(0x54)
    policy = U64(0x58)


class IdAuth(Layout, size=4096):
    """The signatures, and the keys to check them with; the author key signs the ID key."""

    id_key_algo = U32(0)
    auth_key_algo = U32(4)
    id_block_sig = Bytes(0x040, 512)
    id_key = Bytes(0x240, 0x404)
    id_key_sig = Bytes(0x680, 512)
    author_key = Bytes(0x880, 0x404)
