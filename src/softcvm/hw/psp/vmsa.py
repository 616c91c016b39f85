"""What firmware does to a VMSA at launch: register protection.

[APM2-24593 VMSA Register Protection; ASPFW].  With VMSA_REG_PROT in SEV_FEATURES, registers lie
in memory XORed with a nonce, so that equal registers do not make equal ciphertext.  The guest
learns from its secrets page which quadwords are meant.
"""

from softcvm.abi.layout import U64, Layout

__all__ = ("SECURE_TSC", "TWEAK_BITMAP", "VMSA_REG_PROT", "VmsaLaunch", "apply_nonce")

SECURE_TSC = 1 << 9
VMSA_REG_PROT = 1 << 14


class VmsaLaunch(Layout, size=4096):
    """The fields of a VMSA that firmware reads or writes.  [APM2-24593 Table B-4]"""

    guest_tsc_scale = U64(0x2F0)
    guest_tsc_offset = U64(0x2F8)
    reg_prot_nonce = U64(0x300)
    sev_features = U64(0x3B0)


_TWEAKED = (
    (0x178, 0x180),  # rip
    (0x1D8, 0x1E0),  # rsp
    (0x1F8, 0x200),  # rax
    (0x308, 0x320),  # rcx rdx rbx
    (0x328, 0x380),  # rbp rsi rdi r8-r15
    (0x420, 0x670),  # x87 xmm ymm
    (0x980, 0xFC0),  # mask registers, zmm
)


def _bitmap() -> bytes:
    bits = 0
    for start, end in _TWEAKED:
        for quadword in range(start // 8, end // 8):
            bits |= 1 << quadword
    return bits.to_bytes(64, "little")


TWEAK_BITMAP = _bitmap()
"""One bit for each quadword of the VMSA that carries the nonce."""


def apply_nonce(page: bytes) -> bytes:
    """XOR the protected quadwords with the page's nonce; doing it twice undoes it."""
    nonce = page[0x300:0x308]
    out = bytearray(page)
    for start, end in _TWEAKED:
        length = end - start
        mask = nonce * (length // 8)
        piece = int.from_bytes(out[start:end], "little") ^ int.from_bytes(mask, "little")
        out[start:end] = piece.to_bytes(length, "little")
    return bytes(out)
