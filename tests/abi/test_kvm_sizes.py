"""KVM's structures against a C compiler: sizes, offsets and numbers.

Outsiders: the uapi headers of the machine the tests run on, compiled; and LAYOUT, which
tools/gen_kvm_abi.py made with gcc from the headers of the kernel named on the first line of
_generated_kvm.py.
"""

import re
import subprocess
from pathlib import Path

import pytest

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm import memory, vcpu
from softcvm.abi.kvm.run import KVM_RUN_SIZE, KvmExit, KvmRun, SystemEvent
from softcvm.abi.layout import Bytes, Layout
from tests.conftest import Require

STRUCTS: dict[str, type[Layout]] = {
    "kvm_userspace_memory_region": memory.KvmUserspaceMemoryRegion,
    "kvm_userspace_memory_region2": memory.KvmUserspaceMemoryRegion2,
    "kvm_create_guest_memfd": memory.KvmCreateGuestMemfd,
    "kvm_memory_attributes": memory.KvmMemoryAttributes,
    "kvm_pre_fault_memory": memory.KvmPreFaultMemory,
    "kvm_enc_region": memory.KvmEncRegion,
    "kvm_dirty_log": memory.KvmDirtyLog,
    "kvm_clear_dirty_log": memory.KvmClearDirtyLog,
    "kvm_dirty_gfn": memory.KvmDirtyGfn,
    "kvm_enable_cap": vcpu.KvmEnableCap,
    "kvm_device_attr": vcpu.KvmDeviceAttr,
    "kvm_regs": vcpu.KvmRegs,
    "kvm_segment": vcpu.KvmSegment,
    "kvm_dtable": vcpu.KvmDtable,
    "kvm_sregs": vcpu.KvmSregs,
    "kvm_sregs2": vcpu.KvmSregs2,
    "kvm_fpu": vcpu.KvmFpu,
    "kvm_debugregs": vcpu.KvmDebugregs,
    "kvm_xcrs": vcpu.KvmXcrs,
    "kvm_vcpu_events": vcpu.KvmVcpuEvents,
    "kvm_cpuid_entry2": vcpu.KvmCpuidEntry2,
    "kvm_mp_state": vcpu.KvmMpState,
    "kvm_guest_debug": vcpu.KvmGuestDebug,
}
RENAMED = {"args": "arg0", "arch.debugreg": "debugreg"}


def offset(layout: type[Layout], name: str) -> int:
    field = layout.fields()[name]
    return field.offset if isinstance(field, Bytes) else field.lo // 8


@pytest.mark.parametrize("struct", STRUCTS)
def test_a_layout_lies_where_the_compiler_puts_it(struct: str) -> None:
    layout = STRUCTS[struct]
    assert k.LAYOUT[struct] == layout.SIZE
    for name, expected in k.LAYOUT.items():
        if name.startswith(f"{struct}."):
            field = name.removeprefix(f"{struct}.")
            assert offset(layout, RENAMED.get(field, field.replace(".", "_"))) == expected, name


def test_kvm_run_lies_where_the_compiler_puts_it() -> None:
    assert k.LAYOUT["kvm_run"] == KVM_RUN_SIZE
    checked = 0
    for name, expected in k.LAYOUT.items():
        if name.startswith("kvm_run."):
            field = name.removeprefix("kvm_run.")
            assert (
                offset(
                    KvmRun,
                    "sync_regs"
                    if field == "s"
                    else RENAMED.get(field, field).replace(".", "_"),
                )
                == expected
            ), name
            checked += 1
    assert checked > 30


def test_exit_reasons_and_flags_are_the_headers() -> None:
    for reason in KvmExit:
        assert getattr(k, f"KVM_EXIT_{reason.name}") == reason
    for event in SystemEvent:
        assert getattr(k, f"KVM_SYSTEM_EVENT_{event.name}") == event
    for state in vcpu.MpState:
        assert getattr(k, f"KVM_MP_STATE_{state.name}") == state
    assert k.KVM_MEM_GUEST_MEMFD == memory.MemFlag.GUEST_MEMFD
    assert k.KVM_MEMORY_ATTRIBUTE_PRIVATE == memory.KVM_MEMORY_ATTRIBUTE_PRIVATE
    assert k.KVM_X86_SNP_VM == memory.VmType.SNP


def test_the_numbers_are_those_of_this_machines_headers(
    gcc: str, require: Require, tmp_path: Path
) -> None:
    """What older headers do not know is left out."""
    header = Path("/usr/include/linux/kvm.h")
    require("kvm-headers", header.exists(), "apt install linux-libc-dev")
    known = set(re.findall(r"#define\s+(KVM_\w+)", header.read_text()))
    names = [n for n in vars(k) if n.startswith("KVM_") and n in known]
    structs = [n for n in k.LAYOUT if "." not in n and f"struct {n} {{" in header.read_text()]
    lines = [f'printf("{n} %lu\\n", (unsigned long)({n}));' for n in names]
    lines += [f'printf("{n} %zu\\n", sizeof(struct {n}));' for n in structs]
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n"
        + "\n".join(lines)
        + "}\n"
    )
    subprocess.run([gcc, "-o", tmp_path / "numbers", source], check=True, capture_output=True)
    out = subprocess.run(
        [tmp_path / "numbers"], check=True, capture_output=True, text=True
    ).stdout
    values = {name: int(value) for name, value in (line.split() for line in out.splitlines())}
    ours = {**vars(k), **k.LAYOUT}
    assert {n: ours[n] for n in values} == values
    assert len(names) > 200
    assert len(structs) > 5
