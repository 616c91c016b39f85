"""Runs that look at themselves: every invariant at each quiescent point, and what a run as a whole must show.

Each gives the names of the sentences that were broken.  An error on the way ends a scene, and what was seen up to
there counts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EIO

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmUserspaceMemoryRegion2, MemFlag, VmType
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE
from softcvm.abi.launch_digest import LaunchPageType
from softcvm.hw.access import HostRmpFault
from softcvm.hw.events import NestedPageFault
from softcvm.invariants import check_all, watch
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info
from softcvm.kernel.arch.x86.virt.svm.sev import RmpSpin, rmp_make_shared
from softcvm.kernel.errors import KernelError
from softcvm.machine import Machine
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE, Pfn, PgLevel
from tests.kernel.svm.conftest import Host, Vm
from tests.kernel.svm.sev_vms import launched, plain_vm
from tests.vmm.guests import booted, config, machine

__all__ = ("CLAIMS", "SCENES", "broken_in")

PUNCH_HOLE = 3
FAULTS = 4_000
"""Nested page faults of a scene; a whole boot has some hundreds."""
CLAIMS = {
    "guest_passed_its_own_checks": "the guest's own checks",
    "launch_digest_is_the_predicted_one": "the digest that `softcvm measure` predicts",
    "teardown_returns_every_page": "the census before and after",
    "calls_end_as_they_should": "how a call ends",
    "zaps_are_flushed": "a flush of translations after every zap",
    "host_reads_no_plaintext": "what the host reads of private memory",
    "a_used_asid_is_dirty": "what firmware says of the ASID of a guest that is gone",
}
"""What scenes look at beside the invariants."""


class SceneOver(Exception):
    """Something is broken: what follows from it is not looked at."""


class FaultsForEver(Exception):
    """A guest that does not come on."""


class Observer:
    """What was seen to be broken on one machine."""

    def __init__(self, subject: Machine) -> None:
        self.machine = subject
        self.broken: set[str] = set()
        self._watched = watch(subject)
        self._faults = 0
        subject.events.attach(self._count)

    def _count(self, event: tuple[object, ...]) -> None:
        """A guest that faults for ever ends the scene too."""
        self._faults += isinstance(event, NestedPageFault)
        if self._faults > FAULTS:
            raise FaultsForEver(f"{FAULTS} nested page faults")

    def give_up(self) -> None:
        """The scene ended with an error: no quiescent point, but what was seen of events counts."""
        self.expect("calls_end_as_they_should", False)
        self.broken |= {result.name for result in self._watched.results() if not result.held}

    def look(self) -> None:
        """At a quiescent point; where something is broken the scene ends."""
        self.broken |= {r.name for r in check_all(self.machine, self._watched) if not r.held}
        if self.broken:
            raise SceneOver

    def expect(self, claim: str, holds: bool) -> None:
        assert claim in CLAIMS
        if not holds:
            self.broken.add(claim)

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """One call: if it zaps, it flushes too."""
        before = self.machine.counters
        yield
        after = self.machine.counters
        zapped = after["zaps"] > before["zaps"]
        self.expect(
            "zaps_are_flushed", not zapped or after["tlb_flushes"] > before["tlb_flushes"]
        )


ENDS = (AssertionError, FaultsForEver, HostRmpFault, RmpSpin)
"""How a scene with a defect may end early; anything else, what is not modelled too, is an error of the test."""
Play = Callable[[Observer], None]


def broken_in(scene: str) -> set[str]:
    """Play a scene; the sentences that were broken."""
    make, play = SCENES[scene]
    observer = Observer(make())
    try:
        play(observer)
    except SceneOver:
        pass
    except ENDS:
        observer.give_up()
    return observer.broken


# A whole boot: what `softcvm boot` reports


def _boot(observer: Observer) -> None:
    result, _ = booted(config(vcpus=2), observer.machine)
    observer.broken |= {claim.name for claim in result.claims if not claim.held}


# A protected VM without SEV, no guest running


def _memory(observer: Observer) -> None:
    """Private and shared memory come and go under one VM."""
    host = Host(observer.machine)
    vm = host.vm(VmType.SW_PROTECTED, init=False)
    vm.memory(1024)
    vm.vcpu()
    observer.look()
    assert vm.prefault(0, 1024) == 0
    observer.look()
    with observer.flushing():
        host.user.sys.fallocate(vm.gmem, PUNCH_HOLE, 16 << PAGE_SHIFT, 16 << PAGE_SHIFT)
    observer.look()
    vm.prefault(0, 1024)
    with observer.flushing():
        vm.attributes(100, 50, private=False)
    observer.look()
    vm.prefault(0, 150)
    observer.look()
    with observer.flushing():
        host.user.sys.munmap(vm.shared + (120 << PAGE_SHIFT), 8 << PAGE_SHIFT)
    observer.look()
    with observer.flushing():
        _slot(vm, 0, npages=0)
    observer.look()
    _close(observer, vm, vm.gmem)


def _logging(observer: Observer) -> None:
    """A plain VM whose memory is logged from some time on."""
    host = Host(observer.machine)
    vm = host.vm(VmType.DEFAULT, init=False)
    vm.vcpu()
    addr = host.user.mmap(64 << PAGE_SHIFT)
    host.user.sys.store(addr, bytes(range(256)))
    _slot(vm, 0, npages=64, addr=addr)
    assert vm.prefault(0, 64) == 0
    observer.look()
    _slot(vm, MemFlag.LOG_DIRTY_PAGES, npages=64, addr=addr)
    observer.look()
    with suppress(OSError):  # EEXIST
        _slot(vm, 0, npages=8, addr=addr, gfn=60, number=1)
    observer.look()
    _close(observer, vm)


def _slot(
    vm: Vm, flags: int, *, npages: int, addr: int = 0, gfn: int = 0, number: int = 0
) -> None:
    region = KvmUserspaceMemoryRegion2(
        slot=number,
        flags=flags,
        guest_phys_addr=gfn << PAGE_SHIFT,
        memory_size=npages << PAGE_SHIFT,
        userspace_addr=addr,
    )
    vm.user.ioctl(vm.fd, k.KVM_SET_USER_MEMORY_REGION2, region)


def _close(observer: Observer, vm: Vm, *fds: int) -> None:
    """Close what user space has of a VM, the VM last."""
    for run in vm.runs:
        vm.user.sys.munmap(run, KVM_RUN_MMAP_SIZE)
    for fd in (*vm.vcpus, *fds, vm.fd):
        vm.user.sys.close(fd)
        observer.look()


# SNP, launched page by page


SECRET = b"a secret of the guest".ljust(PAGE_SIZE, b".")


def _launch(observer: Observer) -> None:
    """A launch with everything that firmware can refuse, then a second one."""
    host = Host(observer.machine)
    observer.machine.process()  # somebody else
    before = observer.machine.census()
    for _ in range(2):
        vm = host.vm()
        vm.memory(64)
        observer.look()
        vm.start()
        observer.look()
        assert vm.update(0, SECRET)[0] == 0
        observer.look()
        vm.vcpu()
        vm.prefault(32, 1)  # EOPNOTSUPP: not before the launch is over
        observer.look()
        wrong, _, _ = vm.update(8, b"\xff" * PAGE_SIZE, page_type=LaunchPageType.CPUID)
        observer.expect("calls_end_as_they_should", wrong == EIO)  # firmware corrects it
        observer.look()
        vm.update(0, SECRET)  # measured already
        observer.look()
        vm.finish()
        observer.look()
        _read_by_the_host(observer, vm)
        assert vm.prefault(16, 16) == 0
        observer.look()
        host.user.sys.fallocate(vm.gmem, PUNCH_HOLE, 16 << PAGE_SHIFT, 4 << PAGE_SHIFT)
        observer.look()
        _close(observer, vm, vm.gmem)
        observer.expect("teardown_returns_every_page", observer.machine.census() == before)


def _read_by_the_host(observer: Observer, vm: Vm) -> None:
    """Neither a launched page nor the registers can be read in memory."""
    soc = observer.machine.soc
    kvm = vm.kvm
    gmem = kvm.memslots[0].all()[0].gmem_file
    assert gmem is not None
    folio = gmem.inode.folios[0]
    assert folio is not None
    vmsa = kvm.vcpus[0].arch.svm.vmsa
    assert vmsa is not None
    seen = soc.host_read(folio.delta << PAGE_SHIFT, PAGE_SIZE)
    registers = soc.host_read(vmsa << PAGE_SHIFT, PAGE_SIZE)
    hidden = seen != SECRET and registers.count(0) < PAGE_SIZE // 8
    observer.expect("host_reads_no_plaintext", hidden)


def _asids(observer: Observer) -> None:
    """More guests one after another than there are ASIDs."""
    host = Host(observer.machine)
    for turn in range(host.soc.profile.min_sev_asid + 1):
        vm = host.vm()
        vm.launch(1, vcpus=0)
        if turn % 33 == 0:
            observer.look()
        asid = sev_info(vm.kvm).asid
        for fd in (vm.gmem, vm.fd):
            host.user.sys.close(fd)
        observer.expect("a_used_asid_is_dirty", asid in host.soc.psp.asids.dirty)
    observer.look()


def _hostile(observer: Observer) -> None:
    """Linux tries to take a page that firmware keeps a guest in."""
    host = Host(observer.machine)
    vm = host.vm()
    vm.launch(1)
    with suppress(KernelError):
        rmp_make_shared(host.linux, Pfn(vm.context() >> PAGE_SHIFT), PgLevel.PG_4K)
    observer.look()


# SEV and SEV-ES


def _sev(observer: Observer) -> None:
    """Regions, a mirror, a move to another VM."""
    host = Host(observer.machine)
    source = launched(host, es=True, vcpus=1)
    addr = host.user.mmap(4 << PAGE_SHIFT)
    assert source.update(addr, PAGE_SIZE) == 0
    observer.look()
    assert source.region(addr, 4 << PAGE_SHIFT) == 0
    observer.look()
    mirror = plain_vm(host)
    assert mirror.mirror(source) == 0
    observer.look()
    target = plain_vm(host, vcpus=1)
    assert target.move_from(source) == 0
    observer.look()
    assert target.region(addr, 4 << PAGE_SHIFT, register=False) == 0
    observer.look()
    for vm in (source, mirror, target):
        vm.close()
        observer.look()


def _small() -> Machine:
    return Machine("7.3", "genoa", 1 << 28)


SCENES: dict[str, tuple[Callable[[], Machine], Play]] = {
    "boot": (machine, _boot),
    "memory": (_small, _memory),
    "logging": (_small, _logging),
    "launch": (_small, _launch),
    "asids": (_small, _asids),
    "hostile": (_small, _hostile),
    "sev": (_small, _sev),
}
