"""A vCPU's registers at reset as QEMU sets them, from which KVM makes the VMSA that is measured.

x86_cpu_reset_hold() of QEMU's target/i386/cpu.c, with the reset vector of the firmware (sev_es_set_reset_
vector(), target/i386/sev.c).  What QEMU writes and KVM already has after creating a vCPU (FPU, XCR0, debug
registers, PAT) is not written again.  CR0 keeps CD and NW here; KVM clears them, and sets CR4.MCE and
EFER.SVME, on the way into the VMSA: vmm/vmsa.py predicts the page that results.
"""

from softcvm.abi.kvm.vcpu import KvmDtable, KvmRegs, KvmSegment, KvmSregs

__all__ = ("reset_regs", "reset_sregs")

_CR0_RESET = 0x6000_0010
_RFLAGS_RESET = 2
_APIC_BASE = 0xFEE0_0000
_APIC_ENABLED = 1 << 11
_APIC_BSP = 1 << 8

_DATA_ACCESSED = 0x3
_CODE_ACCESSED = 0xB
_LDT = 0x2
_BUSY_TSS = 0xB


def reset_regs(eip: int, signature: int) -> KvmRegs:
    """EDX holds the processor's signature; IP the offset of the entry in its 64K segment."""
    return KvmRegs(rip=eip & 0xFFFF, rdx=signature, rflags=_RFLAGS_RESET)


def reset_sregs(eip: int, *, bsp: bool) -> KvmSregs:
    data = _segment(type=_DATA_ACCESSED, s=1)
    table = bytes(KvmDtable(limit=0xFFFF))
    return KvmSregs(
        cs=_segment(type=_CODE_ACCESSED, s=1, selector=0xF000, base=eip & 0xFFFF_0000),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=_segment(type=_BUSY_TSS),
        ldt=_segment(type=_LDT),
        gdt=table,
        idt=table,
        cr0=_CR0_RESET,
        apic_base=_APIC_BASE | _APIC_ENABLED | (_APIC_BSP if bsp else 0),
    )


def _segment(**fields: int) -> bytes:
    return bytes(KvmSegment(None, limit=0xFFFF, present=1, **fields))
