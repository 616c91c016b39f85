"""Registers between user space's view of a vCPU and the save area that VMRUN loads (arch/x86/kvm/svm/svm.c, v7.2).

Owns KVM's own adjustments on the way in, and their removal on the way back.  The registers themselves are
kept in VcpuArch; a save area exists while the guest is entered, and as the VMSA of an SEV-ES guest.
"""

import struct
from typing import TYPE_CHECKING

from softcvm.abi.kvm.vcpu import KvmDtable, KvmFpu, KvmRegs, KvmSegment
from softcvm.abi.vmsa import Segment, Vmsa
from softcvm.kernel.arch.x86.kvm.cpuid_runtime import kvm_update_cpuid_runtime
from softcvm.kernel.arch.x86.kvm.vcpu import MSR_IA32_CR_PAT

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu

__all__ = ("enter_save_area", "leave_save_area", "save_area", "sync_fpu")

_EFER_SVME = 1 << 12
_CR0_NW_CD = 3 << 29
_CR4_MCE = 1 << 6
_QUIRK_CD_NW_CLEARED = 1 << 1
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "tr")
_MSRS = (
    ("sysenter_cs", 0x174),
    ("sysenter_esp", 0x175),
    ("sysenter_eip", 0x176),
    ("star", 0xC000_0081),
    ("lstar", 0xC000_0082),
    ("cstar", 0xC000_0083),
    ("sfmask", 0xC000_0084),
    ("kernel_gs_base", 0xC000_0102),
    ("g_pat", MSR_IA32_CR_PAT),
    ("dbgctl", 0x1D9),
    ("xss", 0xDA0),
)
_GPRS = (
    *("rax", "rbx", "rcx", "rdx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags"),
    *(f"r{n}" for n in range(8, 16)),
)
_KVM_REGS = struct.Struct("<18Q")
_GENERAL = struct.Struct("<3Q8x11Q")
_GENERAL_AT = 0x308
"""RCX to R15 in a save area, where the place of RSP is empty."""
_NOT_GENERAL = (
    slice(0, 0x170),
    slice(0x180, 0x1D8),
    slice(0x1E0, 0x1F8),
    slice(0x200, 0x308),
    slice(0x3E8, 0x570),
)
"""Everything else that a guest changes: segments, control registers, MSRs, FPU."""
_FPU = (
    ("x87_dp", "last_dp"),
    ("mxcsr", "mxcsr"),
    ("x87_ftw", "ftwx"),
    ("x87_fsw", "fsw"),
    ("x87_fcw", "fcw"),
    ("x87_fop", "last_opcode"),
    ("x87_rip", "last_ip"),
    ("fpreg_xmm", "xmm"),
)


def save_area(vcpu: "KvmVcpu") -> Vmsa:
    """What the vCPU is entered with, without its FPU."""
    arch, sregs = vcpu.arch, vcpu.arch.sregs
    save = Vmsa()
    for name in _SEGMENTS:
        setattr(save, name, _packed(sregs.segment(name)))
    save.ldtr = _packed(sregs.segment("ldt"))
    save.gdtr = _table(sregs.table("gdt"))
    save.idtr = _table(sregs.table("idt"))
    save.cpl = sregs.segment("ss").dpl & 3
    # svm_set_efer(), svm_set_cr0(), svm_set_cr4(): SVME always, caching never off, MCE as the host has it.
    save.efer = sregs.efer | _EFER_SVME
    save.cr0 = sregs.cr0 & ~_hidden_cr0(vcpu)
    save.cr2 = sregs.cr2
    save.cr3 = sregs.cr3
    save.cr4 = sregs.cr4 | _CR4_MCE
    save.dr7 = arch.debugregs.dr7
    save.dr6 = arch.debugregs.dr6
    for name, index in _MSRS:
        setattr(save, name, arch.msrs.get(index, 0))
    save.xcr0 = arch.xcr0
    _copy_general(save, arch.regs)
    return save


def enter_save_area(vcpu: "KvmVcpu") -> Vmsa:
    """The save area for VMRUN, FPU included.

    Most entries follow an exit that changed general registers only: the rest is kept as it was made then.
    """
    arch, svm = vcpu.arch, vcpu.arch.svm
    made_from = (
        bytes(arch.sregs.data),
        bytes(arch.fpu.data),
        bytes(arch.debugregs.data),
        [arch.msrs.get(index, 0) for _, index in _MSRS],
        arch.xcr0,
        vcpu.kvm.arch.disabled_quirks,
    )
    if svm.entered_with is None or svm.entered_with[0] != made_from:
        save = save_area(vcpu)
        sync_fpu(save, arch.fpu)
        svm.entered_with = made_from, bytes(save.data)
        return save
    save = Vmsa(svm.entered_with[1])
    _copy_general(save, arch.regs)
    return save


def leave_save_area(vcpu: "KvmVcpu", save: Vmsa) -> None:
    """Take the guest's registers out of the save area after #VMEXIT."""
    made = vcpu.arch.svm.entered_with
    assert made is not None, "it was entered"
    if any(made[1][part] != save.data[part] for part in _NOT_GENERAL):
        _load_save_area(vcpu, save)
        return
    regs = vcpu.arch.regs
    rcx, rdx, rbx, rbp, rsi, rdi, *numbered = _GENERAL.unpack_from(save.data, _GENERAL_AT)
    first = (save.rax, rbx, rcx, rdx, rsi, rdi, save.rsp, rbp)
    regs.data[:] = _KVM_REGS.pack(*first, *numbered, save.rip, save.rflags)


def _copy_general(save: Vmsa, regs: KvmRegs) -> None:
    rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *numbered, rip, rflags = _KVM_REGS.unpack(regs.data)
    save.rax, save.rsp, save.rip, save.rflags = rax, rsp, rip, rflags
    _GENERAL.pack_into(save.data, _GENERAL_AT, rcx, rdx, rbx, rbp, rsi, rdi, *numbered)


def _load_save_area(vcpu: "KvmVcpu", save: Vmsa) -> None:
    """Everything, FPU included."""
    arch, sregs = vcpu.arch, vcpu.arch.sregs
    for name in _SEGMENTS:
        setattr(sregs, name, _unpacked(name, getattr(save, name), save.cpl))
    sregs.ldt = _unpacked("ldt", save.ldtr, save.cpl)
    for name, table in (("gdt", save.gdtr), ("idt", save.idtr)):
        entry = Segment(table)
        setattr(sregs, name, bytes(KvmDtable(limit=entry.limit & 0xFFFF, base=entry.base)))
    sregs.efer = save.efer & ~_EFER_SVME | sregs.efer & _EFER_SVME
    hidden = _hidden_cr0(vcpu)
    sregs.cr0 = save.cr0 & ~hidden | sregs.cr0 & hidden
    sregs.cr2 = save.cr2
    sregs.cr3 = save.cr3
    cr4 = save.cr4 & ~_CR4_MCE | sregs.cr4 & _CR4_MCE
    if cr4 != sregs.cr4:  # svm_set_cr4(): KVM intercepts writes of CR4
        sregs.cr4 = cr4
        kvm_update_cpuid_runtime(vcpu)
    arch.debugregs.dr7, arch.debugregs.dr6 = save.dr7, save.dr6
    for name, index in _MSRS:
        value = getattr(save, name)
        if value or index in arch.msrs:
            arch.msrs[index] = value
    for name in _GPRS:
        setattr(arch.regs, name, getattr(save, name))
    arch.xcr0 = save.xcr0
    for field, ours in _FPU:
        setattr(arch.fpu, ours, getattr(save, field))
    low, high = save.fpreg_x87[:64], save.fpreg_x87[64:]
    arch.fpu.fpr = b"".join(
        low[8 * n : 8 * n + 8] + high[2 * n : 2 * n + 2] + bytes(6) for n in range(8)
    )


def sync_fpu(save: Vmsa, fpu: KvmFpu) -> None:
    """FXSAVE state.  The x87 registers are laid out as 8 x 8 bytes, then 8 x 2."""
    for field, theirs in _FPU:
        setattr(save, field, getattr(fpu, theirs))
    registers = [fpu.fpr[at : at + 16] for at in range(0, 128, 16)]
    save.fpreg_x87 = b"".join(r[:8] for r in registers) + b"".join(r[8:10] for r in registers)


def _hidden_cr0(vcpu: "KvmVcpu") -> int:
    """Bits of CR0 that the guest has without their effect."""
    return 0 if vcpu.kvm.arch.disabled_quirks & _QUIRK_CD_NW_CLEARED else _CR0_NW_CD


def _packed(var: KvmSegment) -> bytes:
    """svm_set_segment(): attributes packed as the VMCB has them."""
    present = var.present & 1 and not var.unusable
    attrib = (
        var.type & 0xF
        | (var.s & 1) << 4
        | (var.dpl & 3) << 5
        | int(bool(present)) << 7
        | (var.avl & 1) << 8
        | (var.l & 1) << 9
        | (var.db & 1) << 10
        | (var.g & 1) << 11
    )
    return bytes(Segment(selector=var.selector, attrib=attrib, limit=var.limit, base=var.base))


def _unpacked(name: str, packed: bytes, cpl: int) -> bytes:
    """svm_get_segment(): granularity is what the limit needs, since AMD's processors do not keep the bit."""
    entry = Segment(packed)
    attrib = entry.attrib
    usable = attrib >> 7 & 1
    var = KvmSegment(
        base=entry.base,
        limit=entry.limit,
        selector=entry.selector,
        type=attrib & 0xF,
        s=attrib >> 4 & 1,
        dpl=attrib >> 5 & 3,
        present=usable,
        avl=attrib >> 8 & 1,
        l=attrib >> 9 & 1,
        db=attrib >> 10 & 1,
        g=int(entry.limit > 0xFFFFF),
        unusable=1 - usable,
    )
    if name == "tr":
        var.type |= 2  # busy
    elif name in ("ds", "es", "fs", "gs") and usable:
        var.type |= 1  # accessed
    elif name == "ss":
        var.db &= usable
        var.dpl = cpl
    return bytes(var)


def _table(var: KvmDtable) -> bytes:
    return bytes(Segment(limit=var.limit, base=var.base))
