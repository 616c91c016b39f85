"""SNP_LAUNCH_FINISH: the owner's ID block is checked, and the guest may run.

[ABI-56860 r1.58 SNP_LAUNCH_FINISH; ASPFW].  Order of the ID block's checks: digest, policy,
algorithms, signature of the block by the ID key, signature of the ID key by the author key.
"""

from typing import TYPE_CHECKING

from softcvm.abi.id_block import (
    ALGO_ECDSA_P384_SHA384,
    EcdsaPublicKey,
    EcdsaSignature,
    IdAuth,
    IdBlock,
)
from softcvm.abi.launch_digest import sha384
from softcvm.abi.snp_firmware import SnpCmd, SnpLaunchFinish, SnpStatus
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.psp.gctx import Gctx, next_state
from softcvm.hw.psp.keys import verify
from softcvm.hw.psp.operands import read, read_context, reserved_bits_set, write_context
from softcvm.sim.addr import PAGE_MASK

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("snp_launch_finish",)


def snp_launch_finish(psp: "Psp", cmd: SnpLaunchFinish) -> SnpStatus:
    # RESERVED
    if reserved_bits_set(cmd) or cmd.gctx_paddr & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    gctx = read_context(psp, cmd.gctx_paddr)
    # GUEST
    state = next_state(gctx, SnpCmd.LAUNCH_FINISH)
    if state is None or gctx.imi_en:
        return SnpStatus.INVALID_GUEST_STATE
    if not gctx.asid:
        return SnpStatus.INACTIVE
    # ID BLOCK
    if cmd.id_block_en:
        refused = _check_id_block(psp, cmd, gctx)
        if refused is not None:
            return refused
    # OUTPUT
    gctx.state = state
    gctx.host_data = cmd.host_data
    gctx.id_block_en = cmd.id_block_en
    gctx.author_key_en = cmd.auth_key_en
    gctx.vcek_dis = cmd.vcek_disabled
    psp.asids.use(gctx.asid)
    write_context(psp, cmd.gctx_paddr, gctx)
    return SnpStatus.SUCCESS


def _check_id_block(psp: "Psp", cmd: SnpLaunchFinish, gctx: Gctx) -> SnpStatus | None:
    """Check the block and note it in `gctx`; the status if it is refused."""
    raw = read(psp, cmd.id_block_paddr, IdBlock.SIZE)
    block = IdBlock(raw)
    auth = IdAuth(read(psp, cmd.id_auth_paddr, IdAuth.SIZE))
    if block.ld != gctx.ld:
        return SnpStatus.BAD_MEASUREMENT
    if block.policy != gctx.policy:
        return SnpStatus.POLICY_FAILURE
    if auth.id_key_algo != ALGO_ECDSA_P384_SHA384:
        return SnpStatus.INVALID_PARAM
    if cmd.auth_key_en and auth.auth_key_algo != ALGO_ECDSA_P384_SHA384:
        return SnpStatus.INVALID_PARAM
    if not verify(EcdsaPublicKey(auth.id_key), EcdsaSignature(auth.id_block_sig), raw):
        return SnpStatus.BAD_SIGNATURE
    gctx.id_block = raw
    gctx.id_key_digest = sha384(auth.id_key)
    if cmd.auth_key_en:
        author = EcdsaPublicKey(auth.author_key)
        if not verify(author, EcdsaSignature(auth.id_key_sig), auth.id_key):
            return SnpStatus.BAD_SIGNATURE
        gctx.author_key_digest = sha384(auth.author_key)
    return None
