"""Random commands and RMPUPDATEs: pages go only where the published table lets an agent move them.

The table and the decoding of states are written here anew from [ABI-56860] page states; they
share no code with the model.
"""

from collections.abc import Iterable
from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from softcvm.abi.layout import Layout
from softcvm.abi.rmp import RmpState
from softcvm.abi.snp_firmware import (
    SnpActivate,
    SnpAddr,
    SnpCmd,
    SnpDbg,
    SnpLaunchFinish,
    SnpLaunchStart,
    SnpLaunchUpdate,
    SnpPageMdInit,
    SnpPageMove,
    SnpPageReclaim,
    SnpPageSwapIn,
    SnpPageSwapOut,
    SnpPageUnsmash,
    SnpStatus,
)
from softcvm.hw.events import RmpTransition
from softcvm.hw.insn.psmash import psmash
from softcvm.hw.insn.rmpupdate import rmpupdate
from softcvm.sim.events import Event
from tests.hw.psp.host import POLICY, Host

ALLOWED: dict[str, set[tuple[str, str]]] = {
    "RMPUPDATE": {
        *((a, b) for a in ("hv", "gi", "gv", "rc") for b in ("hv", "gi", "pg", "fw", "rc")),
        ("gv", "gv"),
        ("gv", "ps"),
    },
    "PSMASH": {(s, s) for s in ("gi", "gv", "rc", "pg", "ps", "fw")},
    "SNP_GCTX_CREATE": {("fw", "cx")},
    "SNP_DECOMMISSION": {("cx", "fw")},
    "SNP_LAUNCH_UPDATE": {("pg", "gv")},
    "SNP_PAGE_RECLAIM": {("fw", "rc"), ("md", "rc"), ("pg", "gi"), ("ps", "gv")},
    "SNP_PAGE_UNSMASH": {("pg", "pg"), ("ps", "ps")},
    "SNP_PAGE_MD_INIT": {("fw", "md")},
    "SNP_PAGE_MOVE": {
        ("pg", "gi"),
        ("ps", "gi"),
        ("pg", "gv"),
        ("gi", "gi"),  # a page moved onto itself is written twice
        ("md", "fw"),
        ("fw", "md"),
    },
    "SNP_PAGE_SWAP_OUT": {("pg", "pg"), ("ps", "pg"), ("md", "fw")},
    "SNP_PAGE_SWAP_IN": {("pg", "pg"), ("pg", "ps"), ("fw", "md")},
}
GUEST = 0x3FF << 51


def state(lo: int) -> str:
    """The state of an entry's low quadword."""
    assigned, immutable, validated = lo & 1, lo >> 2 & 1, lo >> 62 & 1
    if not assigned:
        return "hf" if immutable else "hv"
    if lo & GUEST:
        return {(0, 0): "gi", (0, 1): "gv", (1, 0): "pg", (1, 1): "ps"}[immutable, validated]
    if not immutable:
        return "rc"
    if lo >> 48 & 7:
        return "md" if lo >> 48 & 7 == 1 else "other"
    if lo >> 12 & (1 << 36) - 1:
        return "other"
    return "cx" if lo >> 61 & 1 else "fw"


PAGES = [(1024 + i) << 12 for i in range(6)]
LARGE = 2048 << 12
pages = st.sampled_from(PAGES)
any_page = st.sampled_from([*PAGES, LARGE, LARGE + 4096])
gctxs = st.sampled_from([PAGES[0]] * 9 + PAGES)
others = st.sampled_from(PAGES[1:])
asids = st.sampled_from([1, 1, 1, 1, 1, 2])
bits = st.integers(0, 1)
gpas = st.sampled_from([0, 0x1000, 0x20_0000])


def rmp_request(pagesize: int) -> st.SearchStrategy[RmpState]:
    return st.one_of(
        st.just(RmpState(pagesize=pagesize)),
        st.just(RmpState(assigned=1, immutable=1, pagesize=pagesize)),
        st.builds(
            RmpState,
            assigned=st.just(1),
            immutable=bits,
            asid=asids,
            pagesize=st.just(pagesize),
            gpa=st.just(0x20_0000) if pagesize else gpas,
        ),
    )


def command(cmd: SnpCmd, buffer: st.SearchStrategy[Layout]) -> st.SearchStrategy[object]:
    return st.tuples(st.just(cmd), buffer)


COMMANDS = st.one_of(
    command(SnpCmd.GCTX_CREATE, st.builds(SnpAddr, address=pages)),
    command(
        SnpCmd.LAUNCH_START, st.builds(SnpLaunchStart, gctx_paddr=gctxs, policy=st.just(POLICY))
    ),
    command(SnpCmd.ACTIVATE, st.builds(SnpActivate, gctx_paddr=gctxs, asid=asids)),
    command(
        SnpCmd.LAUNCH_UPDATE,
        st.builds(
            SnpLaunchUpdate,
            gctx_paddr=gctxs,
            address=any_page,
            page_size=bits,
            page_type=st.integers(1, 5),
        ),
    ),
    command(
        SnpCmd.LAUNCH_UPDATE,
        st.builds(SnpLaunchUpdate, gctx_paddr=gctxs, address=others, page_type=st.just(1)),
    ),
    command(SnpCmd.LAUNCH_FINISH, st.builds(SnpLaunchFinish, gctx_paddr=gctxs)),
    command(SnpCmd.DECOMMISSION, st.builds(SnpAddr, address=pages)),
    command(SnpCmd.PAGE_RECLAIM, st.builds(SnpPageReclaim, paddr=any_page, page_size=bits)),
    command(SnpCmd.PAGE_UNSMASH, st.builds(SnpPageUnsmash, paddr=st.just(LARGE))),
    command(
        SnpCmd.PAGE_MOVE,
        st.builds(SnpPageMove, gctx_paddr=gctxs, src_paddr=any_page, dst_paddr=any_page),
    ),
    command(SnpCmd.PAGE_MD_INIT, st.builds(SnpPageMdInit, gctx_paddr=gctxs, page_paddr=others)),
    command(
        SnpCmd.PAGE_SWAP_OUT,
        st.builds(
            SnpPageSwapOut,
            gctx_paddr=gctxs,
            src_paddr=others,
            dst_paddr=others,
            page_type=st.integers(0, 2),
            root_mdata_en=st.just(1),
        ),
    ),
    command(
        SnpCmd.PAGE_SWAP_IN,
        st.builds(
            SnpPageSwapIn,
            gctx_paddr=gctxs,
            src_paddr=others,
            dst_paddr=others,
            page_type=st.integers(0, 2),
            root_mdata_en=st.just(1),
        ),
    ),
    command(
        SnpCmd.DBG_ENCRYPT,
        st.builds(SnpDbg, gctx_paddr=gctxs, src_addr=others, dst_addr=any_page),
    ),
    st.tuples(st.just("rmp"), others, rmp_request(0)),
    st.tuples(st.just("again"), others, rmp_request(0)),
    st.tuples(st.just("again"), others, rmp_request(0)),
    st.tuples(st.just("again"), st.just(LARGE), rmp_request(1)),
    st.tuples(st.just("swap"), others),
    st.tuples(st.just("rmp"), st.just(LARGE), st.one_of(rmp_request(0), rmp_request(1))),
    st.tuples(st.just("rmp"), pages, rmp_request(0)),
    st.tuples(st.just("smash"), st.just(LARGE)),
)


def opening() -> Iterable[tuple[object, ...]]:
    """A guest launching under ASID 1, so that random commands find something to work on."""
    gctx = PAGES[0]
    yield "rmp", gctx, RmpState(assigned=1, immutable=1)
    yield SnpCmd.GCTX_CREATE, SnpAddr(address=gctx)
    yield SnpCmd.LAUNCH_START, SnpLaunchStart(gctx_paddr=gctx, policy=POLICY)
    yield SnpCmd.ACTIVATE, SnpActivate(gctx_paddr=gctx, asid=1)
    for spa in PAGES[1:3]:
        yield "rmp", spa, RmpState(assigned=1, immutable=1, asid=1, gpa=0x1000)
    yield "rmp", LARGE, RmpState(assigned=1, immutable=1, asid=1, gpa=0x20_0000, pagesize=1)


@settings(max_examples=250)
@given(st.lists(COMMANDS, min_size=10, max_size=60))
def test_pages_go_only_where_the_table_allows(steps: list[tuple[object, ...]]) -> None:
    host = Host().init()
    seen: list[Event] = []
    host.soc.tp.attach(seen.append)
    for step in chain(opening(), steps):
        seen.clear()
        status: object = None
        match step:
            case ("rmp", int(spa), RmpState() as request):
                rmpupdate(host.soc, spa, request)
            case ("again", int(spa), RmpState() as request):  # back to the hypervisor first
                size = request.pagesize
                host.run(SnpCmd.PAGE_RECLAIM, SnpPageReclaim(paddr=spa | size))
                rmpupdate(host.soc, spa, RmpState(pagesize=size))
                rmpupdate(host.soc, spa, request)
            case ("swap", int(spa)):  # only `immutable` changes: Guest-Valid becomes Pre-Swap
                entry = host.soc.rmp.entry(spa >> 12)
                same = RmpState(1, entry.pagesize, 1, entry.gpa, entry.asid)
                rmpupdate(host.soc, spa, same)
            case ("smash", int(spa)):
                psmash(host.soc, spa)
            case (SnpCmd() as cmd, Layout() as buffer):
                status = host.run(cmd, buffer)
            case _:
                raise TypeError(f"no such step: {step}")
        for event in seen:
            if isinstance(event, RmpTransition) and event.status == "SUCCESS":
                assert status in (None, SnpStatus.SUCCESS)
                pair = (state(event.old_lo), state(event.new_lo))
                assert pair in ALLOWED[event.agent], (event.agent, pair)
        check_every_entry(host)


def check_every_entry(host: Host) -> None:
    counts: dict[int, int] = {}
    for start, end, value in host.soc.rmp.map.runs(1024, 3072):
        lo, _ = host.soc.rmp.quadwords(value, start)
        assert state(lo) != "other"
        if lo & GUEST:
            asid = (lo & GUEST) >> 51
            counts[asid] = counts.get(asid, 0) + end - start
        if lo >> 62 & 1:
            assert lo & GUEST
    assert counts == host.soc.rmp.asid_pages
    for asid in host.psp.asids.in_use:
        assert host.psp.asid_runnable(asid)
        assert asid not in host.psp.asids.dirty
