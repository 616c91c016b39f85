"""The real kernel as a peer: a C program on this machine's guest_memfd, or recorded ratios without one.

Without /dev/kvm, or on a kernel too old for the operation, the time of a Python loop that does the RMP's
check and write on a dict of __slots__ objects stands in: how many such pairs each operation of the real
kernel takes was measured beside it once (Linux 6.18 on an EPYC, CPython 3.11: 5.3 us, 0.26 s and 4.2 us
against 0.28 us).
"""

import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from bench.sides import Side

__all__ = ("real_kernel",)

_IN_SLOTS_PAIRS = {
    "pair": 4.97e-6 / 2.55e-6,
    "bulk": 0.404 / 2.55e-6,
    "touch": 4.18e-6 / 2.55e-6,
}
_PAGES = 16384
_BUILD = TemporaryDirectory(prefix="softcvm-bench-")


def real_kernel(what: str) -> Side:
    """Seconds of one `pair`, `bulk` or `touch` of real_gmem.c."""
    program = _program()
    if program is not None and _run(program, what) is not None:
        return lambda: _run(program, what) or 0.0
    return lambda: _slots_pair() * _IN_SLOTS_PAIRS[what]


@cache
def _program() -> Path | None:
    """The C program, where there is a compiler."""
    source, program = Path(__file__).with_name("real_gmem.c"), Path(_BUILD.name) / "real_gmem"
    try:
        subprocess.run(["cc", "-O2", "-o", program, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return program


def _run(program: Path, what: str) -> float | None:
    done = subprocess.run([program, what], capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


class _Entry:
    __slots__ = ("asid", "assigned", "gpa")

    def __init__(self) -> None:
        self.assigned = 0
        self.asid = 0
        self.gpa = 0


class _Table:
    def __init__(self) -> None:
        self.entries = {pfn: _Entry() for pfn in range(_PAGES)}
        self.updates = 0

    def update(self, pfn: int, assigned: int, asid: int, gpa: int) -> int:
        entry = self.entries[pfn]
        if entry.assigned and assigned:
            return 2
        if gpa & 4095 or (asid and not assigned):
            return 1
        entry.assigned, entry.asid, entry.gpa = assigned, asid, gpa
        self.updates += 1
        return 0


def _slots_pair() -> float:
    table = _Table()
    begun = perf_counter()
    for pfn in range(_PAGES):
        table.update(pfn, 1, 5, pfn << 12)
        table.update(pfn, 0, 0, 0)
    return (perf_counter() - begun) / _PAGES
