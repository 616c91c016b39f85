"""Machine code in a caught program's VM: written by the assembler, run by KVM_RUN, seen through KVM's interface.

What each instruction does is the AMD manual's to say; the code and its expected traces are written out by hand.
"""

import shutil

import pytest

from tests.attach.caught import caught

pytestmark = pytest.mark.skipif(
    shutil.which("as") is None, reason="needs as: apt install binutils"
)

GUEST = """
import subprocess, tempfile
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_long] * 6
SIZE, CODE, TABLES, GDT, IDT, STACK = 0x200000, 0x1000, 0x10000, 0x20000, 0x21000, 0x30000
def assemble(text):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["as", "-o", f"{folder}/o", "-"], input=text, text=True, check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", f"{folder}/o", f"{folder}/b"], check=True)
        return open(f"{folder}/b", "rb").read()
class Guest:
    def __init__(self, text, vm_type=0):
        self.vm = ioctl(kvm, CREATE_VM, vm_type)
        self.memory = libc.mmap(0, SIZE, 3, 0x22, -1, 0)
        region = struct.pack("<IIQQQ", 0, 0, 0, SIZE, self.memory)
        assert ioctl(self.vm, 0x4020AE46, region) == region or True
        self.poke(CODE, assemble(".code64\\n" + text))
        self.poke(TABLES, struct.pack("<Q", TABLES + 0x1000 | 3))
        self.poke(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2000 | 3))
        self.poke(TABLES + 0x2000, struct.pack("<2Q", TABLES + 0x3000 | 3, 0x400083))  # GPA 4M at 2M
        self.poke(TABLES + 0x3000, b"".join(struct.pack("<Q", n << 12 | 3) for n in range(256)))
        self.poke(GDT, struct.pack("<3Q", 0, 0xAF9B000000FFFF, 0xCF93000000FFFF))
        self.vcpu = ioctl(self.vm, CREATE_VCPU, 0)
        self.run_page = mmap.mmap(self.vcpu, ioctl(kvm, 0xAE04))
        self.sregs()
        self.set_regs(rip=CODE, rsp=STACK, rflags=2)
    def poke(self, gpa, data):
        ctypes.memmove(self.memory + gpa, data, len(data))
    def peek(self, gpa, length):
        return ctypes.string_at(self.memory + gpa, length)
    def gate(self, vector, handler):
        self.poke(IDT + 16 * vector, struct.pack("<HHBBHQ", handler & 0xFFFF, 8, 0, 0x8E, handler >> 16, 0))
    def sregs(self):
        def segment(selector, kind, l=0, db=1):
            return struct.pack("<QIH10B", 0, 0xFFFFFFFF, selector, kind, 1, 0, db, 1, l, 1, 0, 0, 0)
        data, code = segment(0x10, 3), segment(8, 11, 1, 0)
        tr = struct.pack("<QIH10B", 0, 0x67, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)
        ldt = struct.pack("<QIH10B", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0)
        tables = struct.pack("<QH6xQH6x", GDT, 0x17, IDT, 0xFFF)
        control = struct.pack("<7Q", 0x80050033, 0, TABLES, 0x220, 0, 0xD00, 0xFEE00900)
        assert not isinstance(ioctl(self.vcpu, 0x4138AE84, code + data * 5 + tr + ldt + tables + control + bytes(32)), str)
    NAMES = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()
    def set_regs(self, **values):
        ioctl(self.vcpu, 0x4090AE82, struct.pack("<18Q", *(values.get(name, 0) for name in self.NAMES)))
    def regs(self):
        buffer = bytearray(144)
        fcntl.ioctl(self.vcpu, 0x8090AE81, buffer)
        return dict(zip(self.NAMES, struct.unpack("<18Q", buffer)))
    def run(self):
        result = ioctl(self.vcpu, RUN)
        return result if result else struct.unpack_from("<I", self.run_page, 8)[0]
    def union(self, format):
        return struct.unpack_from(format, self.run_page, 32)
IO, HLT, MMIO, SHUTDOWN = 2, 5, 6, 8
"""


def test_code_computes_and_its_registers_are_kvms_to_read() -> None:
    out = caught(
        GUEST
        + """
g = Guest("mov $7, %eax; mov $6, %ecx; mul %ecx; mov %rax, 0x40000; movq %rax, %xmm3; hlt")
print(g.run(), g.regs()["rax"], g.peek(0x40000, 8) == struct.pack("<Q", 42), hex(g.regs()["rip"]))
"""
    )
    assert out.split() == ["5", "42", "True", "0x101a"]


def test_ports_stop_the_guest_before_rip_moves() -> None:
    out = caught(
        GUEST
        + """
g = Guest("mov $0x1234, %eax; mov $0x3f8, %dx; out %ax, %dx; in $0x80, %al; mov %al, 0x40000; hlt")
print(g.run(), g.union("<BBHIQ")[:4], hex(g.regs()["rip"]))
print(g.run_page[4096:4098] == b"\\x34\\x12")
print(g.run(), g.union("<BBHIQ")[:4])
g.run_page[4096] = 0x5A
print(g.run(), g.peek(0x40000, 1))
"""
    )
    assert out.split("\n") == ["2 (1, 2, 1016, 1) 0x1009", "True", "2 (0, 1, 128, 1)", "5 b'Z'"]


def test_memory_that_is_not_there_is_mmio() -> None:
    out = caught(
        GUEST
        + """
g = Guest("mov $0x200000, %rbx; movl $0x11223344, 8(%rbx); movzwl 16(%rbx), %eax; mov 24(%rbx), %rcx; hlt")
print(g.run(), [hex(v) for v in g.union("<Q8sIB")[::2]], g.union("<Q8sIB")[1][:4].hex(), g.union("<Q8sIB")[3])
print(g.run(), [hex(v) for v in g.union("<Q8sIB")[::2]], g.union("<Q8sIB")[3])
g.run_page[40:42] = b"\\xcd\\xab"
print(g.run(), [hex(v) for v in g.union("<Q8sIB")[::2]])
g.run_page[40:48] = bytes(range(1, 9))
print(g.run(), hex(g.regs()["rax"]), hex(g.regs()["rcx"]))
"""
    )
    assert out.split("\n") == [
        "6 ['0x400008', '0x4'] 44332211 1",
        "6 ['0x400010', '0x2'] 0",
        "6 ['0x400018', '0x8']",
        "5 0xabcd 0x807060504030201",
    ]


@pytest.mark.parametrize(
    ("instruction", "vector", "error"),
    [
        ("movabs $0x8000000000000000, %rbx; mov (%rbx), %eax", 13, 0),
        ("xor %ebx, %ebx; div %ebx", 0, None),
        ("ud2", 6, None),
        ("int3", 3, None),
        ("mov 0x700000, %rax", 14, 0),
    ],
)
def test_exceptions_reach_the_guests_handler_twice_in_a_row(
    instruction: str, vector: int, error: int | None
) -> None:
    pops = "pop %rdx;" if vector in (13, 14) else ""
    out = caught(
        GUEST
        + f"""
g = Guest("go: mov %rsp, %rbp; {instruction}; hlt; .org 0x800; {pops} inc %r8; mov %rbp, %rsp; mov $go, %rax; add $0x1000, %rax; cmp $2, %r8; je 1f; jmp *%rax; 1: hlt")
g.gate({vector}, CODE + 0x800)
g.set_regs(rip=CODE, rsp=STACK, rflags=2, rdx=0x77)
print(g.run(), g.regs()["r8"], g.regs()["rdx"])
"""
    )
    expected = "0" if pops else "119"
    assert out.split() == ["5", "2", expected]


def test_what_linux_does_not_emulate_is_an_internal_error() -> None:
    """x87 from MMIO: handle_emulation_failure(), with the bytes of the instruction."""
    out = caught(
        GUEST
        + """
g = Guest("mov $0x200000, %rax; flds (%rax)")
print(g.run(), g.union("<II")[0], g.run_page[49:51] == b"\\xd9\\x00")
"""
    )
    assert out.split() == ["17", "1", "True"]


def test_an_exception_without_a_handler_is_shutdown() -> None:
    out = caught(GUEST + 'g = Guest("ud2")\nprint(g.run())')
    assert out.split() == ["8"]


def test_a_signal_ends_a_guest_that_loops_for_ever() -> None:
    out = caught(
        GUEST
        + """
g = Guest("out %al, $0x80; 1: inc %rcx; jmp 1b")
assert g.run() == IO  # the time of the first entry is not the loop's
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.2)
begun = time.monotonic()
print(g.run(), 0.15 < time.monotonic() - begun < 10, g.regs()["rcx"] > 1000)
"""
    )
    assert out.split() == ["EINTR", "True", "True"]


def test_program_and_guest_see_each_others_writes() -> None:
    out = caught(
        GUEST
        + """
g = Guest("1: mov 0x40000, %rax; test %rax, %rax; jz 1b; lock incq 0x40008; mov %rax, 0x40010; hlt")
t = threading.Thread(target=g.run)
t.start()
time.sleep(0.1)
g.poke(0x40000, struct.pack("<Q", 0x1122))
t.join(10)
print(t.is_alive(), struct.unpack("<2Q", g.peek(0x40008, 16)))
"""
    )
    assert out.split("\n") == ["False (1, 4386)"]


def test_code_in_the_place_of_an_instruction_that_left_the_guest_is_the_guests_own() -> None:
    """The second time, NOPs and an INC are where OUT was: nothing stops there, nor is it invalid."""
    out = caught(
        GUEST
        + """
g = Guest("1: mov $0x3f8, %dx; out %al, %dx; inc %rcx; cmp $2, %rcx; je 2f; movb $0x90, 0x1004; jmp 1b; 2: hlt")
print(g.run(), g.run(), g.regs()["rcx"])
"""
    )
    assert out.split() == ["2", "5", "2"]


def test_an_instruction_that_leaves_the_guest_is_found_where_ordinary_code_was() -> None:
    out = caught(
        GUEST
        + """
g = Guest("1: mov $0x3f8, %dx; nop; inc %rcx; cmp $2, %rcx; je 2f; movb $0xee, 0x1004; jmp 1b; 2: hlt")
print(g.run(), g.run(), g.regs()["rcx"])
"""
    )
    assert out.split() == ["2", "5", "2"]


def test_a_guest_goes_from_real_mode_to_64_bits() -> None:
    """From CS F000 with base FFFF0000, as a processor comes out of reset, by a far jump a mode."""
    out = caught(
        GUEST
        + """
RESET = '''
.code16
    mov $0x5a, %al
    out %al, $0x80
    mov $0x41000, %ebx
    movw %bx, %ds:0x42
    lgdtl %cs:(descriptor - base)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $24, $(0x3000 + protected - base)
.code32
protected:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %ss
    mov $0x12345678, %eax
    mov $0x40000, %ecx
    mov %eax, 8(%ecx)
    mov $0x99, %eax
    out %eax, $0x81
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $0x10000, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    ljmpl $8, $(0x3000 + long - base)
.code64
long:
    movabs $0x1122334455667788, %rax
    mov %rax, 0x40010
    hlt
.align 8
descriptor: .word 31
    .long 0x20000
'''
g = Guest("nop")
g.poke(0x3000, assemble(".set base, .\\n" + RESET))
g.poke(GDT + 24, struct.pack("<Q", 0xCF9B000000FFFF))
told = bytearray(struct.pack("<II", 100, 0) + bytes(4000))  # EFER.LME must be in the vCPU's CPUID
fcntl.ioctl(kvm, 0xC008AE05, told)
fcntl.ioctl(g.vcpu, 0x4008AE90, told)
raw = bytearray(320)
fcntl.ioctl(g.vcpu, 0x8138AE83, raw)
def segment(base, selector, kind):
    return struct.pack("<QIH10B", base, 0xFFFF, selector, kind, 1, 0, 0, 1, 0, 0, 0, 0, 0)
raw[:144] = segment(0x3000, 0xF000, 11) + segment(0, 0, 3) * 5
raw[224:272] = struct.pack("<6Q", 0x60000010, 0, 0, 0, 0, 0)
assert not isinstance(ioctl(g.vcpu, 0x4138AE84, bytes(raw[:312])), str)
g.set_regs(rip=0, rsp=0, rflags=2)
print(g.run(), g.union("<BBHI"), g.run_page[4096])
print(g.run(), g.union("<BBHI"), g.run_page[4096])
print(g.run(), g.peek(0x42, 2).hex(), g.peek(0x40008, 4).hex(), g.peek(0x40010, 8).hex())
after = bytearray(312)
fcntl.ioctl(g.vcpu, 0x8138AE83, after)
cs, control = struct.unpack_from("<QIHB", after), struct.unpack_from("<6Q", after, 224)
print(hex(cs[2]), hex(control[0]), hex(control[5]))
"""
    )
    assert out.split("\n") == [
        "2 (1, 1, 128, 1) 90",
        "2 (1, 4, 129, 1) 153",
        "5 0010 78563412 8877665544332211",
        "0x8 0xe0000011 0x500",
    ]
