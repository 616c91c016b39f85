"""The secrets page: keys that firmware hands to a guest at launch.

[ABI-56860 r1.58 §8.17.2.5]; Linux: struct snp_secrets_page (arch/x86/include/asm/sev.h, v7.2).
"""

from softcvm.abi.layout import U8, U32, U64, Bits, Bytes, Layout

__all__ = ("SECRETS_VERSION", "SecretsPage")

SECRETS_VERSION = 3


class SecretsPage(Layout, size=4096):
    """0xA0-0xFF and 0x140-0x15F are the guest's; an SVSM leaves its address in the latter."""

    version = U32(0x00)
    imi_en = Bits(0x04 * 8)
    fms = U32(0x08)
    gosvw = Bytes(0x10, 16)
    vmpck0 = Bytes(0x20, 32)
    vmpck1 = Bytes(0x40, 32)
    vmpck2 = Bytes(0x60, 32)
    vmpck3 = Bytes(0x80, 32)
    guest_os_area = Bytes(0xA0, 96)
    vmsa_tweak_bitmap = Bytes(0x100, 64)
    svsm_base = U64(0x140)
    svsm_size = U64(0x148)
    svsm_caa = U64(0x150)
    svsm_max_version = U32(0x158)
    svsm_guest_vmpl = U8(0x15C)
    tsc_factor = U32(0x160)
