"""/proc/cpuinfo of the machine that the program is caught on.

What the real processor can do stays, since the program runs on it; who made it, and what concerns confidential
VMs, is the model's.  [arch/x86/kernel/cpu/proc.c, arch/x86/include/asm/cpufeatures.h; v6.12]
"""

from softcvm.hw.cpu.cpuid import cpuid
from softcvm.hw.profile import CpuProfile

__all__ = ("cpuinfo",)

_OURS = ("svm", "npt", "nrip_save", "sme", "sev", "sev_es", "sev_snp")
_NOT_OURS = frozenset({"vmx", "ept", "vpid", "flexpriority", "tdx_host_platform", "tdx_guest"})


def cpuinfo(profile: CpuProfile) -> str:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        return "".join(_line(profile, line) for line in file)


def _line(profile: CpuProfile, line: str) -> str:
    label, colon, value = line.partition(":")
    if not colon:
        return line
    match label.strip():
        case "vendor_id":
            value = "AuthenticAMD"
        case "cpu family":
            value = str(profile.family)
        case "model":
            value = str(profile.model)
        case "stepping":
            value = str(profile.stepping)
        case "model name":
            value = _brand(profile)
        case "flags":
            kept = [flag for flag in value.split() if flag not in _NOT_OURS]
            value = " ".join([*kept, *(flag for flag in _OURS if flag not in kept)])
        case _:
            return line
    return f"{label}: {value}\n"


def _brand(profile: CpuProfile) -> str:
    leaves = (cpuid(profile, function) for function in range(0x8000_0002, 0x8000_0005))
    raw = b"".join(word.to_bytes(4, "little") for leaf in leaves for word in leaf)
    return raw.rstrip(b"\0").decode("ascii")
