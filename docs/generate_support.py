"""Writes the tables of docs/support.md that a machine can answer for.  `python docs/generate_support.py`

Each ioctl is tried on each kind of file of each kernel, with an address that nothing is mapped at: a
call that reaches its own code is modelled, one that falls through the dispatch is refused, and one that
stops the run is Unmodelled.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import VmType
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.sev import SEV_ISSUE_CMD as ISSUE
from softcvm.abi.sev import KvmSevCmd, KvmSevInit, SevCmdId, SevIssueCmd, SevUserCmd
from softcvm.kernel.errors import Unmodelled
from softcvm.kernel.profile import PROFILES
from softcvm.machine.process import MachineProcess
from softcvm.uapi.numbers import IOCTL_NAMES, is_kvm_ioctl
from softcvm.uapi.unmodelled import (
    UNMODELLED_ON_KVM,
    UNMODELLED_ON_VCPU,
    UNMODELLED_ON_VM,
)

__all__ = ("encrypt_op_states", "ioctl_states", "support")

PAGE = Path(__file__).parent / "support.md"
SOURCE = Path(__file__).parent.parent / "src" / "softcvm" / "kernel"
FILES = ("/dev/kvm", "VM", "vCPU")
UNMODELLED = (UNMODELLED_ON_KVM, UNMODELLED_ON_VM, UNMODELLED_ON_VCPU)
KERNELS = tuple(PROFILES)
BAD = 0x1000
NOTES = {
    "KVM_CREATE_IRQCHIP": "stored; application processors wait for INIT and SIPI, no interrupt is delivered",
    "KVM_RESET_DIRTY_RINGS": "no signal cuts it short, as one may in later kernels (unconfirmed)",
    "KVM_GET_DEVICE_ATTR": "/dev/kvm: the SEV group; vCPU: the TSC offset",
    "KVM_HAS_DEVICE_ATTR": "/dev/kvm: the SEV group; vCPU: the TSC offset",
    "KVM_ENABLE_CAP": "VM: all of x86 but SGX and EOI broadcasts (Unmodelled); vCPU: ENFORCE_PV_FEATURE_CPUID; "
    "bus cycles, x2APIC formats and disabled exits but HLT are stored, no effect",
    "KVM_SET_MSRS": "those of KVM on AMD; Unmodelled: x2APIC, CET, and records that KVM keeps in guest memory; no clock runs",
    "KVM_GET_MSRS": "those of KVM on AMD; Unmodelled: x2APIC, CET",
    "KVM_GET_MSR_INDEX_LIST": "6.18 and 7.3: Unmodelled, for CET",
    "KVM_GET_MSR_FEATURE_INDEX_LIST": "6.18 and 7.3: Unmodelled, for CET",
    "KVM_SET_VCPU_EVENTS": "exceptions; Unmodelled: interrupts, NMIs, payloads, triple faults",
    "KVM_SET_SIGNAL_MASK": "a signal that only this mask blocks still ends KVM_RUN under exec",
    "KVM_SET_DEVICE_ATTR": "vCPU: the TSC offset, of RDTSC in machine code; it begins at zero, not at minus the host's TSC",
    "KVM_GET_STATS_FD": "names and form of Linux; counted is what the model does, times and the rest are zero",
    "KVM_SET_LAPIC": "stored, no effect; a running timer or an interrupt to deliver is Unmodelled",
    "KVM_GET_NESTED_STATE": "kvm_amd with nested=0: guests have no SVM",
    "KVM_SET_NESTED_STATE": "kvm_amd with nested=0: guests have no SVM",
    "KVM_REGISTER_COALESCED_MMIO": "under exec the ring is in the pages of the first vCPU",
    "KVM_TRANSLATE": "in long mode and without paging; of a guest with SEV Unmodelled",
    "KVM_SET_SREGS2": "with PDPTRs Unmodelled",
    "KVM_SET_USER_MEMORY_REGION2": "GUEST_MEMFD: VMs with private memory in 6.12, every VM from 6.18",
    "KVM_CREATE_GUEST_MEMFD": "flags from 6.18; folios of 4K, or 2M by option",
    "KVM_SET_MEMORY_ATTRIBUTES": "in place by option (7.3)",
    "KVM_PRE_FAULT_MEMORY": "EAGAIN for a slot that goes: from 6.18",
    "KVM_RUN": "every VM type; registers in kvm_run (SYNC_REGS)",
    "KVM_MEMORY_ENCRYPT_OP": "commands below",
}
EXIT_NOTES = {
    KvmExit.MEMORY_FAULT: "KVM_RUN fails with EFAULT, EHWPOISON or what guest_memfd answered",
    KvmExit.HYPERCALL: "MAP_GPA_RANGE; from 7.2 user space may answer 0, EINVAL, EAGAIN only",
    KvmExit.SYSTEM_EVENT: "SEV_TERM",
    KvmExit.FAIL_ENTRY: "from 6.15: VMRUN without a valid VMSA",
    KvmExit.SNP_REQ_CERTS: "from 7.0",
}


def _state(
    sys: MachineProcess, fd: int, request: int, name: str, unmodelled: Mapping[int, int]
) -> str:
    """What becomes of one ioctl on one file; "" where that file has no such ioctl."""
    if request in unmodelled:  # may be refused before that shows
        return "Unmodelled"
    try:
        sys.ioctl(fd, request, BAD)
    except Unmodelled:
        return "Unmodelled"
    except OSError as error:
        return (
            "" if re.search(rf"{name} on (a VM|a vCPU|/dev/kvm)$", str(error)) else "modelled"
        )
    return "modelled"


def ioctl_states(kernel: str) -> dict[str, dict[str, str]]:
    """name -> file -> state, for every ioctl of <linux/kvm.h>."""
    sys = Machine(kernel, memory=1 << 27).process()
    kvm = sys.open("/dev/kvm")
    states: dict[str, dict[str, str]] = {}
    for request, name in IOCTL_NAMES.items():
        if not is_kvm_ioctl(request):
            continue
        vm = sys.ioctl(kvm, k.KVM_CREATE_VM, VmType.DEFAULT)
        vcpu = sys.ioctl(vm, k.KVM_CREATE_VCPU, 0)
        fds = zip(FILES, (kvm, vm, vcpu), UNMODELLED, strict=True)
        states[name] = {file: _state(sys, fd, request, name, no) for file, fd, no in fds}
        sys.close(vcpu)
        sys.close(vm)
    return states


def _sev(sys: MachineProcess, vm: int, command: int, sev_fd: int) -> str:
    cmd = KvmSevCmd(id=command, data_ptr=BAD, sev_fd=sev_fd)
    try:
        sys.ioctl(vm, k.KVM_MEMORY_ENCRYPT_OP, cmd.data)
    except Unmodelled:
        return "Unmodelled"
    except OSError as error:
        return "refused" if "does not exist" in str(error) else "modelled"
    return "modelled"


def encrypt_op_states(kernel: str) -> dict[str, str]:
    """Command of KVM_MEMORY_ENCRYPT_OP -> state, each on a VM that is initialised for it."""
    sys = Machine(kernel, memory=1 << 27).process()
    kvm, sev_fd = sys.open("/dev/kvm"), sys.open("/dev/sev")
    states = {}
    for command in SevCmdId:
        vm_type = VmType.SNP if command >= SevCmdId.SNP_LAUNCH_START else VmType.SEV_ES
        vm = sys.ioctl(kvm, k.KVM_CREATE_VM, vm_type)
        params = sys.mmap(4096, 3, 0x22)
        sys.store(params, bytes(KvmSevInit()))
        init = KvmSevCmd(id=SevCmdId.INIT2, data_ptr=params)
        sys.ioctl(vm, k.KVM_MEMORY_ENCRYPT_OP, init.data)
        states[command.name] = _sev(sys, vm, command, sev_fd)
        sys.close(vm)
        sys.munmap(params, 4096)
    return states


def _dev_sev_states(kernel: str) -> dict[str, str]:
    sys = Machine(kernel, memory=1 << 27).process()
    fd = sys.open("/dev/sev")
    states = {}
    for command in SevUserCmd:
        try:
            sys.ioctl(fd, ISSUE, SevIssueCmd(cmd=command, data_ptr=BAD).data)
            states[command.name] = "modelled"
        except Unmodelled:
            states[command.name] = "Unmodelled"
        except OSError:
            states[command.name] = "modelled"
    return states


def _exit_states() -> dict[str, str]:
    """An exit is modelled when some code of the kernel names it."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py")))
    raised = set(re.findall(r"KvmExit\.(\w+)", source))
    return {
        each.name: "modelled" if each.name in raised else "never happens here"
        for each in KvmExit
    }


def _by_kernel(states: dict[str, str]) -> str:
    """One word where the kernels agree."""
    if len(set(states.values())) == 1:
        return states[KERNELS[0]]
    return "; ".join(f"{kernel}: {state or 'refused'}" for kernel, state in states.items())


def _ioctls() -> list[str]:
    tables = {kernel: ioctl_states(kernel) for kernel in KERNELS}
    lines = ["| ioctl | /dev/kvm | VM | vCPU | |", "|---|---|---|---|---|"]
    for name in sorted(tables[KERNELS[0]]):
        cells = [
            _by_kernel({kernel: tables[kernel][name][file] for kernel in KERNELS})
            for file in FILES
        ]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} | {NOTES.get(name, '')} |")
    none = sorted(n for n in tables[KERNELS[0]] if not any(tables[KERNELS[0]][n].values()))
    lines += [
        "",
        f"Of other architectures, of device files, or refused on these three: {', '.join(none)}.",
    ]
    return lines


def _commands() -> list[str]:
    tables = {kernel: encrypt_op_states(kernel) for kernel in KERNELS}
    lines = ["", "| KVM_MEMORY_ENCRYPT_OP | " + " | ".join(KERNELS) + " |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {' | '.join(tables[kernel][name] for kernel in KERNELS)} |"
        for name in tables[KERNELS[0]]
    ]
    states = _dev_sev_states(KERNELS[-1])
    lines += ["", "| SEV_ISSUE_CMD on /dev/sev | |", "|---|---|"]
    return lines + [f"| {name} | {state} |" for name, state in states.items()]


def _exits() -> list[str]:
    lines = ["", "| exit of KVM_RUN | | |", "|---|---|---|"]
    for name, state in _exit_states().items():
        lines.append(f"| {name} | {state} | {EXIT_NOTES.get(KvmExit[name], '')} |")
    return lines


def support(text: str) -> str:
    """docs/support.md with its tables as the machine answers now."""
    tables = "\n".join([*_ioctls(), *_commands(), *_exits(), ""])
    marks = re.compile(r"(<!-- ioctls -->\n).*?(<!-- end of ioctls -->\n)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}{tables}{found[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(support(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
