"""One guest's life on a fresh machine, observed: what `softcvm boot` does, without its printing.

Owns when the machine is looked at: when the launch is over, whenever the guest leaves for something other
than a page-state change and more pages belong to guests than at any such point before (the last of these is
the peak), and when everything is closed.  These are points where nothing in the kernel is half done.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.ovmf import SectionType
from softcvm.guest.boot_info import BootInfo, Extent
from softcvm.guest.checks import Check
from softcvm.guest.ghcb import TermSet
from softcvm.guest.programs.memory_life import memory_life
from softcvm.invariants import Checked, check_all, watch
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info
from softcvm.kernel.task import Rlimits
from softcvm.machine import Machine
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE, pfn_to_spa
from softcvm.vmm.errors import VmmError
from softcvm.vmm.launch import Progress
from softcvm.vmm.measure import launch_digest
from softcvm.vmm.run import Termination
from softcvm.vmm.vmm import GuestConfig, Vmm

__all__ = ("BootResult", "Claim", "boot", "boot_info", "executed_digest")

Census = Mapping[str, int]
_OTHER_FDS = 1024


class Claim(NamedTuple):
    """A sentence that was checked: how many things were looked at, and whether it held for all."""

    name: str
    checked: int
    held: bool
    broken: tuple[str, ...] = ()


@dataclass
class BootResult:
    """What came of it.  `failure` is why the VMM gave up, if it did."""

    launch_digest: bytes
    predicted_digest: bytes
    pages: dict[str, Census] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    leaked_pages: int = 0
    termination: Termination | None = None
    failure: str = ""

    @property
    def good(self) -> bool:
        return not self.failure and all(claim.held for claim in self.claims)


def boot_info(config: GuestConfig) -> BootInfo:
    """What a guest's firmware would find in its memory map and in itself."""
    launched = sorted(
        Extent(update.gpa, update.gpa + update.npages * PAGE_SIZE) for update in config.plan()
    )
    secrets = config.image.section(SectionType.SECRETS)
    cpuid = config.image.section(SectionType.CPUID)
    return BootInfo(
        ram=tuple(Extent(start, end) for start, end in config.board.e820),
        launched=tuple(launched),
        secrets_gpa=secrets.gpa if secrets else None,
        cpuid_gpa=cpuid.gpa if cpuid else None,
        vcpus=config.vcpus,
    )


def boot(
    machine: Machine,
    config: GuestConfig,
    on_line: Callable[[str], None],
    progress: Progress | None = None,
    *,
    scripted: bool = True,
) -> BootResult:
    """Launch, run and tear down.  VmmError when it does not even launch; the machine is then clean again.

    scripted: the guest is the script memory_life; else the image's own code, for which DRAM needs a backing.
    An interrupt leaves the model where it is, perhaps in the middle of a step: the machine is to be dropped.
    """
    observer = _Observer(machine)
    if scripted:
        machine.vm_guest(memory_life(boot_info(config)))
    else:
        machine.vm_machine_code()
    sys = machine.process(Rlimits(nofile=config.vcpus + _OTHER_FDS))  # as libvirt raises it
    vmm = Vmm(sys, config)
    try:
        vmm.launch(progress)
    except VmmError:
        vmm.close()
        raise
    result = BootResult(executed_digest(machine), _predicted(config))
    observer.look("launch")

    def on_exit(reason: KvmExit) -> None:
        if progress is not None:
            done = vmm.memory.conversions["to private"]
            progress("guest", done, config.board.memory_bytes >> PAGE_SHIFT)
        if reason is not KvmExit.HYPERCALL:
            observer.look_if_more("peak")

    try:
        result.termination = vmm.run(on_line, on_exit)
    except VmmError as error:
        result.failure = str(error)
    observer.look_if_more("peak")
    vmm.close()
    observer.look("after_teardown")
    result.pages = observer.pages
    result.counters = _counters(machine)
    result.leaked_pages = machine.linux.leaked_pages
    result.claims = [*observer.claims(), *_own_claims(result, observer)]
    return result


class _Observer:
    """Takes censuses, and checks every invariant each time it does."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.before = dict(machine.census())
        self.pages: dict[str, Census] = {}
        self._most = -1
        self._watch = watch(machine)
        self._seen: dict[str, Claim] = {}

    def look(self, when: str) -> None:
        self.pages[when] = dict(self.machine.census())
        for checked in check_all(self.machine):
            self._add(checked)

    def look_if_more(self, when: str) -> None:
        owned = sum(self.machine.rmp.asid_pages.values())
        if owned > self._most:
            self._most = owned
            self.look(when)

    def claims(self) -> list[Claim]:
        self._watch.detach()
        for checked in self._watch.results():
            self._add(checked)
        return list(self._seen.values())

    def _add(self, result: Checked) -> None:
        before = self._seen.get(result.name, Claim(result.name, 0, True))
        broken = tuple(f"pfn {pfn:#x}: {why}" for pfn, why in result.violations)
        self._seen[result.name] = Claim(
            result.name,
            before.checked + result.checked,
            before.held and result.held,
            before.broken + broken,
        )


def _own_claims(result: BootResult, observer: _Observer) -> list[Claim]:
    """What a boot itself must show."""
    same = result.launch_digest == result.predicted_digest
    after = result.pages["after_teardown"]
    back = after == observer.before and not result.leaked_pages
    ended = result.termination == Termination(TermSet.SOFTCVM, Check.PASSED)
    return [
        Claim(
            "launch_digest_is_the_predicted_one",
            1,
            same,
            () if same else (f"predicted {result.predicted_digest.hex()}",),
        ),
        Claim(
            "guest_passed_its_own_checks",
            1,
            ended,
            () if ended else (result.failure or _ending(result.termination),),
        ),
        Claim(
            "teardown_returns_every_page",
            1,
            back,
            () if back else (f"before {observer.before}, leaked {result.leaked_pages}",),
        ),
    ]


def _ending(termination: Termination | None) -> str:
    if termination is None:
        return "the guest did not end"
    if (
        termination.reason_set == TermSet.SOFTCVM
        and termination.reason in Check.__members__.values()
    ):
        return f"the guest ended because its check {Check(termination.reason).name} failed"
    return (
        f"the guest ended with reason set {termination.reason_set}, code {termination.reason}"
    )


def executed_digest(machine: Machine) -> bytes:
    """The digest in the guest context of the machine's one VM: what firmware will attest."""
    (kvm,) = machine.linux.vm_list
    context = sev_info(kvm).snp_context
    assert context is not None, "a launched VM has a guest context"
    return machine.soc.psp.gctx(pfn_to_spa(context)).ld


def _predicted(config: GuestConfig) -> bytes:
    return launch_digest(
        config.image,
        config.vcpus,
        config.vcpu_sig,
        guest_features=config.guest_features,
        hashes=config.hashes,
    )


def _counters(machine: Machine) -> dict[str, int]:
    """Every counter by its own name, and the names that a summary of either side goes by."""
    counters = dict(machine.counters)
    summary = {
        "ioctls": counters["ioctls"],
        "exits": counters["kvm_exits"],
        "rmpupdate": counters["rmpupdate"],
        "psmash": counters["psmash"],
        "pvalidate": counters["pvalidate"],
        "zaps": counters["zaps"],
        "tlb_flushes": counters["tlb_flushes"],
        "cache_flushes": counters["clflush_pages"]
        + counters["wbinvd"]
        + counters["page_flushes"],
        "bytes_zeroed": counters["bytes_zeroed"],
        "bytes_encrypted": counters["bytes_encrypted"],
    }
    return summary | {name: counters[name] for name in sorted(counters) if name not in summary}
