"""The few devices of the virtual board: port numbers that a guest and its VMM agree on.

The debug console is QEMU's isa-debugcon as OVMF uses it (hw/char/debugcon.c, OvmfPkg/Library/
PlatformDebugLibIoPort): bytes written are text, and a read tells that it is there.  The bounce device is
this project's own: the smallest device that reads and writes a guest's memory.  A guest writes the frame
number of a shared page to its port; the device replaces the page's bytes by their complement.
"""

__all__ = ("BOUNCE_PORT", "DEBUGCON_PORT", "DEBUGCON_READBACK", "DELAY_PORT")

DEBUGCON_PORT = 0x402
DEBUGCON_READBACK = 0xE9
DELAY_PORT = 0x80
"""Writing here takes a while and does nothing (POST codes; Linux's native_io_delay())."""
BOUNCE_PORT = 0xB0C0
"""Written with 4 bytes, a gfn."""
