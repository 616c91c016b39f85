"""Port input and output through the GHCB, and text on the debug console.  [GHCB-56421 §4.1.2]"""

from softcvm.abi.board import DEBUGCON_PORT, DEBUGCON_READBACK
from softcvm.abi.ghcb import GHCB_SHARED_BUFFER_SIZE, GhcbExit, IoioInfo
from softcvm.guest.ghcb import GhcbClient, GuestSteps

__all__ = ("Console", "port_in", "port_out")

_ADDRESS_64 = 1 << 9


def port_out(ghcb: GhcbClient, port: int, value: int, size: int) -> GuestSteps[None]:
    """OUT of 1, 2 or 4 bytes."""
    info = port << IoioInfo.PORT_SHIFT | size << IoioInfo.SIZE_SHIFT | _ADDRESS_64
    yield from ghcb.checked_call(GhcbExit.IOIO, info, rax=value)


def port_in(ghcb: GhcbClient, port: int, size: int) -> GuestSteps[int]:
    """IN of 1, 2 or 4 bytes."""
    info = port << IoioInfo.PORT_SHIFT | size << IoioInfo.SIZE_SHIFT | IoioInfo.IN | _ADDRESS_64
    reply = yield from ghcb.checked_call(GhcbExit.IOIO, info, rax=0)
    return reply.rax & ((1 << 8 * size) - 1)


class Console:
    """The debug console, when there is one: without, lines go nowhere."""

    def __init__(self, ghcb: GhcbClient) -> None:
        self.ghcb = ghcb
        self.present = False

    def probe(self) -> GuestSteps[None]:
        self.present = (yield from port_in(self.ghcb, DEBUGCON_PORT, 1)) == DEBUGCON_READBACK

    def line(self, text: str) -> GuestSteps[None]:
        """REP OUTSB: one exit for a line."""
        if not self.present:
            return
        data = text.encode()[: GHCB_SHARED_BUFFER_SIZE - 1] + b"\n"
        scratch = yield from self.ghcb.write_buffer(data)
        info = (
            DEBUGCON_PORT << IoioInfo.PORT_SHIFT
            | 1 << IoioInfo.SIZE_SHIFT
            | _ADDRESS_64
            | IoioInfo.STRING
            | IoioInfo.REP
        )
        yield from self.ghcb.checked_call(GhcbExit.IOIO, info, len(data), sw_scratch=scratch)
