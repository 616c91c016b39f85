"""Many registers of the engine in one call: its own interface makes several objects for each of them.

Owns the memory through which they travel, laid out once.  Which registers those are, and what they mean, is
tcg_registers.py's.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

__all__ = ("Batch",)


class Batch:
    """These registers of one engine, one behind the other, each in as many bytes as are said with it."""

    def __init__(self, uc: Any, registers: Sequence[tuple[int, int]]) -> None:
        """registers: the engine's number, and bytes: as many as the engine moves, or more."""
        from unicorn.unicorn_py3.unicorn import uclib

        self._read, self._write = uclib.uc_reg_read_batch, uclib.uc_reg_write_batch
        self._handle = uc._uch
        self._count = len(registers)
        self._data = (ctypes.c_char * sum(size for _, size in registers))()
        at = ctypes.addressof(self._data)
        places = []
        for _, size in registers:
            places.append(at)
            at += size
        self._numbers = (ctypes.c_int32 * self._count)(*(number for number, _ in registers))
        self._places = (ctypes.c_void_p * self._count)(*places)

    def read(self) -> bytes:
        """As the engine holds them.  Bytes that it does not move are as they were put."""
        status = self._read(self._handle, self._numbers, self._places, self._count)
        if status:
            raise RuntimeError(f"uc_reg_read_batch: {status}")
        return self._data.raw

    def write(self, data: bytes) -> None:
        """Give the engine all of them."""
        self.put(data)
        status = self._write(self._handle, self._numbers, self._places, self._count)
        if status:
            raise RuntimeError(f"uc_reg_write_batch: {status}")

    def put(self, data: bytes) -> None:
        """What the memory holds, without telling the engine: which MSR is meant."""
        if len(data) != len(self._data):
            raise ValueError(f"{len(data)} bytes for {len(self._data)}")
        ctypes.memmove(self._data, data, len(data))
