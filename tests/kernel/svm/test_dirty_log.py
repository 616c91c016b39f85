"""What a guest and KVM write to shared memory is in the dirty log, page by page, and nothing else is."""

import struct
from typing import Any

from softcvm.abi.ghcb import GHCB_SHARED_BUFFER, Ghcb, GhcbExit, gpa_request, valid_mask
from softcvm.abi.insn import Hlt, Load, Program, Store, Vmgexit, Wrmsr
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmDirtyLog, KvmUserspaceMemoryRegion2
from softcvm.abi.kvm.vcpu import KvmEnableCap
from softcvm.abi.svm import Msr
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE

LOG_DIRTY = 1
BASE, PAGES = 0x100, 130


class Logged:
    """A launched SNP guest with a shared slot of 130 pages at GFN 0x100."""

    def __init__(
        self, host: Any, guest: Program, flags: int = LOG_DIRTY, ring: int = 0
    ) -> None:
        host.guest(lambda _: guest)
        self.host = host
        self.vm = host.vm()
        if ring:
            cap = KvmEnableCap(cap=k.KVM_CAP_DIRTY_LOG_RING, arg0=ring)
            host.user.ioctl(self.vm.fd, k.KVM_ENABLE_CAP, cap)
        self.vm.launch(16)
        self.hva = host.user.mmap(PAGES * PAGE_SIZE)
        self.bitmap = host.user.mmap(PAGE_SIZE)
        self.flags(flags)

    def flags(self, flags: int) -> None:
        region = KvmUserspaceMemoryRegion2(
            slot=1,
            flags=flags,
            guest_phys_addr=BASE << PAGE_SHIFT,
            memory_size=PAGES << PAGE_SHIFT,
            userspace_addr=self.hva,
        )
        assert self.host.user.errno(self.vm.fd, k.KVM_SET_USER_MEMORY_REGION2, region) == 0

    def run(self) -> None:
        assert self.vm.run().exit_reason == k.KVM_EXIT_HLT

    def fetch(self) -> set[int]:
        args = KvmDirtyLog(slot=1, dirty_bitmap=self.bitmap)
        assert self.host.user.errno(self.vm.fd, k.KVM_GET_DIRTY_LOG, args) == 0
        image = self.host.user.sys.load(self.bitmap, -(-PAGES // 64) * 8)
        bits = int.from_bytes(image, "little")
        return {page for page in range(bits.bit_length()) if bits >> page & 1}


def gpa(page: int) -> int:
    return BASE + page << PAGE_SHIFT


def writer(*rounds: tuple[int, ...]) -> Program:
    """Write to the pages of each round, and halt after it."""
    for pages in rounds:
        for page in pages:
            yield Store(gpa(page), b"x", c=False)
        yield Hlt()


def test_each_round_of_writes_is_logged_once(host: Any) -> None:
    rounds = ((0, 5, 6, 129), (5,), (), (5, 6, 64), (5, 6))
    logged = Logged(host, writer(*rounds))
    for pages in rounds:
        logged.run()
        assert logged.fetch() == set(pages)
        assert logged.fetch() == set()
    assert host.user.sys.load(logged.hva + 64 * PAGE_SIZE, 1) == b"x"


def test_a_second_write_to_a_logged_page_is_no_fault(host: Any) -> None:
    logged = Logged(host, writer((3, 3, 3), (3, 3)))
    faults = []
    for _ in range(2):
        before = host.machine.counters["npf"]
        logged.run()
        faults.append(host.machine.counters["npf"] - before)
        assert logged.fetch() == {3}
    assert faults == [1, 1]


def test_switching_the_log_on_write_protects_what_is_mapped(host: Any) -> None:
    logged = Logged(host, writer((1, 2), (2,), (1,)), flags=0)
    logged.run()
    logged.flags(LOG_DIRTY)
    assert logged.fetch() == set()
    logged.run()
    assert logged.fetch() == {2}
    logged.flags(0)
    logged.run()
    logged.flags(LOG_DIRTY)
    assert logged.fetch() == set()


def test_a_read_logs_a_page_that_becomes_writable_and_one_that_stays_read_only_does_not(
    host: Any,
) -> None:
    """make_spte() marks what it maps writable, whatever the access was; a write-protected page stays as it is."""

    def reader() -> Program:
        for _ in range(2):
            yield Load(gpa(7), 1, c=False)
            yield Hlt()

    logged = Logged(host, reader())
    logged.run()
    assert logged.fetch() == {7}
    logged.run()
    assert logged.fetch() == set()


def asks_for_a_page_state_change(ghcb_gpa: int) -> Program:
    """One PSC entry through a GHCB at this address, then a look at the answer."""
    request = Ghcb(
        sw_exit_code=GhcbExit.PSC,
        sw_scratch=ghcb_gpa + GHCB_SHARED_BUFFER,
        shared_buffer=struct.pack("<HHIQ", 0, 0, 0, 1 << 52 | gpa(2)).ljust(2032, b"\0"),
    )
    marked = valid_mask("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", "sw_scratch")
    request.valid_bitmap = marked.to_bytes(16, "little")
    yield Wrmsr(Msr.SEV_ES_GHCB, gpa_request(ghcb_gpa >> PAGE_SHIFT))
    yield Vmgexit()
    yield Wrmsr(Msr.SEV_ES_GHCB, ghcb_gpa)
    yield Store(ghcb_gpa, bytes(request), c=False)
    yield Vmgexit()
    yield Load(ghcb_gpa, 8, c=False)
    yield Hlt()


def test_what_kvm_itself_writes_is_logged(host: Any) -> None:
    """KVM lets go of the GHCB, which lies in the logged slot, when the vCPU is entered again."""
    logged = Logged(host, asks_for_a_page_state_change(gpa(9)))
    logged.vm.exit_hypercalls()
    assert logged.vm.run().exit_reason == k.KVM_EXIT_HYPERCALL
    assert logged.fetch() == {9}
    assert logged.fetch() == set()
    logged.run()
    assert logged.fetch() == {9}


# Rings


class Ring:
    """The vCPU's ring as a VMM reads it: four-word entries, of which DIRTY is 1 and RESET 2."""

    def __init__(self, logged: Logged, nbytes: int) -> None:
        self.sys, self.vm, self.size = logged.host.user.sys, logged.vm, nbytes // 16
        self.addr = self.sys.mmap(nbytes, 3, 1, self.vm.vcpus[0], 64 * PAGE_SIZE)
        self.next = 0

    def harvest(self) -> list[tuple[int, int]]:
        """(slot, page of the slot) in the order in which they were written."""
        found: list[tuple[int, int]] = []
        while True:
            at = self.addr + self.next % self.size * 16
            flags, slot, offset = struct.unpack("<IIQ", self.sys.load(at, 16))
            if flags != 1:
                return found
            self.sys.store(at, struct.pack("<I", 2))
            found.append((slot, offset))
            self.next += 1

    def reset(self) -> int:
        return int(self.sys.ioctl(self.vm.fd, k.KVM_RESET_DIRTY_RINGS))


def test_a_ring_tells_pages_in_the_order_of_their_first_write(host: Any) -> None:
    rounds = ((5, 0, 5, 129), (0, 7), (0, 129))
    logged = Logged(host, writer(*rounds), ring=PAGE_SIZE)
    ring = Ring(logged, PAGE_SIZE)
    logged.run()
    assert ring.harvest() == [(1, 5), (1, 0), (1, 129)]
    logged.run()  # page 0 was not reset: it can be written without a fault
    assert ring.harvest() == [(1, 7)]
    assert (ring.reset(), ring.reset()) == (4, 0)
    logged.run()
    assert ring.harvest() == [(1, 0), (1, 129)]


def test_a_ring_that_is_reset_in_time_goes_round_and_round(host: Any) -> None:
    pages = tuple(range(130))
    logged = Logged(host, writer(pages, pages, pages, pages), ring=PAGE_SIZE)
    ring = Ring(logged, PAGE_SIZE)
    for _ in range(4):
        logged.run()
        assert ring.harvest() == [(1, page) for page in pages]
        assert ring.reset() == len(pages)


def test_without_a_reset_the_guest_stays_out_when_64_entries_are_left(host: Any) -> None:
    entries = 256
    once = tuple(range(130))
    logged = Logged(host, writer(once, once), ring=entries * 16)
    ring = Ring(logged, entries * 16)
    logged.run()
    logged.flags(0)
    logged.flags(LOG_DIRTY)  # write-protects what is mapped: the same pages are logged again
    assert logged.vm.run().exit_reason == k.KVM_EXIT_DIRTY_RING_FULL
    assert logged.vm.run().exit_reason == k.KVM_EXIT_DIRTY_RING_FULL
    early = ring.harvest()
    assert len(early) == entries - 64
    assert ring.reset() == len(early)
    logged.run()
    # The write that found the ring full had not been made: its page is write-protected by the reset.
    assert early + ring.harvest()[1:] == [(1, page) for page in once] * 2


def test_an_entry_beyond_the_slot_spoils_its_neighbours(host: Any) -> None:
    """v6.12 virt/kvm/dirty_ring.c: pages less than 64 apart share a mask, and one that leaves the slot drops it."""
    far = PAGES - 1 - 64
    logged = Logged(host, writer((far, PAGES - 1), (far, PAGES - 1)), ring=PAGE_SIZE)
    ring = Ring(logged, PAGE_SIZE)
    logged.run()
    assert ring.harvest() == [(1, far), (1, PAGES - 1)]
    host.user.sys.store(ring.addr + 2 * 16, struct.pack("<IIQ", 2, 1, PAGES + 1))
    assert ring.reset() == 3
    logged.run()
    # KVM's next entry takes the place of the one that was made up; only the far page was protected.
    entries = struct.unpack("<IIQIIQ", host.user.sys.load(ring.addr + 2 * 16, 32))
    assert entries == (1, 1, far, 0, 0, 0)


def test_a_ring_may_be_reset_backwards(host: Any) -> None:
    pages = (90, 40, 30, 29, 92, 100, 0)
    logged = Logged(host, writer(pages, pages), ring=PAGE_SIZE)
    ring = Ring(logged, PAGE_SIZE)
    for _ in range(2):
        logged.run()
        assert ring.harvest() == [(1, page) for page in pages]
        assert ring.reset() == len(pages)


def test_made_up_entries_leave_a_ring_that_says_it_is_full(host: Any) -> None:
    """v6.12 virt/kvm/dirty_ring.c: what is used is a u32, and the ring is judged when a page enters it."""
    logged = Logged(host, writer((1,), (2,), (3,)), ring=PAGE_SIZE)
    ring = Ring(logged, PAGE_SIZE)
    for index in range(2):
        host.user.sys.store(ring.addr + 16 * index, struct.pack("<IIQ", 2, 7, 0))
    assert ring.reset() == 2
    logged_exits = [logged.vm.run().exit_reason for _ in range(2)]
    assert logged_exits == [k.KVM_EXIT_DIRTY_RING_FULL] * 2
    assert host.machine.counters["warnings"] > 0
