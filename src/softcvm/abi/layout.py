"""Structures as tables: a class whose attributes name bits or fields of a little-endian record.

    class RmpEntryRaw(Layout, size=16):
        assigned = Bits(0)
        gpa = Bits(50, 12)
        perms = U8(8)

An instance wraps a bytearray of exactly `size` bytes; reading and writing an attribute reads and writes
those bits.  For tables, tests and viewers: hot code shifts and masks inline and names the table.
"""

from typing import Any, ClassVar, Self, overload

__all__ = ("U8", "U16", "U32", "U64", "Bits", "Bytes", "Layout")


class Bits:
    """Bits hi .. lo (inclusive) of the record read as one little-endian integer."""

    def __init__(self, hi: int, lo: int | None = None) -> None:
        self.hi = hi
        self.lo = hi if lo is None else lo
        self.mask = (1 << (self.hi - self.lo + 1)) - 1
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type) -> Self: ...
    @overload
    def __get__(self, obj: "Layout", owner: type) -> int: ...
    def __get__(self, obj: "Layout | None", owner: type) -> Self | int:
        if obj is None:
            return self
        first, last = self.lo >> 3, (self.hi >> 3) + 1
        return int.from_bytes(obj.data[first:last], "little") >> (self.lo & 7) & self.mask

    def __set__(self, obj: "Layout", value: int) -> None:
        if not 0 <= value <= self.mask:
            raise ValueError(f"{self.name} takes {self.hi - self.lo + 1} bits, not {value:#x}")
        first, last = self.lo >> 3, (self.hi >> 3) + 1
        shift = self.lo & 7
        word = int.from_bytes(obj.data[first:last], "little")
        word = word & ~(self.mask << shift) | value << shift
        obj.data[first:last] = word.to_bytes(last - first, "little")


class U8(Bits):
    """An unsigned byte at a byte offset."""

    width = 8

    def __init__(self, offset: int) -> None:
        super().__init__(offset * 8 + self.width - 1, offset * 8)
        self.offset = offset
        self._place = slice(offset, offset + self.width // 8)

    @overload
    def __get__(self, obj: None, owner: type) -> Self: ...
    @overload
    def __get__(self, obj: "Layout", owner: type) -> int: ...
    def __get__(self, obj: "Layout | None", owner: type) -> Self | int:
        if obj is None:
            return self
        return int.from_bytes(obj.data[self._place], "little")

    def __set__(self, obj: "Layout", value: int) -> None:
        if not 0 <= value <= self.mask:
            raise ValueError(f"{self.name} takes {self.width} bits, not {value:#x}")
        obj.data[self._place] = value.to_bytes(self.width >> 3, "little")


class U16(U8):
    width = 16


class U32(U8):
    width = 32


class U64(U8):
    width = 64


class Bytes:
    """`length` raw bytes at a byte offset."""

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type) -> Self: ...
    @overload
    def __get__(self, obj: "Layout", owner: type) -> bytes: ...
    def __get__(self, obj: "Layout | None", owner: type) -> Self | bytes:
        if obj is None:
            return self
        return bytes(obj.data[self.offset : self.offset + self.length])

    def __set__(self, obj: "Layout", value: bytes) -> None:
        if len(value) != self.length:
            raise ValueError(f"{self.name} takes {self.length} bytes, not {len(value)}")
        obj.data[self.offset : self.offset + self.length] = value


class Layout:
    """Base of the tables.  Keyword arguments of the constructor set fields; the rest is zero."""

    SIZE: ClassVar[int] = 0
    _table: ClassVar[dict[str, "Bits | Bytes"]] = {}
    __slots__ = ("data",)

    def __init_subclass__(cls, *, size: int, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.SIZE = size
        cls._table = {}
        for klass in reversed(cls.__mro__):
            cls._table.update(
                {n: f for n, f in vars(klass).items() if isinstance(f, Bits | Bytes)}
            )
        for name, field in cls.fields().items():
            end = (
                (field.hi >> 3) + 1 if isinstance(field, Bits) else field.offset + field.length
            )
            if end > size:
                raise TypeError(f"{cls.__name__}.{name} ends at byte {end} of {size}")

    def __init__(self, data: bytes | bytearray | None = None, **fields: int | bytes) -> None:
        if data is None:
            data = bytearray(self.SIZE)
        if len(data) != self.SIZE:
            raise ValueError(f"{type(self).__name__} takes {self.SIZE} bytes, not {len(data)}")
        self.data = bytearray(data)
        for name, value in fields.items():
            if name not in self._table:
                raise TypeError(f"{type(self).__name__} has no field {name}")
            setattr(self, name, value)

    @classmethod
    def over(cls, buffer: bytearray) -> Self:
        """A record that lies in this buffer, not in a copy of it."""
        if len(buffer) != cls.SIZE:
            raise ValueError(f"{cls.__name__} takes {cls.SIZE} bytes, not {len(buffer)}")
        record = cls.__new__(cls)
        record.data = buffer
        return record

    @classmethod
    def fields(cls) -> dict[str, "Bits | Bytes"]:
        """Field name -> its place, in the order of the table."""
        return cls._table

    def __bytes__(self) -> bytes:
        return bytes(self.data)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout) and type(self) is type(other) and self.data == other.data
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = []
        for name in self.fields():
            value = getattr(self, name)
            if isinstance(value, int):
                if value:
                    shown.append(f"{name}={value:#x}")
            elif any(value):
                shown.append(f"{name}={value.hex()}")
        return f"{type(self).__name__}({', '.join(shown)})"
