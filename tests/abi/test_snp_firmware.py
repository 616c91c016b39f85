"""Firmware's buffers against the kernel's structures.

The table is what gcc 12 says of include/linux/psp-sev.h, include/uapi/linux/psp-sev.h,
include/uapi/linux/sev-guest.h and struct snp_guest_msg_hdr, struct snp_secrets_page of
arch/x86/include/asm/sev.h in Debian's linux-source-6.12: sizeof, and place and size of fields.
"""

import pytest

from softcvm.abi.cpuid import CpuidFunction
from softcvm.abi.id_block import EcdsaPublicKey, EcdsaSignature, IdAuth, IdBlock
from softcvm.abi.layout import Bits, Layout
from softcvm.abi.snp_firmware import (
    SnpActivate,
    SnpAddr,
    SnpDbg,
    SnpGuestRequest,
    SnpGuestStatus,
    SnpLaunchFinish,
    SnpLaunchStart,
    SnpLaunchUpdate,
    SnpPageReclaim,
    SnpPageUnsmash,
)
from softcvm.abi.snp_guest_msg import GuestMsgHdr, MsgKeyReq, MsgKeyRsp, MsgReportReq
from softcvm.abi.snp_platform import (
    SevInit,
    SevInitEx,
    SevPlatformStatus,
    SnpCommit,
    SnpConfig,
    SnpInitEx,
    SnpPlatformStatusBuffer,
    SnpRange,
    SnpRangeListHeader,
    SnpShutdownEx,
)
from softcvm.abi.snp_secrets import SecretsPage

Fields = dict[str, tuple[int, int]]

RECORDED: list[tuple[type[Layout], int, Fields]] = [
    (SnpActivate, 12, {"asid": (8, 4)}),
    (SnpAddr, 8, {"address": (0, 8)}),
    (
        SnpLaunchStart,
        48,
        {
            "policy": (8, 8),
            "ma_gctx_paddr": (16, 8),
            "desired_tsc_khz": (28, 4),
            "gosvw": (32, 16),
        },
    ),
    (SnpLaunchUpdate, 32, {"address": (16, 8)}),
    (
        SnpLaunchFinish,
        64,
        {"id_block_paddr": (8, 8), "id_auth_paddr": (16, 8), "host_data": (32, 32)},
    ),
    (SnpGuestStatus, 16, {"address": (8, 8)}),
    (SnpPageReclaim, 8, {}),
    (SnpPageUnsmash, 8, {}),
    (SnpDbg, 24, {"src_addr": (8, 8), "dst_addr": (16, 8)}),
    (SnpGuestRequest, 24, {"req_paddr": (8, 8), "res_paddr": (16, 8)}),
    (SnpInitEx, 64, {"list_paddr": (8, 8)}),
    (SnpRange, 16, {"page_count": (8, 4)}),
    (SnpRangeListHeader, 8, {}),
    (SnpShutdownEx, 8, {}),
    (SnpCommit, 4, {}),
    (SnpConfig, 64, {}),
    (SevInit, 20, {"tmr_address": (8, 8), "tmr_len": (16, 4)}),
    (
        SevInitEx,
        36,
        {
            "flags": (4, 4),
            "tmr_address": (8, 8),
            "tmr_len": (16, 4),
            "nv_address": (24, 8),
            "nv_len": (32, 4),
        },
    ),
    (SevPlatformStatus, 12, {"flags": (3, 4), "build": (7, 1), "guest_count": (8, 4)}),
    (
        SnpPlatformStatusBuffer,
        32,
        {
            "build_id": (4, 4),
            "guest_count": (12, 4),
            "current_tcb_version": (16, 8),
            "reported_tcb_version": (24, 8),
        },
    ),
    (
        GuestMsgHdr,
        96,
        {
            "msg_seqno": (32, 8),
            "algo": (48, 1),
            "hdr_version": (49, 1),
            "hdr_sz": (50, 2),
            "msg_type": (52, 1),
            "msg_version": (53, 1),
            "msg_sz": (54, 2),
            "msg_vmpck": (60, 1),
        },
    ),
    (MsgReportReq, 96, {"vmpl": (64, 4)}),
    (
        MsgKeyReq,
        32,
        {
            "guest_field_select": (8, 8),
            "vmpl": (16, 4),
            "guest_svn": (20, 4),
            "tcb_version": (24, 8),
        },
    ),
    (MsgKeyRsp, 64, {}),
    (
        SecretsPage,
        4096,
        {
            "fms": (8, 4),
            "gosvw": (16, 16),
            "vmpck0": (32, 32),
            "vmpck3": (128, 32),
            "guest_os_area": (160, 96),
            "vmsa_tweak_bitmap": (256, 64),
            "svsm_base": (320, 8),
            "svsm_caa": (336, 8),
            "svsm_guest_vmpl": (348, 1),
        },
    ),
    (CpuidFunction, 48, {"xcr0_in": (8, 8), "eax": (24, 4), "reserved": (40, 8)}),
    (IdBlock, 96, {}),
    (IdAuth, 4096, {}),
    (EcdsaPublicKey, 0x404, {}),
    (EcdsaSignature, 512, {}),
]


@pytest.mark.parametrize(("layout", "size", "fields"), RECORDED)
def test_a_buffer_lies_as_the_kernel_lays_it(
    layout: type[Layout], size: int, fields: Fields
) -> None:
    assert size == layout.SIZE
    for name, (offset, length) in fields.items():
        field = layout.fields()[name]
        if isinstance(field, Bits):
            assert (field.lo, field.hi) == (8 * offset, 8 * (offset + length) - 1), name
        else:
            assert (field.offset, field.length) == (offset, length), name


def test_bit_fields_are_where_gcc_puts_them() -> None:
    def word(buffer: Layout, index: int) -> int:
        return int.from_bytes(buffer.data[4 * index : 4 * index + 4], "little")

    assert word(SnpLaunchUpdate(page_size=1), 2) == 0x1
    assert word(SnpLaunchUpdate(page_type=7), 2) == 0xE
    assert word(SnpLaunchUpdate(imi_page=1), 2) == 0x10
    assert word(SnpLaunchUpdate(vmpl1_perms=0xFF), 6) == 0xFF00
    assert word(SnpLaunchUpdate(vmpl3_perms=0xFF), 6) == 0xFF00_0000
    assert word(SnpLaunchFinish(auth_key_en=1), 6) == 0x2
    assert word(SnpLaunchFinish(vcek_disabled=1), 6) == 0x4
