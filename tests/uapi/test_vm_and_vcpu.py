"""Creating VMs and vCPUs, capabilities, registers, KVM_RUN's first checks, dead VMs.

Expected values: virt/kvm/kvm_main.c and arch/x86/kvm/x86.c v6.12 and v7.2, read.
"""

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.run import KvmExit, KvmRun
from softcvm.abi.kvm.vcpu import KvmEnableCap, KvmRegs, KvmSregs
from softcvm.kernel.errors import Unmodelled
from softcvm.kernel.task import Rlimits
from tests.uapi.calls import MIB, PAGE, VmCalls, anon, errno_of


def start(vm_type: int = VmType.DEFAULT, kernel: str = "7.3") -> tuple[Machine, VmCalls]:
    machine = Machine(kernel=kernel, memory=256 * MIB)
    return machine, VmCalls(machine.process(), vm_type)


@pytest.mark.parametrize(
    ("vm_type", "expected"),
    [
        (0, "0"),
        (1, "0"),
        (2, "0"),
        (3, "0"),
        (4, "0"),
        (5, "EINVAL"),
        (31, "EINVAL"),
        (32, "EINVAL"),
    ],
)
def test_vm_types(vm_type: int, expected: str) -> None:
    machine = Machine(memory=256 * MIB)
    assert errno_of(lambda: VmCalls(machine.process(), vm_type)) == expected


def test_a_vm_needs_a_descriptor_before_its_type_is_looked_at() -> None:
    sys = Machine(memory=256 * MIB).process(Rlimits(nofile=4))
    kvm = sys.open("/dev/kvm")
    assert errno_of(lambda: sys.ioctl(kvm, k.KVM_CREATE_VM, 99)) == "EMFILE"


def test_dev_kvm_answers() -> None:
    machine, calls = start()
    sys, kvm = calls.sys, calls.kvm
    assert sys.ioctl(kvm, k.KVM_GET_API_VERSION) == 12
    assert errno_of(lambda: sys.ioctl(kvm, k.KVM_GET_API_VERSION, 1)) == "EINVAL"
    assert sys.ioctl(kvm, k.KVM_GET_VCPU_MMAP_SIZE) == 3 * PAGE
    assert errno_of(lambda: sys.ioctl(kvm, k.KVM_CREATE_VCPU)) == "EINVAL"
    assert errno_of(lambda: sys.ioctl(kvm, 0x5401)) == "EINVAL"
    assert errno_of(lambda: sys.ioctl(99, k.KVM_GET_API_VERSION)) == "EBADF"
    assert errno_of(lambda: sys.open("/dev/nothing")) == "ENOENT"
    assert machine.counters["ioctls"] == 7


@pytest.mark.parametrize(
    ("cap", "on_kvm", "on_default", "on_snp"),
    [
        (k.KVM_CAP_USER_MEMORY2, 1, 1, 1),
        (k.KVM_CAP_MEMORY_FAULT_INFO, 1, 1, 1),
        (k.KVM_CAP_MEMORY_ATTRIBUTES, 8, 0, 8),
        (k.KVM_CAP_GUEST_MEMFD, 1, 1, 1),
        (k.KVM_CAP_VM_TYPES, 0x1F, 0x1F, 0x1F),
        (k.KVM_CAP_PRE_FAULT_MEMORY, 1, 1, 1),
        (k.KVM_CAP_EXIT_HYPERCALL, 0x1000, 0x1000, 0x1000),
        (k.KVM_CAP_MULTI_ADDRESS_SPACE, 2, 2, 1),
        (k.KVM_CAP_READONLY_MEM, 1, 1, 0),
        (k.KVM_CAP_NR_MEMSLOTS, 32764, 32764, 32764),
        (k.KVM_CAP_GUEST_MEMFD_FLAGS, 3, 3, 1),
        (12345, 0, 0, 0),
    ],
)
def test_capabilities(cap: int, on_kvm: int, on_default: int, on_snp: int) -> None:
    _, calls = start()
    snp = VmCalls(calls.sys, VmType.SNP)
    check = k.KVM_CHECK_EXTENSION
    told = [calls.sys.ioctl(fd, check, cap) for fd in (calls.kvm, calls.fd, snp.fd)]
    assert told == [on_kvm, on_default, on_snp]


def test_a_6_12_kernel_offers_gmem_to_private_vms_only() -> None:
    _, calls = start(kernel="6.12")
    check = k.KVM_CHECK_EXTENSION
    assert calls.sys.ioctl(calls.kvm, check, k.KVM_CAP_GUEST_MEMFD) == 1
    assert calls.sys.ioctl(calls.fd, check, k.KVM_CAP_GUEST_MEMFD) == 0
    assert errno_of(calls.gmem) == "0"  # creating one was never refused


def test_enable_cap() -> None:
    _, calls = start()
    assert errno_of(lambda: calls.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1 << 12)) == "0"
    assert errno_of(lambda: calls.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 1)) == "EINVAL"
    assert errno_of(lambda: calls.enable_cap(k.KVM_CAP_EXIT_HYPERCALL, 0, flags=1)) == "EINVAL"
    assert errno_of(lambda: calls.enable_cap(12345)) == "EINVAL"
    calls.enable_cap(k.KVM_CAP_SPLIT_IRQCHIP, 24)
    assert errno_of(lambda: calls.enable_cap(k.KVM_CAP_SPLIT_IRQCHIP, 24)) == "EEXIST"


def test_vcpu_ids() -> None:
    _, calls = start()
    assert errno_of(lambda: calls.vcpu(4096)) == "EINVAL"
    calls.vcpu(7)
    assert errno_of(lambda: calls.vcpu(7)) == "EEXIST"
    assert errno_of(lambda: calls.vcpu(4095)) == "0"


def test_a_vcpu_that_gets_no_descriptor_leaves_nothing_behind() -> None:
    machine = Machine(memory=256 * MIB)
    calls = VmCalls(machine.process(Rlimits(nofile=5)), VmType.SNP)
    free = machine.linux.page_alloc.free_pages
    assert errno_of(calls.vcpu) == "EMFILE"
    (kvm,) = machine.linux.vm_list
    assert kvm.created_vcpus == kvm.online_vcpus == 0
    assert machine.linux.page_alloc.free_pages == free


def test_registers_come_back_as_they_were_set() -> None:
    _, calls = start()
    vcpu = calls.vcpu()
    regs = KvmRegs(rax=1, rip=0xFFFF_FFF0, rflags=0)
    calls.sys.ioctl(vcpu, k.KVM_SET_REGS, regs.data)
    back = bytearray(KvmRegs.SIZE)
    calls.sys.ioctl(vcpu, k.KVM_GET_REGS, back)
    assert KvmRegs(back).rip == 0xFFFF_FFF0
    assert KvmRegs(back).rflags == 2
    sregs = bytearray(KvmSregs.SIZE)
    calls.sys.ioctl(vcpu, k.KVM_GET_SREGS, sregs)
    broken = KvmSregs(sregs)
    broken.cr0 = 0x8000_0000  # paging without protection
    assert errno_of(lambda: calls.sys.ioctl(vcpu, k.KVM_SET_SREGS, broken.data)) == "EINVAL"


def test_kvm_run_is_refused_before_the_guest_is_entered() -> None:
    _, calls = start(VmType.SNP)
    vcpu = calls.vcpu()
    sys = calls.sys
    assert errno_of(lambda: sys.ioctl(vcpu, k.KVM_RUN, 1)) == "EINVAL"
    page = sys.mmap(3 * PAGE, 3, 1, vcpu)
    sys.store(page + KvmRun.immediate_exit.offset, b"\1")
    assert errno_of(lambda: sys.ioctl(vcpu, k.KVM_RUN)) == "EINTR"
    sys.store(page + KvmRun.immediate_exit.offset, b"\0")
    sys.store(page + KvmRun.kvm_dirty_regs.offset, b"\1")
    assert errno_of(lambda: sys.ioctl(vcpu, k.KVM_RUN)) == "EINVAL"


def test_a_dead_vm_answers_eio_to_everything_but_close() -> None:
    machine, calls = start(VmType.SW_PROTECTED)
    vcpu, gmem = calls.vcpu(), calls.gmem()
    (kvm,) = machine.linux.vm_list
    kvm.bug("a test says so")
    hva = anon(calls.sys, MIB)
    assert errno_of(lambda: calls.region(hva=hva)) == "EIO"
    assert errno_of(lambda: calls.sys.ioctl(vcpu, k.KVM_RUN)) == "EIO"
    assert errno_of(lambda: calls.sys.ioctl(calls.fd, 0xDEAD)) == "EIO"
    calls.sys.fallocate(gmem, 1, 0, MIB)  # a file outlives its VM
    calls.close()
    assert not machine.linux.vm_list


def test_what_is_not_modelled_is_no_errno() -> None:
    _, calls = start()
    with pytest.raises(Unmodelled, match="KVM_IRQFD"):
        calls.sys.ioctl(calls.fd, k.KVM_IRQFD, bytearray(32))
    assert errno_of(lambda: calls.sys.ioctl(calls.fd, k.KVM_RUN)) == "ENOTTY"
    assert errno_of(lambda: calls.sys.ioctl(calls.vcpu(), k.KVM_CREATE_VCPU)) == "EINVAL"


def test_an_ap_with_an_in_kernel_irqchip_waits() -> None:
    _, calls = start(VmType.SNP)
    calls.enable_cap(k.KVM_CAP_SPLIT_IRQCHIP, 24)
    calls.vcpu(0)
    ap = calls.vcpu(1)
    state = bytearray(4)
    calls.sys.ioctl(ap, k.KVM_GET_MP_STATE, state)
    assert state[0] == 1  # UNINITIALIZED
    page = calls.sys.mmap(PAGE, 3, 1, ap)
    assert calls.sys.load(page + KvmRun.exit_reason.offset, 1)[0] == KvmExit.UNKNOWN


def test_the_tsc_runs_at_the_hosts_frequency_until_user_space_says_otherwise() -> None:
    machine, calls = start(kernel="6.12")
    sys, vm = calls.sys, calls.fd
    host = sys.ioctl(vm, k.KVM_GET_TSC_KHZ)
    assert host == machine.soc.profile.tsc_khz
    assert errno_of(lambda: sys.ioctl(vm, k.KVM_SET_TSC_KHZ, 256 * host)) == "EINVAL"
    sys.ioctl(vm, k.KVM_SET_TSC_KHZ, 1_000_000)
    vcpu = sys.ioctl(vm, k.KVM_CREATE_VCPU, 0)
    assert sys.ioctl(vcpu, k.KVM_GET_TSC_KHZ) == 1_000_000
    sys.ioctl(vcpu, k.KVM_SET_TSC_KHZ, 0)
    assert sys.ioctl(vcpu, k.KVM_GET_TSC_KHZ) == host


def test_the_limit_of_vcpu_ids_is_set_once() -> None:
    _, calls = start(kernel="6.12")
    sys, vm = calls.sys, calls.fd

    def limit(ids: int) -> str:
        cap = KvmEnableCap(cap=k.KVM_CAP_MAX_VCPU_ID, arg0=ids)
        return errno_of(lambda: sys.ioctl(vm, k.KVM_ENABLE_CAP, cap.data))

    assert [limit(ids) for ids in (4097, 3, 4, 3)] == ["EINVAL", "0", "EINVAL", "0"]
    assert errno_of(lambda: sys.ioctl(vm, k.KVM_CREATE_VCPU, 3)) == "EINVAL"
    sys.ioctl(vm, k.KVM_CREATE_VCPU, 2)


def test_fewer_mmu_pages_than_kvm_needs_are_refused() -> None:
    _, calls = start(kernel="6.12")
    sys, vm = calls.sys, calls.fd
    assert errno_of(lambda: sys.ioctl(vm, k.KVM_SET_NR_MMU_PAGES, 63)) == "EINVAL"
    assert errno_of(lambda: sys.ioctl(vm, k.KVM_SET_NR_MMU_PAGES, 64)) == "0"
    assert errno_of(lambda: sys.ioctl(vm, k.KVM_GET_NR_MMU_PAGES)) == "ENOTTY"
