"""Page-state changes that a guest asks for (snp_begin_psc() and friends, arch/x86/kvm/svm/sev.c, v7.2).

A request is a header and up to 253 entries in the GHCB's scratch area; each entry is 1 or 512 pages to be
made private or shared.  KVM changes nothing itself: it joins neighbouring entries that ask for the same
and leaves to user space with KVM_HC_MAP_GPA_RANGE, once for each such batch.  Progress is written into
the guest's buffer, so what was done stays visible when a later batch fails.

The guest can rewrite the buffer at any time.  Every pass therefore takes its own copy, checks that, and
trusts nothing of the pass before except what KVM itself remembers (Psc).
"""

from errno import EAGAIN, EINVAL
from struct import unpack_from
from typing import TYPE_CHECKING

from softcvm.abi.ghcb import (
    GHCB_MSR_PSC_ERROR,
    PSC_ENTRY_SIZE,
    PSC_HEADER_SIZE,
    PSC_MAX_ENTRIES,
    GhcbMsr,
    PscError,
    PscOp,
)
from softcvm.abi.kvm.memory import KVM_HC_MAP_GPA_RANGE, MapGpaRange
from softcvm.abi.kvm.run import KvmExit
from softcvm.kernel.errors import KernelError
from softcvm.sim.addr import PAGE_SHIFT, PTRS_PER_PMD
from softcvm.sim.state import State
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.arch.x86.kvm.svm.ghcb import VcpuSevEs
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = ("Psc", "map_gpa_range_exit_enabled", "snp_begin_psc", "snp_begin_psc_msr")

_CUR_PAGE = (1 << 12) - 1


class Psc(State):
    """The batch that user space works on: its first entry and how many entries it is."""

    saved = ("cur_idx", "batch_size")

    def __init__(self, cur_idx: int, batch_size: int) -> None:
        self.cur_idx = cur_idx
        self.batch_size = batch_size


def map_gpa_range_exit_enabled(kvm: "Kvm") -> bool:
    return bool(kvm.arch.hypercall_exit_enabled & 1 << KVM_HC_MAP_GPA_RANGE)


# By MSR: one 4K page


def snp_begin_psc_msr(vcpu: "KvmVcpu", msr: int) -> int:
    """Leave to user space for one page; the answer is in the GHCB MSR when the guest goes on."""
    op, gfn = msr >> 52 & 0xF, msr >> 12 & ((1 << 40) - 1)
    if op not in (PscOp.PRIVATE, PscOp.SHARED) or not map_gpa_range_exit_enabled(vcpu.kvm):
        vcpu.arch.svm.vmcb.ghcb_gpa = GHCB_MSR_PSC_ERROR
        return 1
    _exit_map_gpa_range(vcpu, gfn, 1, private=op == PscOp.PRIVATE, huge=False)
    vcpu.arch.complete_userspace_io = _complete_psc_msr
    return 0


def _complete_psc_msr(vcpu: "KvmVcpu") -> Steps[int]:
    yield from ()
    failed = _hypercall_ret(vcpu)
    vcpu.arch.svm.vmcb.ghcb_gpa = GHCB_MSR_PSC_ERROR if failed else int(GhcbMsr.PSC_RESP)
    return 1


# By buffer


def snp_begin_psc(vcpu: "KvmVcpu") -> int:
    """Go on with the request in the scratch area: 0 to leave to user space, 1 when it is answered."""
    sev_es = vcpu.arch.svm.sev_es
    if not map_gpa_range_exit_enabled(vcpu.kvm):
        return _complete(sev_es, PscError.GENERIC)
    assert sev_es.scratch is not None
    max_entries = (sev_es.scratch.length - PSC_HEADER_SIZE) // PSC_ENTRY_SIZE
    if max_entries > PSC_MAX_ENTRIES:
        vcpu.kvm.linux.warn("snp_begin_psc", f"room for {max_entries} entries")
        return _complete(sev_es, PscError.GENERIC)
    while True:
        if sev_es.psc is not None:
            vcpu.kvm.linux.warn("snp_begin_psc", "a batch is in flight")
            return _complete(sev_es, PscError.GENERIC)
        answer = _next_batch(vcpu, sev_es, max_entries)
        if answer is not None:
            return answer


def _next_batch(vcpu: "KvmVcpu", sev_es: "VcpuSevEs", max_entries: int) -> int | None:
    """Find the next entries to do; None when they were nothing to do and the search goes on."""
    cur, end = unpack_from("<HH", sev_es.read_scratch(0, PSC_HEADER_SIZE))
    if end >= max_entries:
        return _complete(sev_es, PscError.INVALID_HDR)
    if cur > end:
        return _complete(sev_es, 0)
    count = end + 1 - cur
    entries: tuple[int, ...] = unpack_from(
        f"<{count}Q",
        sev_es.read_scratch(PSC_HEADER_SIZE + cur * PSC_ENTRY_SIZE, count * PSC_ENTRY_SIZE),
    )
    at = 0
    npages = done = 0
    while at < count:
        first = entries[at]
        npages = PTRS_PER_PMD if first >> 56 & 1 else 1
        done = first & _CUR_PAGE
        if done > npages or (first >> 12) & (npages - 1):
            _skip(sev_es, cur, at)
            return _complete(sev_es, PscError.INVALID_ENTRY)
        npages -= done
        if npages:
            break
        at += 1
    _skip(sev_es, cur, at)
    if at == count:
        return _complete(sev_es, 0)
    first = entries[at]
    op, gfn, huge = first >> 52 & 0xF, first >> 12 & (1 << 40) - 1, bool(first >> 56 & 1)
    # A 2M entry that is done in part goes on as 4K pages and is joined with nothing that follows: the
    # comparison is with the entry's own first page.
    batch, npages = _coalesce(entries, at, npages, huge=huge and not done)
    sev_es.psc = Psc(cur + at, batch)
    if op not in (PscOp.PRIVATE, PscOp.SHARED):
        _complete_batch(sev_es)  # smash and unsmash: nothing to do, and nobody to ask
        return None
    _exit_map_gpa_range(vcpu, gfn + done, npages, private=op == PscOp.PRIVATE, huge=huge)
    vcpu.arch.complete_userspace_io = _complete_one_psc
    return 0


def _coalesce(entries: tuple[int, ...], at: int, npages: int, *, huge: bool) -> tuple[int, int]:
    """How many entries from `at` on are one contiguous range of one kind, and their pages together."""
    size = PTRS_PER_PMD if huge else 1
    first = entries[at]
    kind = first & 0xF << 52 | int(huge) << 56
    gfn = first >> 12 & (1 << 40) - 1
    batch = 1
    for entry in entries[at + 1 :]:
        wanted = gfn + npages
        if wanted >> 40 or entry & ~(0x7F << 57) != kind | wanted << 12:
            break
        batch += 1
        npages += size
    return batch, npages


def _skip(sev_es: "VcpuSevEs", cur: int, entries: int) -> None:
    """Tell the guest that entries were passed over because they were done already."""
    if entries:
        sev_es.write_scratch(0, (cur + entries & 0xFFFF).to_bytes(2, "little"))


def _complete_one_psc(vcpu: "KvmVcpu") -> Steps[int]:
    """User space has answered for a batch: next one, or the end."""
    yield from ()
    sev_es = vcpu.arch.svm.sev_es
    if _hypercall_ret(vcpu):
        return _complete(sev_es, PscError.GENERIC)
    _complete_batch(sev_es)
    return snp_begin_psc(vcpu)


def _complete_batch(sev_es: "VcpuSevEs") -> None:
    """Mark every entry of the batch as done in the guest's buffer."""
    psc = sev_es.psc
    assert psc is not None
    at = PSC_HEADER_SIZE + psc.cur_idx * PSC_ENTRY_SIZE
    size = psc.batch_size * PSC_ENTRY_SIZE
    buffer = bytearray(sev_es.read_scratch(at, size))
    for offset in range(0, size, PSC_ENTRY_SIZE):
        pages = PTRS_PER_PMD if buffer[offset + 7] & 1 else 1
        buffer[offset] = pages & 0xFF
        buffer[offset + 1] = buffer[offset + 1] & 0xF0 | pages >> 8
    sev_es.write_scratch(at, bytes(buffer))
    sev_es.write_scratch(0, (psc.cur_idx + psc.batch_size).to_bytes(2, "little"))
    sev_es.psc = None


def _complete(sev_es: "VcpuSevEs", result: int) -> int:
    """The request is over; its result goes to SW_EXITINFO2."""
    sev_es.psc = None
    assert sev_es.ghcb is not None
    sev_es.ghcb.set(sw_exit_info_2=result)
    return 1


# Both


def _exit_map_gpa_range(
    vcpu: "KvmVcpu", gfn: int, npages: int, *, private: bool, huge: bool
) -> None:
    """KVM_EXIT_HYPERCALL.  The page size is what the guest named, even for the rest of a 2M entry."""
    run = vcpu.run
    attrs = MapGpaRange.ENCRYPTED if private else MapGpaRange(0)
    attrs |= MapGpaRange.PAGE_SZ_2M if huge else MapGpaRange.PAGE_SZ_4K
    run.exit_reason = KvmExit.HYPERCALL
    run.hypercall_nr = KVM_HC_MAP_GPA_RANGE
    args = b"".join(
        value.to_bytes(8, "little") for value in (gfn << PAGE_SHIFT, npages, int(attrs))
    )
    run.hypercall_args = args + run.hypercall_args[len(args) :]
    if vcpu.kvm.linux.profile.hypercall_ret_cleared:
        run.hypercall_ret = 0


def _hypercall_ret(vcpu: "KvmVcpu") -> int:
    """User space's answer, read once.  EINVAL: a value that the kernel does not take any more."""
    ret = vcpu.run.hypercall_ret
    if vcpu.kvm.linux.profile.map_gpa_range_ret_checked and ret not in (0, EINVAL, EAGAIN):
        raise KernelError(EINVAL, f"hypercall.ret {ret:#x} of a page-state change")
    return ret
