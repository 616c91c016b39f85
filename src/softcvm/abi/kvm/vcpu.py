"""Structures of the vCPU ioctls, and of capabilities and devices.

[include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h v6.12]; offsets are checked
against a C compiler by tests/abi/test_kvm_sizes.py.
"""

from enum import IntEnum

from softcvm.abi.layout import U8, U16, U32, U64, Bytes, Layout

__all__ = (
    "KvmCpuidEntry2",
    "KvmDebugregs",
    "KvmDeviceAttr",
    "KvmDtable",
    "KvmEnableCap",
    "KvmFpu",
    "KvmGuestDebug",
    "KvmMpState",
    "KvmMsrFilter",
    "KvmMsrFilterRange",
    "KvmRegs",
    "KvmSegment",
    "KvmSregs",
    "KvmSregs2",
    "KvmVcpuEvents",
    "KvmXcrs",
    "MpState",
)


class MpState(IntEnum):
    """kvm_mp_state.mp_state."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class KvmRegs(Layout, size=144):
    rax = U64(0)
    rbx = U64(8)
    rcx = U64(16)
    rdx = U64(24)
    rsi = U64(32)
    rdi = U64(40)
    rsp = U64(48)
    rbp = U64(56)
    r8 = U64(64)
    r9 = U64(72)
    r10 = U64(80)
    r11 = U64(88)
    r12 = U64(96)
    r13 = U64(104)
    r14 = U64(112)
    r15 = U64(120)
    rip = U64(128)
    rflags = U64(136)


class KvmSegment(Layout, size=24):
    base = U64(0)
    limit = U32(8)
    selector = U16(12)
    type = U8(14)
    present = U8(15)
    dpl = U8(16)
    db = U8(17)
    s = U8(18)
    l = U8(19)  # noqa: E741 - the name in struct kvm_segment
    g = U8(20)
    avl = U8(21)
    unusable = U8(22)
    padding = U8(23)


class KvmDtable(Layout, size=16):
    base = U64(0)
    limit = U16(8)
    padding = Bytes(10, 6)


class _Sregs(Layout, size=280):
    """What struct kvm_sregs and kvm_sregs2 begin with."""

    cs = Bytes(0, 24)
    ds = Bytes(24, 24)
    es = Bytes(48, 24)
    fs = Bytes(72, 24)
    gs = Bytes(96, 24)
    ss = Bytes(120, 24)
    tr = Bytes(144, 24)
    ldt = Bytes(168, 24)
    gdt = Bytes(192, 16)
    idt = Bytes(208, 16)
    cr0 = U64(224)
    cr2 = U64(232)
    cr3 = U64(240)
    cr4 = U64(248)
    cr8 = U64(256)
    efer = U64(264)
    apic_base = U64(272)

    def segment(self, name: str) -> KvmSegment:
        """A copy of cs, ds, es, fs, gs, ss, tr or ldt."""
        return KvmSegment(getattr(self, name))

    def table(self, name: str) -> KvmDtable:
        """A copy of gdt or idt."""
        return KvmDtable(getattr(self, name))


class KvmSregs(_Sregs, size=312):
    interrupt_bitmap = Bytes(280, 32)


class KvmSregs2(_Sregs, size=320):
    flags = U64(280)
    pdptrs = Bytes(288, 32)


class KvmFpu(Layout, size=416):
    fpr = Bytes(0, 128)
    fcw = U16(128)
    fsw = U16(130)
    ftwx = U8(132)
    pad1 = U8(133)
    last_opcode = U16(134)
    last_ip = U64(136)
    last_dp = U64(144)
    xmm = Bytes(152, 256)
    mxcsr = U32(408)
    pad2 = U32(412)


class KvmDebugregs(Layout, size=128):
    db = Bytes(0, 32)
    dr6 = U64(32)
    dr7 = U64(40)
    flags = U64(48)
    reserved = Bytes(56, 72)


class KvmXcrs(Layout, size=392):
    """struct kvm_xcrs; an xcr is 16 bytes: number u32, reserved u32, value u64."""

    nr_xcrs = U32(0)
    flags = U32(4)
    xcrs = Bytes(8, 256)
    padding = Bytes(264, 128)


class KvmCpuidEntry2(Layout, size=40):
    function = U32(0)
    index = U32(4)
    flags = U32(8)
    eax = U32(12)
    ebx = U32(16)
    ecx = U32(20)
    edx = U32(24)
    padding = Bytes(28, 12)


class KvmVcpuEvents(Layout, size=64):
    exception_injected = U8(0)
    exception_nr = U8(1)
    exception_has_error_code = U8(2)
    exception_pending = U8(3)
    exception_error_code = U32(4)
    interrupt_injected = U8(8)
    interrupt_nr = U8(9)
    interrupt_soft = U8(10)
    interrupt_shadow = U8(11)
    nmi_injected = U8(12)
    nmi_pending = U8(13)
    nmi_masked = U8(14)
    sipi_vector = U32(16)
    flags = U32(20)
    smi_smm = U8(24)
    smi_pending = U8(25)
    smi_smm_inside_nmi = U8(26)
    smi_latched_init = U8(27)
    triple_fault_pending = U8(28)
    reserved = Bytes(29, 26)
    exception_has_payload = U8(55)
    exception_payload = U64(56)


class KvmMpState(Layout, size=4):
    mp_state = U32(0)


class KvmMsrFilterRange(Layout, size=24):
    flags = U32(0)
    nmsrs = U32(4)
    base = U32(8)
    bitmap = U64(16)


class KvmMsrFilter(Layout, size=392):
    flags = U32(0)
    ranges = Bytes(8, 384)

    def range_list(self) -> list[KvmMsrFilterRange]:
        """All sixteen; one without MSRs is not used."""
        size = KvmMsrFilterRange.SIZE
        return [KvmMsrFilterRange(self.ranges[n : n + size]) for n in range(0, 16 * size, size)]


class KvmGuestDebug(Layout, size=72):
    control = U32(0)
    pad = U32(4)
    debugreg = Bytes(8, 64)


class KvmEnableCap(Layout, size=104):
    cap = U32(0)
    flags = U32(4)
    arg0 = U64(8)
    arg1 = U64(16)
    arg2 = U64(24)
    arg3 = U64(32)
    pad = Bytes(40, 64)


class KvmDeviceAttr(Layout, size=24):
    flags = U32(0)
    group = U32(4)
    attr = U64(8)
    addr = U64(16)
