"""What firmware says happened."""

from typing import NamedTuple

__all__ = ("FirmwareCommand",)


class FirmwareCommand(NamedTuple):
    """A command ran; its buffer as firmware left it (b"" if none), its SnpStatus by name."""

    command: str
    buffer: bytes
    status: str
