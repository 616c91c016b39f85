"""Linear memory without page tables."""

from softcvm.hw.cpu.paging import Access


class Flat:
    """64 KiB from address 0."""

    def __init__(self) -> None:
        self.data = bytearray(0x10000)

    def read_linear(self, address: int, length: int, access: Access) -> bytes:
        return bytes(self.data[address : address + length])

    def write_linear(self, address: int, data: bytes, access: Access) -> None:
        self.data[address : address + len(data)] = data
