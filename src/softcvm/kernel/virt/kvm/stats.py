"""KVM_GET_STATS_FD: what a VM and a vCPU have done, as numbers with names (virt/kvm/binary_stats.c, kvm_main.c;
arch/x86/kvm/x86.c; v6.12).

Owns the names and the layout of the file.  Counted is what the model does: entries, exits by kind, faults, pages
mapped now.  What it never does (shadow paging, halt polling, nested guests) stays zero, and so does what needs a clock.
"""

import struct
from typing import TYPE_CHECKING, NamedTuple

from softcvm.kernel.fs.file import File, FileKind
from softcvm.kernel.mm.uaccess import copy_to_user
from softcvm.sim.addr import Hva, PgLevel, pages_per_level
from softcvm.sim.state import State
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = ("StatsFile", "kvm_get_stats_fd", "kvm_stats_read")

_NAME_SIZE = 48
_HEADER = struct.Struct("<6I")
_DESC = struct.Struct(f"<IhHII{_NAME_SIZE}s")
_CUMULATIVE, _INSTANT, _PEAK, _LOG_HIST = 0, 1, 2, 4
_NONE, _SECONDS, _BOOLEAN = 0, 2 << 4, 4 << 4
_NS = -9
_BUCKETS = 32


class _Stat(NamedTuple):
    name: str
    flags: int = _CUMULATIVE | _NONE
    size: int = 1
    exponent: int = 0


def _counters(*names: str) -> tuple[_Stat, ...]:
    return tuple(_Stat(name) for name in names)


_VM = (
    *_counters("remote_tlb_flush", "remote_tlb_flush_requests", "mmu_shadow_zapped"),
    *_counters("mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_recycled"),
    *_counters("mmu_cache_miss"),
    _Stat("mmu_unsync", _INSTANT),
    _Stat("pages_4k", _INSTANT),
    _Stat("pages_2m", _INSTANT),
    _Stat("pages_1g", _INSTANT),
    _Stat("nx_lpage_splits", _INSTANT),
    _Stat("max_mmu_rmap_size", _PEAK),
    _Stat("max_mmu_page_hash_collisions", _PEAK),
)
_VM_LAST = ("max_mmu_page_hash_collisions", "max_mmu_rmap_size")
"""These two lie in the other order than they are described."""
_VCPU = (
    *_counters(
        "halt_successful_poll", "halt_attempted_poll", "halt_poll_invalid", "halt_wakeup"
    ),
    _Stat("halt_poll_success_ns", _CUMULATIVE | _SECONDS, 1, _NS),
    _Stat("halt_poll_fail_ns", _CUMULATIVE | _SECONDS, 1, _NS),
    _Stat("halt_wait_ns", _CUMULATIVE | _SECONDS, 1, _NS),
    _Stat("halt_poll_success_hist", _LOG_HIST | _SECONDS, _BUCKETS, _NS),
    _Stat("halt_poll_fail_hist", _LOG_HIST | _SECONDS, _BUCKETS, _NS),
    _Stat("halt_wait_hist", _LOG_HIST | _SECONDS, _BUCKETS, _NS),
    _Stat("blocking", _INSTANT | _BOOLEAN),
    *_counters("pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast"),
    *_counters("pf_mmio_spte_created", "pf_guest", "tlb_flush", "invlpg", "exits", "io_exits"),
    *_counters(
        "mmio_exits", "signal_exits", "irq_window_exits", "nmi_window_exits", "l1d_flush"
    ),
    *_counters(
        "halt_exits", "request_irq_exits", "irq_exits", "host_state_reload", "fpu_reload"
    ),
    *_counters("insn_emulation", "insn_emulation_fail", "hypercalls", "irq_injections"),
    *_counters("nmi_injections", "req_event", "nested_run", "directed_yield_attempted"),
    *_counters("directed_yield_successful", "preemption_reported", "preemption_other"),
    _Stat("guest_mode", _INSTANT | _BOOLEAN),
    *_counters("notify_window_exits"),
)
_PAGES = {
    "pages_4k": PgLevel.PG_4K,
    "pages_2m": PgLevel.PG_2M,
    "pages_1g": PgLevel.PG_1G,
}


class StatsFile(State):
    """One opened statistics file: of a VM, or of a vCPU.  Its offset is that of read()."""

    saved = ("kvm", "vcpu", "id", "offset")

    def __init__(self, kvm: "Kvm", vcpu: "KvmVcpu | None", pid: int) -> None:
        self.kvm = kvm
        self.vcpu = vcpu
        self.id = f"kvm-{pid}" + (f"/vcpu-{vcpu.vcpu_id}" if vcpu is not None else "")
        self.offset = 0

    def content(self) -> bytes:
        """The whole file as it is now: header, id, descriptors, data."""
        stats = _VM if self.vcpu is None else _VCPU
        offsets = _offsets(stats)
        desc_at = _HEADER.size + _NAME_SIZE
        data_at = desc_at + _DESC.size * len(stats)
        header = _HEADER.pack(0, _NAME_SIZE, len(stats), _HEADER.size, desc_at, data_at)
        descriptors = b"".join(
            _DESC.pack(s.flags, s.exponent, s.size, offsets[s.name], 0, s.name.encode())
            for s in stats
        )
        values = _vm_values(self.kvm) if self.vcpu is None else self.vcpu.stat
        data = bytearray(8 * sum(s.size for s in stats))
        for name, value in values.items():
            data[offsets[name] : offsets[name] + 8] = value.to_bytes(8, "little")
        return header + self.id.encode().ljust(_NAME_SIZE, b"\0") + descriptors + data


def _offsets(stats: tuple[_Stat, ...]) -> dict[str, int]:
    """Where each lies in the data."""
    order = [s for s in stats if s.name not in _VM_LAST]
    order += [s for name in _VM_LAST for s in stats if s.name == name]
    offsets, at = {}, 0
    for stat in order:
        offsets[stat.name] = at
        at += 8 * stat.size
    return offsets


def _vm_values(kvm: "Kvm") -> dict[str, int]:
    pages = dict.fromkeys(_PAGES, 0)
    for mapping in kvm.arch.npt.mappings():
        name = next(n for n, level in _PAGES.items() if level is mapping.level)
        pages[name] += mapping.npages // pages_per_level(mapping.level)
    return pages


def kvm_get_stats_fd(kvm: "Kvm", vcpu: "KvmVcpu | None", proc: "Process") -> int:
    """KVM_GET_STATS_FD: a file that holds the VM.  EMFILE."""
    fd = proc.files.get_unused_fd(proc.rlimits.nofile)
    stats = StatsFile(kvm, vcpu, kvm.creator_pid)
    kvm.get()
    return proc.files.install(fd, File(FileKind.STATS, stats, _release), cloexec=True)


def _release(file: File) -> Steps[None]:
    if not isinstance(file.private, StatsFile):
        raise TypeError(f"release of a {file.kind.value} file as statistics")
    yield from file.private.kvm.put()


def kvm_stats_read(
    file: StatsFile, proc: "Process", addr: int, size: int, offset: int | None
) -> Steps[int]:
    """read() at the file's own offset, or pread() at one.  0 at the end; EFAULT."""
    at = file.offset if offset is None else offset
    data = file.content()[at : at + size]
    if data:
        yield from copy_to_user(proc.mm, Hva(addr), data)
    if offset is None:
        file.offset = at + len(data)
    return len(data)
