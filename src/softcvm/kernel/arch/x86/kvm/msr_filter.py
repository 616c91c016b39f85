"""MSRs that user space keeps for itself: KVM_X86_SET_MSR_FILTER, and exits for accesses that KVM refuses
(KVM_CAP_X86_USER_SPACE_MSR; arch/x86/kvm/x86.c, v6.12)."""

from collections.abc import Sequence
from enum import IntFlag
from errno import EINVAL
from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.kvm.vcpu import KvmMsrFilter, KvmMsrFilterRange
from softcvm.kernel.arch.x86.kvm.vcpu import KvmRequest
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import copy_from_user
from softcvm.sim.addr import Hva
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.arch.x86.kvm.vcpu import CompleteUserspaceIo
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm, KvmVcpu

__all__ = (
    "MSR_READ",
    "MSR_WRITE",
    "MsrExit",
    "kvm_msr_allowed",
    "kvm_msr_user_space",
    "kvm_set_msr_filter",
)

MSR_READ, MSR_WRITE = 1, 2
_DEFAULT_DENY = 1
_MAX_BITMAP = 0x600
_X2APIC = range(0x800, 0x900)


class MsrExit(IntFlag):
    """Why an access was refused: kvm_run.msr.reason."""

    INVAL = 1
    UNKNOWN = 2
    FILTER = 4


class MsrRange(NamedTuple):
    flags: int
    base: int
    nmsrs: int
    bitmap: int


def kvm_set_msr_filter(kvm: "Kvm", proc: "Process", filter_: KvmMsrFilter) -> Steps[None]:
    """EINVAL: flags, everything denied without a range, a range that is too long.  EFAULT."""
    if filter_.flags & ~_DEFAULT_DENY:
        raise KernelError(EINVAL, f"kvm_msr_filter flags {filter_.flags:#x}")
    ranges = filter_.range_list()
    allow = not filter_.flags & _DEFAULT_DENY
    if not allow and not any(r.nmsrs for r in ranges):
        raise KernelError(EINVAL, "every MSR denied, and no range")
    kept = yield from _ranges(proc, ranges)
    yield from kvm.lock.acquire()
    kvm.arch.msr_filter = (allow, kept)
    for vcpu in kvm.vcpus:
        vcpu.arch.requests |= KvmRequest.MSR_FILTER_CHANGED
        kvm.ops.vcpu_kick(vcpu)
    kvm.lock.release()


def _ranges(
    proc: "Process", ranges: Sequence[KvmMsrFilterRange]
) -> Steps[tuple[MsrRange, ...]]:
    """kvm_add_msr_filter()"""
    kept = []
    for r in ranges:
        if not r.nmsrs:
            continue
        if not r.flags or r.flags & ~(MSR_READ | MSR_WRITE):
            raise KernelError(EINVAL, f"kvm_msr_filter_range flags {r.flags:#x}")
        size = (r.nmsrs + 63) // 64 * 8
        if size > _MAX_BITMAP:
            raise KernelError(EINVAL, f"a range of {r.nmsrs} MSRs")
        bitmap = yield from copy_from_user(proc.mm, Hva(r.bitmap), size)
        kept.append(MsrRange(r.flags, r.base, r.nmsrs, int.from_bytes(bitmap, "little")))
    return tuple(kept)


def kvm_msr_allowed(vcpu: "KvmVcpu", index: int, access: int) -> bool:
    """The first range that has the MSR and the access decides; x2APIC MSRs are never filtered."""
    if vcpu.kvm.arch.msr_filter is None or index in _X2APIC:
        return True
    allow, ranges = vcpu.kvm.arch.msr_filter
    for r in ranges:
        if r.flags & access and r.base <= index < r.base + r.nmsrs:
            return bool(r.bitmap >> index - r.base & 1)
    return allow


def kvm_msr_user_space(
    vcpu: "KvmVcpu",
    exit_: KvmExit,
    index: int,
    data: int,
    why: MsrExit,
    then: "CompleteUserspaceIo",
) -> bool:
    """Whether user space asked for such refusals: then kvm_run is filled, and `then` goes on."""
    if not vcpu.kvm.arch.user_space_msr_mask & why:
        return False
    run = vcpu.run
    run.exit_reason = exit_
    run.msr_error = 0
    run.msr_reason, run.msr_index, run.msr_data = why, index, data
    vcpu.arch.complete_userspace_io = then
    return True
