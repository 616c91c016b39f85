"""Linux's private memory: single pages and 1 GiB against the real kernel, memslots, and recording.

What a page costs is measured through the public Sys of a launched SNP guest's VMM, per page and with no
collector attached unless a benchmark says so.
"""

from collections.abc import Callable
from time import perf_counter

from bench.real import real_kernel
from bench.sides import Bench, Side
from softcvm.abi.insn import Program, Pvalidate
from softcvm.abi.kvm import _generated_kvm as nr
from softcvm.abi.kvm.memory import (
    KvmMemoryAttributes,
    KvmPreFaultMemory,
    KvmUserspaceMemoryRegion2,
    MemFlag,
    VmType,
)
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE, KvmExit
from softcvm.machine import Machine
from softcvm.sim.addr import PAGE_SIZE
from softcvm.vmm import launch
from softcvm.vmm.kvm import Kvm, Vm

__all__ = ("BENCHES",)

_GIB = 1 << 30
_PAGES = 4096
_KEEP_SIZE, _PUNCH_HOLE = 1, 3
_ANON, _RW = 0x22, 3


class _Guest:
    """A launched SNP guest with 1 GiB, all of it private and none of it there yet."""

    def __init__(self) -> None:
        self.machine = Machine(memory=4 * _GIB)
        self.machine.vm_guest(_accept)
        self.sys = self.machine.process()
        self.vm = Kvm(self.sys).create_vm(VmType.SNP)
        self.vm.sev_fd = self.sys.open("/dev/sev")
        launch.init(self.vm, 1)
        self.gmem = self.vm.create_guest_memfd(_GIB)
        self.vm.set_user_memory_region2(
            KvmUserspaceMemoryRegion2(
                flags=MemFlag.GUEST_MEMFD,
                memory_size=_GIB,
                userspace_addr=self.sys.mmap(_GIB, _RW, _ANON),
                guest_memfd=self.gmem,
            )
        )
        self.vm.set_private(0, _GIB, True)
        launch.launch_start(self.vm)
        self.vcpu = self.vm.create_vcpu(0, KVM_RUN_MMAP_SIZE)
        launch.launch_finish(self.vm)

    def punch(self) -> None:
        self.sys.fallocate(self.gmem, _PUNCH_HOLE, 0, _GIB)

    # One page each, the whole guest in turn.  Arguments are packed before the clock starts.

    def page_pairs(self) -> Callable[[], None]:
        sys, gmem = self.sys, self.gmem

        def pairs() -> None:
            for offset in range(0, _PAGES * PAGE_SIZE, PAGE_SIZE):
                sys.fallocate(gmem, _KEEP_SIZE, offset, PAGE_SIZE)
                sys.fallocate(gmem, _PUNCH_HOLE, offset, PAGE_SIZE)

        return pairs

    def attribute_pairs(self) -> Callable[[], None]:
        requests = [
            KvmMemoryAttributes(address=gpa, size=PAGE_SIZE, attributes=attributes).data
            for gpa in range(0, _PAGES * PAGE_SIZE, PAGE_SIZE)
            for attributes in (0, 8)
        ]
        return self._ioctls(self.vm.fd, nr.KVM_SET_MEMORY_ATTRIBUTES, requests)

    def faults(self) -> Callable[[], None]:
        requests = [
            KvmPreFaultMemory(gpa=gpa, size=PAGE_SIZE).data
            for gpa in range(0, _PAGES * PAGE_SIZE, PAGE_SIZE)
        ]
        return self._ioctls(self.vcpu.fd, nr.KVM_PRE_FAULT_MEMORY, requests)

    def _ioctls(self, fd: int, number: int, requests: list[bytearray]) -> Callable[[], None]:
        sys = self.sys

        def all_of_them() -> None:
            for request in requests:
                sys.ioctl(fd, number, request)

        return all_of_them


def _accept(vcpu_id: int) -> Program:
    """Use fresh private pages one by one: each is a nested page fault, then PVALIDATE."""
    for gpa in range(0, _PAGES * PAGE_SIZE, PAGE_SIZE):
        yield Pvalidate(gpa, 0, True)


def _timed(prepare: Callable[[], Callable[[], None]], count: int) -> Side:
    """Seconds per page of what prepare() gives, which is not part of the time."""

    def side() -> float:
        call = prepare()
        begun = perf_counter()
        call()
        return (perf_counter() - begun) / count

    return side


def _page_pair() -> tuple[Side, Side]:
    return _timed(_Guest().page_pairs, _PAGES), real_kernel("pair")


def _attribute_pair() -> tuple[Side, Side]:
    return _timed(_Guest().attribute_pairs, _PAGES), real_kernel("pair")


def _fault() -> tuple[Side, Side]:
    guest = _Guest()

    def prepare() -> Callable[[], None]:
        guest.punch()
        return guest.faults()

    return _timed(prepare, _PAGES), real_kernel("touch")


def _guest_fault() -> tuple[Side, Side]:
    """One KVM_RUN that ends when the guest has used all its pages and halts."""

    def prepare() -> Callable[[], None]:
        guest = _Guest()

        def run() -> None:
            if guest.vcpu.run() or guest.vcpu.exit().exit_reason != KvmExit.HLT:
                raise RuntimeError(f"the guest ended with {guest.vcpu.exit()}")

        return run

    return _timed(prepare, _PAGES), real_kernel("touch")


def _convert_gib() -> tuple[Side, Side]:
    """All that belongs to it: RMP entries, nested page table, attributes, guest_memfd."""
    guest = _Guest()

    def there_and_back() -> None:
        guest.vcpu.pre_fault(0, _GIB)
        guest.vm.set_private(0, _GIB, False)
        guest.punch()
        guest.vm.set_private(0, _GIB, True)

    return _timed_repeatedly(there_and_back, 50, 1000), real_kernel("bulk")


def _fill_gib() -> tuple[Side, Side]:
    guest = _Guest()

    def fill_and_punch() -> None:
        guest.sys.fallocate(guest.gmem, _KEEP_SIZE, 0, _GIB)
        guest.punch()

    return _timed_repeatedly(fill_and_punch, 50, 5000), real_kernel("bulk")


def _timed_repeatedly(call: Callable[[], None], repeat: int, times: int) -> Side:
    """Seconds of `times` calls, from `repeat` of them."""

    def side() -> float:
        begun = perf_counter()
        for _ in range(repeat):
            call()
        return (perf_counter() - begun) / repeat * times

    return side


def _slots(count: int) -> Side:
    """Seconds per memslot of a VM with `count` of them, created in no order of their addresses."""

    def prepare() -> Callable[[], None]:
        sys = Machine(memory=1 << 30).process()
        vm = Vm(sys, Kvm(sys).create_vm(VmType.SNP).fd)
        hva = sys.mmap(count * PAGE_SIZE, _RW, _ANON)
        requests = [
            KvmUserspaceMemoryRegion2(
                slot=slot,
                guest_phys_addr=slot * 7919 % count * PAGE_SIZE,
                memory_size=PAGE_SIZE,
                userspace_addr=hva,
            ).data
            for slot in range(count)
        ]

        def create() -> None:
            for request in requests:
                sys.ioctl(vm.fd, nr.KVM_SET_USER_MEMORY_REGION2, request)

        return create

    return _timed(prepare, count)


def _recorded(attached: bool) -> Side:
    """Page by page: filled, punched, converted and faulted in; with or without a recorder."""
    guest = _Guest()
    events: list[tuple[object, ...]] = []
    if attached:
        guest.machine.events.attach(events.append)

    def prepare() -> Callable[[], None]:
        guest.punch()
        events.clear()
        work = guest.page_pairs(), guest.attribute_pairs(), guest.faults()

        def run() -> None:
            for part in work:
                part()

        return run

    return _timed(prepare, _PAGES)


BENCHES = (
    Bench(
        "page-pair",
        "one page of a bound guest_memfd of an SNP VM filled and punched, through Sys",
        "the same on the real guest_memfd of this machine, in C",
        1.5,
        _page_pair,
    ),
    Bench(
        "attribute-pair",
        "one page made shared and private again by KVM_SET_MEMORY_ATTRIBUTES",
        "one page filled and punched on the real guest_memfd, in C",
        5.0,
        _attribute_pair,
    ),
    Bench(
        "fill-gib",
        "1 GiB of guest_memfd filled and punched, 5,000 times",
        "the same on the real guest_memfd, in C, once",
        1.0,
        _fill_gib,
    ),
    Bench(
        "convert-gib",
        "1 GiB prefaulted into the RMP, made shared, punched, made private, 1,000 times",
        "1 GiB of real guest_memfd filled and punched, in C, once",
        1.0,
        _convert_gib,
    ),
    Bench(
        "fault",
        "KVM_PRE_FAULT_MEMORY of one fresh private page of an SNP guest",
        "one touch of a fresh page of a mapped real guest_memfd, in C",
        6.0,
        _fault,
    ),
    Bench(
        "guest-fault",
        "PVALIDATE of one fresh private page by a scripted guest in KVM_RUN",
        "one touch of a fresh page of a mapped real guest_memfd, in C",
        6.0,
        _guest_fault,
    ),
    Bench(
        "memslots",
        "one memslot, when a VM gets 32,764",
        "one memslot, when a VM gets 2,048",
        1.5,
        lambda: (_slots(32764), _slots(2048)),
    ),
    Bench(
        "recording",
        "pages filled, punched, converted and faulted in, all events recorded",
        "the same with nobody listening",
        1.5,
        lambda: (_recorded(True), _recorded(False)),
    ),
)
