"""What the comparison with a real kernel taught the model (tools/kvm_diff).

Each test is a script that was answered in two ways, shrunk, with the answer of Linux 6.18.44.
tests/uapi/test_kvm_diff.py asks the kernel at hand again, with other scripts.
"""

import pytest

from softcvm import HostSignal, Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.machine import MachineProcess
from tests.uapi.calls import GUEST_MEMFD, MIB, PAGE, VmCalls, anon, errno_of

ARENA = 0x10_0000_0000
RW, EXEC = 3, 4
SHARED, PRIVATE, VALIDATE, DROPPABLE = 1, 2, 3, 8
FIXED, ANON, NOREPLACE = 0x10, 0x20, 0x100000
SIGBUS, SIGSEGV = 7, 11
INIT_SHARED = 3
S64 = 1 << 63


def process(kernel: str = "6.18") -> tuple[MachineProcess, VmCalls]:
    sys = Machine(kernel=kernel, memory=64 * MIB).process()
    return sys, VmCalls(sys, VmType.DEFAULT)


def test_a_refusal_by_the_file_leaves_a_hole_where_map_fixed_was_to_go() -> None:
    """mm/vma.c unmaps what is replaced before f_op->mmap, which is where guest_memfd refuses."""
    sys, vm = process()
    gmem = vm.gmem(PAGE)
    sys.mmap(3 * PAGE, RW, PRIVATE | ANON | FIXED, -1, 0, ARENA)
    refused = errno_of(lambda: sys.mmap(PAGE, RW, SHARED | FIXED, gmem, 0, ARENA + PAGE))
    assert refused == "ENODEV"
    with pytest.raises(HostSignal) as touched:
        sys.load(ARENA + PAGE, 1)
    assert (touched.value.signo, touched.value.addr) == (SIGSEGV, ARENA + PAGE)
    assert sys.load(ARENA + 2 * PAGE, 1) == b"\0"


def test_a_refusal_before_the_file_is_asked_leaves_the_mapping() -> None:
    sys, vm = process()
    sys.mmap(PAGE, RW, PRIVATE | ANON | FIXED, -1, 0, ARENA)
    sys.store(ARENA, b"here")
    for fd, prot, why in ((vm.fd, RW, "ENODEV"), (vm.gmem(PAGE, 3), EXEC, "EPERM")):

        def again(fd: int = fd, prot: int = prot) -> int:
            return sys.mmap(PAGE, prot, SHARED | FIXED, fd, 0, ARENA)

        assert errno_of(again) == why
    assert sys.load(ARENA, 4) == b"here"


@pytest.mark.parametrize(
    ("flags", "offset", "prot", "expected"),
    [
        (VALIDATE | FIXED | NOREPLACE, 0, RW, "EOPNOTSUPP"),  # newer than MAP_SHARED_VALIDATE
        (VALIDATE | FIXED | NOREPLACE, 0, RW | EXEC, "EOPNOTSUPP"),
        (SHARED | FIXED | NOREPLACE, 0, RW, "0"),
        (SHARED, -PAGE, RW | EXEC, "EOVERFLOW"),  # before noexec
        (SHARED, S64 - PAGE, RW, "EOVERFLOW"),  # a file ends at 2^63 - 1
        (PRIVATE, S64 - PAGE, RW, "EOVERFLOW"),  # before MAP_PRIVATE
        (SHARED, S64 - 2 * PAGE, RW, "0"),
        (DROPPABLE, 0, RW, "EINVAL"),
        (SHARED, 1, RW, "EINVAL"),
    ],
)
def test_mmap_of_a_gmem_is_checked_in_this_order(
    flags: int, offset: int, prot: int, expected: str
) -> None:
    sys, vm = process()
    gmem = vm.gmem(PAGE, INIT_SHARED)
    assert errno_of(lambda: sys.mmap(PAGE, prot, flags, gmem, offset, ARENA)) == expected


def test_an_unaligned_offset_is_refused_before_the_file_is_looked_up() -> None:
    sys, _ = process()
    assert errno_of(lambda: sys.mmap(PAGE, RW, SHARED, 999, 1)) == "EINVAL"
    assert errno_of(lambda: sys.mmap(PAGE, RW, SHARED, 999, 0)) == "EBADF"


def test_a_fixed_address_beyond_the_address_space_is_enomem_even_if_unaligned() -> None:
    sys, _ = process()
    anonymous = PRIVATE | ANON | FIXED
    assert errno_of(lambda: sys.mmap(PAGE, RW, anonymous, -1, 0, (1 << 47) + 1)) == "ENOMEM"
    assert errno_of(lambda: sys.mmap(PAGE, RW, anonymous, -1, 0, ARENA + 1)) == "EINVAL"


def test_droppable_memory_is_anonymous_memory() -> None:
    sys, _ = process()
    address = sys.mmap(PAGE, RW, DROPPABLE | ANON)
    assert sys.load(address, 2) == b"\0\0"
    assert errno_of(lambda: sys.mmap(PAGE, RW, VALIDATE | ANON)) == "EINVAL"


@pytest.mark.parametrize(("kernel", "expected"), [("6.12", "0"), ("6.18", "EPERM")])
def test_vcpu_files_became_noexec(kernel: str, expected: str) -> None:
    sys, vm = process(kernel)
    vcpu = vm.vcpu()
    assert errno_of(lambda: sys.mmap(PAGE, EXEC | RW, SHARED, vcpu)) == expected


def test_a_signal_names_the_address_and_a_store_keeps_what_came_before_it() -> None:
    sys, vm = process()
    gmem = vm.gmem(2 * PAGE, INIT_SHARED)
    sys.mmap(4 * PAGE, RW, SHARED | FIXED, gmem, PAGE, ARENA)
    with pytest.raises(HostSignal) as touched:
        sys.store(ARENA + 8, b"x" * 2 * PAGE)
    assert (touched.value.signo, touched.value.addr) == (SIGBUS, ARENA + PAGE)
    assert sys.load(ARENA + 8, PAGE - 8) == b"x" * (PAGE - 8)
    with pytest.raises(HostSignal) as touched:
        sys.load(ARENA + PAGE + 12, 1)
    assert (touched.value.signo, touched.value.addr) == (SIGBUS, ARENA + PAGE + 12)


@pytest.mark.parametrize(
    ("length", "expected"), [(0, "0"), (1, "EINVAL"), (PAGE, "EINVAL"), (1 << 63, "EINVAL")]
)
def test_madvise_of_the_last_page_wraps(length: int, expected: str) -> None:
    sys, _ = process()
    assert errno_of(lambda: sys.madvise((1 << 64) - PAGE, length, 4)) == expected


@pytest.mark.parametrize(
    ("kernel", "expected"), [("6.12", "EINVAL"), ("6.18", "0"), ("7.3", "EINVAL")]
)
def test_r3_5_a_binding_just_below_2_63_passed_in_6_18(kernel: str, expected: str) -> None:
    """loff_t overflows in kvm_gmem_bind(); eba85fee7fc6 is the fix."""
    sys, _ = process(kernel)
    vm = VmCalls(sys, VmType.DEFAULT if kernel != "6.12" else VmType.SW_PROTECTED)
    gmem, hva = vm.gmem(MIB), anon(sys, MIB)

    def bind(slot: int, offset: int) -> str:
        return errno_of(
            lambda: vm.region(
                slot, slot * MIB, 2 * PAGE, hva, GUEST_MEMFD, gmem=gmem, offset=offset
            )
        )

    assert bind(0, S64 - PAGE) == expected
    assert bind(1, S64 - 2 * PAGE) == "EINVAL"
    assert bind(2, S64) == "EINVAL"
    if expected == "0":
        assert bind(3, S64 - PAGE) == "EINVAL"  # bound already
    sys.close(gmem)
    vm.close()


@pytest.mark.parametrize(
    ("cap", "on_kvm", "on_vm"),
    [
        (k.KVM_CAP_ONE_REG, 1, 1),
        (k.KVM_CAP_LAST_CPU, 1, 1),
        (k.KVM_CAP_X2APIC_API, 15, 11),
        (k.KVM_CAP_DISABLE_QUIRKS2, 0x5FF, 0x5FF),
        (k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3, 3),
        (k.KVM_CAP_SET_GUEST_DEBUG2, 0x1F0003, 0x1F0003),
    ],
)
def test_capabilities_of_6_18_44(cap: int, on_kvm: int, on_vm: int) -> None:
    sys, vm = process()
    told = [sys.ioctl(fd, k.KVM_CHECK_EXTENSION, cap) for fd in (vm.kvm, vm.fd)]
    assert told == [on_kvm, on_vm]
