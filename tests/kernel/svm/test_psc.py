"""Page-state changes: KVM's walk over a guest's buffer against a second, slow one; what reaches user space."""

import struct
from dataclasses import dataclass, field
from errno import EAGAIN, EBUSY, EINVAL
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcvm.abi.ghcb import (
    GHCB_SHARED_BUFFER,
    PSC_ENTRIES_PROPOSED,
    PSC_MAX_ENTRIES,
    Ghcb,
    GhcbExit,
    PscError,
    PscOp,
    gpa_request,
    psc_entry,
    psc_request,
    valid_mask,
)
from softcvm.abi.insn import Load, Program, Pvalidate, Rdmsr, Store, Touch, Vmgexit, Wrmsr
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.svm import Msr

GHCB_GPA = 0x1000


# The algorithm, written down again without batches of its own: one entry at a time, from the text of
# [GHCB-56421 §4.1.6] and facts about KVM (v6.12, arch/x86/kvm/svm/sev.c).


@dataclass
class Slow:
    """A PSC buffer in a guest's memory and a hypervisor that walks it."""

    buffer: bytearray
    answers: list[int]
    exits: list[tuple[int, int, int]] = field(default_factory=list)
    result: int | None = None

    def header(self) -> tuple[int, int]:
        cur, end = struct.unpack_from("<HH", self.buffer)
        return cur, end

    def entry(self, idx: int) -> dict[str, int]:
        (raw,) = struct.unpack_from("<Q", self.buffer, 8 + 8 * idx)
        return {
            "raw": raw,
            "cur": raw & 0xFFF,
            "gfn": raw >> 12 & 0xFF_FFFF_FFFF,
            "op": raw >> 52 & 15,
            "huge": raw >> 56 & 1,
        }

    def finish_entry(self, idx: int) -> None:
        e = self.entry(idx)
        raw = e["raw"] & ~0xFFF | (512 if e["huge"] else 1)
        struct.pack_into("<Q", self.buffer, 8 + 8 * idx, raw)
        struct.pack_into("<H", self.buffer, 0, idx + 1)

    def walk(self, room: int) -> None:
        while True:
            cur, end = self.header()
            if end >= room:
                self.result = 1 << 32 | 1
                return
            first = None
            for idx in range(cur, end + 1):
                e = self.entry(idx)
                total = 512 if e["huge"] else 1
                if e["cur"] > total or e["gfn"] % total:
                    self.result = 1 << 32 | 2
                    return
                if e["cur"] < total:
                    first = idx
                    break
                struct.pack_into("<H", self.buffer, 0, idx + 1)
            if first is None:
                self.result = 0
                return
            e = self.entry(first)
            split = e["cur"] > 0
            pages = (512 if e["huge"] else 1) - e["cur"]
            same = [first]
            for idx in range(first + 1, end + 1):
                n = self.entry(idx)
                joins = (
                    n["op"] == e["op"]
                    and n["cur"] == 0
                    and bool(n["huge"]) == (bool(e["huge"]) and not split)
                    and n["gfn"] == e["gfn"] + pages
                )
                if not joins:
                    break
                same.append(idx)
                pages += 512 if n["huge"] else 1
            if e["op"] in (1, 2):
                attrs = (16 if e["op"] == 1 else 0) | e["huge"]
                self.exits.append(((e["gfn"] + e["cur"]) << 12, pages, attrs))
                if self.answers.pop(0) if self.answers else 0:
                    self.result = 0x100 << 32
                    return
            for idx in same:
                self.finish_entry(idx)


# The same through a guest, KVM and a VMM


def _guest(buffer: bytes, offset: int, out: list[Any]) -> Program:
    """Register a GHCB, ask for the page-state changes in `buffer`, note what came back."""
    yield Wrmsr(Msr.SEV_ES_GHCB, gpa_request(GHCB_GPA >> 12))
    yield Vmgexit()
    yield Wrmsr(Msr.SEV_ES_GHCB, GHCB_GPA)
    ghcb = Ghcb(
        sw_exit_code=GhcbExit.PSC,
        sw_scratch=GHCB_GPA + offset,
        protocol_version=2,
        valid_bitmap=valid_mask(
            "sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", "sw_scratch"
        ).to_bytes(16, "little"),
    )
    ghcb.data[offset : offset + len(buffer)] = buffer
    yield Store(GHCB_GPA, bytes(ghcb), c=False)
    yield Vmgexit()
    out.append((yield Load(GHCB_GPA, 4096, c=False)))


def _serve(host: Any, buffer: bytes, offset: int, answers: list[int]) -> tuple[Ghcb, list[Any]]:
    out: list[bytes] = []
    host.guest(lambda _: _guest(buffer, offset, out))
    vm = host.vm()
    vm.launch(16)
    vm.exit_hypercalls()
    vm.attributes(1, 1, private=False)
    exits = []
    while not out:
        seen = vm.run()
        if seen.exit_reason == k.KVM_EXIT_HYPERCALL:
            gpa, npages, attrs = struct.unpack_from("<3Q", seen.hypercall_args)
            exits.append((gpa, npages, attrs))
            vm.answer(answers.pop(0) if answers else 0)
        else:
            assert seen.exit_reason == k.KVM_EXIT_HLT
    return Ghcb(out[0]), exits


_entry = st.builds(
    lambda gfn, op, huge, cur, stray: psc_entry(gfn, op, huge=huge, cur_page=cur) | stray << 57,
    st.one_of(st.integers(0, 8), st.sampled_from([0x200, 0x400, 0x600, 0xFF_FFFF_FFFF])),
    st.sampled_from([1, 1, 1, 2, 2, 3, 4, 0, 15]),
    st.booleans(),
    st.sampled_from([0, 0, 0, 0, 1, 1, 2, 100, 511, 512, 513]),
    st.sampled_from([0, 0, 0, 1]),
)


@st.composite
def _neighbours(draw: st.DrawFn) -> list[int]:
    """A run of one kind, where joining happens; some entries are done already, or in part."""
    huge, op = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 3]))
    step = 512 if huge else 1
    gfn = draw(st.integers(0, 4)) * 512
    return [
        psc_entry(gfn + i * step, op, huge=huge, cur_page=min(cur, step))
        for i, cur in enumerate(draw(st.lists(st.sampled_from([0, 0, 0, 512, 5]), max_size=6)))
    ]


@st.composite
def _requests(draw: st.DrawFn) -> tuple[list[int], int, int, int, list[int]]:
    """Entries, cur_entry, end_entry, how late in the buffer it begins, user space's answers."""
    lists = draw(st.lists(st.one_of(_neighbours(), st.lists(_entry, max_size=3)), max_size=4))
    entries = [entry for each in lists for entry in each]
    cur = draw(st.one_of(st.just(0), st.just(0), st.integers(0, 5), st.integers(0, 65535)))
    last = max(len(entries) - 1, 0)
    end = draw(
        st.one_of(st.just(last), st.just(last), st.integers(0, 20), st.integers(250, 65535))
    )
    late = draw(st.sampled_from([0, 0, 8, 16, 1024, 2000]))
    answers = draw(st.lists(st.sampled_from([0, 0, 0, EINVAL]), max_size=6))
    return entries, cur, end, late, answers


@settings(max_examples=250)
@given(_requests())
def test_any_buffer_gives_what_the_slow_walk_gives(
    boot: Any, case: tuple[list[int], int, int, int, list[int]]
) -> None:
    entries, cur, end, late, answers = case
    room = (2032 - late - 8) // 8
    body = b"".join(entry.to_bytes(8, "little") for entry in entries[:room])
    buffer = struct.pack("<HHI", cur, end, 0) + body
    slow = Slow(bytearray(buffer.ljust(2032 - late, b"\0")), list(answers))
    slow.walk(room)
    ghcb, exits = _serve(boot(), buffer, GHCB_SHARED_BUFFER + late, list(answers))
    assert exits == slow.exits
    assert ghcb.sw_exit_info_2 == slow.result
    assert ghcb.sw_exit_info_1 == 0
    assert ghcb.shared_buffer[late:] == bytes(slow.buffer)


def _walks_alike(boot: Any, entries: list[int], cur: int, end: int, late: int = 0) -> Slow:
    """One request through both walks; what the slow one says."""
    room = (2032 - late - 8) // 8
    body = b"".join(entry.to_bytes(8, "little") for entry in entries)
    buffer = struct.pack("<HHI", cur, end, 0) + body
    slow = Slow(bytearray(buffer.ljust(2032 - late, b"\0")), [])
    slow.walk(room)
    ghcb, exits = _serve(boot(), buffer, GHCB_SHARED_BUFFER + late, [])
    assert (exits, ghcb.sw_exit_info_2) == (slow.exits, slow.result)
    assert ghcb.shared_buffer[late:] == bytes(slow.buffer)
    return slow


def test_a_2m_entry_done_in_part_goes_on_at_4k_under_its_own_first_gfn(boot: Any) -> None:
    partial = psc_entry(0x200, 1, huge=True, cur_page=100)
    after = _walks_alike(boot, [partial, psc_entry(0x400, 1, huge=True)], 0, 1)
    assert after.exits == [(0x264 << 12, 412, 17), (0x400 << 12, 512, 17)]
    # Linux compares with the entry's own gfn, not with where it goes on: 0x200 + 412 joins.
    joined = _walks_alike(boot, [partial, psc_entry(0x200 + 412, 1)], 0, 1)
    assert joined.exits == [(0x264 << 12, 413, 17)]


def test_entries_that_are_done_are_passed_over_and_counted(boot: Any) -> None:
    done = [psc_entry(2, 1, cur_page=1), psc_entry(0x200, 2, huge=True, cur_page=512)]
    assert _walks_alike(boot, done, 0, 1).exits == []
    assert (
        _walks_alike(boot, [*done, psc_entry(3, 1, cur_page=2)], 0, 2).result == (1 << 32) | 2
    )
    assert _walks_alike(boot, [*done, psc_entry(9, 1)], 0, 2).exits == [(9 << 12, 1, 16)]


@pytest.mark.parametrize("late", [0, 8, 1024, 2016, 2024])
def test_the_last_entry_is_the_one_that_still_lies_in_the_shared_buffer(
    boot: Any, late: int
) -> None:
    room = (2032 - late - 8) // 8
    assert _walks_alike(boot, [], room, room, late).result == (1 << 32) | 1
    if room:
        assert _walks_alike(boot, [], room - 1, room - 1, late).result == 0


def test_neighbours_become_one_exit_and_kinds_are_kept_apart(boot: Any) -> None:
    entries = [psc_entry(g, PscOp.PRIVATE) for g in (2, 3, 4)]
    entries += [psc_entry(g, PscOp.SHARED) for g in (5, 6)]
    entries += [psc_entry(g, PscOp.PRIVATE, huge=True) for g in (0x200, 0x400)]
    buffer = struct.pack("<HHI", 0, len(entries) - 1, 0) + b"".join(
        e.to_bytes(8, "little") for e in entries
    )
    ghcb, exits = _serve(boot(), buffer, GHCB_SHARED_BUFFER, [])
    assert exits == [(0x2000, 3, 16), (0x5000, 2, 0), (0x20_0000, 1024, 17)]
    assert ghcb.sw_exit_info_2 == 0
    assert struct.unpack_from("<HH", ghcb.shared_buffer) == (7, 6)


def test_a_failure_keeps_what_was_done_before_it(boot: Any) -> None:
    entries = [psc_entry(2, 1), psc_entry(9, 1), psc_entry(12, 1)]
    buffer = struct.pack("<HHI", 0, 2, 0) + b"".join(e.to_bytes(8, "little") for e in entries)
    ghcb, exits = _serve(boot(), buffer, GHCB_SHARED_BUFFER, [0, EAGAIN])
    assert len(exits) == 2
    assert ghcb.sw_exit_info_2 == PscError.GENERIC
    assert struct.unpack_from("<H", ghcb.shared_buffer) == (1,)
    assert [ghcb.shared_buffer[8 + 8 * i] for i in range(3)] == [1, 0, 0]


def test_without_the_capability_a_request_is_refused_without_an_exit(boot: Any) -> None:
    host = boot()
    out: list[bytes] = []
    buffer = struct.pack("<HHIQ", 0, 0, 0, psc_entry(2, 1))
    host.guest(lambda _: _guest(buffer, GHCB_SHARED_BUFFER, out))
    vm = host.vm()
    vm.launch(16)
    vm.attributes(1, 1, private=False)
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert Ghcb(out[0]).sw_exit_info_2 == PscError.GENERIC


@pytest.mark.parametrize(
    ("kernel", "ret", "answered"),
    [
        ("6.12", EBUSY, True),
        ("6.18", 1 << 40, True),
        ("7.3", EBUSY, False),
        ("7.3", EAGAIN, True),
        ("7.3", EINVAL, True),
    ],
)
def test_from_7_2_user_space_may_answer_0_einval_or_eagain_only(
    boot: Any, kernel: str, ret: int, answered: bool
) -> None:
    host = boot(kernel)
    out: list[bytes] = []
    buffer = struct.pack("<HHIQ", 0, 0, 0, psc_entry(2, 1))
    host.guest(lambda _: _guest(buffer, GHCB_SHARED_BUFFER, out))
    vm = host.vm()
    vm.launch(16)
    vm.exit_hypercalls()
    vm.attributes(1, 1, private=False)
    assert vm.run().exit_reason == k.KVM_EXIT_HYPERCALL
    vm.answer(ret)
    assert vm.user.errno(vm.vcpus[0], k.KVM_RUN) == (0 if answered else EINVAL)
    if answered:
        assert Ghcb(out[0]).sw_exit_info_2 == PscError.GENERIC


@pytest.mark.parametrize(("kernel", "left"), [("6.12", 0x77), ("6.18", 0), ("7.3", 0)])
def test_from_6_14_kvm_clears_ret_before_it_leaves(boot: Any, kernel: str, left: int) -> None:
    host = boot(kernel)
    out: list[bytes] = []
    buffer = struct.pack("<HHIQ", 0, 0, 0, psc_entry(2, 1))
    host.guest(lambda _: _guest(buffer, GHCB_SHARED_BUFFER, out))
    vm = host.vm()
    vm.launch(16)
    vm.exit_hypercalls()
    vm.attributes(1, 1, private=False)
    vm.answer(0x77)
    assert vm.run().hypercall_ret == left


# By MSR


@pytest.mark.parametrize(
    ("op", "enabled", "ret", "exits", "reply"),
    [
        (1, True, 0, [(0x7000, 1, 16)], 0x015),
        (2, True, 0, [(0x7000, 1, 0)], 0x015),
        (1, True, EINVAL, [(0x7000, 1, 16)], 1 << 63 | 0x015),
        (3, True, 0, [], 1 << 63 | 0x015),
        (0, True, 0, [], 1 << 63 | 0x015),
        (1, False, 0, [], 1 << 63 | 0x015),
    ],
)
def test_one_page_by_msr(
    boot: Any, op: int, enabled: bool, ret: int, exits: list[Any], reply: int
) -> None:
    host = boot()
    out: list[int] = []
    seen_exits: list[Any] = []

    def guest(_: int) -> Program:
        yield Wrmsr(Msr.SEV_ES_GHCB, psc_request(7, op))
        yield Vmgexit()
        out.append((yield Rdmsr(Msr.SEV_ES_GHCB)))

    host.guest(guest)
    vm = host.vm()
    vm.launch(16)
    if enabled:
        vm.exit_hypercalls()
    while not out:
        seen = vm.run()
        if seen.exit_reason == k.KVM_EXIT_HYPERCALL:
            seen_exits.append(struct.unpack_from("<3Q", seen.hypercall_args))
            vm.answer(ret)
    assert seen_exits == exits
    assert out == [reply]


# Row 2.5


@pytest.mark.parametrize("count", [PSC_ENTRIES_PROPOSED, PSC_MAX_ENTRIES])
@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("order", [0, 9])
def test_r2_5_a_full_request_converts_pages_both_ways_and_every_cost_is_counted(
    boot: Any, count: int, huge: bool, order: int
) -> None:
    """252 entries in the thread, 253 in the final format; each 4K or 2M, each private or shared.

    The VMM changes the attributes and punches out what became shared; the RMP is updated when the guest
    comes back to a page, and again when it is freed.
    """
    size = 512 if huge else 1
    span = count * size
    first, npages = 512, 512 + -(-span // 512) * 512
    host = boot(order=order, pages=1 << 19)
    out: list[bytes] = []
    whole = huge and order == 9  # 2M from the guest's request down to the RMP
    unit = 512 if whole else 1

    def request(op: PscOp) -> bytes:
        entries = (psc_entry(first + i * size, op, huge=huge) for i in range(count))
        return struct.pack("<HHI", 0, count - 1, 0) + b"".join(
            e.to_bytes(8, "little") for e in entries
        )

    def guest(_: int) -> Program:
        yield from _guest(request(PscOp.PRIVATE), GHCB_SHARED_BUFFER, out)
        yield Touch(0)  # wakes up after the VMM has looked
        done = 0
        while done < span:  # 4K of a 2M page in the RMP: KVM smashes it on the way
            left = (span - done) // unit
            back = yield Pvalidate((first + done) << 12, int(whole), True, left)
            assert (back.code, back.cf) == (0, False)
            done += back.done * unit
        yield Pvalidate(first << 12, int(whole), False, 1)
        yield from _guest(request(PscOp.SHARED), GHCB_SHARED_BUFFER, out)

    host.guest(guest)
    vm = host.vm()
    vm.memory(npages, private=False)
    vm.attributes(0, 1, private=True)
    vm.start()
    vm.update(0, bytes(4096))
    vm.vcpu()
    vm.finish()
    vm.exit_hypercalls()
    counters, hw, rmp = host.linux.counters, host.soc.counters, host.soc.rmp
    asid = vm.kvm.arch.sev.asid
    before = rmp.asid_pages[asid]
    exits = []
    while len(out) < 2:
        seen = vm.run()
        if len(out) == 2:
            break
        assert seen.exit_reason == k.KVM_EXIT_HYPERCALL
        gpa, n, attrs = struct.unpack_from("<3Q", seen.hypercall_args)
        exits.append((gpa >> 12, n, attrs))
        private = bool(attrs & 16)
        splits, updates, flushes = counters.direct_map_splits, hw.rmpupdate, hw.clflush_pages
        vm.attributes(gpa >> 12, n, private=private)
        if private:
            assert rmp.asid_pages[asid] == before  # nothing happens before the pages are used
            if huge and not order:  # 129,536 faults of one page take their time
                assert vm.prefault(gpa >> 12, n) == 0
        else:
            mapped = rmp.asid_pages[asid]
            assert mapped == before + (-(-span // 512) * 512 if order else span)
            vm.user.sys.fallocate(vm.gmem, 3, gpa, n << 12)
            assert hw.rmpupdate - updates == span // unit
            assert hw.clflush_pages - flushes == span
            assert rmp.asid_pages[asid] == mapped - span
            # The direct map is split where a 4K page changes hands for the first time.
            assert counters.direct_map_splits - splits == (1 if order and not huge else 0)
        vm.answer(0)
    # One exit for a contiguous request, with the granularity that the guest named.
    assert exits == [(first, span, 16 | huge), (first, span, int(huge))]
    assert [Ghcb(page).sw_exit_info_2 for page in out] == [0, 0]
    assert hw.psmash == (1 if order and not huge else 0)
