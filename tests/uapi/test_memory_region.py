"""KVM_SET_USER_MEMORY_REGION(2): every refusal, in the order in which Linux looks.

Each row of ORDER is wrong in its own point and in every later one, so that the errno tells
which check came first.  Expected values: virt/kvm/kvm_main.c v6.12 and v7.2, read;
Documentation/virt/kvm/api.rst §4.140.
"""

from typing import Any

import pytest

from softcvm import Machine
from softcvm.abi.kvm.memory import VmType
from tests.uapi.calls import GUEST_MEMFD, MIB, PAGE, PRIVATE, VmCalls, anon, errno_of

LOG_DIRTY, READONLY = 1, 2
U64 = (1 << 64) - 1


def vm(kernel: str = "7.3", vm_type: int = VmType.SW_PROTECTED) -> VmCalls:
    return VmCalls(Machine(kernel=kernel, memory=256 * MIB).process(), vm_type)


@pytest.mark.parametrize(
    ("why", "arguments", "expected"),
    [
        ("a slot number of KVM's own", {"slot": 32764}, "EINVAL"),
        ("the last slot number that user space has", {"slot": 32763}, "0"),
        ("an unknown flag", {"flags": 8}, "EINVAL"),
        ("a flag that KVM keeps for itself", {"flags": 1 << 16}, "EINVAL"),
        ("dirty logging of private memory", {"flags": GUEST_MEMFD | LOG_DIRTY}, "EINVAL"),
        ("a read-only private slot", {"flags": GUEST_MEMFD | READONLY}, "EINVAL"),
        ("a size that is no multiple of a page", {"size": PAGE + 1}, "EINVAL"),
        ("an unaligned GPA", {"gpa": 1}, "EINVAL"),
        ("an unaligned user address", {"hva": 1}, "EINVAL"),
        ("a user address of the kernel", {"hva": 1 << 63}, "EINVAL"),
        ("a user range that ends in the kernel", {"hva": (1 << 47) - 2 * PAGE}, "EINVAL"),
        ("an address space that a private VM has not", {"slot": 1 << 16}, "EINVAL"),
        ("a GPA range that wraps", {"gpa": U64 - PAGE + 1}, "EINVAL"),
        ("deleting what is not there", {"slot": 7, "size": 0}, "EINVAL"),
        ("a GPA beyond MAXPHYADDR", {"gpa": 1 << 46}, "EINVAL"),
        ("nothing wrong", {}, "0"),
    ],
)
def test_region_is_refused_for(why: str, arguments: dict[str, int], expected: str) -> None:
    calls = vm()
    hva = anon(calls.sys, MIB)
    call: Any = {"hva": hva, **arguments}
    assert errno_of(lambda: calls.region(**call)) == expected, why


def test_the_first_version_knows_two_flags_and_says_so_before_it_looks_at_the_slot() -> None:
    calls = vm()
    assert errno_of(lambda: calls.region(slot=32764, flags=GUEST_MEMFD, v1=True)) == "EINVAL"
    hva = anon(calls.sys, MIB)
    assert errno_of(lambda: calls.region(hva=hva, flags=LOG_DIRTY, v1=True)) == "0"


def test_an_overlap_is_reported_before_the_gmem_is_even_looked_up() -> None:
    calls = vm()
    hva = anon(calls.sys, 2 * MIB)
    calls.region(0, 0, MIB, hva)
    overlap = errno_of(lambda: calls.region(1, MIB - PAGE, MIB, hva, GUEST_MEMFD, gmem=99))
    assert overlap == "EEXIST"
    assert errno_of(lambda: calls.region(1, MIB, MIB, hva, GUEST_MEMFD, gmem=99)) == "EBADF"


def test_r3_1_what_binding_a_gmem_refuses() -> None:
    calls = vm()
    other = VmCalls(calls.sys)
    hva = anon(calls.sys, 4 * MIB)
    gmem, theirs = calls.gmem(MIB), other.gmem(MIB)

    def bind(fd: int, size: int, offset: int, slot: int = 0, gpa: int = 0) -> str:
        return errno_of(lambda: calls.region(slot, gpa, size, hva, GUEST_MEMFD, fd, offset))

    assert bind(calls.kvm, MIB, 0) == "EINVAL"  # no guest_memfd
    assert bind(theirs, MIB, 0) == "EINVAL"  # another VM's
    assert bind(gmem, MIB, PAGE // 2) == "EINVAL"
    assert bind(gmem, 2 * MIB, 0) == "EINVAL"  # beyond its end
    assert bind(gmem, MIB, PAGE) == "EINVAL"
    assert bind(gmem, PAGE, U64 - PAGE + 1) == "EINVAL"  # offset + size wraps
    assert bind(gmem, PAGE, 1 << 63) == "EINVAL"  # eba85fee7fc6: unsigned
    assert bind(gmem, MIB // 2, 0) == "0"
    assert bind(gmem, MIB // 2, MIB // 2, slot=1, gpa=MIB) == "0"


def test_r3_5_two_memslots_cannot_share_an_index_of_a_gmem() -> None:
    calls = vm()
    hva = anon(calls.sys, 4 * MIB)
    gmem = calls.gmem(2 * MIB)
    calls.region(0, 0, MIB, hva, GUEST_MEMFD, gmem, 0)
    again = errno_of(lambda: calls.region(1, 4 * MIB, MIB, hva, GUEST_MEMFD, gmem, MIB - PAGE))
    assert again == "EINVAL"
    calls.region(0, 0, 0, hva, GUEST_MEMFD, gmem)
    calls.region(1, 4 * MIB, MIB, hva, GUEST_MEMFD, gmem, MIB - PAGE)


def test_a_private_slot_can_only_be_deleted() -> None:
    calls = vm()
    hva = anon(calls.sys, 4 * MIB)
    gmem = calls.gmem(4 * MIB)
    calls.region(0, 0, MIB, hva, GUEST_MEMFD, gmem)
    same = errno_of(lambda: calls.region(0, 0, MIB, hva, GUEST_MEMFD, gmem))
    assert same == "EINVAL"  # not even the same again
    assert errno_of(lambda: calls.region(0, 0, MIB, hva)) == "EINVAL"  # GUEST_MEMFD toggled
    assert errno_of(lambda: calls.region(0, MIB, MIB, hva, GUEST_MEMFD, gmem)) == "EINVAL"
    assert errno_of(lambda: calls.region(0, 0, 0, hva, GUEST_MEMFD, gmem)) == "0"


def test_a_shared_slot_moves_and_changes_flags_but_not_its_memory() -> None:
    calls = vm(vm_type=VmType.DEFAULT)
    hva = anon(calls.sys, 4 * MIB)
    calls.region(0, 0, MIB, hva)
    assert errno_of(lambda: calls.region(0, 0, MIB, hva)) == "0"  # nothing changes
    assert errno_of(lambda: calls.region(0, MIB, MIB, hva)) == "0"  # moves
    assert errno_of(lambda: calls.region(0, MIB, MIB, hva, LOG_DIRTY)) == "0"
    assert errno_of(lambda: calls.region(0, MIB, MIB, hva + PAGE)) == "EINVAL"
    assert errno_of(lambda: calls.region(0, MIB, 2 * MIB, hva)) == "EINVAL"
    assert errno_of(lambda: calls.region(0, MIB, MIB, hva, READONLY)) == "EINVAL"
    calls.region(1, 8 * MIB, MIB, hva)
    assert errno_of(lambda: calls.region(0, 8 * MIB, MIB, hva)) == "EEXIST"


@pytest.mark.parametrize(
    ("kernel", "expected"), [("6.12", "EINVAL"), ("6.18", "0"), ("7.3", "0")]
)
def test_a_default_vm_takes_a_gmem_slot_from_6_18_on(kernel: str, expected: str) -> None:
    calls = vm(kernel, VmType.DEFAULT)
    gmem = calls.gmem(MIB)
    hva = anon(calls.sys, MIB)
    assert errno_of(lambda: calls.region(0, 0, MIB, hva, GUEST_MEMFD, gmem)) == expected


def test_a_vm_with_smm_has_two_address_spaces_that_do_not_overlap_each_other() -> None:
    calls = vm(vm_type=VmType.DEFAULT)
    hva = anon(calls.sys, MIB)
    calls.region(0, 0, MIB, hva)
    calls.region(1 << 16, 0, MIB, hva)
    assert errno_of(lambda: calls.region(2 << 16, 0, MIB, hva)) == "EINVAL"


def test_padding_is_not_looked_at() -> None:
    calls = vm()
    hva = anon(calls.sys, MIB)
    region = bytearray(160)
    region[16:24] = MIB.to_bytes(8, "little")
    region[24:32] = hva.to_bytes(8, "little")
    region[44:160] = b"\xff" * 116
    assert calls.sys.ioctl(calls.fd, 0x40A0AE49, region) == 0


def test_deleting_a_slot_forgets_neither_attributes_nor_pages() -> None:
    calls = vm()
    hva = anon(calls.sys, MIB)
    gmem = calls.private_slot(0, 0, MIB)
    vcpu = calls.vcpu()
    assert calls.prefault(vcpu, 0, MIB) == ("0", MIB, 0)
    zeroed = calls.sys.machine.counters["bytes_zeroed"]  # type: ignore[attr-defined]
    calls.region(0, 0, 0, hva, GUEST_MEMFD, gmem)
    assert calls.prefault(vcpu, 0, PAGE)[0] == "EFAULT"  # private, and no slot
    calls.region(0, 0, MIB, hva, GUEST_MEMFD, gmem)
    assert calls.prefault(vcpu, 0, MIB) == ("0", MIB, 0)
    assert calls.sys.machine.counters["bytes_zeroed"] == zeroed  # type: ignore[attr-defined]
    assert errno_of(lambda: calls.attributes(0, MIB, PRIVATE)) == "0"
