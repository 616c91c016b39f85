"""Files that the program finds on this machine instead of the real one's, by path, and what stat() says of them.

Device nodes are opened in the model; the rest are texts that tell what kind of host this is.
"""

import os
import stat
import struct

from softcvm.machine import Machine

__all__ = ("NODES", "node_stat", "node_statx", "text_of")

NODES = {"/dev/kvm": (10, 232), "/dev/sev": (10, 124)}
"""Path -> major and minor number.  /dev/sev has a dynamic minor number."""
_PARAMETERS = "/sys/module/{module}/parameters/{name}"
_NODE_MODE = {"/dev/kvm": 0o666, "/dev/sev": 0o600}


def _yes(value: bool) -> str:
    return "Y\n" if value else "N\n"


def _parameters(machine: Machine) -> dict[str, str]:
    """Parameters of kvm and kvm_amd that follow from what the machine is.  [svm.c, sev.c, x86.c v6.12]"""
    snp = machine.linux.sev_dev.snp_initialized
    amd = {
        "sev": _yes(True),
        "sev_es": _yes(True),
        "sev_snp": _yes(snp),
        "npt": _yes(True),
        "nested": "0\n",
        "avic": _yes(False),
        "force_avic": _yes(False),
        "vgif": "0\n",
        "vls": "0\n",
        "vnmi": _yes(False),
        "dump_invalid_vmcb": _yes(False),
    }
    generic = {
        "tdp_mmu": _yes(True),
        "mmio_caching": _yes(True),
        "nx_huge_pages": "N\n",
        "ignore_msrs": _yes(False),
        "enable_pmu": _yes(False),
        "enable_vmware_backdoor": _yes(False),
        "force_emulation_prefix": "0\n",
        "eager_page_split": _yes(True),
    }
    found = {}
    for module, values in (("kvm_amd", amd), ("kvm", generic)):
        for name, value in values.items():
            found[_PARAMETERS.format(module=module, name=name)] = value
    return found


def text_of(machine: Machine, path: str) -> str | None:
    """What a program reads at a path; None: it is the real machine's.  OSError(ENOENT): not on this one."""
    if path == "/proc/cpuinfo":
        from softcvm.attach.cpuinfo import cpuinfo

        return cpuinfo(machine.soc.profile)
    if path.startswith(("/sys/module/kvm/", "/sys/module/kvm_amd/", "/sys/module/kvm_intel/")):
        found = _parameters(machine).get(path)
        if found is None:
            raise FileNotFoundError(2, os.strerror(2), path)
        return found
    return None


def node_stat(path: str) -> bytes:
    """struct stat of a device node.  [arch/x86/include/uapi/asm/stat.h]"""
    mode = stat.S_IFCHR | _NODE_MODE[path]
    rdev = os.makedev(*NODES[path])
    return struct.pack("<QQQIIIIQqqq6Q24x", 5, 1, 1, mode, 0, 0, 0, rdev, 0, 4096, 0, *(0,) * 6)


def node_statx(path: str) -> bytes:
    """struct statx with the basic fields.  [include/uapi/linux/stat.h]"""
    mode = stat.S_IFCHR | _NODE_MODE[path]
    major, minor = NODES[path]
    basic = 0x7FF
    head = struct.pack("<IIQIIIHHQQQQ", basic, 4096, 0, 1, 0, 0, mode, 0, 1, 0, 0, 0)
    return (head + bytes(64) + struct.pack("<IIII", major, minor, 0, 5)).ljust(256, b"\0")
