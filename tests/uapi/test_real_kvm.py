"""The same calls on a real /dev/kvm and on the model: the errno must be the same.

Tables of good and bad arguments for a DEFAULT VM, which every host has; no guest runs.  The
host's kernel picks the profile.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import pytest

from softcvm import HostSys, Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.sys import Sys
from tests.conftest import Require
from tests.uapi.calls import GUEST_MEMFD, MIB, PAGE, VmCalls, anon, errno_of
from tools.kvm_diff.real import nearest_profile, why_not

Answers = list[tuple[object, str]]
S64 = 1 << 63


@pytest.fixture
def kernel(require: Require) -> str:
    """The profile of the running kernel."""
    require("kvm", not why_not(), why_not())
    return nearest_profile()


@contextmanager
def real() -> Iterator[VmCalls]:
    calls = VmCalls(HostSys(), VmType.DEFAULT)
    try:
        yield calls
    finally:
        calls.close()


def both(kernel: str, ask: Callable[[VmCalls], Answers]) -> None:
    with real() as calls:
        expected = ask(calls)
    modelled: Sys = Machine(kernel=kernel, memory=256 * MIB).process()
    got = ask(VmCalls(modelled, VmType.DEFAULT))
    assert [a for a in zip(got, expected, strict=True) if a[0] != a[1]] == []


def test_creating_a_gmem(kernel: str) -> None:
    sizes = (0, 1, PAGE, PAGE + 1, 2 * MIB, S64 - PAGE, S64, 2 * S64 - PAGE)

    def ask(calls: VmCalls) -> Answers:
        return [
            ((size, flags), errno_of(partial(calls.gmem, size, flags)))
            for size, flags in product(sizes, (0, 1, 2, 3, 4, 1 << 63))
        ]

    both(kernel, ask)


def test_fallocate(kernel: str) -> None:
    modes = (0, 1, 2, 3, 4, 5, 8, 9, 0x10, 0x11, 0x20, 0x21, 0x40, 0x41, 0x80, 0x1A, 0x100)
    places = (-PAGE, -1, 0, 1, PAGE, 4 * PAGE, 5 * PAGE, S64 - PAGE)
    lengths = (-PAGE, 0, 1, PAGE, 4 * PAGE, 8 * PAGE, S64 - PAGE)

    def ask(calls: VmCalls) -> Answers:
        gmem = calls.gmem(4 * PAGE)
        return [
            (a, errno_of(partial(calls.sys.fallocate, gmem, *a)))
            for a in product(modes, places, lengths)
        ]

    both(kernel, ask)


def test_mapping_a_gmem(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        answers: Answers = []
        for flags in (0, 1, 3):
            if errno_of(partial(calls.gmem, PAGE, flags)) != "0":
                continue
            gmem = calls.gmem(PAGE, flags)
            for length, prot, how, offset in product(
                (0, 1, PAGE, 4 * PAGE), (0, 1, 3, 5), (0, 1, 2, 3), (0, 1, PAGE)
            ):
                call = (length, prot, how, gmem, offset)
                shown = (flags, length, prot, how, offset)
                answers.append((shown, errno_of(partial(calls.sys.mmap, *call))))
        return answers

    both(kernel, ask)


def test_memory_regions(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        hva, gmem = anon(calls.sys, 4 * MIB), calls.gmem(2 * MIB)
        answers: Answers = []
        for slot, flags, gpa, size, at in product(
            (0, 32763, 32764, 2 << 16, 0xFFFF),  # a second address space needs CONFIG_KVM_SMM
            (0, 1, 2, 4, 5, 6, 8, 1 << 16),
            (0, 1, MIB, S64, 2 * S64 - PAGE),
            (0, 1, PAGE, MIB, 1 << 44),
            (0, 1),
        ):
            shown = (slot, flags, gpa, size, at)
            answers.append(
                (shown, errno_of(partial(calls.region, slot, gpa, size, hva + at, flags, gmem)))
            )
        return answers

    both(kernel, ask)


def test_binding_a_gmem(kernel: str) -> None:
    def ask(calls: VmCalls) -> Answers:
        if calls.sys.ioctl(calls.fd, k.KVM_CHECK_EXTENSION, k.KVM_CAP_GUEST_MEMFD) == 0:
            return []
        hva, gmem = anon(calls.sys, 4 * MIB), calls.gmem(2 * MIB)
        answers: Answers = []
        for slot, gpa, size, fd, offset in product(
            (0, 1), (0, MIB), (0, PAGE, MIB), (gmem, calls.fd, 999), (0, 1, MIB, 2 * MIB, S64)
        ):
            call = (slot, gpa, size, hva, GUEST_MEMFD, fd, offset)
            kind = {gmem: "gmem", calls.fd: "vm"}.get(fd, "none")
            shown = (slot, gpa, size, kind, offset)
            answers.append((shown, errno_of(partial(calls.region, *call))))
        return answers

    both(kernel, ask)


def test_capabilities(kernel: str) -> None:
    """Those that say what KVM's memory code can do; vendor and type bits differ between
    hosts."""
    caps = (
        k.KVM_CAP_USER_MEMORY,
        k.KVM_CAP_USER_MEMORY2,
        k.KVM_CAP_GUEST_MEMFD,
        k.KVM_CAP_GUEST_MEMFD_FLAGS,
        k.KVM_CAP_MEMORY_FAULT_INFO,
        k.KVM_CAP_NR_MEMSLOTS,
        k.KVM_CAP_EXIT_HYPERCALL,
        k.KVM_CAP_READONLY_MEM,
        99999,
    )

    def ask(calls: VmCalls) -> Answers:
        check = k.KVM_CHECK_EXTENSION
        return [(cap, str(calls.sys.ioctl(calls.fd, check, cap))) for cap in caps]

    both(kernel, ask)
