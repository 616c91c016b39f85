"""struct kvm and struct kvm_vcpu: a VM, its vCPUs, and the references that keep them.

virt/kvm/kvm_main.c, v7.2.  A VM lives until its last reference: its own fd, each vCPU fd, each
guest_memfd file, each mirror VM.  The invalidation protocol that faults are checked against
(begin, add range, end, retry) is here; who begins and ends is memslots.py, mem_attributes.py,
guest_memfd.py and mmu_notifier.py. What x86 adds is kvm.arch and arch/x86/kvm.

Locks, outermost first: kvm.lock (the VM as a whole), vcpu.mutex (one ioctl at a time),
slots_lock (memslots and attributes), srcu (readers of memslots), mmu_lock (page tables and the
invalidation state).
"""

from collections import Counter
from errno import EEXIST, EINVAL, EIO
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.memory import KVM_DIRTY_LOG_INITIALLY_SET, VmType
from softcvm.abi.kvm.run import KvmRun
from softcvm.hw.npt import Npt
from softcvm.kernel.arch.x86.kvm.vcpu import VcpuArch
from softcvm.kernel.errors import KernelError
from softcvm.kernel.fs.file import File, FileKind
from softcvm.kernel.host import KvmBug, Linux
from softcvm.kernel.locks import Rank
from softcvm.kernel.virt.kvm.coalesced_mmio import CoalescedZone
from softcvm.kernel.virt.kvm.dirty_ring import KvmDirtyRing
from softcvm.kernel.virt.kvm.memslots import Memslots, kvm_free_memslots, nr_memslot_as_ids
from softcvm.kernel.virt.kvm.mmu_notifier import KvmMmuNotifier
from softcvm.sim.addr import PAGE_SIZE, Gfn
from softcvm.sim.rangemap import RangeMap
from softcvm.sim.state import State
from softcvm.sim.steps import Mutex, RwSem, Steps, lockdep_assert_held

if TYPE_CHECKING:
    from softcvm.kernel.arch.x86.kvm.msr_filter import MsrRange
    from softcvm.kernel.arch.x86.kvm.ops import X86Ops
    from softcvm.kernel.arch.x86.kvm.svm.sev import KvmSevInfo
    from softcvm.kernel.mm.mmap import MmStruct
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.memslots import KvmMemorySlot

__all__ = (
    "KVM_MAX_VCPUS",
    "KVM_MAX_VCPU_IDS",
    "Kvm",
    "KvmArch",
    "KvmVcpu",
    "VmCreated",
    "VmDestroyed",
    "kvm_create_vcpu",
    "kvm_create_vm",
    "kvm_supported_vm_types",
)

KVM_MAX_VCPUS = 1024
KVM_MAX_VCPU_IDS = 4 * KVM_MAX_VCPUS


class VmCreated(NamedTuple):
    vm: int
    vm_type: VmType


class VmDestroyed(NamedTuple):
    vm: int


class KvmArch(State):
    """struct kvm_arch (arch/x86/include/asm/kvm_host.h): what x86 adds to a VM."""

    saved = (
        "vm_type",
        "has_private_mem",
        "has_protected_state",
        "pre_fault_allowed",
        "hypercall_exit_enabled",
        "disabled_quirks",
        "default_tsc_khz",
        "max_vcpu_ids",
        "bsp_vcpu_id",
        "guest_can_read_msr_platform_info",
        "exception_payload_enabled",
        "triple_fault_event",
        "user_space_msr_mask",
        "msr_filter",
        "exit_on_emulation_error",
        "disabled_exits",
        "apic_bus_cycle_ns",
        "x2apic_format",
        "x2apic_broadcast_quirk_disabled",
        "disable_nx_huge_pages",
        "n_requested_mmu_pages",
        "irqchip",
        "irqchip_split",
        "npt",
        "sev",
    )

    def __init__(self, vm_type: VmType, tsc_khz: int) -> None:
        self.vm_type = vm_type
        self.default_tsc_khz = tsc_khz
        """Of vCPUs that are created from now on.  # stored, no effect"""
        self.max_vcpu_ids = 0
        """KVM_CAP_MAX_VCPU_ID; 0 while user space has set no limit."""
        self.bsp_vcpu_id = 0
        """KVM_SET_BOOT_CPU_ID"""
        self.guest_can_read_msr_platform_info = True
        self.exception_payload_enabled = False
        self.triple_fault_event = False
        self.user_space_msr_mask = 0
        """Reasons for which a refused MSR access leaves to user space (KVM_CAP_X86_USER_SPACE_MSR)."""
        self.msr_filter: tuple[bool, tuple[MsrRange, ...]] | None = None
        """KVM_X86_SET_MSR_FILTER: whether other MSRs are allowed, and the ranges."""
        self.exit_on_emulation_error = False
        self.disabled_exits = 0
        """KVM_CAP_X86_DISABLE_EXITS.  # stored, no effect"""
        self.apic_bus_cycle_ns = 1
        """KVM_CAP_X86_APIC_BUS_CYCLES_NS.  # stored, no effect: the local APIC has no timer"""
        self.x2apic_format = self.x2apic_broadcast_quirk_disabled = False
        """KVM_CAP_X2APIC_API.  # stored, no effect"""
        self.disable_nx_huge_pages = False
        """KVM_CAP_VM_DISABLE_NX_HUGE_PAGES.  # stored: AMD's processors need no such split"""
        self.n_requested_mmu_pages = 0
        """KVM_SET_NR_MMU_PAGES.  # stored, no effect: that is of shadow paging"""
        self.has_private_mem = vm_type is VmType.SW_PROTECTED
        self.has_protected_state = False
        self.pre_fault_allowed = vm_type in (VmType.DEFAULT, VmType.SW_PROTECTED)
        self.hypercall_exit_enabled = 0
        """Mask of hypercall numbers that leave to user space (KVM_CAP_EXIT_HYPERCALL)."""
        self.disabled_quirks = 0
        self.irqchip = self.irqchip_split = False
        """In-kernel local APICs: APs wait for INIT and SIPI.  # stored; no interrupt is
        modelled"""
        self.npt = Npt()
        self.sev: KvmSevInfo | None = None


class Kvm(State):
    """struct kvm.  `mm` is the address space of its creator, the only one that may use it."""

    saved = (
        "id",
        "mm",
        "creator_pid",
        "users_count",
        "memslots",
        "nr_memslot_pages",
        "mem_attr",
        "mmu_invalidate_seq",
        "mmu_invalidate_in_progress",
        "mmu_invalidate_range_start",
        "mmu_invalidate_range_end",
        "mn_active_invalidate_count",
        "created_vcpus",
        "vcpus",
        "coalesced_mmio_ring",
        "coalesced_zones",
        "manual_dirty_log_protect",
        "dirty_ring_size",
        "vm_bugged",
        "vm_dead",
        "arch",
    )
    derived = {
        "linux": "the host, which lists this VM",
        "lock": "free at quiescent points",
        "slots_lock": "free at quiescent points",
        "srcu": "no reader at quiescent points",
        "mmu_lock": "free at quiescent points",
        "notifier": "the address space's way to this VM",
    }

    memslots: list[Memslots]

    def __init__(self, linux: Linux, mm: "MmStruct", vm_type: VmType, pid: int) -> None:
        self.linux = linux
        self.creator_pid = pid
        self.id = linux.next_vm
        linux.next_vm += 1
        self.mm = mm
        self.users_count = 1
        dep = linux.lockdep
        self.lock = Mutex(dep, "kvm->lock", Rank.KVM_LOCK)
        self.slots_lock = Mutex(dep, "kvm->slots_lock", Rank.SLOTS_LOCK)
        self.srcu = RwSem(dep, "kvm->srcu", Rank.KVM_SRCU)
        self.mmu_lock = RwSem(dep, "kvm->mmu_lock", Rank.MMU_LOCK)
        self.nr_memslot_pages = 0
        self.mem_attr: RangeMap[int] = RangeMap(0)
        """gfn -> KVM_MEMORY_ATTRIBUTE_*; 0, shared, where nobody said anything."""
        self.mmu_invalidate_seq = 0
        self.mmu_invalidate_in_progress = 0
        self.mmu_invalidate_range_start: int | None = None
        self.mmu_invalidate_range_end: int | None = None
        self.mn_active_invalidate_count = 0
        self.created_vcpus = 0
        self.vcpus: list[KvmVcpu] = []
        self.coalesced_mmio_ring = bytearray(PAGE_SIZE)
        self.coalesced_zones: list[CoalescedZone] = []
        self.manual_dirty_log_protect = 0
        """KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE (1) and KVM_DIRTY_LOG_INITIALLY_SET (2)."""
        self.dirty_ring_size = 0
        """Bytes of each vCPU's dirty ring; 0: memslots have bitmaps."""
        self.vm_bugged = False
        self.vm_dead = False
        self.arch = KvmArch(vm_type, linux.soc.profile.tsc_khz)
        self.notifier = KvmMmuNotifier(self)

    def get(self) -> "Kvm":
        """kvm_get_kvm()"""
        if self.users_count <= 0:
            raise ValueError(f"kvm_get_kvm() on VM {self.id} whose last reference is gone")
        self.users_count += 1
        return self

    @property
    def dirty_log_initially_set(self) -> bool:
        """kvm_dirty_log_manual_protect_and_init_set()"""
        return bool(self.manual_dirty_log_protect & KVM_DIRTY_LOG_INITIALLY_SET)

    def put(self) -> Steps[None]:
        """kvm_put_kvm(): the last reference destroys the VM."""
        self.users_count -= 1
        if self.users_count == 0:
            yield from kvm_destroy_vm(self)

    @property
    def ops(self) -> "X86Ops":
        return self.linux.kvm_x86_ops

    @property
    def online_vcpus(self) -> int:
        return len(self.vcpus)

    def bug(self, why: str) -> KernelError:
        """KVM_BUG(): the VM is dead from here on; raise what this returns (EIO) or go on as
        Linux does."""
        if not self.vm_bugged:
            self.vm_bugged = True
            self.vm_dead = True
            for vcpu in self.vcpus:
                self.ops.vcpu_kick(vcpu)  # KVM_REQ_VM_DEAD
            self.linux.counters.warnings += 1
            if self.linux.tp.emit:
                self.linux.tp.emit(KvmBug(self.id, why))
        return KernelError(EIO, f"KVM_BUG: {why}")

    def gfn_to_memslot(self, gfn: Gfn, as_id: int = 0) -> "KvmMemorySlot | None":
        return self.memslots[as_id].at(gfn)

    def flush_remote_tlbs(self) -> None:
        """kvm_flush_remote_tlbs(): no vCPU may use a translation that was zapped before
        this."""
        sev = self.arch.sev
        self.linux.soc.flush_tlb(sev.asid if sev is not None else 0)

    # What a fault is checked against.  begin, add and end need mmu_lock held for write.

    def mmu_invalidate_begin(self) -> None:
        lockdep_assert_held(self.mmu_lock)
        self.mmu_invalidate_in_progress += 1
        if self.mmu_invalidate_in_progress == 1:
            self.mmu_invalidate_range_start = None
            self.mmu_invalidate_range_end = None

    def mmu_invalidate_range_add(self, start: int, end: int) -> None:
        """Widen the range under invalidation; it never shrinks before the last end."""
        lockdep_assert_held(self.mmu_lock)
        if self.mmu_invalidate_range_start is None or self.mmu_invalidate_range_end is None:
            self.mmu_invalidate_range_start, self.mmu_invalidate_range_end = start, end
        else:
            self.mmu_invalidate_range_start = min(self.mmu_invalidate_range_start, start)
            self.mmu_invalidate_range_end = max(self.mmu_invalidate_range_end, end)

    def mmu_invalidate_end(self) -> None:
        lockdep_assert_held(self.mmu_lock)
        self.mmu_invalidate_seq += 1
        if self.mmu_invalidate_range_start is None:
            self.linux.warn("kvm_mmu_invalidate_end", "no range was added since begin")
        self.mmu_invalidate_in_progress -= 1
        if self.mmu_invalidate_in_progress < 0:
            self.bug("mmu_invalidate_end() without begin()")

    def mmu_invalidate_retry_gfn(self, seq: int, start: int, end: int | None = None) -> bool:
        """Whether a fault on [start, end) that began at `seq` has lost against an
        invalidation."""
        if self.mmu_invalidate_in_progress:
            lo, hi = self.mmu_invalidate_range_start, self.mmu_invalidate_range_end
            if lo is None or hi is None:
                self.linux.warn("mmu_invalidate_retry_gfn", "invalidation without a range")
                return True
            if lo < (start + 1 if end is None else end) and start < hi:
                return True
        return self.mmu_invalidate_seq != seq


_VCPU_PAGES = 3
"""kvm_run, the data of port I/O, and the VM's ring of coalesced writes."""


class KvmVcpu(State):
    """struct kvm_vcpu.  `run` is the page that the VMM maps at offset 0 of the vCPU's fd."""

    saved = ("vcpu_id", "vcpu_idx", "run", "pio_data", "dirty_ring", "sigset", "stat", "arch")
    derived = {
        "kvm": "the VM, which lists this vCPU",
        "mutex": "free at quiescent points",
        "proc": "who runs it, during an ioctl",
    }

    def __init__(self, kvm: Kvm, vcpu_id: int) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.vcpu_idx = -1
        self.mutex = Mutex(kvm.linux.lockdep, "vcpu->mutex", Rank.VCPU_MUTEX)
        shared = kvm.linux.mappable(_VCPU_PAGES * PAGE_SIZE)
        self.run = KvmRun.over(shared[:PAGE_SIZE])
        self.pio_data = shared[PAGE_SIZE : 2 * PAGE_SIZE]
        if not kvm.vcpus:  # where pages are a program's, the ring is in those of the first vCPU
            kvm.coalesced_mmio_ring = shared[2 * PAGE_SIZE :]
        self.dirty_ring = KvmDirtyRing(kvm.dirty_ring_size) if kvm.dirty_ring_size else None
        self.proc: Process | None = None
        self.stat: Counter[str] = Counter()
        """struct kvm_vcpu_stat, by name; what was never counted is 0."""
        self.sigset: int | None = None
        """KVM_SET_SIGNAL_MASK: signals that are blocked during KVM_RUN; None: those of the thread."""
        self.arch = VcpuArch(
            bsp=self.is_bsp, irqchip=kvm.arch.irqchip, tsc_khz=kvm.arch.default_tsc_khz
        )

    @property
    def is_bsp(self) -> bool:
        """kvm_vcpu_is_bsp()"""
        return self.vcpu_id == self.kvm.arch.bsp_vcpu_id


def kvm_supported_vm_types(linux: Linux) -> int:
    """KVM_CAP_VM_TYPES: mask by type number."""
    return (
        1 << VmType.DEFAULT | 1 << VmType.SW_PROTECTED | linux.kvm_x86_ops.supported_vm_types()
    )


def kvm_create_vm(proc: "Process", vm_type: int) -> Steps[int]:
    """KVM_CREATE_VM: a VM of the caller's address space; its fd is close-on-exec.

    EMFILE comes before EINVAL for the type, because the number is reserved first.
    """
    linux = proc.linux
    fd = proc.files.get_unused_fd(proc.rlimits.nofile)
    try:
        if vm_type >= 32 or not kvm_supported_vm_types(linux) >> vm_type & 1:
            raise KernelError(EINVAL, f"VM type {vm_type:#x} is not supported")
        kvm = Kvm(linux, proc.mm, VmType(vm_type), proc.pid)
        linux.kvm_x86_ops.vm_init(kvm)
    except KernelError:
        proc.files.put_unused_fd(fd)
        raise
    kvm.memslots = [Memslots() for _ in range(nr_memslot_as_ids(kvm))]
    yield from proc.mm.mmu_notifier_register(kvm.notifier)
    linux.vm_list.append(kvm)
    if linux.tp.emit:
        linux.tp.emit(VmCreated(kvm.id, kvm.arch.vm_type))
    return proc.files.install(fd, File(FileKind.VM, kvm, _kvm_vm_release), cloexec=True)


def _kvm_vm_release(file: File) -> Steps[None]:
    kvm = file.private
    if not isinstance(kvm, Kvm):
        raise TypeError(f"release of a {file.kind.value} file as a VM")
    yield from kvm.put()


def _kvm_vcpu_release(file: File) -> Steps[None]:
    """The vCPU itself stays until its VM is destroyed."""
    vcpu = file.private
    if not isinstance(vcpu, KvmVcpu):
        raise TypeError(f"release of a {file.kind.value} file as a vCPU")
    yield from vcpu.kvm.put()


def kvm_destroy_vm(kvm: Kvm) -> Steps[None]:
    """The last reference is gone: zap, vCPUs, vendor, memslots, attributes, in this order."""
    linux = kvm.linux
    linux.vm_list.remove(kvm)
    if kvm.notifier in kvm.mm.notifiers:
        kvm.mm.notifiers.remove(kvm.notifier)
    yield from kvm.notifier.mm_release()
    if kvm.mn_active_invalidate_count:
        kvm.mn_active_invalidate_count = 0
    elif kvm.mmu_invalidate_in_progress:
        linux.warn("kvm_destroy_vm", "an invalidation is still in progress")
    for vcpu in kvm.vcpus:
        yield from kvm.ops.vcpu_free(vcpu)
    kvm.vcpus.clear()
    yield from kvm.ops.vm_destroy(kvm)
    yield from kvm_free_memslots(kvm)
    kvm.mem_attr.clear()
    if linux.tp.emit:
        linux.tp.emit(VmDestroyed(kvm.id))


def kvm_create_vcpu(kvm: Kvm, proc: "Process", vcpu_id: int) -> Steps[int]:
    """KVM_CREATE_VCPU: a vCPU and its fd, which holds the VM.

    EINVAL: id or number of vCPUs.  EEXIST: the id is taken.  EMFILE, and what the vendor
    answers.
    """
    if vcpu_id >= KVM_MAX_VCPU_IDS:
        raise KernelError(EINVAL, f"vCPU id {vcpu_id:#x} of {KVM_MAX_VCPU_IDS:#x}")
    yield from kvm.lock.acquire()
    try:
        if kvm.created_vcpus >= KVM_MAX_VCPUS:
            raise KernelError(EINVAL, f"{kvm.created_vcpus} vCPUs exist")
        kvm.arch.max_vcpu_ids = kvm.arch.max_vcpu_ids or KVM_MAX_VCPU_IDS
        if vcpu_id >= kvm.arch.max_vcpu_ids:
            raise KernelError(EINVAL, f"vCPU id {vcpu_id:#x} of {kvm.arch.max_vcpu_ids:#x}")
        kvm.ops.vcpu_precreate(kvm)
        kvm.created_vcpus += 1
    finally:
        kvm.lock.release()
    vcpu = KvmVcpu(kvm, vcpu_id)
    try:
        yield from kvm.ops.vcpu_create(vcpu)
        try:
            fd = yield from _put_online(vcpu, proc)
        except KernelError:
            yield from kvm.ops.vcpu_free(vcpu)
            raise
    except KernelError:
        yield from kvm.lock.acquire()
        kvm.created_vcpus -= 1
        kvm.lock.release()
        raise
    return fd


def _put_online(vcpu: KvmVcpu, proc: "Process") -> Steps[int]:
    kvm = vcpu.kvm
    yield from kvm.lock.acquire()
    try:
        if any(other.vcpu_id == vcpu.vcpu_id for other in kvm.vcpus):
            raise KernelError(EEXIST, f"vCPU id {vcpu.vcpu_id} is taken")
        fd = proc.files.get_unused_fd(proc.rlimits.nofile)
        vcpu.vcpu_idx = kvm.online_vcpus
        file = File(FileKind.VCPU, vcpu, _kvm_vcpu_release)
        kvm.get()
        proc.files.install(fd, file, cloexec=True)
        kvm.vcpus.append(vcpu)
    finally:
        kvm.lock.release()
    return fd
