"""Executing a launch plan: LAUNCH_START, every LAUNCH_UPDATE in order, LAUNCH_FINISH.

sev_snp_launch_start(), sev_launch_update(), sev_snp_launch_finish() of QEMU's target/i386/sev.c.  What is
launched is launch_plan.py's; KVM adds a VMSA per vCPU when the launch finishes.
"""

from collections.abc import Callable, Sequence

from softcvm.abi.cpuid import read_page
from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.sev import (
    KvmSevInit,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmSevSnpLaunchUpdate,
    SevCmdId,
)
from softcvm.abi.snp_policy import GuestPolicy
from softcvm.abi.svm import SevFeatures
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.vmm.errors import VmmError
from softcvm.vmm.kvm import Vm
from softcvm.vmm.launch_plan import LaunchUpdate
from softcvm.vmm.memory import GuestMemory

__all__ = ("DEFAULT_POLICY", "init", "launch_finish", "launch_start", "launch_updates")

DEFAULT_POLICY = int(GuestPolicy.SMT | GuestPolicy.RSVD_MBO)
"""QEMU's: SMT allowed, no debugging, no migration agent, any ABI version."""

Progress = Callable[[str, int, int], None]
"""What, how much of it is done, and how much there is."""


def init(vm: Vm, guest_features: int) -> None:
    """KVM_SEV_INIT2.  KVM sets SNP_ACTIVE itself and refuses it from user space."""
    vmsa_features = guest_features & ~int(SevFeatures.SNP_ACTIVE)
    vm.sev(SevCmdId.INIT2, KvmSevInit(vmsa_features=vmsa_features))


def launch_start(vm: Vm, policy: int = DEFAULT_POLICY) -> None:
    vm.sev(SevCmdId.SNP_LAUNCH_START, KvmSevSnpLaunchStart(policy=policy))


def launch_updates(
    vm: Vm,
    memory: GuestMemory,
    plan: Sequence[LaunchUpdate],
    cpuid_page: bytes,
    progress: Progress | None = None,
) -> None:
    """Put each update's bytes on the shared side, have KVM move them in, and drop the copy."""
    total = sum(update.npages for update in plan)
    done = 0
    for update in plan:
        cpuid = update.page_type is LaunchPageType.CPUID
        _launch_update(vm, memory, update, cpuid_page if cpuid else update.data)
        done += update.npages
        if progress is not None:
            progress("launch", done, total)


def launch_finish(vm: Vm) -> None:
    vm.sev(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())


def _launch_update(
    vm: Vm, memory: GuestMemory, update: LaunchUpdate, data: bytes | None
) -> None:
    size = update.npages * PAGE_SIZE
    if data is not None:
        memory.write(update.gpa, data)
    request = KvmSevSnpLaunchUpdate(
        gfn_start=update.gpa >> PAGE_SHIFT,
        uaddr=memory.hva(update.gpa, size),
        len=size,
        type=update.page_type,
    )
    try:
        while request.len:
            request = vm.sev(SevCmdId.SNP_LAUNCH_UPDATE, request)
    except VmmError as error:
        where = f"{update.what} at {update.gpa:#x}"
        if data is not None and update.page_type is LaunchPageType.CPUID:
            where += _corrections(data, memory.read(update.gpa, PAGE_SIZE))
        raise VmmError(f"{error}, launching {where}", error.errno) from error
    memory.discard_shared(update.gpa, size)


def _corrections(sent: bytes, left: bytes) -> str:
    """What firmware would have had instead: it writes its own values into a refused CPUID table."""
    wrong = [
        f"Fn{mine.eax_in:08X}_x{mine.ecx_in:X}"
        for mine, theirs in zip(read_page(sent), read_page(left), strict=False)
        if mine != theirs
    ]
    return f"; firmware corrected {', '.join(wrong)}" if wrong else ""
