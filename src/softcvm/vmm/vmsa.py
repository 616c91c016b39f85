"""The registers a vCPU is launched with, as each VMM sets them up.

QEMU: what KVM puts into the VMSA (sev_es_sync_vmsa(), arch/x86/kvm/svm/sev.c, v7.2) after QEMU's reset
(x86_cpu_reset_hold(), target/i386/cpu.c) and the reset vector taken from the firmware image.  EC2 and
Google Compute Engine and a guest that starts in COCONUT-SVSM differ as sev-snp-measure 0.0.13 has it.
"""

from enum import Enum
from struct import Struct

from softcvm.abi.vmsa import Vmsa

__all__ = ("BSP_RESET_EIP", "VmmType", "initial_vmsa", "initial_vmsa_svsm")

BSP_RESET_EIP = 0xFFFF_FFF0
_SEGMENT = Struct("<HHIQ")
_PAT = 0x0007_0406_0007_0406  # the reset value of the PAT MSR
_PAT_GCE = 0x0000_0000_0007_0106
_EDX_OTHER = 0x600  # a family 6 signature, whatever the processor
_MXCSR = 0x1F80
_X87_FCW = 0x37F


class VmmType(Enum):
    """Whose initial register state."""

    QEMU = "QEMU"
    EC2 = "ec2"
    GCE = "gce"


def initial_vmsa(
    eip: int, vcpu_sig: int, sev_features: int, vmm_type: VmmType = VmmType.QEMU
) -> Vmsa:
    """A vCPU at reset in real mode, entered at `eip`: base and offset as a far jump would set them."""
    ec2 = vmm_type is VmmType.EC2
    vmsa = _at_reset(sev_features)
    vmsa.es = vmsa.ds = vmsa.fs = vmsa.gs = _segment(attrib=0x93)
    vmsa.ss = _segment(attrib=0x92 if ec2 else 0x93)
    vmsa.cs = _segment(
        selector=0xF000,
        attrib=0x9A if ec2 and eip == BSP_RESET_EIP else 0x9B,
        base=eip & 0xFFFF_0000,
    )
    vmsa.tr = _segment(attrib=0x83 if ec2 else 0x8B)
    vmsa.cr0 = 0x10
    vmsa.rip = eip & 0xFFFF
    vmsa.g_pat = _PAT_GCE if vmm_type is VmmType.GCE else _PAT
    if vmm_type is VmmType.QEMU:
        vmsa.rdx = vcpu_sig
        vmsa.mxcsr = _MXCSR
        vmsa.x87_fcw = _X87_FCW
    else:
        vmsa.rdx = _EDX_OTHER
    return vmsa


def initial_vmsa_svsm(eip: int, vcpu_sig: int) -> Vmsa:
    """A vCPU that starts in an SVSM: flat 32-bit segments, protected mode, SEV features SNP only."""
    vmsa = _at_reset(sev_features=1)
    vmsa.es = vmsa.ss = vmsa.ds = vmsa.fs = _segment(0x10, 0xC93, limit=0xFFFF_FFFF)
    vmsa.cs = _segment(0x08, 0xC9B, limit=0xFFFF_FFFF)
    vmsa.gs = _segment(attrib=0x93)
    vmsa.tr = _segment(attrib=0x8B)
    vmsa.cr0 = 0x11
    vmsa.rip = eip
    vmsa.g_pat = _PAT
    vmsa.rdx = vcpu_sig
    vmsa.mxcsr = _MXCSR  # and the x87 control word stays 0
    return vmsa


def _at_reset(sev_features: int) -> Vmsa:
    vmsa = Vmsa()
    vmsa.gdtr = vmsa.idtr = _segment()
    vmsa.ldtr = _segment(attrib=0x82)
    vmsa.efer = 0x1000  # SVME, which KVM sets for every guest it runs
    vmsa.cr4 = 0x40  # MCE, likewise
    vmsa.dr7 = 0x400
    vmsa.dr6 = 0xFFFF_0FF0
    vmsa.rflags = 0x2
    vmsa.sev_features = sev_features
    vmsa.xcr0 = 1
    return vmsa


def _segment(selector: int = 0, attrib: int = 0, limit: int = 0xFFFF, base: int = 0) -> bytes:
    """The bytes of an abi.vmsa.Segment."""
    return _SEGMENT.pack(selector, attrib, limit, base)
