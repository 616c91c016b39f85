"""vCPU types by QEMU's names and their CPUID signatures.

The names are those of QEMU's target/i386/cpu.c (builtin_x86_defs) that sev-snp-measure 0.0.13 knows; the
signature is Fn0000_0001_EAX, which a vCPU also finds in EDX at reset and which is so part of its VMSA.
"""

__all__ = ("CPU_SIGNATURES", "cpu_signature", "family_model_stepping")


def cpu_signature(family: int, model: int, stepping: int) -> int:
    """CPUID Fn0000_0001_EAX.  [APM3-24594 appendix E, Fn0000_0001_EAX]

    A family above 15 is a base of 15 and the rest in the extended field; models are split 4 and 4.
    """
    if not (0 <= family <= 0xF + 0xFF and 0 <= model <= 0xFF and 0 <= stepping <= 0xF):
        raise ValueError(
            f"no CPUID signature has family {family} model {model} stepping {stepping}"
        )
    base = min(family, 0xF)
    return (
        (family - base) << 20 | (model >> 4) << 16 | base << 8 | (model & 0xF) << 4 | stepping
    )


def family_model_stepping(signature: int) -> tuple[int, int, int]:
    """The inverse of `cpu_signature`."""
    base = signature >> 8 & 0xF
    family = base + (signature >> 20 & 0xFF if base == 0xF else 0)
    return family, signature >> 12 & 0xF0 | signature >> 4 & 0xF, signature & 0xF


_NAPLES = cpu_signature(23, 1, 2)
_ROME = cpu_signature(23, 49, 0)
_MILAN = cpu_signature(25, 1, 1)
_GENOA = cpu_signature(25, 17, 0)
_TURIN = cpu_signature(26, 0, 0)

CPU_SIGNATURES = {
    "EPYC": _NAPLES,
    "EPYC-v1": _NAPLES,
    "EPYC-v2": _NAPLES,
    "EPYC-IBPB": _NAPLES,
    "EPYC-v3": _NAPLES,
    "EPYC-v4": _NAPLES,
    "EPYC-Rome": _ROME,
    "EPYC-Rome-v1": _ROME,
    "EPYC-Rome-v2": _ROME,
    "EPYC-Rome-v3": _ROME,
    "EPYC-Milan": _MILAN,
    "EPYC-Milan-v1": _MILAN,
    "EPYC-Milan-v2": _MILAN,
    "EPYC-Genoa": _GENOA,
    "EPYC-Genoa-v1": _GENOA,
    "EPYC-Turin": _TURIN,
}
"""QEMU's -cpu name -> signature."""
