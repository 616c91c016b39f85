"""SNP launch commands through ioctls; digests against sev-snp-measure."""

from errno import EBADF, EFAULT, EINVAL, EIO, ENOTTY, EOPNOTSUPP
from typing import Any

import pytest
from sevsnpmeasure.gctx import GCTX
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmm_types import VMMType
from sevsnpmeasure.vmsa import VMSA as OutsideVmsa

from softcvm.abi.cpuid import CpuidPage
from softcvm.abi.insn import Load, Program
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.vcpu import KvmDebugregs, KvmFpu, KvmRegs, KvmSegment, KvmSregs
from softcvm.abi.rmp import PageState
from softcvm.abi.sev import (
    KvmSevInit,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmSevSnpLaunchUpdate,
    SevCmdId,
)
from softcvm.abi.vmsa import Vmsa
from softcvm.hw.events import RmpTransition
from softcvm.kernel.arch.x86.kvm.svm import launch
from softcvm.kernel.arch.x86.kvm.svm.vmsa import vmsa_image
from softcvm.kernel.arch.x86.virt.svm.sev import rmp_make_shared
from softcvm.kernel.virt.kvm.gmem_inode import GmemFile
from softcvm.sim.addr import Pfn, PgLevel

NORMAL, ZERO, UNMEASURED, SECRETS, CPUID = 1, 3, 4, 5, 6
TWO_PAGES = bytes(range(256)) * 32
SIGNATURE = 0xA10F10


def qemu_registers(vm: Any, vcpu: int, eip: int, rdx: int) -> None:
    """What QEMU gives an SEV-ES vCPU before launch: reset state, EIP from the firmware's reset block."""
    data = bytes(KvmSegment(limit=0xFFFF, type=3, present=1, s=1))
    sregs = KvmSregs(
        cs=bytes(
            KvmSegment(
                base=eip & 0xFFFF_0000, limit=0xFFFF, selector=0xF000, type=11, present=1, s=1
            )
        ),
        tr=bytes(KvmSegment(limit=0xFFFF, type=11, present=1)),
        ldt=bytes(KvmSegment(limit=0xFFFF, type=2, present=1)),
        gdt=(0xFFFF << 64).to_bytes(16, "little"),
        idt=(0xFFFF << 64).to_bytes(16, "little"),
        cr0=0x6000_0010,
        apic_base=0xFEE0_0900,
        **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data),
    )
    for request, arg in (
        (k.KVM_SET_SREGS, sregs),
        (k.KVM_SET_REGS, KvmRegs(rdx=rdx, rip=eip & 0xFFFF, rflags=2)),
        (k.KVM_SET_FPU, KvmFpu(fcw=0x37F, mxcsr=0x1F80)),
        (k.KVM_SET_DEBUGREGS, KvmDebugregs(dr6=0xFFFF_0FF0, dr7=0x400)),
    ):
        vm.user.ioctl(vm.vcpus[vcpu], request, arg)


@pytest.mark.parametrize("features", [0x1, 0x21])
def test_the_measured_vmsa_is_what_sev_snp_measure_expects_of_qemu(
    host: Any, features: int
) -> None:
    vm = host.vm(init=False)
    vm.op(SevCmdId.INIT2, KvmSevInit(vmsa_features=features & ~1))
    for vcpu_id in range(2):
        vm.vcpu(vcpu_id)
    qemu_registers(vm, 0, 0xFFFF_FFF0, SIGNATURE)
    qemu_registers(vm, 1, 0x0080_B004, SIGNATURE)
    outside = OutsideVmsa(SevMode.SEV_SNP, 0x80_B004, SIGNATURE, features, VMMType.QEMU)
    for vcpu, page in zip(vm.kvm.vcpus, outside.pages(2), strict=True):
        ours = vmsa_image(vcpu)
        wanted = Vmsa(bytes(page))
        assert {n: getattr(ours, n) for n in Vmsa.fields()} == {
            n: getattr(wanted, n) for n in Vmsa.fields()
        }
        assert bytes(ours) == bytes(page)


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("order", [0, 9])
def test_r2_2_a_payload_placed_before_boot_measures_as_sev_snp_measure_says(
    boot: Any, kernel: str, order: int
) -> None:
    """Contents reach the guest's page first and are encrypted there: firmware has no source buffer."""
    host = boot(kernel, order=order)
    seen: list[bytes] = []

    def guest(_: int) -> Program:
        seen.append((yield Load(0x10_0000, 8192)))

    host.guest(guest)
    vm = host.vm()
    vm.memory(1024)
    vm.start()
    outside = GCTX()
    assert vm.digest() == outside.ld()
    assert vm.update(0x100, TWO_PAGES)[0] == 0
    outside.update_normal_pages(0x10_0000, TWO_PAGES)
    assert vm.update(0x180, bytes(3 * 4096), ZERO)[0] == 0
    outside.update_zero_pages(0x18_0000, 3 * 4096)
    assert vm.update(0x190, TWO_PAGES, UNMEASURED)[0] == 0
    outside.update_unmeasured_pages(0x19_0000, 8192)
    assert vm.update(0x1A0, bytes(4096), SECRETS)[0] == 0
    outside.update_secrets_page(0x1A_0000)
    assert vm.update(0x1B0, bytes(CpuidPage()), CPUID)[0] == 0
    outside.update_cpuid_page(0x1B_0000)
    assert vm.digest() == outside.ld()
    vm.vcpu(0)
    qemu_registers(vm, 0, 0xFFFF_FFF0, SIGNATURE)
    vm.finish()
    page = next(OutsideVmsa(SevMode.SEV_SNP, 0, SIGNATURE, 1, VMMType.QEMU).pages(1))
    outside.update_vmsa_page(page)
    assert vm.digest() == outside.ld()
    # What the guest reads is the payload; what the host reads is not.
    assert vm.run().exit_reason == k.KVM_EXIT_HLT
    assert seen == [TWO_PAGES]
    pfn = _pfn(vm, 0x100)
    assert host.soc.host_read(pfn << 12, 4096) != TWO_PAGES[:4096]
    assert host.soc.rmp.state(pfn) is PageState.GUEST_VALID


def test_an_ovmf_image_measures_page_by_page_as_sev_snp_measure_does(
    host: Any, ovmf_image: Any
) -> None:
    image = ovmf_image.read_bytes()[-64 * 4096 :]
    vm = host.vm()
    vm.memory(1024)
    vm.start()
    assert vm.update(512, image)[0] == 0
    outside = GCTX()
    outside.update_normal_pages(512 << 12, image)
    assert vm.digest() == outside.ld()


def _pfn(vm: Any, gfn: int) -> int:
    gmem = vm.user.sys.proc.files.lookup(vm.gmem).private
    assert isinstance(gmem, GmemFile)
    folio = gmem.inode.folios[gfn]
    assert folio is not None
    return gfn + folio.delta


# Row 1.4


def test_r1_4_a_launch_update_takes_each_page_through_pre_guest(host: Any) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    seen: list[RmpTransition] = []
    host.machine.events.attach(
        lambda e: seen.append(e) if isinstance(e, RmpTransition) else None
    )
    assert vm.update(5, TWO_PAGES)[0] == 0
    asid = vm.kvm.arch.sev.asid
    for gfn in (5, 6):
        pfn = _pfn(vm, gfn)
        assigned, validated = [e for e in seen if e.pfn == pfn]
        # assigned, 4K, immutable, gpa, asid; [PPR-19h-11h] bit positions
        assert assigned.new_lo == 1 | 1 << 2 | gfn << 12 | asid << 51
        assert (assigned.old_lo, assigned.agent) == (0, "RMPUPDATE")
        assert validated.new_lo == 1 | gfn << 12 | asid << 51 | 1 << 62


# Row 1.3


@pytest.mark.parametrize("order", [0, 9])
def test_r1_3_a_launch_works_on_4k_pages_plainly(boot: Any, order: int) -> None:
    vm = (host := boot(order=order)).vm()
    vm.memory(1024)
    vm.start()
    assert vm.update(512, bytes(512 * 4096), ZERO)[0] == 0
    assert {host.soc.rmp.entry(_pfn(vm, gfn)).pagesize for gfn in range(512, 1024)} == {0}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"len": 4095}, "not whole pages"),
        ({"len": 4096, "flags": 1}, "flags"),
        ({"len": 4096, "type": 2}, "VMSA pages are KVM's own"),
        ({"len": 4096, "type": 0}, "no such type"),
        ({"len": 4096, "type": 7}, "no such type"),
        ({"len": 4096, "gfn_start": 1 << 20}, "no memslot"),
        ({"len": 0}, "empty"),
        ({"len": 4096, "uaddr": 0x1001}, "unaligned source"),
    ],
)
def test_r1_3_a_request_that_needs_anything_else_is_refused(
    host: Any, fields: dict[str, int], why: str
) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    params = KvmSevSnpLaunchUpdate(**({"type": NORMAL, "uaddr": vm.shared} | fields))
    errno, cmd = vm.sev_cmd(SevCmdId.SNP_LAUNCH_UPDATE, params, error=0x99)
    assert (errno, cmd.error) == (EINVAL, 0x99), why


def test_an_empty_update_did_nothing_successfully_until_2026(boot: Any) -> None:
    vm = boot("6.12").vm()
    vm.memory(64)
    vm.start()
    errno, _, params = vm.update(3, b"")
    assert (errno, params.gfn_start, params.len) == (0, 3, 0)


# Row 1.8 and the shape of failures


def test_r1_8_failed_launch_update_reverts_only_what_it_changed(boot: Any) -> None:
    """Two VMs; the second's update fails on its second page, whose neighbours belong to somebody.

    Before it: its own page, launched. After it: a page of another guest, untouched. The page itself
    goes back to the hypervisor.
    """
    host = boot()
    other, vm = host.vm(), host.vm()
    for each in (other, vm):
        each.memory(64)
        each.start()
    assert other.update(10, TWO_PAGES)[0] == 0
    page = CpuidPage()
    page.data[0:4] = (65).to_bytes(4, "little")  # more entries than there are slots
    assert vm.update(1, TWO_PAGES[:4096])[0] == 0
    rmp = host.soc.rmp
    before = {pfn: rmp.raw(pfn) for pfn in range(host.soc.memory_pages >> 4)}
    seen: list[RmpTransition] = []
    detach = host.machine.events.attach(
        lambda e: seen.append(e) if isinstance(e, RmpTransition) else None
    )
    errno, cmd, params = vm.update(2, bytes(page), CPUID)
    detach()
    assert (errno, cmd.error) == (EIO, 0x16)
    assert (params.gfn_start, params.len) == (2, 4096)
    failed = _pfn(vm, 2)
    assert {e.pfn for e in seen} == {failed}
    assert rmp.state(failed) is PageState.HYPERVISOR
    assert {pfn: rmp.raw(pfn) for pfn in before} == before
    assert vm.update(2, TWO_PAGES)[0] == 0  # and the page can be used for something else


def test_r1_8_a_failure_after_the_first_page_is_a_short_success(host: Any) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    assert vm.update(6, TWO_PAGES[:4096])[0] == 0
    uaddr = vm.user.mmap(4 * 4096)
    errno, cmd, params = vm.update(4, bytes(4 * 4096), NORMAL, uaddr=uaddr)
    assert (errno, params.gfn_start, params.len) == (0, 6, 2 * 4096)
    assert params.uaddr == uaddr + 2 * 4096
    assert cmd.error == 0
    assert host.soc.rmp.state(_pfn(vm, 5)) is PageState.GUEST_VALID
    errno, _, params = vm.update(6, bytes(4096))  # the page that stopped it is assigned
    assert (errno, params.gfn_start) == (EIO, 6)


def test_r1_8_the_revert_is_one_function_that_a_defect_can_replace(
    boot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread's bug: on failure, reset everything in the request. Another guest's page goes with it."""
    host = boot()
    victim, vm = host.vm(), host.vm()
    for each in (victim, vm):
        each.memory(64)
        each.start()
    assert victim.update(10, TWO_PAGES)[0] == 0
    good = launch.snp_launch_update_revert

    def revert_everything(kvm: Any, pfn: Pfn, args: Any) -> Any:
        yield from good(kvm, pfn, args)
        rmp_make_shared(kvm.linux, Pfn(_pfn(victim, 10)), PgLevel.PG_4K)

    monkeypatch.setattr(launch, "snp_launch_update_revert", revert_everything)
    page = CpuidPage()
    page.data[0:4] = (65).to_bytes(4, "little")
    assert vm.update(2, bytes(page), CPUID)[0] == EIO
    assert host.soc.rmp.state(_pfn(victim, 10)) is PageState.HYPERVISOR


def test_a_refused_cpuid_page_comes_back_corrected(host: Any) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    page = CpuidPage()
    page.data[0:4] = (1).to_bytes(4, "little")
    page.data[16:20] = (0x8000_001F).to_bytes(4, "little")
    page.data[16 + 24 : 16 + 28] = (0xFFFF_FFFF).to_bytes(
        4, "little"
    )  # EAX: every feature there is
    uaddr = vm.user.mmap(4096)
    vm.user.sys.store(uaddr, bytes(page))
    errno, cmd, _ = vm.update(2, bytes(4096), CPUID, uaddr=uaddr)
    assert (errno, cmd.error) == (EIO, 0x16)
    corrected = vm.user.sys.load(uaddr, 4096)
    assert corrected != bytes(page)
    vm.user.sys.store(uaddr, corrected)
    assert vm.update(2, bytes(4096), CPUID, uaddr=uaddr)[0] == 0


# Row 1.10


@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
def test_r1_10_every_page_a_launch_update_touches_is_released_on_every_path(
    boot: Any, kernel: str
) -> None:
    host = boot(kernel)
    vm = host.vm()
    vm.memory(64)
    vm.start()
    refs = host.linux.page_alloc.refs
    held = list(refs)
    page = CpuidPage()
    page.data[0:4] = (65).to_bytes(4, "little")
    uaddr = vm.user.mmap(3 * 4096)
    vm.user.sys.store(uaddr, b"x" * 4096)
    attempts = [
        vm.update(2, TWO_PAGES),  # success
        vm.update(2, TWO_PAGES),  # assigned already
        vm.update(8, bytes(page), CPUID),  # refused by firmware
        vm.update(12, bytes(4096), uaddr=0x10_0000),  # source not mapped
        vm.update(13, bytes(4096), uaddr=0),  # no source
    ]
    assert [errno for errno, _, _ in attempts] == [0, EIO, EIO, EIO, EIO]
    assert refs == held
    gmem = vm.user.sys.proc.files.lookup(vm.gmem).private
    folios = {gfn: gmem.inode.folios[gfn] for gfn in range(64)}
    uptodate = [gfn for gfn, folio in folios.items() if folio and folio.uptodate]
    assert uptodate == [2, 3]  # dirtied and accepted; the others stay as if never touched
    vm.user.sys.munmap(uaddr, 3 * 4096)
    vm.user.sys.close(vm.gmem)


# Errnos, in the kernel's order


def test_launch_start_refuses_in_order(host: Any) -> None:
    vm = host.vm(init=False)
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_START, KvmSevSnpLaunchStart())[0] == ENOTTY
    vm.op(SevCmdId.INIT2, KvmSevInit())
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_START)[0] == EFAULT
    for policy, flags in (
        (0x30000, 1),
        (0x30000 | 1 << 18, 0),
        (0x30000 | 1 << 21, 0),
        (0x10000, 0),
        (0x20000, 0),
        (0x30000 | 1 << 20, 0),
    ):
        params = KvmSevSnpLaunchStart(policy=policy, flags=flags)
        assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_START, params)[0] == EINVAL, hex(policy)
    good = KvmSevSnpLaunchStart(policy=0x30000)
    for fd in (99, host.dev_kvm):  # a bad sev_fd is ENOTTY, because no context could be created
        assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_START, good, sev_fd=fd)[0] == ENOTTY
    high = KvmSevSnpLaunchStart(policy=0x3FFFF)
    errno, cmd = vm.sev_cmd(SevCmdId.SNP_LAUNCH_START, high)
    assert (errno, cmd.error) == (EIO, 7)  # POLICY_FAILURE: no firmware has API 255.255
    assert vm.kvm.arch.sev.snp_context is None
    vm.op(SevCmdId.SNP_LAUNCH_START, good)
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_START, good)[0] == EINVAL


def test_error_is_firmware_s_status_where_firmware_was_asked_and_else_the_caller_s(
    host: Any,
) -> None:
    vm = host.vm()
    vm.memory(16)
    start = KvmSevSnpLaunchStart(policy=0x30000)
    errno, cmd = vm.sev_cmd(SevCmdId.SNP_LAUNCH_START, start, error=0x77)
    assert (errno, cmd.error) == (0, 0)
    update = KvmSevSnpLaunchUpdate(gfn_start=1, len=4096, type=ZERO)
    errno, cmd = vm.sev_cmd(SevCmdId.SNP_LAUNCH_UPDATE, update, error=0x77)
    assert (errno, cmd.error) == (0, 0x77)  # a status of its own, copied on failure only


def test_commands_before_their_time(host: Any) -> None:
    sev = host.vm(VmType.SEV_ES)
    for vm in (host.vm(init=False), sev):
        assert vm.update(0, TWO_PAGES)[0] == EINVAL
        assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())[0] == ENOTTY
    vm = host.vm()
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())[0] == EINVAL
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_UPDATE)[0] == EINVAL
    vm.start()
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_UPDATE)[0] == EFAULT
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_FINISH)[0] == EFAULT
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish(flags=1))[0] == EINVAL


def test_a_shared_gfn_cannot_be_launched_and_its_page_stays_unassigned(host: Any) -> None:
    vm = host.vm()
    vm.memory(64, private=False)
    vm.start()
    assert vm.update(3, TWO_PAGES)[0] == EIO
    assert host.soc.rmp.state(_pfn(vm, 3)) is PageState.HYPERVISOR


def test_a_source_must_stay_readable(host: Any) -> None:
    uaddr = host.user.mmap(4096)  # the first mapping: above it there will never be another
    vm = host.vm()
    vm.memory(64)
    vm.start()
    errno, _, params = vm.update(3, TWO_PAGES, uaddr=uaddr)
    assert (errno, params.gfn_start, params.len) == (0, 4, 4096)
    errno, _, _ = vm.update(4, TWO_PAGES[:4096], uaddr=uaddr + 4096)
    assert errno == EIO


def test_closing_dev_sev_breaks_later_commands(host: Any) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    vm.vcpu()
    host.user.sys.close(host.dev_sev)
    errno, _ = vm.sev_cmd(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())
    assert errno == EBADF


def test_finish_twice_finds_the_vmsa_encrypted(host: Any) -> None:
    vm = host.vm()
    vm.launch(16)
    assert vm.sev_cmd(SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())[0] == EINVAL


def test_prefault_waits_for_the_end_of_the_launch(host: Any) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    vm.vcpu()
    assert vm.prefault(0, 8) == EOPNOTSUPP
    vm.finish()
    assert vm.prefault(0, 8) == 0
    assert host.soc.rmp.state(_pfn(vm, 3)) is PageState.GUEST_INVALID


def test_kvm_run_before_the_launch_is_finished_fails_to_enter(host: Any) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    vm.vcpu()
    seen = vm.run()
    assert seen.exit_reason == k.KVM_EXIT_FAIL_ENTRY
    assert seen.fail_entry_hardware_entry_failure_reason == (1 << 64) - 1


def test_the_vmsa_page_never_begins_a_2m_region(host: Any) -> None:
    vm = host.vm()
    vm.launch(16, vcpus=40)
    vmsas = [vcpu.arch.svm.vmsa for vcpu in vm.kvm.vcpus]
    assert len(set(vmsas)) == 40
    assert all(pfn % 512 for pfn in vmsas)
    entries = [host.soc.rmp.head(pfn) for pfn in vmsas]
    assert {(e.vmsa, e.validated, e.gpa) for e in entries} == {(1, 1, 0xFFFF_FFFF_F000)}


def test_a_page_that_is_launched_is_not_launched_again(host: Any) -> None:
    vm = host.vm()
    vm.memory(64)
    vm.start()
    assert vm.update(3, TWO_PAGES[:4096])[0] == 0
    digest = vm.digest()
    assert vm.update(3, TWO_PAGES[:4096])[0] == EIO
    assert vm.digest() == digest
