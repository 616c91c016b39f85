"""Instructions of a guest that KVM carries out, and events that user space queues, seen through KVM's interface.

What each does is from arch/x86/kvm/{emulate,x86}.c v6.12 and the kernel's own selftests (userspace_io_test.c,
xcr0_cpuid_test.c, userspace_msr_exit_test.c, coalesced_io_test.c, sync_regs_test.c); the code is written out by hand.
"""

import shutil

import pytest

from tests.attach.caught import caught
from tests.attach.test_machine_code import GUEST

pytestmark = pytest.mark.skipif(
    shutil.which("as") is None, reason="needs as: apt install binutils"
)


def test_ins_reads_ahead_what_lies_on_the_page() -> None:
    out = caught(
        GUEST
        + """
g = Guest("mov $0x40ffe, %edi; mov $5, %ecx; mov $0x80, %dx; rep insb; hlt")
for _ in range(2):
    print(g.run(), g.union("<BBHIQ")[:4], hex(g.regs()["rip"]))
    g.run_page[4096:4104] = b"abcdefgh"
print(g.run(), g.peek(0x40FFE, 6), g.regs()["rcx"], hex(g.regs()["rdi"]))
"""
    )
    assert out.split("\n") == [
        "2 (0, 1, 128, 2) 0x100e",
        "2 (0, 1, 128, 3) 0x100e",
        "5 b'ababc\\x00' 0 0x41003",
    ]


def test_outs_leaves_with_one_item_at_a_time() -> None:
    out = caught(
        GUEST
        + """
g = Guest("mov $0x40000, %esi; mov $2, %ecx; mov $0x80, %dx; rep outsw; hlt")
g.poke(0x40000, b"\\x11\\x22\\x33\\x44")
for _ in range(2):
    print(g.run(), g.union("<BBHIQ")[:4], bytes(g.run_page[4096:4098]).hex(), g.regs()["rcx"])
print(g.run(), hex(g.regs()["rsi"]))
"""
    )
    assert out.split("\n") == [
        "2 (1, 2, 128, 1) 1122 1",
        "2 (1, 2, 128, 1) 3344 0",
        "5 0x40004",
    ]


def test_ins_to_a_page_that_is_not_there_is_a_page_fault_of_the_guest() -> None:
    out = caught(
        GUEST
        + """
g = Guest("mov $0x700000, %edi; mov $0x80, %dx; insb; hlt; .org 0x800; pop %rax; mov %cr2, %rbx; hlt")
g.gate(14, CODE + 0x800)
print(g.run(), g.run(), hex(g.regs()["rax"]), hex(g.regs()["rbx"]))
"""
    )
    assert out.split() == ["2", "5", "0x2", "0x700000"]


def test_xsetbv_sets_what_the_guest_has_and_faults_for_the_rest() -> None:
    """Without CPUID the guest has x87 state only: 1 is taken, 3 is #GP, and #UD without CR4.OSXSAVE."""
    out = caught(
        GUEST
        + """
ENABLE = "mov %cr4, %rax; or $0x40000, %rax; mov %rax, %cr4;"
SET = "xor %ecx, %ecx; xor %edx, %edx; mov ${}, %eax; xsetbv; hlt; .org 0x800; mov $0xbad, %r9d; hlt; .org 0x900; mov $0x6d, %r9d; hlt"
for enable, value in ((ENABLE, 1), (ENABLE, 3), ("", 1)):
    g = Guest(enable + SET.format(value))
    g.gate(13, CODE + 0x800)
    g.gate(6, CODE + 0x900)
    print(g.run(), hex(g.regs()["r9"]))
"""
    )
    assert out.split("\n") == ["5 0x0", "5 0xbad", "5 0x6d"]


def test_an_msr_of_the_save_area_leaves_the_guest_where_the_filter_denies_it() -> None:
    out = caught(
        GUEST
        + """
g = Guest("mov $0xc0000100, %ecx; rdmsr; mov %eax, %r8d; rdmsr; hlt")
assert not isinstance(ioctl(g.vm, 0x4068AEA3, struct.pack("<II4Q", 188, 0, 4, 0, 0, 0).ljust(104, b"\\0")), str)
bitmap = ctypes.create_string_buffer(8)
deny = struct.pack("<II", 0, 0) + struct.pack("<IIIIQ", 1, 1, 0xC0000100, 0, ctypes.addressof(bitmap))
assert not isinstance(ioctl(g.vm, 0x4188AEC6, deny.ljust(392, b"\\0")), str)
print(g.run(), hex(g.union("<QIIQ")[2]))
g.run_page[48:56] = struct.pack("<Q", 0x5566)
print(g.run(), hex(g.regs()["r8"]))
"""
    )
    assert out.split("\n") == ["29 0xc0000100", "29 0x5566"]


def test_coalesced_writes_fill_the_ring_and_then_leave() -> None:
    """170 entries, one of which stays free."""
    out = caught(
        GUEST
        + """
g = Guest("mov $0x200000, %rbx; mov $0x80, %dx; movl $7, 8(%rbx); mov $5, %al; out %al, %dx; movl $9, 8(%rbx); hlt")
for addr, pio in ((0x400008, 0), (0x80, 1)):
    assert not isinstance(ioctl(g.vm, 0x4010AE67, struct.pack("<QII", addr, 4, pio)), str)
ring = 2 * 4096
g.run_page[ring:ring + 8] = struct.pack("<II", 1, 168)
print(g.run(), [hex(v) for v in g.union("<QQIB")])
print(struct.unpack_from("<II", g.run_page, ring))
for n in (168, 169):
    addr, length, pio, data = struct.unpack_from("<QIIQ", g.run_page, ring + 8 + 24 * n)
    print(hex(addr), length, pio, data)
print(g.run())
"""
    )
    assert out.split("\n") == [
        "6 ['0x400008', '0x9', '0x4', '0x1']",
        "(1, 0)",
        "0x400008 4 0 7",
        "0x80 1 1 5",
        "5",
    ]


def test_an_exception_that_user_space_injects_reaches_the_guest_once() -> None:
    out = caught(
        GUEST
        + """
g = Guest("1: hlt; hlt; .org 0x800; pop %rax; inc %r8; iretq")
g.gate(13, CODE + 0x800)
events = bytearray(64)
events[0:3], events[4:8] = b"\\x01\\x0d\\x01", struct.pack("<I", 0x18)
assert not isinstance(ioctl(g.vcpu, 0x4040AEA0, bytes(events)), str)
back = bytearray(64)
fcntl.ioctl(g.vcpu, 0x8040AE9F, back)
print(list(back[:4]), back[4])
print(g.run(), g.regs()["r8"], hex(g.regs()["rax"]))
fcntl.ioctl(g.vcpu, 0x8040AE9F, back)
print(back[0], g.run(), g.regs()["r8"])
"""
    )
    assert out.split("\n") == ["[1, 13, 1, 0] 24", "5 1 0x18", "0 5 1"]


def test_translate_walks_the_guests_own_table() -> None:
    out = caught(
        GUEST
        + """
g = Guest("hlt")
for address in (0x12345, 0x212345, 0x700000):
    data = bytearray(struct.pack("<QQQ", address, 0, 0))
    fcntl.ioctl(g.vcpu, 0xC018AE85, data)
    _, gpa, valid, writeable, user = struct.unpack_from("<QQBBB", data)
    print(hex(gpa), valid, writeable, user)
"""
    )
    assert out.split("\n") == ["0x12345 1 1 0", "0x412345 1 1 0", "0xffffffffffffffff 0 1 0"]


def test_rdtsc_has_the_offset_that_user_space_set() -> None:
    """Two guests of one machine read one after the other: the second is ahead by its offset and what passed."""
    out = caught(
        GUEST
        + """
def tsc(offset):
    g = Guest("rdtsc; shl $32, %rdx; or %rdx, %rax; hlt")
    if offset:
        value = ctypes.c_uint64(offset)
        attr = struct.pack("<IIQQ", 0, 0, 0, ctypes.addressof(value))
        assert not isinstance(ioctl(g.vcpu, 0x4018AEE1, attr), str)
    assert g.run() == HLT
    return g.regs()["rax"]
hour = 3600 * 10**10
plain, ahead = tsc(0), tsc(hour)
print(0 < ahead - hour - plain < hour)
"""
    )
    assert out.split() == ["True"]
