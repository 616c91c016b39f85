"""The guest context: what firmware knows of a guest, in a page that it alone can read.

[ABI-56860 r1.58 GCTX].  The page lies in DRAM under a key of firmware's own and every command
reads it anew [ASPFW]; a copy of DRAM therefore holds it, and the host sees ciphertext.  Its
layout is AMD's secret: the one here is the model's.

A guest's life is TRANSITIONS; a command that is not in it for a state is INVALID_GUEST_STATE.
"""

from collections.abc import Mapping
from typing import Final

from softcvm.abi.layout import U8, U32, U64, Bytes, Layout
from softcvm.abi.snp_firmware import Gstate, SnpCmd

__all__ = ("NO_MIGRATION_AGENT", "TRANSITIONS", "Gctx", "next_state")

TRANSITIONS: Final[Mapping[tuple[Gstate, SnpCmd], Gstate]] = {
    (Gstate.INIT, SnpCmd.LAUNCH_START): Gstate.LAUNCH,
    (Gstate.LAUNCH, SnpCmd.ACTIVATE): Gstate.LAUNCH,
    (Gstate.RUNNING, SnpCmd.ACTIVATE): Gstate.RUNNING,
    (Gstate.LAUNCH, SnpCmd.LAUNCH_UPDATE): Gstate.LAUNCH,
    (Gstate.LAUNCH, SnpCmd.LAUNCH_FINISH): Gstate.RUNNING,
    (Gstate.RUNNING, SnpCmd.GUEST_REQUEST): Gstate.RUNNING,
    (Gstate.LAUNCH, SnpCmd.PAGE_MOVE): Gstate.LAUNCH,
    (Gstate.RUNNING, SnpCmd.PAGE_MOVE): Gstate.RUNNING,
    (Gstate.LAUNCH, SnpCmd.PAGE_MD_INIT): Gstate.LAUNCH,
    (Gstate.RUNNING, SnpCmd.PAGE_MD_INIT): Gstate.RUNNING,
    (Gstate.LAUNCH, SnpCmd.PAGE_SWAP_OUT): Gstate.LAUNCH,
    (Gstate.RUNNING, SnpCmd.PAGE_SWAP_OUT): Gstate.RUNNING,
    (Gstate.LAUNCH, SnpCmd.PAGE_SWAP_IN): Gstate.LAUNCH,
    (Gstate.RUNNING, SnpCmd.PAGE_SWAP_IN): Gstate.RUNNING,
}
"""DECOMMISSION, GUEST_STATUS and the debug commands take a guest in any state."""

NO_MIGRATION_AGENT: Final = (1 << 64) - 1


class Gctx(Layout, size=4096):
    """One guest.  asid is 0 while the guest is not activated."""

    state = U8(0x000)  # Gstate
    imi_en = U8(0x001)
    id_block_en = U8(0x002)
    author_key_en = U8(0x003)
    vcek_dis = U8(0x004)
    asid = U32(0x008)
    desired_tsc_khz = U32(0x00C)
    policy = U64(0x010)
    migration_agent_paddr = U64(0x018)
    vek_seed = Bytes(0x020, 32)
    oek = Bytes(0x040, 32)
    vmpck0 = Bytes(0x060, 32)
    vmpck1 = Bytes(0x080, 32)
    vmpck2 = Bytes(0x0A0, 32)
    vmpck3 = Bytes(0x0C0, 32)
    vmrk = Bytes(0x0E0, 32)
    report_id = Bytes(0x100, 32)
    report_id_ma = Bytes(0x120, 32)
    gosvw = Bytes(0x140, 16)
    ld = Bytes(0x150, 48)
    imd = Bytes(0x180, 48)
    host_data = Bytes(0x1B0, 32)
    id_block = Bytes(0x1D0, 96)
    id_key_digest = Bytes(0x230, 48)
    author_key_digest = Bytes(0x260, 48)
    msg_count0 = U64(0x290)
    msg_count1 = U64(0x298)
    msg_count2 = U64(0x2A0)
    msg_count3 = U64(0x2A8)
    oek_iv_count = U64(0x2B0)
    launch_tcb = Bytes(0x2B8, 8)
    root_md_entry = Bytes(0x2C0, 64)

    def vmpck(self, vmpl: int) -> bytes:
        """The communication key of a VMPL, 0 to 3."""
        return (self.vmpck0, self.vmpck1, self.vmpck2, self.vmpck3)[vmpl]

    def msg_count(self, vmpck: int) -> int:
        """Messages so far under a communication key, requests and responses."""
        return (self.msg_count0, self.msg_count1, self.msg_count2, self.msg_count3)[vmpck]

    def count_messages(self, vmpck: int, count: int) -> None:
        setattr(self, f"msg_count{vmpck}", count)


def next_state(gctx: Gctx, command: SnpCmd) -> Gstate | None:
    """Where a command takes this guest; None when it is not allowed now."""
    return TRANSITIONS.get((Gstate(gctx.state), command))
