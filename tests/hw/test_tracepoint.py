"""Row 1.6: the tracepoint alone tells the history of every page, and explains every violation and #VC.

Nothing here looks into the machine while it runs.  A history is rebuilt from the events; only at the end
is it compared with the real table.
"""

from random import Random
from typing import Any, NamedTuple

import pytest

from softcvm.abi.rmp import RmpState
from softcvm.hw.events import GuestVc, HostRmpPf, NestedPageFault, RmpTransition
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.sim.events import Event
from tests.hw.machines import MEMORY_PAGES, PAGE, BareGuest, snp_machine
from tests.hw.test_hostile_machine import HostileMachine, act

GPA = ((1 << 39) - 1) << 12
ASSIGNED, PAGESIZE, IMMUTABLE, VALIDATED = 1, 2, 4, 1 << 62
RMP_BIT = 1 << 31


class Known(NamedTuple):
    """What the stream has told about one page: its entry, and the event that made it so."""

    lo: int
    hi: int
    event: int

    @property
    def asid(self) -> int:
        return self.lo >> 51 & 0x3FF

    @property
    def gfn(self) -> int:
        return (self.lo & GPA) >> 12


class History:
    """Every page's entry after each event, from the events alone."""

    def __init__(self) -> None:
        self.pages: dict[int, Known] = {}
        self.events = 0
        self.explained: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case RmpTransition():
                self.changed(event)
            case NestedPageFault() if event.error_code & RMP_BIT:
                self.explain_npf(event)
            case GuestVc():
                self.explain_vc(event)
            case HostRmpPf():
                self.explain_host_pf(event)
            case _:
                pass  # no violation
        self.events += 1

    def known(self, pfn: int) -> Known:
        return self.pages.get(pfn, Known(0, 0, -1))

    def changed(self, event: RmpTransition) -> None:
        refused = event.status != "SUCCESS"
        if refused:
            assert (event.old_lo, event.old_hi) == (event.new_lo, event.new_hi)
        for i in range(min(event.npages, max(0, MEMORY_PAGES - event.pfn))):
            before = self.known(event.pfn + i)
            assert self.bound(event.old_lo, i) == self.bound(before.lo, 0) or (refused and i)
            if not refused:
                lo = self.bound(event.new_lo, i)
                self.pages[event.pfn + i] = Known(lo, event.new_hi, self.events)

    @staticmethod
    def bound(lo: int, page: int) -> int:
        """The low quadword `page` pages into a run: a guest's gpa grows with the pages."""
        return lo + (page << 12) if lo >> 51 & 0x3FF else lo & ~GPA

    def explain_npf(self, event: NestedPageFault) -> None:
        """The check that is named fails on the entry that the stream knows, and no earlier one does."""
        page = self.known(event.pfn)
        own = bool(page.lo & ASSIGNED) and page.asid == event.asid
        bound = page.gfn == event.gpa >> 12
        match event.check:
            case "OWN":
                assert not own
            case "GPAM":
                assert own
                assert not bound
            case "MUT":
                assert own
                assert bound
                assert page.lo & IMMUTABLE
            case "SZ":
                assert own
                assert bound
                assert not page.lo & IMMUTABLE
            case "VMPL":
                assert own
                assert bound
                assert page.lo & VALIDATED
                assert event.error_code >> 36 & 1
            case "HVO":
                head = event.pfn - event.pfn % 512
                assert any(self.known(p).lo & ASSIGNED for p in range(head, head + 512))
            case other:
                pytest.fail(f"a violation for no reason that is known: {other}")
        self.count(event.check)

    def explain_vc(self, event: GuestVc) -> None:
        page = self.known(event.pfn)
        assert page.lo & ASSIGNED
        assert page.asid == event.asid
        assert page.gfn == event.gpa >> 12
        assert not page.lo & VALIDATED
        assert page.event >= 0, "and the stream names who made it so"
        self.count("VAL")

    def explain_host_pf(self, event: HostRmpPf) -> None:
        head = event.pfn - event.pfn % 512
        assert any(self.known(p).lo & ASSIGNED for p in range(head, head + 512))
        self.count("host")

    def count(self, what: str) -> None:
        self.explained[what] = self.explained.get(what, 0) + 1


@pytest.mark.parametrize("seed", range(3))
def test_r1_6_the_stream_alone_explains_every_violation_of_a_hostile_walk(seed: int) -> None:
    chance = Random(seed)
    explained: dict[str, int] = {}
    for number in range(12):
        history = History()
        machine = HostileMachine()
        machine.collector = history
        machine.begin(milan=bool(number % 2))
        for _ in range(120):
            act(machine, chance)
        rmp = machine.soc.rmp
        for pfn in range(MEMORY_PAGES):
            lo, hi = rmp.quadwords(rmp.map[pfn], pfn)
            known = history.known(pfn)
            assert (History.bound(lo, 0), hi) == (History.bound(known.lo, 0), known.hi)
        for what, count in history.explained.items():
            explained[what] = explained.get(what, 0) + count
    assert {"OWN", "SZ", "VAL", "host"} <= explained.keys()


def test_r1_6_every_transition_is_seen_with_old_entry_new_entry_and_result() -> None:
    events: list[Any] = []
    soc = snp_machine()
    soc.tp.attach(events.append)
    new = RmpState(assigned=1, gpa=0x5000, asid=7)
    rmpupdate(soc, 600 * PAGE, new, 3)
    rmpupdate(soc, 600 * PAGE, RmpState(assigned=1, immutable=1))
    rmpupdate(soc, 600 * PAGE, RmpState())
    raw = 1 | 5 << 12 | 7 << 51
    fresh = 0x1F  # VMPL0 may do everything
    assert events == [
        RmpTransition("RMPUPDATE", 600, 3, 0, 0, raw, fresh, "SUCCESS"),
        RmpTransition("RMPUPDATE", 600, 1, raw, fresh, 0b101, fresh, "SUCCESS"),
        RmpTransition("RMPUPDATE", 600, 1, 0b101, fresh, 0b101, fresh, "FAIL_PERMISSION"),
    ]


def test_r1_6_who_took_the_page_of_an_unexpected_vc_is_in_the_stream() -> None:
    """The story a guest's owner asks for: why did my page, accepted long ago, raise #VC?"""
    from softcvm.abi.insn import Load, Pvalidate
    from softcvm.abi.svm import GuestException

    events: list[Any] = []
    soc = snp_machine(collector=events.append)
    guest = BareGuest(soc, 1, 1, 512)
    guest.launch()
    guest.assign(8)
    guest.does(Pvalidate(8 * PAGE, 0, True))
    rmpupdate(soc, guest.spa(8), RmpState())
    rmpupdate(soc, guest.spa(8), RmpState(assigned=1, gpa=8 * PAGE, asid=1))
    with pytest.raises(GuestException):
        guest.does(Load(8 * PAGE, 1))
    (vc,) = [event for event in events if isinstance(event, GuestVc)]
    touching = [
        event
        for event in events
        if isinstance(event, RmpTransition) and event.pfn <= vc.pfn < event.pfn + event.npages
    ]
    lost = [event for event in touching if event.old_lo & ~event.new_lo & VALIDATED]
    assert [event.agent for event in lost] == ["RMPUPDATE"]
    assert lost[0].new_lo == 0
    assert touching[-1].new_lo >> 51 & 0x3FF == vc.asid
