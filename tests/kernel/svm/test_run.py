"""KVM_RUN of guests without SNP: plain, SEV and SEV-ES; what they see, and what the host sees of them."""

from errno import EINVAL
from typing import Any

import pytest

from softcvm.abi.ghcb import GhcbExit, IoioInfo, cpuid_request
from softcvm.abi.insn import (
    Cpuid,
    Hlt,
    In,
    Load,
    Out,
    Program,
    Pvalidate,
    Rdmsr,
    Store,
    Vmgexit,
    Vmmcall,
    Wrmsr,
)
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KVM_HC_MAP_GPA_RANGE, VmType
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE, KvmRun
from softcvm.abi.kvm.vcpu import KvmDtable, KvmRegs, KvmSegment, KvmSregs
from softcvm.abi.sev import SevCmdId
from softcvm.abi.svm import ExitCode, GuestException, Msr, Vector
from tests.kernel.svm.sev_vms import ES, PAGE, SevVm
from tests.kernel.svm.test_ghcb import ghcb

TEXT = bytes(range(256)) * 16
ENOSYS = -1000 & (1 << 64) - 1


class Guest:
    """One VM of any type with one vCPU and 16 pages at GPA 0; what its script saw is in `seen`."""

    def __init__(self, host: Any, vm_type: int, script: Any, *, launch: bool = True) -> None:
        self.seen: list[Any] = []
        host.guest(lambda _: script(self.seen.append))
        self.host, self.user = host, host.user
        self.vm = SevVm(host, vm_type, init=vm_type in (VmType.SEV, VmType.SEV_ES))
        if vm_type in (VmType.SEV, VmType.SEV_ES):
            self.vm.start(ES if vm_type == VmType.SEV_ES else 0)
        self.memory = self.vm.slot(16)
        self.vcpu = self.user.ioctl(self.vm.fd, k.KVM_CREATE_VCPU, 0)
        self.shared = self.user.mmap(KVM_RUN_MMAP_SIZE, 1, self.vcpu)
        if vm_type == VmType.SEV_ES and launch:
            assert self.vm.cmd(SevCmdId.LAUNCH_UPDATE_VMSA) == 0

    def run(self) -> KvmRun:
        self.user.ioctl(self.vcpu, k.KVM_RUN)
        return KvmRun(self.user.sys.load(self.shared, KvmRun.SIZE))

    def load(self, gpa: int, length: int) -> bytes:
        data: bytes = self.user.sys.load(self.memory + gpa, length)
        return data

    def pio(self, run: KvmRun) -> bytes:
        data: bytes = self.user.sys.load(self.shared + run.io_data_offset, run.io_size)
        return data

    def regs(self) -> KvmRegs:
        regs = KvmRegs()
        self.user.ioctl(self.vcpu, k.KVM_GET_REGS, regs)
        return regs


def raised(vector: Vector, code: int = 0) -> tuple[Vector, int]:
    return vector, code


def trying(op: Any, note: Any) -> Program:
    """An instruction whose exception is noted."""
    try:
        note((yield op))
    except GuestException as exception:
        note((exception.vector, exception.error_code))


def halts() -> Program:
    yield Hlt()
    yield Hlt()


PLAIN = [VmType.DEFAULT, VmType.SW_PROTECTED, VmType.SEV]


@pytest.mark.parametrize("vm_type", PLAIN)
def test_a_guest_with_visible_registers_talks_through_ports_and_memory(
    host: Any, vm_type: VmType
) -> None:
    def script(note: Any) -> Program:
        yield Store(0x3000, b"hello", c=False)
        note((yield Load(0x3000, 5, c=False)))
        yield Out(0x3F8, 0x41)
        note((yield In(0x3F9, 2)))
        note((yield Vmmcall(77)))

    guest = Guest(host, vm_type, script)
    run = guest.run()
    assert (run.exit_reason, run.io_port, run.io_direction) == (k.KVM_EXIT_IO, 0x3F8, 1)
    assert guest.pio(run) == b"A"
    assert guest.load(0x3000, 5) == b"hello"
    run = guest.run()
    assert (run.exit_reason, run.io_port, run.io_size) == (k.KVM_EXIT_IO, 0x3F9, 2)
    guest.user.sys.store(guest.shared + run.io_data_offset, b"\x34\x12")
    assert guest.run().exit_reason == k.KVM_EXIT_HLT
    assert guest.seen == [b"hello", 0x1234, ENOSYS]


def test_the_host_sees_and_sets_a_plain_guests_registers_at_an_exit(host: Any) -> None:
    def script(note: Any) -> Program:
        yield Out(0x80, 0xCAFE, 2)
        note((yield In(0x81, 4)))
        note((yield In(0x82, 1)))

    guest = Guest(host, VmType.DEFAULT, script)
    guest.run()
    assert guest.regs().rax == 0xCAFE
    run = guest.run()
    guest.user.sys.store(guest.shared + run.io_data_offset, b"\xef\xbe\xad\xde")
    run = guest.run()
    assert run.io_port == 0x82
    assert guest.regs().rax == 0xDEADBEEF  # four bytes replace RAX
    # A vCPU that user space moves elsewhere does not take the data of the port.
    regs = guest.regs()
    regs.rip += 0x10
    guest.user.ioctl(guest.vcpu, k.KVM_SET_REGS, regs)
    guest.user.sys.store(guest.shared + run.io_data_offset, b"\x77")
    assert guest.run().exit_reason == k.KVM_EXIT_HLT
    assert guest.regs().rax == 0xDEADBEEF


def test_cpuid_and_msrs_of_a_plain_guest_are_kvms(host: Any) -> None:
    def script(note: Any) -> Program:
        note((yield Cpuid(0x4000_0000)))
        note((yield Rdmsr(0x1B)))
        yield from trying(Wrmsr(0x277, 0x0202_0202), note)  # no such memory type: #GP
        yield from trying(Wrmsr(0x277, 0x0606_0606), note)
        note((yield Rdmsr(0x277)))

    guest = Guest(host, VmType.DEFAULT, script)
    assert guest.run().exit_reason == k.KVM_EXIT_HLT
    assert guest.seen == [
        (0, 0, 0, 0),
        0xFEE0_0900,
        raised(Vector.GP),
        None,
        0x0606_0606,
    ]


@pytest.mark.parametrize("vm_type", [VmType.DEFAULT, VmType.SEV, VmType.SEV_ES])
def test_what_is_snps_is_undefined_for_the_others(host: Any, vm_type: VmType) -> None:
    guest = Guest(host, vm_type, lambda note: trying(Pvalidate(0, 0, True), note))
    assert guest.run().exit_reason == k.KVM_EXIT_HLT
    assert guest.seen == [raised(Vector.UD)]


@pytest.mark.parametrize("vm_type", [VmType.SEV, VmType.SEV_ES])
def test_a_sev_guest_reads_its_payload_and_the_host_ciphertext(
    host: Any, vm_type: VmType
) -> None:
    def script(note: Any) -> Program:
        note((yield Load(0x2000, PAGE)))
        note((yield Load(0x2000, PAGE, c=False)))
        yield Store(0x4000, TEXT)
        yield Store(0x5000, TEXT, c=False)
        note((yield Rdmsr(Msr.SEV_STATUS)))

    guest = Guest(host, vm_type, script)
    guest.user.sys.store(guest.memory + 0x2000, TEXT)
    assert guest.vm.update(guest.memory + 0x2000, PAGE) == 0
    cipher = guest.load(0x2000, PAGE)
    assert guest.run().exit_reason == k.KVM_EXIT_HLT
    assert guest.seen == [TEXT, cipher, 1 if vm_type == VmType.SEV else 3]
    assert guest.load(0x5000, PAGE) == TEXT
    key = host.soc.key(guest.vm.sev.asid)
    page = guest.memory + 0x4000 >> 12
    spa = page + guest.user.sys.proc.mm.pages[page] << 12
    assert guest.load(0x4000, PAGE) == key.encrypt(spa, TEXT) != TEXT


def test_a_sev_es_guest_asks_through_the_msr_and_the_page(host: Any) -> None:
    gpa = 0x6000
    request = ghcb(GhcbExit.IOIO, info_1=0x3F8 << IoioInfo.PORT_SHIFT | 1 << 4, rax=0x5A)

    def script(note: Any) -> Program:
        yield from trying(Cpuid(0), note)
        yield from trying(Out(0x3F8, 1), note)
        yield from trying(Rdmsr(0x1B), note)
        yield Wrmsr(Msr.SEV_ES_GHCB, cpuid_request(1, 0))
        note((yield Vmgexit()) & 0xFFF)
        yield Store(gpa, bytes(request), c=False)
        yield Wrmsr(Msr.SEV_ES_GHCB, gpa)
        yield Vmgexit()

    guest = Guest(host, VmType.SEV_ES, script)
    run = guest.run()
    assert (run.exit_reason, run.io_port) == (k.KVM_EXIT_IO, 0x3F8)
    assert guest.pio(run) == b"Z"
    assert guest.run().exit_reason == k.KVM_EXIT_HLT
    assert guest.seen == [
        raised(Vector.VC, ExitCode.CPUID),
        raised(Vector.VC, ExitCode.IOIO),
        raised(Vector.VC, ExitCode.MSR),
        5,  # GHCB_MSR_CPUID_RESP
    ]
    assert guest.user.errno(guest.vcpu, k.KVM_GET_REGS, KvmRegs()) == EINVAL


def test_a_sev_es_vcpu_does_not_run_before_its_registers_are_encrypted(host: Any) -> None:
    """The processor would decrypt what lies in plain, and find nothing that it can enter."""
    guest = Guest(host, VmType.SEV_ES, lambda _: halts(), launch=False)
    run = guest.run()
    assert run.exit_reason == k.KVM_EXIT_FAIL_ENTRY
    assert run.fail_entry_hardware_entry_failure_reason == (1 << 64) - 1


def test_a_hypercall_of_a_plain_guest_needs_long_mode_for_its_full_width(host: Any) -> None:
    """In the real mode of a fresh vCPU the arguments are 32 bits wide."""

    def script(note: Any) -> Program:
        note((yield Vmmcall(KVM_HC_MAP_GPA_RANGE, (1 << 40, 1, 0, 0))))

    guest = Guest(host, VmType.DEFAULT, script)
    guest.run()
    assert guest.seen == [ENOSYS]  # not enabled


def test_vcpus_without_sev_have_asids_of_their_own_behind_those_for_sev(host: Any) -> None:
    asids = []
    for _ in range(2):
        guest = Guest(host, VmType.DEFAULT, lambda _: halts())
        guest.run()
        [vcpu] = guest.vm.kvm.vcpus
        asids.append(vcpu.arch.svm.vmcb.asid)
        guest.run()
        assert vcpu.arch.svm.vmcb.asid == asids[-1]
    assert asids == [host.soc.profile.max_asid + 1, host.soc.profile.max_asid + 2]


def long_mode() -> KvmSregs:
    """What a VMM sets for 64-bit code at privilege level 3."""

    def segment(type_: int, **more: int) -> bytes:
        fields: dict[str, Any] = {
            "base": 0,
            "limit": 0xFFFFFFFF,
            "present": 1,
            "s": 1,
            "g": 1,
            "dpl": 3,
        }
        return bytes(KvmSegment(type=type_, **fields | more))

    sregs = KvmSregs(
        cs=segment(0xB, l=1, selector=0x33),
        tr=segment(0xB, s=0, limit=0x67, g=0, selector=0x40, base=0x9000, dpl=0),
        ldt=bytes(KvmSegment(unusable=1)),
        gdt=bytes(KvmDtable(base=0x8000, limit=0x7F)),
        idt=bytes(KvmDtable(base=0xFFFF_8000_0000_1000, limit=0xFFF)),
        cr0=0x8005_0033,
        cr2=0x1234,
        cr3=0x10_0000,
        cr4=0x20,
        efer=0xD01,
        apic_base=0xFEE0_0900,
    )
    sregs.ss = segment(3, db=1, selector=0x2B)
    sregs.ds = sregs.es = segment(3, db=1, selector=0x2B)
    sregs.fs = segment(3, base=0x7FFF_F000_0000, selector=0)
    sregs.gs = segment(3, base=0xFFFF_8800_0000_0000, selector=0)
    return sregs


def test_a_guest_that_changes_nothing_gives_its_registers_back(host: Any) -> None:
    guest = Guest(host, VmType.DEFAULT, lambda _: halts())
    names = [name for name in KvmRegs.fields() if name not in ("rip", "rflags")]
    numbers: dict[str, Any] = {name: i << 32 | i for i, name in enumerate(names)}
    regs = KvmRegs(rip=0x1000, rflags=0x246, **numbers)
    sregs = long_mode()
    guest.user.ioctl(guest.vcpu, k.KVM_SET_REGS, regs)
    guest.user.ioctl(guest.vcpu, k.KVM_SET_SREGS, sregs)
    assert guest.run().exit_reason == k.KVM_EXIT_HLT
    after = KvmSregs()
    guest.user.ioctl(guest.vcpu, k.KVM_GET_SREGS, after)
    assert guest.regs() == regs
    assert after == sregs
