"""A hostile hypervisor, two hostile guests and a host program that tries everything, on a few pages.

Every rule is one instruction, access or firmware command with operands that may be nonsense.  After each,
every sentence of softcvm.invariants.hardware that does not ask for a well-behaved guest holds.  Beside
them the machine keeps its own books on what SNP promises a guest: a private page that it can read holds
what it wrote there last.
"""

from collections.abc import Callable
from itertools import permutations, product
from random import Random
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from softcvm.abi.insn import Fetch, GuestOp, Load, Pvalidate, Rmpadjust, Rmpquery, Store, Touch
from softcvm.abi.rmp import RmpState
from softcvm.abi.snp_firmware import (
    SnpActivate,
    SnpAddr,
    SnpCmd,
    SnpDbg,
    SnpGuestStatus,
    SnpLaunchFinish,
    SnpLaunchStart,
    SnpLaunchUpdate,
    SnpPageMdInit,
    SnpPageMove,
    SnpPageReclaim,
    SnpPageSwapIn,
    SnpPageSwapOut,
    SnpPageUnsmash,
)
from softcvm.abi.svm import ExitCode, GuestException
from softcvm.hw.access import HostRmpFault
from softcvm.hw.events import RmpTransition
from softcvm.hw.insn.psmash import psmash
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.hw.profile import GENOA, MILAN
from softcvm.hw.rmp import ASID_MASK, ASID_SHIFT, PAGESIZE
from softcvm.invariants.registry import check_all, watch
from softcvm.sim.addr import PgLevel
from softcvm.sim.events import Collector
from tests.hw.machines import PAGE, POLICY, BareGuest, Exited, command, snp_machine

# Frames of guest 1, frames of guest 2, firmware's pages, the RMP, the last page.
PFNS = (3, 4, 512, 513, 514, 515, 1023, 1024, 1025, 1536, 1537, 1538, 2048, 3072, 4095)
GFNS = (0, 1, 1, 2, 2, 3, 511, 512, 512, 513, 1024)
FIRST = (512, 1536)
HOME = tuple(
    (guest, gfn, FIRST[guest] + gfn) for guest in (0, 1) for gfn in (0, 1, 2, 3, 512, 513)
)
"""(guest, gfn, pfn) where each frame is at home."""
ASTRAY = tuple((guest, gfn, pfn) for guest in (0, 1) for gfn in GFNS for pfn in PFNS)
SWAPPED = tuple(
    (guest, a, FIRST[guest] + b) for guest in (0, 1) for a, b in permutations((0, 1, 2, 3), 2)
)
"""A frame of the guest behind another of its addresses."""
PLACES = HOME * 40 + SWAPPED * 5 + ASTRAY
PAGES = tuple(pfn for _, _, pfn in HOME) * 2 + PFNS
CONTEXTS = (1, 2, 3)
BITS = (0, 1)
OFTEN = (True, True, True, False)
FAULTS = (("#VC", 0x404), ("#VMEXIT", ExitCode.NPF), ("#VMEXIT", ExitCode.INVALID))
DATA = (b"x", b"hostile", bytes(range(24)))

Place = tuple[int, int, int]
F = TypeVar("F", bound=Callable[..., None])

ACTIONS: dict[str, dict[str, tuple[Any, ...]]] = {}


def action(**operands: tuple[Any, ...]) -> Callable[[F], F]:
    """A Hypothesis rule that draws from these operands, and an entry in the list for seeded walks."""

    def register(method: F) -> F:
        ACTIONS[method.__name__] = operands
        drawn: Any = {name: st.sampled_from(several) for name, several in operands.items()}
        make_rule: Any = rule
        registered: F = make_rule(**drawn)(method)
        return registered

    return register


class HostileMachine(RuleBasedStateMachine):
    collector: Collector | None = None
    """Sees everything from before SNP_INIT on."""

    @initialize(milan=st.booleans())
    def begin(self, milan: bool) -> None:
        self.soc = snp_machine(MILAN if milan else GENOA, collector=self.collector)
        self.watched = watch(self.soc)
        self.wrote: dict[tuple[int, int, int], bytes] = {}
        """(asid, gfn, pfn) -> what the guest last stored at the start of that page, while it was its own."""
        self.soc.tp.attach(self.forget)
        self.guests = [BareGuest(self.soc, 1, 1, 512), BareGuest(self.soc, 2, 2, 1536)]
        for guest in self.guests:
            guest.launch([b"\x11" * PAGE, b"\x22" * PAGE])
            guest.assign(3)
            guest.assign(512, 512, large=True)
            guest.does(Pvalidate(512 * PAGE, 1, True))

    def forget(self, event: Any) -> None:
        """The promise ends where the page stops being validated, or changes in any way but by PSMASH."""
        if isinstance(event, RmpTransition) and event.agent not in ("PSMASH", "RMPADJUST"):
            if (event.old_lo, event.old_hi) == (event.new_lo, event.new_hi):
                return
            for key in [k for k in self.wrote if event.pfn <= k[2] < event.pfn + event.npages]:
                del self.wrote[key]

    @invariant()
    def every_sentence_holds(self) -> None:
        if not hasattr(self, "soc"):
            return
        broken = [c for c in check_all(self.soc, self.watched, hostile=True) if not c.held]
        assert not broken, "\n".join(f"{c.sentence}: {c.violations}" for c in broken)

    # -- the hypervisor's instructions and tables -------------------------------------------------

    @action(at=PLACES, size=BITS, immutable=(0, 0, 1), count=(1, 1, 3))
    def assign(self, at: Place, size: int, immutable: int, count: int) -> None:
        guest, gfn, pfn = at
        new = RmpState(1, size, immutable, gfn * PAGE, self.guests[guest].asid)
        rmpupdate(self.soc, pfn * PAGE, new, count)

    @action(pfn=PAGES, size=BITS, count=(1, 1, 3))
    def reclaim(self, pfn: int, size: int, count: int) -> None:
        rmpupdate(self.soc, pfn * PAGE, RmpState(pagesize=size), count)

    @action(pfn=PAGES, fields=tuple(product(BITS, BITS, BITS)), gfn=GFNS, asid=(0, 1, 1006))
    def rmpupdate_anything(
        self, pfn: int, fields: tuple[int, int, int], gfn: int, asid: int
    ) -> None:
        rmpupdate(self.soc, pfn * PAGE, RmpState(*fields, gfn * PAGE, asid))

    @action(pfn=PAGES, head=OFTEN)
    def psmash_anything(self, pfn: int, head: bool) -> None:
        psmash(self.soc, (pfn - pfn % 512 if head else pfn) * PAGE)

    @action(at=PLACES, level=(1, 1, 2))
    def map_anything(self, at: Place, level: int) -> None:
        guest, gfn, pfn = at
        size = 1 if level == 1 else 512
        gfn -= gfn % size
        npt = self.guests[guest].npt
        npt.zap(gfn, gfn + size)
        npt.set(gfn, pfn - pfn % size, size, PgLevel(level))

    @action(guest=BITS, gfn=GFNS)
    def zap(self, guest: int, gfn: int) -> None:
        self.guests[guest].npt.zap(gfn, gfn + 1)

    @action(guest=BITS, pfn=PAGES)
    def point_vmcb_elsewhere_and_back(self, guest: int, pfn: int) -> None:
        """VMRUN with an arbitrary page as VMSA: refused unless it is a VMSA of this guest."""
        vmcb = self.guests[guest].vmcb
        kept, vmcb.vmsa_pa = vmcb.vmsa_pa, pfn * PAGE
        entry = self.soc.rmp.head(pfn)
        try:
            self.guests[guest].does(Touch(PAGE))
        except Exited as left:
            if left.code == ExitCode.INVALID:
                return
        except GuestException:
            pass
        finally:
            vmcb.vmsa_pa = kept
        assert (entry.vmsa, entry.asid, entry.immutable) == (1, self.guests[guest].asid, 0)

    # -- the host's own accesses ------------------------------------------------------------------

    @action(pfn=PAGES, data=DATA, level=(1, 2))
    def host_writes(self, pfn: int, data: bytes, level: int) -> None:
        first = pfn - pfn % 512
        under = range(first, first + 512) if level == 2 else [pfn]
        owned = [p for p in under if self.soc.rmp.head(p).assigned]
        before = self.soc.host_read(pfn * PAGE, PAGE)
        try:
            self.soc.host_write(pfn * PAGE, data, PgLevel(level))
        except HostRmpFault as fault:
            answer, expected = fault.error_code, before
        else:
            answer, expected = 0, data + before[len(data) :]
        assert answer == (0x8000_0003 if owned else 0)
        assert self.soc.host_read(pfn * PAGE, PAGE) == expected

    @action(pfn=PAGES)
    def host_reads_anything(self, pfn: int) -> None:
        assert len(self.soc.host_read(pfn * PAGE, PAGE)) == PAGE

    # -- guests -----------------------------------------------------------------------------------

    def _does(self, guest: int, op: GuestOp) -> tuple[Any, ...]:
        """("done", result), or which fault: nothing but an NPF, #VC 0x404 or a refused VMRUN."""
        try:
            return ("done", self.guests[guest].does(op))
        except GuestException as exception:
            faulted: tuple[str, int] = ("#VC", exception.error_code)
        except Exited as left:
            faulted = ("#VMEXIT", left.code)
        assert faulted in FAULTS
        return faulted

    @action(guest=BITS, gfn=GFNS, data=DATA, c=OFTEN)
    def guest_stores(self, guest: int, gfn: int, data: bytes, c: bool) -> None:
        translated = self.guests[guest].npt.translate(gfn, 1)
        if self._does(guest, Store(gfn * PAGE, data, c))[0] == "done" and c:
            assert translated is not None
            key = (self.guests[guest].asid, gfn, translated.pfn)
            self.wrote[key] = data + self.wrote.get(key, b"")[len(data) :]

    @action(guest=BITS, gfn=GFNS, c=OFTEN)
    def guest_loads(self, guest: int, gfn: int, c: bool) -> None:
        translated = self.guests[guest].npt.translate(gfn, 1)
        result = self._does(guest, Load(gfn * PAGE, 32, c))
        if result[0] == "done" and c:
            assert translated is not None
            wrote = self.wrote.get((self.guests[guest].asid, gfn, translated.pfn), b"")
            assert result[1][: len(wrote)] == wrote
            entry = self.soc.rmp.head(translated.pfn)
            assert (entry.validated, entry.immutable) == (1, 0)
            assert entry.asid == self.guests[guest].asid
            assert self.soc.rmp.gfn(translated.pfn) == gfn
        if result[0] == "done" and not c:
            assert translated is not None
            assert result[1] == self.soc.host_read(translated.pfn * PAGE, 32)

    @action(guest=BITS, gfn=GFNS, size=BITS, validate=OFTEN, count=(1, 1, 3))
    def guest_pvalidates(
        self, guest: int, gfn: int, size: int, validate: bool, count: int
    ) -> None:
        self._does(guest, Pvalidate(gfn * PAGE, size, validate, count))

    @action(
        guest=BITS,
        gfn=GFNS,
        size=BITS,
        vmpl=(0, 1, 1, 2, 3),
        perms=(0, 1, 3, 15, 31, 255),
        vmsa=(False, False, True),
    )
    def guest_rmpadjusts(
        self, guest: int, gfn: int, size: int, vmpl: int, perms: int, vmsa: bool
    ) -> None:
        self._does(guest, Rmpadjust(gfn * PAGE, size, vmpl, perms, vmsa))

    @action(guest=BITS, gfn=GFNS, vmpl=(0, 1, 2, 3))
    def guest_rmpqueries(self, guest: int, gfn: int, vmpl: int) -> None:
        self._does(guest, Rmpquery(gfn * PAGE, vmpl))

    @action(guest=BITS, gfn=GFNS, user=(False, True))
    def guest_executes(self, guest: int, gfn: int, user: bool) -> None:
        self._does(guest, Fetch(gfn * PAGE, user))

    # -- firmware commands ------------------------------------------------------------------------

    @action(pfn=PAGES)
    def give_to_firmware(self, pfn: int) -> None:
        rmpupdate(self.soc, pfn * PAGE, RmpState(assigned=1, immutable=1))

    @action(pfn=PAGES, size=BITS)
    def page_reclaim(self, pfn: int, size: int) -> None:
        self.soc.psp.command(SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=pfn * PAGE | size))

    @action(pfn=PAGES)
    def page_unsmash(self, pfn: int) -> None:
        paddr = (pfn - pfn % 512) * PAGE
        self.soc.psp.command(SnpCmd.PAGE_UNSMASH, SnpPageUnsmash(paddr=paddr))

    @action(context=CONTEXTS, pfn=PAGES, size=BITS, page_type=(0, 1, 3, 4, 5, 6, 7))
    def launch_update(self, context: int, pfn: int, size: int, page_type: int) -> None:
        """Any type but a VMSA: one of noise may ask for SecureTSC, which is not modelled."""
        buffer = SnpLaunchUpdate(
            gctx_paddr=context * PAGE,
            address=pfn * PAGE,
            page_size=size,
            page_type=page_type,
        )
        self.soc.psp.command(SnpCmd.LAUNCH_UPDATE, buffer)

    @action(guest=BITS, src=PAGES, dst=PAGES, size=BITS)
    def page_move(self, guest: int, src: int, dst: int, size: int) -> None:
        buffer = SnpPageMove(
            gctx_paddr=self.guests[guest].gctx,
            page_size=size,
            src_paddr=src * PAGE,
            dst_paddr=dst * PAGE,
        )
        self.soc.psp.command(SnpCmd.PAGE_MOVE, buffer)

    @action(guest=BITS, pfn=PAGES)
    def page_md_init(self, guest: int, pfn: int) -> None:
        buffer = SnpPageMdInit(gctx_paddr=self.guests[guest].gctx, page_paddr=pfn * PAGE)
        self.soc.psp.command(SnpCmd.PAGE_MD_INIT, buffer)

    @action(guest=BITS, src=PAGES, dst=PAGES, mdata=PAGES, entry=BITS)
    def page_swap_out(self, guest: int, src: int, dst: int, mdata: int, entry: int) -> None:
        buffer = SnpPageSwapOut(
            gctx_paddr=self.guests[guest].gctx,
            src_paddr=src * PAGE,
            dst_paddr=dst * PAGE,
            mdata_paddr=mdata * PAGE + 64 * entry,
        )
        self.soc.psp.command(SnpCmd.PAGE_SWAP_OUT, buffer)

    @action(guest=BITS, src=PAGES, dst=PAGES, mdata=PAGES, entry=BITS)
    def page_swap_in(self, guest: int, src: int, dst: int, mdata: int, entry: int) -> None:
        buffer = SnpPageSwapIn(
            gctx_paddr=self.guests[guest].gctx,
            src_paddr=src * PAGE,
            dst_paddr=dst * PAGE,
            mdata_paddr=mdata * PAGE + 64 * entry,
        )
        self.soc.psp.command(SnpCmd.PAGE_SWAP_IN, buffer)

    @action(guest=BITS, src=PAGES, dst=PAGES, encrypt=(False, True))
    def debug(self, guest: int, src: int, dst: int, encrypt: bool) -> None:
        cmd = SnpCmd.DBG_ENCRYPT if encrypt else SnpCmd.DBG_DECRYPT
        buffer = SnpDbg(
            gctx_paddr=self.guests[guest].gctx, src_addr=src * PAGE, dst_addr=dst * PAGE
        )
        self.soc.psp.command(cmd, buffer)

    @action(guest=BITS, pfn=PAGES)
    def guest_status(self, guest: int, pfn: int) -> None:
        buffer = SnpGuestStatus(gctx_paddr=self.guests[guest].gctx, address=pfn * PAGE)
        self.soc.psp.command(SnpCmd.GUEST_STATUS, buffer)

    @action(context=CONTEXTS)
    def decommission(self, context: int) -> None:
        self.soc.psp.command(SnpCmd.DECOMMISSION, SnpAddr(address=context * PAGE))

    @action(context=CONTEXTS)
    def give_context_page(self, context: int) -> None:
        rmpupdate(self.soc, context * PAGE, RmpState(assigned=1, immutable=1))

    @action(context=CONTEXTS)
    def gctx_create(self, context: int) -> None:
        self.soc.psp.command(SnpCmd.GCTX_CREATE, SnpAddr(address=context * PAGE))

    @action(context=CONTEXTS)
    def launch_start(self, context: int) -> None:
        buffer = SnpLaunchStart(gctx_paddr=context * PAGE, policy=POLICY)
        self.soc.psp.command(SnpCmd.LAUNCH_START, buffer)

    @action(context=CONTEXTS, asid=(0, 1, 1, 2, 2, 99, 100, 5000))
    def activate(self, context: int, asid: int) -> None:
        buffer = SnpActivate(gctx_paddr=context * PAGE, asid=asid)
        self.soc.psp.command(SnpCmd.ACTIVATE, buffer)

    @action(context=CONTEXTS)
    def launch_finish(self, context: int) -> None:
        buffer = SnpLaunchFinish(gctx_paddr=context * PAGE)
        self.soc.psp.command(SnpCmd.LAUNCH_FINISH, buffer)

    @action(asid=(1, 2))
    def take_every_page_back(self, asid: int) -> None:
        """What a hypervisor does before it uses an ASID again, as far as the pages let it."""
        for start, end, value in self.soc.rmp.map.held(0, 3072):
            if value[0] & ASID_MASK == asid << ASID_SHIFT:
                size = 512 if value[0] & PAGESIZE else 1
                state = RmpState(pagesize=int(size == 512))
                rmpupdate(self.soc, start * PAGE, state, (end - start) // size)

    @action(everywhere=OFTEN)
    def wbinvd(self, everywhere: bool) -> None:
        if everywhere:
            self.soc.caches.wbinvd_on_all_cpus()
        else:
            self.soc.caches.wbinvd(0)

    @action()
    def df_flush(self) -> None:
        self.soc.psp.command(SnpCmd.DF_FLUSH)


CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def test_hostility_breaks_no_sentence() -> None:
    run_state_machine_as_test(
        HostileMachine,
        settings=settings(
            max_examples=40, stateful_step_count=60, suppress_health_check=CHECKS
        ),
    )


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_hostility_at_length_breaks_no_sentence() -> None:
    run_state_machine_as_test(
        HostileMachine,
        settings=settings(
            max_examples=400, stateful_step_count=100, suppress_health_check=CHECKS
        ),
    )


def act(machine: HostileMachine, chance: Random) -> None:
    """One rule with operands from a seeded generator, which goes further in the time than Hypothesis."""
    name = chance.choice(sorted(ACTIONS))
    operands = {key: chance.choice(several) for key, several in ACTIONS[name].items()}
    getattr(machine, name)(**operands)


def walk_far(seed: int, machines: int, steps: int) -> None:
    chance = Random(seed)
    for number in range(machines):
        machine = HostileMachine()
        machine.begin(milan=bool(number % 2))
        for _ in range(steps):
            act(machine, chance)
            machine.every_sentence_holds()


@pytest.mark.parametrize("seed", range(4))
def test_seeded_hostility_breaks_no_sentence(seed: int) -> None:
    walk_far(seed, machines=25, steps=100)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4, 12))
def test_seeded_hostility_at_length_breaks_no_sentence(seed: int) -> None:
    walk_far(seed, machines=60, steps=150)


def test_the_states_that_make_it_interesting_are_reached() -> None:
    """One scripted hour of hostility: every `sometimes` of the hardware comes true."""
    soc = snp_machine()
    watched = watch(soc)
    one, two = BareGuest(soc, 1, 1, 512), BareGuest(soc, 2, 2, 1536)
    one.launch([b"\x11" * PAGE])
    two.launch([b"\x22" * PAGE])
    one.assign(512, 512, large=True)
    one.does(Pvalidate(512 * PAGE, 1, True))
    with pytest.raises(Exited):
        one.does(Pvalidate(513 * PAGE, 0, True))  # SIZEM
    psmash(soc, one.spa(512))
    with pytest.raises(Exited):
        one.does(Load(512 * PAGE, 1))  # 2M leaf, 4K entries
    rmpupdate(soc, one.spa(0), RmpState(1, 1, 0, 0, 1))  # 2M request over 4K entries
    rmpupdate(soc, one.spa(1), RmpState(1, 0, 0, 1 * PAGE, 2))  # straight to the other guest
    with pytest.raises(Exited):
        one.does(Load(1 * PAGE, 1))  # not its own any more
    two.map(1, one.first_pfn + 1)
    with pytest.raises(GuestException):
        two.does(Load(1 * PAGE, 1))  # its own, never accepted
    two.map(3, one.first_pfn + 1)
    with pytest.raises(Exited):
        two.does(Load(3 * PAGE, 1))  # its own, bound elsewhere
    with pytest.raises(HostRmpFault):
        soc.host_write(one.spa(1), b"x")
    update_of_firmware = RmpState(assigned=1, immutable=1)
    rmpupdate(soc, 3 * PAGE, update_of_firmware)
    rmpupdate(soc, 3 * PAGE, RmpState())  # immutable
    soc.psp.command(SnpCmd.GCTX_CREATE, SnpAddr(address=4 * PAGE))  # not a Firmware page
    soc.rmp.in_use.add(one.first_pfn)
    rmpupdate(soc, one.spa(0), RmpState())
    soc.rmp.in_use.clear()
    three = BareGuest(soc, 3, 4, 2560)
    three.launch([b"\x33" * PAGE], vmpl=1)
    with pytest.raises(Exited):
        three.does(Load(1 * PAGE, 1))  # VMPL1 has no permission
    command(soc, SnpCmd.DECOMMISSION, SnpAddr(address=two.gctx))
    for pfn in (two.first_pfn, two.first_pfn + 1, one.first_pfn + 1):
        rmpupdate(soc, pfn * PAGE, RmpState())
    command(soc, SnpCmd.GCTX_CREATE, SnpAddr(address=two.gctx))
    command(soc, SnpCmd.LAUNCH_START, SnpLaunchStart(gctx_paddr=two.gctx, policy=POLICY))
    soc.psp.command(SnpCmd.ACTIVATE, SnpActivate(gctx_paddr=two.gctx, asid=2))

    from softcvm.invariants.registry import registered

    assert {hope.name for hope in registered()[2]} - watched.reached == set()
    assert [c.name for c in check_all(soc, watched) if not c.held] == []
