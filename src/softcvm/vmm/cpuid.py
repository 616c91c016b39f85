"""The CPUID table of a guest: what KVM supports, as the chosen vCPU type shows it.

sev_snp_cpuid_info_fill() of QEMU's target/i386/sev.c.  The table goes into the CPUID page, which firmware
checks against the processor, and to KVM, for the vCPUs.  Of a vCPU type only the signature matters here:
features are the processor's, less what KVM does not support, less what it emulates in a way that firmware
would not vouch for (sev_snp_mask_cpuid_features()).
"""

from collections.abc import Iterable

from softcvm.abi.cpuid import SNP_CPUID_COUNT_MAX, CpuidEntry, write_page
from softcvm.abi.kvm.vcpu import KvmCpuidEntry2
from softcvm.vmm.errors import VmmError

__all__ = ("cpuid_page", "entries", "vcpu_cpuid")

_FEATURES = 0x1
_FEATURES_EXTENDED = 0x8000_0001
_XSTATE = 0xD
_XSAVE_LEGACY = 0x240
_XCR0_X87 = 1
# (leaf, index) -> register -> features that KVM offers and SNP firmware refuses.
_MASKED = {
    (0x1, 0): {"ecx": 1 << 24},  # TSC deadline timer
    (0x7, 0): {
        "ebx": 1 << 1,  # TSC_ADJUST
        "edx": 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31,
        # SPEC_CTRL, STIBP, FLUSHCMD, ARCH_CAPABILITIES, CORE_CAPABILITY, SSBD
    },
    (0x8000_0008, 0): {"ebx": 1 << 25},  # VIRT_SSBD
}
_HYPERVISOR_LEAVES = range(0x4000_0000, 0x5000_0000)


def entries(supported: bytes) -> list[KvmCpuidEntry2]:
    """The records of a struct kvm_cpuid2."""
    count = int.from_bytes(supported[:4], "little")
    size = KvmCpuidEntry2.SIZE
    return [KvmCpuidEntry2(supported[8 + i * size : 8 + (i + 1) * size]) for i in range(count)]


def vcpu_cpuid(supported: Iterable[KvmCpuidEntry2], signature: int) -> list[KvmCpuidEntry2]:
    """What a vCPU of a type with this signature is told."""
    told = []
    for entry in supported:
        mine = KvmCpuidEntry2(bytes(entry))
        if mine.function in (_FEATURES, _FEATURES_EXTENDED):
            mine.eax = signature
        for register, mask in _MASKED.get((mine.function, mine.index), {}).items():
            setattr(mine, register, getattr(mine, register) & ~mask)
        told.append(mine)
    return told


def cpuid_page(told: Iterable[KvmCpuidEntry2]) -> bytes:
    """The page that is launched.

    A guest works out the size of its XSAVE area itself, from the components, so leaf 0xD is given for XCR0
    as it is at reset.  Leaves of the hypervisor's own are not firmware's to vouch for.
    """
    table = []
    for entry in told:
        if entry.function in _HYPERVISOR_LEAVES:
            continue
        given = CpuidEntry(
            entry.function,
            entry.index,
            eax=entry.eax,
            ebx=entry.ebx,
            ecx=entry.ecx,
            edx=entry.edx,
        )
        if entry.function == _XSTATE and entry.index in (0, 1):
            given = given._replace(xcr0_in=_XCR0_X87, ebx=_XSAVE_LEGACY)
        table.append(given)
    if len(table) > SNP_CPUID_COUNT_MAX:
        raise VmmError(
            f"{len(table)} CPUID leaves; an SNP guest's page holds {SNP_CPUID_COUNT_MAX}"
        )
    return write_page(table)
