"""guest_memfd's hooks for SNP and the RMP fault: runs against loops, levels, and what is taken back."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from softcvm.abi.insn import Load, Program, Pvalidate, Rmpadjust, Store, Touch
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.rmp import PageState
from softcvm.hw.access import HostRmpFault
from softcvm.kernel.arch.x86.kvm.svm import gmem, sev
from softcvm.kernel.arch.x86.virt.svm import sev as virt
from softcvm.kernel.arch.x86.virt.svm.sev import rmp_make_private
from softcvm.kernel.errors import KernelError
from softcvm.kernel.host import Warn
from softcvm.sim.addr import Asid, Gfn, Gpa, Pfn, PgLevel
from softcvm.sim.steps import run

BASE = 0x4000
PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


_steps = st.lists(
    st.tuples(
        st.sampled_from(("prepare 4K", "prepare 2M", "free", "smash", "run")),
        st.one_of(st.sampled_from([0, 512, 1024]), st.integers(0, 3 * 512 - 1)),
        st.one_of(st.sampled_from([1, 256, 512, 1024]), st.integers(1, 900)),
    ),
    max_size=7,
)


@settings(max_examples=50)
@example([("prepare 2M", 0, 1), ("free", 0, 512)])
@example([("prepare 2M", 0, 1500), ("free", 100, 1200), ("free", 0, 1536)])
@example([("prepare 4K", 700, 30), ("prepare 2M", 0, 1536), ("run", 0, 900), ("run", 512, 900)])
@given(_steps)
def test_hooks_over_runs_mean_the_loops_over_their_pages(
    boot: Any, steps: list[tuple[str, int, int]]
) -> None:
    worlds = []
    for hook in (_at_once, _page_by_page):
        host = boot()
        kvm = host.vm().kvm
        answers = [hook(kvm, what, BASE + at, at, n) for what, at, n in steps]
        worlds.append(
            (
                answers,
                host.soc.rmp.map.runs(BASE - 512, BASE + 5 * 512),
                host.soc.rmp.asid_pages,
                host.soc.counters,
                host.linux.counters,
                host.linux.snp.direct_map.levels.runs(),
            )
        )
    assert worlds[0] == worlds[1]


def _at_once(kvm: Any, what: str, pfn: int, gfn: int, npages: int) -> int:
    match what:
        case "prepare 4K" | "prepare 2M":
            order = 9 if what == "prepare 2M" else 0
            gmem.sev_gmem_prepare(kvm, Pfn(pfn), Gfn(gfn), npages, order)
        case "free":
            gmem.sev_gmem_invalidate(kvm.linux, Pfn(pfn), Pfn(pfn + npages))
        case "smash":
            virt.snp_rmptable_psmash(kvm.linux, Pfn(pfn))
        case "run":
            return gmem.sev_gmem_mapping_run(kvm, Pfn(pfn), npages, True)
        case _:
            raise AssertionError(what)
    return 0


def _page_by_page(kvm: Any, what: str, pfn: int, gfn: int, npages: int) -> int:
    """The loops of arch/x86/kvm/svm/sev.c (v6.12), one page after the other."""
    linux, asid = kvm.linux, kvm.arch.sev.asid
    match what:
        case "prepare 4K" | "prepare 2M":
            for i in range(npages):
                if virt.snp_lookup_rmpentry(linux, Pfn(pfn + i)).assigned:
                    continue
                head = pfn + i - (pfn + i) % 512
                large = what == "prepare 2M" and not any(
                    virt.snp_lookup_rmpentry(linux, Pfn(p)).assigned
                    for p in range(head, head + 512)
                )
                at = head if large else pfn + i
                gpa = Gpa((gfn + at - pfn) << 12)
                level = PgLevel.PG_2M if large else PgLevel.PG_4K
                virt.rmp_make_private(linux, Pfn(at), gpa, level, asid, immutable=False)
        case "free":
            at, end = pfn, pfn + npages
            while at < end:
                found = virt.snp_lookup_rmpentry(linux, Pfn(at))
                size = 1
                if found.assigned:
                    large = found.level is PgLevel.PG_2M
                    whole = large and at % 512 == 0 and end >= at + 512
                    size = 512 if whole else 1
                    if large and not whole:
                        virt.snp_rmptable_psmash(linux, Pfn(at))
                    level = PgLevel.PG_2M if whole else PgLevel.PG_4K
                    virt.rmp_make_shared(linux, Pfn(at), level)
                    linux.soc.caches.clflush(size)
                at += size
        case "smash":
            virt.snp_rmptable_psmash(linux, Pfn(pfn))
        case "run":
            first = gmem.sev_gmem_max_mapping_level(kvm, Pfn(pfn), True)
            same = 1
            while same < npages:
                if gmem.sev_gmem_max_mapping_level(kvm, Pfn(pfn + same), True) != first:
                    linux.counters.rmp_lookups -= (
                        1  # the look that ends the run is the next one's
                    )
                    break
                same += 1
            return same
        case _:
            raise AssertionError(what)
    return 0


def test_prepare_leaves_what_is_assigned_alone_whoever_owns_it(host: Any) -> None:
    """The kernel's own gap: no look at ASID or GPA. The guest finds out by an RMP fault."""
    kvm, other = host.vm().kvm, host.vm().kvm
    gmem.sev_gmem_prepare(kvm, Pfn(BASE), Gfn(7), 1, 0)
    gmem.sev_gmem_prepare(other, Pfn(BASE), Gfn(9), 1, 0)
    entry = host.soc.rmp.head(BASE)
    assert (entry.asid, entry.gpa) == (kvm.arch.sev.asid, 7 << 12)


def test_prepare_of_a_2m_folio_needs_the_whole_region_unassigned(host: Any) -> None:
    kvm, rmp = host.vm().kvm, host.soc.rmp
    gmem.sev_gmem_prepare(kvm, Pfn(BASE + 5), Gfn(5), 1, 9)
    assert (rmp.head(BASE).pagesize, rmp.head(BASE).gpa) == (1, 0)
    gmem.sev_gmem_prepare(kvm, Pfn(BASE + 517), Gfn(517), 1, 0)
    gmem.sev_gmem_prepare(kvm, Pfn(BASE + 600), Gfn(600), 1, 9)
    assert rmp.head(BASE + 512).assigned == 0
    assert rmp.head(BASE + 600).pagesize == 0


def test_prepare_and_levels_mean_nothing_to_other_vms(host: Any) -> None:
    kvm = host.vm(VmType.SW_PROTECTED, init=False).kvm
    gmem.sev_gmem_prepare(kvm, Pfn(BASE), Gfn(0), 1, 0)
    assert host.soc.rmp.head(BASE).assigned == 0
    assert gmem.sev_gmem_max_mapping_level(kvm, Pfn(BASE), True) == 0
    snp = host.vm().kvm
    assert gmem.sev_gmem_max_mapping_level(snp, Pfn(BASE), False) == 0
    assert gmem.sev_gmem_max_mapping_level(snp, Pfn(BASE), True) is PgLevel.PG_4K


def test_prepare_beyond_the_table_is_enoent_and_a_refusal_einval(host: Any) -> None:
    kvm = host.vm().kvm
    with pytest.raises(KernelError) as beyond:
        gmem.sev_gmem_prepare(kvm, Pfn(host.soc.rmp.covered_pages), Gfn(0), 1, 0)
    assert beyond.value.errno == 2
    with pytest.raises(KernelError) as fixed:
        gmem.sev_gmem_prepare(kvm, Pfn(0xA0), Gfn(0), 1, 0)  # HV-Fixed: RMPUPDATE refuses
    assert fixed.value.errno == 22


def test_a_page_that_cannot_be_taken_back_is_a_warning_and_the_others_go_on(host: Any) -> None:
    linux = host.linux
    kvm = host.vm().kvm
    gmem.sev_gmem_prepare(kvm, Pfn(BASE), Gfn(0), 8, 0)
    rmp_make_private(linux, Pfn(BASE + 3), Gpa(0), PgLevel.PG_4K, Asid(0), immutable=True)
    warned: list[Warn] = []
    linux.tp.attach(lambda e: warned.append(e) if isinstance(e, Warn) else None)
    flushed = host.soc.counters.clflush_pages
    gmem.sev_gmem_invalidate(linux, Pfn(BASE), Pfn(BASE + 8))
    states = [host.soc.rmp.state(BASE + i) for i in range(8)]
    assert states[3] is PageState.FIRMWARE
    assert {*states[:3], *states[4:]} == {PageState.HYPERVISOR}
    assert [w.where for w in warned] == ["sev_gmem_invalidate"]
    assert host.soc.counters.clflush_pages - flushed == 7


def test_a_page_firmware_keeps_kills_the_vm_and_is_leaked(host: Any) -> None:
    linux = host.linux
    vm = host.vm()
    pfn = linux.page_alloc.alloc_pages()
    rmp_make_private(linux, pfn, Gpa(0), PgLevel.PG_4K, Asid(0), immutable=True)
    with pytest.raises(KernelError) as kept:
        sev.kvm_rmp_make_shared(vm.kvm, pfn, PgLevel.PG_4K)
    assert kept.value.errno == 5
    assert vm.kvm.vm_dead
    assert linux.leaked_pages == 1
    assert vm.user.errno(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, 0) == 5
    other = host.vm()
    context = linux.page_alloc.alloc_pages()
    host.soc.rmp.firmware_write(
        "test", context, 1, host.soc.rmp.head(pfn)._replace(vmsa=1)
    )  # a Context page: PAGE_RECLAIM refuses it
    with pytest.raises(KernelError):
        run(sev.snp_page_reclaim(other.kvm, context))
    assert linux.leaked_pages == 2
    assert other.kvm.vm_dead


# Row 2.6 and the RMP fault, by a guest


@pytest.mark.parametrize("touch", ["access", "pvalidate", "rmpadjust"])
def test_r2_6_kvm_smashes_a_2m_entry_that_the_guest_uses_at_4k(boot: Any, touch: str) -> None:
    """Half of a 2M range is converted: its mapping is 4K, its entry 2M until the guest comes back."""
    host, seen = boot(order=9), []

    def guest(_: int) -> Program:
        done = yield Pvalidate(0x20_0000, 1, True)
        assert (done.code, done.cf) == (0, False)
        yield Store(0x20_0000, b"before")
        yield Touch(0x1000, c=False)  # user space converts the upper half meanwhile
        if touch == "access":
            seen.append((yield Load(0x20_0000, 6)))
        elif touch == "pvalidate":
            seen.append((yield Pvalidate(0x20_0000, 0, True)))
        else:
            seen.append((yield Rmpadjust(0x20_0000, 0, 1, 0)))

    host.guest(guest)
    vm = host.vm()
    vm.memory(1024)
    vm.attributes(2, 1, private=False)
    vm.start()
    vm.vcpu()
    vm.finish()
    hw, rmp = host.soc.counters, host.soc.rmp
    seen_exit = vm.run()
    assert (
        seen_exit.exit_reason == k.KVM_EXIT_MEMORY_FAULT
    )  # 0x1000 is private, the access is not
    vm.attributes(1, 1, private=False)
    head = next(s for s, _, (attrs, _) in rmp.map.held() if attrs & 2)
    assert rmp.head(head).pagesize == 1
    vm.attributes(0x300, 0x100, private=False)
    assert rmp.head(head).pagesize == 1  # nothing was punched out: the RMP stays at 2M
    zaps = host.linux.counters.zaps
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert hw.psmash == 1
    assert host.linux.counters.zaps > zaps  # what was mapped before is looked at anew
    assert rmp.head(head).pagesize == 0
    assert rmp.state(head) is PageState.GUEST_VALID  # a smash keeps the guest's acceptance
    if touch == "access":
        assert seen == [b"before"]
    elif touch == "pvalidate":
        assert (seen[0].code, seen[0].cf) == (0, True)
    else:
        assert seen == [0]


def test_r2_6_punching_half_of_a_2m_page_smashes_it_once(boot: Any) -> None:
    host = boot(order=9)
    vm = host.vm()
    vm.launch(1024)
    assert vm.prefault(512, 512) == 0
    hw, asid = host.soc.counters, vm.kvm.arch.sev.asid
    assert hw.psmash == 0
    updates, flushed = hw.rmpupdate, hw.clflush_pages
    vm.user.sys.fallocate(vm.gmem, PUNCH, 768 << 12, 256 << 12)
    assert (hw.psmash, hw.rmpupdate - updates, hw.clflush_pages - flushed) == (1, 256, 256)
    assert host.soc.rmp.asid_pages[asid] == 256 + 1
    updates = hw.rmpupdate
    vm.user.sys.fallocate(vm.gmem, PUNCH, 512 << 12, 256 << 12)
    assert (hw.psmash, hw.rmpupdate - updates) == (1, 256)


def test_what_the_host_does_to_a_private_page(host: Any) -> None:
    vm = host.vm()
    vm.launch(64)
    assert vm.prefault(0, 4) == 0
    pfn = next(s for s, _, (attrs, _) in host.soc.rmp.map.held() if attrs >> 51 & 0x3FF)
    with pytest.raises(HostRmpFault):
        host.soc.host_write(pfn << 12, b"x")
    assert len(host.soc.host_read(pfn << 12, 16)) == 16
