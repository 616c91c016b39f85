"""arch/x86/virt/svm/sev.c: the host's operations on the RMP."""

from errno import EEXIST, EFAULT, EINVAL, ENODEV
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcvm.abi.rmp import PageState, PsmashStatus
from softcvm.hw.access import HostRmpFault
from softcvm.hw.events import RmpTransition
from softcvm.hw.profile import GENOA
from softcvm.hw.soc import Soc
from softcvm.kernel.arch.x86.virt.svm import sev
from softcvm.kernel.arch.x86.virt.svm.sev import RmpError, RmpSpin, SnpHost
from softcvm.kernel.errors import KernelError
from softcvm.kernel.host import Linux
from softcvm.kernel.profile import kernel_profile
from softcvm.sim.addr import Asid, Gpa, Pfn, PgLevel
from softcvm.sim.choice import Scripted

K4, M2 = PgLevel.PG_4K, PgLevel.PG_2M
A7 = Asid(7)


def test_r0_2_make_private_binds_a_pfn_and_make_shared_resets_the_whole_entry(
    host: Any,
) -> None:
    linux, rmp = host.linux, host.soc.rmp
    for level, count in ((K4, 1), (M2, 512)):
        for immutable in (False, True):
            pfn = Pfn(0x2000)
            sev.rmp_make_private(linux, pfn, Gpa(0x40_0000), level, A7, immutable=immutable)
            entry = rmp.head(pfn)
            assert (entry.assigned, entry.gpa, entry.asid) == (1, 0x40_0000, 7)
            assert (entry.pagesize, entry.immutable) == (int(level == M2), int(immutable))
            assert rmp.asid_pages[7] == count
            if immutable:
                with pytest.raises(RmpError):  # only firmware takes an immutable page back
                    sev.rmp_make_shared(linux, pfn, level)
                rmp.firmware_write("test", pfn, count, entry._replace(immutable=0, lock=0))
            sev.rmp_make_shared(linux, pfn, level)
            assert rmp.raw(pfn) == bytes(16)
            assert 7 not in rmp.asid_pages


def test_a_lookup_needs_snp_and_an_entry(host: Any) -> None:
    bare = Linux(Soc(GENOA, 1 << 12), kernel_profile("7.3"))
    bare.snp = SnpHost(bare)
    for call in (
        lambda: sev.snp_lookup_rmpentry(bare, Pfn(1)),
        lambda: sev.rmp_make_shared(bare, Pfn(1), K4),
        lambda: sev.psmash(bare, Pfn(0)),
    ):
        with pytest.raises(KernelError) as none:
            call()
        assert none.value.errno == ENODEV
    with pytest.raises(KernelError) as outside:
        sev.snp_lookup_rmpentry(host.linux, Pfn(host.soc.rmp.covered_pages))
    assert outside.value.errno == EFAULT
    with pytest.raises(KernelError) as not_memory:
        sev.psmash(host.linux, Pfn(host.soc.memory_pages))
    assert not_memory.value.errno == EINVAL


def test_a_lookup_reads_assigned_from_the_page_and_the_level_from_the_2m_head(
    host: Any,
) -> None:
    linux = host.linux
    sev.rmp_make_private(linux, Pfn(0x2000), Gpa(0), M2, A7, immutable=False)
    before = linux.counters.rmp_lookups
    for pfn in (0x2000, 0x2001, 0x21FF):
        found = sev.snp_lookup_rmpentry(linux, Pfn(pfn))
        assert (found.assigned, found.level) == (True, M2)
    assert linux.counters.rmp_lookups == before + 3
    assert sev.snp_lookup_rmpentry(linux, Pfn(0x2200))[2:] == (False, K4)


def test_a_transient_overlap_is_retried_until_it_is_gone(boot: Any) -> None:
    picks = Scripted({"RMPUPDATE finds the entry locked": [0] * 600 + [1, 1, 1]})
    host = boot(choices=picks)
    for pfn in range(0x2000, 0x2400):
        sev.rmp_make_private(host.linux, Pfn(pfn), Gpa(pfn << 12), K4, A7, immutable=False)
    assert host.linux.counters.rmp_retries == 3
    assert host.soc.rmp.asid_pages[7] == 0x400


def test_a_lasting_overlap_is_a_cpu_that_spins_and_not_an_errno(host: Any) -> None:
    sev.rmp_make_private(host.linux, Pfn(0x2000), Gpa(0), M2, A7, immutable=False)
    with pytest.raises(RmpSpin, match="PFN 0x2005"):
        sev.rmp_make_shared(host.linux, Pfn(0x2005), K4)
    sev.rmp_make_private(host.linux, Pfn(0x2405), Gpa(0), K4, A7, immutable=False)
    with pytest.raises(RmpSpin):
        sev.rmp_make_private(host.linux, Pfn(0x2400), Gpa(0), M2, A7, immutable=False)


def test_psmash_keeps_the_binding_and_retries_while_in_use(boot: Any) -> None:
    host = boot(choices=Scripted({"PSMASH finds the entry locked": [1, 1]}))
    linux = host.linux
    sev.rmp_make_private(linux, Pfn(0x2000), Gpa(0x40_0000), M2, A7, immutable=False)
    assert sev.snp_rmptable_psmash(linux, Pfn(0x2123)) is PsmashStatus.SUCCESS
    assert linux.counters.rmp_retries == 2
    entry = host.soc.rmp.entry(0x2123)
    assert (entry.pagesize, entry.gpa, entry.asid) == (0, 0x40_0000 + 0x123000, 7)


def test_a_failing_transition_names_the_entry(host: Any) -> None:
    sev.rmp_make_private(host.linux, Pfn(0x2001), Gpa(0), K4, Asid(0), immutable=True)
    with pytest.raises(RmpError, match=r"PFN 0x2001, RMP entry: \[0x.* - 0x.*\]") as failed:
        sev.rmp_make_private(host.linux, Pfn(0x2000), Gpa(0), K4, A7, immutable=False, count=3)
    assert (failed.value.errno, failed.value.done) == (EFAULT, 1)
    assert host.soc.rmp.state(0x2000) is PageState.GUEST_INVALID
    assert host.soc.rmp.state(0x2002) is PageState.HYPERVISOR


def test_a_2m_transition_needs_an_aligned_pfn_in_memory(host: Any) -> None:
    for pfn in (0x2001, host.soc.memory_pages):
        with pytest.raises(RmpError) as failed:
            sev.rmp_make_private(host.linux, Pfn(pfn), Gpa(0), M2, A7, immutable=False)
        assert failed.value.errno == EFAULT


# The direct map


def test_the_direct_map_is_split_once_where_a_4k_page_changes_and_never_joined(
    host: Any,
) -> None:
    linux = host.linux
    level = linux.snp.direct_map.level
    before = linux.counters.direct_map_splits
    assert level(Pfn(0x2005)) is M2
    sev.rmp_make_private(linux, Pfn(0x2005), Gpa(0), K4, A7, immutable=False, count=3)
    assert linux.counters.direct_map_splits == before + 1
    assert level(Pfn(0x2005)) is level(Pfn(0x21FF)) is K4
    assert level(Pfn(0x2200)) is M2
    sev.rmp_make_shared(linux, Pfn(0x2005), K4, 3)
    sev.rmp_make_private(linux, Pfn(0x2400), Gpa(0), M2, A7, immutable=False)
    assert linux.counters.direct_map_splits == before + 1
    assert (level(Pfn(0x2005)), level(Pfn(0x2400))) == (K4, M2)


def test_without_the_split_a_host_write_nearby_would_fault(host: Any) -> None:
    linux, soc = host.linux, host.soc
    sev.rmp_make_private(linux, Pfn(0x2005), Gpa(0), K4, A7, immutable=False)
    with pytest.raises(HostRmpFault):
        soc.host_write(0x2006 << 12, b"x", M2)
    soc.host_write(0x2006 << 12, b"x", linux.snp.direct_map.level(Pfn(0x2006)))


def test_the_split_comes_before_the_processor_is_asked_and_stays_when_it_refuses(
    host: Any,
) -> None:
    linux, rmp = host.linux, host.soc.rmp
    rmp.firmware_write("test", 0x2600, 1, rmp.head(0x2600)._replace(immutable=1))
    with pytest.raises(RmpError):
        sev.rmp_make_private(linux, Pfn(0x2600), Gpa(0), K4, A7, immutable=False, count=600)
    assert linux.snp.direct_map.level(Pfn(0x2600)) is K4
    assert linux.snp.direct_map.level(Pfn(0x2800)) is M2  # never came that far


def test_a_1g_mapping_is_split_to_2m_around_the_4k_page(boot: Any) -> None:
    host = boot(pages=1 << 19)
    direct_map = host.linux.snp.direct_map
    pfn = Pfn(0x4_1234)
    assert direct_map.level(pfn) is PgLevel.PG_1G
    sev.rmp_make_private(host.linux, pfn, Gpa(0), K4, A7, immutable=False)
    assert direct_map.level(pfn) is K4
    assert direct_map.level(Pfn(pfn + 0x200)) is M2


# Row 1.7


def test_r1_7_reassigning_is_refused_only_with_the_sanity_check_and_its_lookups_are_counted(
    boot: Any,
) -> None:
    plain, strict = boot(), boot(reject_assigned=True)
    for host in (plain, strict):
        sev.rmp_make_private(host.linux, Pfn(0x2000), Gpa(0), K4, A7, immutable=False, count=16)
    sev.rmp_make_private(plain.linux, Pfn(0x2000), Gpa(0), K4, Asid(8), immutable=False)
    assert plain.soc.rmp.head(0x2000).asid == 8  # one guest's page was given to another
    assert plain.linux.counters.rmp_sanity_lookups == 0
    read = strict.linux.counters.rmp_sanity_lookups
    assert read >= 16
    with pytest.raises(RmpError) as refused:
        sev.rmp_make_private(
            strict.linux, Pfn(0x1FFE), Gpa(0), K4, Asid(8), immutable=False, count=4
        )
    assert (refused.value.errno, refused.value.done) == (EEXIST, 2)
    assert strict.soc.rmp.head(0x2000).asid == 7
    assert strict.linux.counters.rmp_sanity_lookups == read + 3
    sev.rmp_make_shared(strict.linux, Pfn(0x2000), K4, 16)  # giving back needs no look
    assert strict.linux.counters.rmp_sanity_lookups == read + 3


def test_r1_6_every_transition_is_seen_with_old_new_and_result(host: Any) -> None:
    seen: list[RmpTransition] = []
    detach = host.linux.tp.attach(
        lambda event: seen.append(event) if isinstance(event, RmpTransition) else None
    )
    sev.rmp_make_private(host.linux, Pfn(0x2000), Gpa(0x9000), K4, A7, immutable=True)
    with pytest.raises(RmpError):
        sev.rmp_make_shared(host.linux, Pfn(0x2000), K4)
    detach()
    made, refused = seen
    assert (made.agent, made.pfn, made.npages, made.old_lo) == ("RMPUPDATE", 0x2000, 1, 0)
    assert made.new_lo == 1 | 1 << 2 | 9 << 12 | 7 << 51
    assert made.status == "SUCCESS"
    assert (refused.old_lo, refused.new_lo) == (made.new_lo, made.new_lo)
    assert refused.status == "FAIL_PERMISSION"


def test_leaked_pages_are_never_handed_out_again(host: Any) -> None:
    linux = host.linux
    pfn = linux.page_alloc.alloc_pages(2)
    sev.snp_leak_pages(linux, Pfn(pfn + 1), 2)
    assert linux.leaked_pages == 2
    given = {p + i for p, n in linux.page_alloc.alloc_run(2000) for i in range(n)}
    assert not given & {pfn + 1, pfn + 2}


# Runs equal the loop over their pages

_OPS = st.lists(
    st.tuples(
        st.sampled_from(("private", "shared", "psmash")),
        st.integers(0x2000, 0x2000 + 3 * 512),
        st.sampled_from((K4, M2)),
        st.integers(1, 700),
        st.integers(1, 3),
        st.booleans(),
    ),
    max_size=8,
)


@settings(max_examples=60)
@given(_OPS)
def test_a_run_of_pages_means_the_loop_over_them(
    ops: list[tuple[str, int, PgLevel, int, int, bool]],
) -> None:
    def world() -> Linux:
        soc = Soc(GENOA, 0x4000)
        soc.rmp.base, soc.rmp.end = 0x3F0_0000, 0x3FF_FFFF
        linux = Linux(soc, kernel_profile("7.3"))
        linux.snp = SnpHost(linux)
        sev.snp_rmptable_init(linux)
        return linux

    at_once, one_by_one = world(), world()
    for op, pfn, level, count, asid, immutable in ops:
        size = 512 if level is M2 else 1
        pfn -= pfn % size
        count = max(1, count // size)
        outcomes = []
        for linux, step in ((at_once, count), (one_by_one, 1)):
            outcomes.append(_apply(linux, op, pfn, level, count, asid, immutable, step))
        assert outcomes[0] == outcomes[1]
    a, b = at_once, one_by_one
    assert a.soc.rmp.map == b.soc.rmp.map
    assert a.soc.rmp.asid_pages == b.soc.rmp.asid_pages
    assert a.soc.counters == b.soc.counters
    assert a.counters == b.counters
    assert a.snp.direct_map.levels == b.snp.direct_map.levels


def _apply(
    linux: Linux,
    op: str,
    pfn: int,
    level: PgLevel,
    count: int,
    asid: int,
    immutable: bool,
    step: int,
) -> str:
    size = 512 if level is M2 else 1
    for at in range(0, count, step):
        page, gpa = Pfn(pfn + at * size), Gpa((at * size + 512) << 12)
        try:
            if op == "private":
                sev.rmp_make_private(
                    linux, page, gpa, level, Asid(asid), immutable=immutable, count=step
                )
            elif op == "shared":
                sev.rmp_make_shared(linux, page, level, step)
            else:
                sev.snp_rmptable_psmash(linux, page)
                if step == count:
                    for other in range(1, count):
                        sev.snp_rmptable_psmash(linux, Pfn(page + other * size))
        except (RmpError, RmpSpin) as failed:
            return str(failed)
    return "done"
