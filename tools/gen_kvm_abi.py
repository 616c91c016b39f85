"""Write src/softcvm/abi/kvm/_generated_kvm.py from the kernel's uapi headers: python
tools/gen_kvm_abi.py INCLUDE_DIR

INCLUDE_DIR is what `make headers_install INSTALL_HDR_PATH=...` left in .../include.  gcc
evaluates the macros and lays out the structures; nothing is parsed but their names.  Numbers
newer than the headers are listed by hand, with where they come from.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

__all__ = ("main",)

_OUTPUT = Path(__file__).parents[1] / "src/softcvm/abi/kvm/_generated_kvm.py"
_WANTED = re.compile(
    r"KVM_(API_VERSION|CAP_\w+|EXIT_\w+|MEM_\w+|MEMORY_\w+|MP_STATE_\w+|X86_\w+_VM|X86_QUIRK_\w+"
    r"|SYSTEM_EVENT_\w+|GUESTDBG_\w+|HC_MAP_GPA_RANGE|MAP_GPA_RANGE_\w+|CPUID_FLAG_\w+)$"
)
_IOCTL = re.compile(r"_IO(|R|W|WR)\s*\(\s*KVMIO")
_FOREIGN = re.compile(
    r"KVM_(CAP_|EXIT_)?(ARM|S390|PPC|SPAPR|MIPS|RISCV|LOONGARCH|IA64|BOOKE|SW_TLB)"
)

_STRUCTS = {
    "kvm_run": "request_interrupt_window immediate_exit exit_reason ready_for_interrupt_injection if_flag "
    "flags cr8 apic_base hypercall.nr hypercall.args hypercall.ret hypercall.flags fail_entry.cpu "
    "io.direction io.size io.port io.count io.data_offset mmio.phys_addr mmio.data mmio.len mmio.is_write "
    "internal.suberror internal.ndata internal.data system_event.type system_event.ndata "
    "system_event.data msr.error msr.reason msr.index msr.data memory_fault.flags memory_fault.gpa "
    "memory_fault.size kvm_valid_regs kvm_dirty_regs s",
    "kvm_userspace_memory_region": "slot flags guest_phys_addr memory_size userspace_addr",
    "kvm_userspace_memory_region2": "slot flags guest_phys_addr memory_size userspace_addr "
    "guest_memfd_offset guest_memfd pad1 pad2",
    "kvm_create_guest_memfd": "size flags reserved",
    "kvm_memory_attributes": "address size attributes flags",
    "kvm_pre_fault_memory": "gpa size flags padding",
    "kvm_enc_region": "addr size",
    "kvm_dirty_log": "slot padding1 dirty_bitmap",
    "kvm_clear_dirty_log": "slot num_pages first_page dirty_bitmap",
    "kvm_dirty_gfn": "flags slot offset",
    "kvm_enable_cap": "cap flags args pad",
    "kvm_device_attr": "flags group attr addr",
    "kvm_regs": "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags",
    "kvm_segment": "base limit selector type present dpl db s l g avl unusable padding",
    "kvm_dtable": "base limit padding",
    "kvm_sregs": "cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base interrupt_bitmap",
    "kvm_sregs2": "cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base flags pdptrs",
    "kvm_fpu": "fpr fcw fsw ftwx pad1 last_opcode last_ip last_dp xmm mxcsr pad2",
    "kvm_debugregs": "db dr6 dr7 flags reserved",
    "kvm_xcrs": "nr_xcrs flags xcrs padding",
    "kvm_vcpu_events": "exception.injected exception.nr exception.has_error_code exception.pending "
    "exception.error_code interrupt.injected interrupt.nr interrupt.soft interrupt.shadow nmi.injected "
    "nmi.pending nmi.masked sipi_vector flags smi.smm smi.pending smi.smm_inside_nmi smi.latched_init "
    "triple_fault.pending reserved exception_has_payload exception_payload",
    "kvm_xcr": "xcr reserved value",
    "kvm_cpuid_entry2": "function index flags eax ebx ecx edx padding",
    "kvm_msr_entry": "index reserved data",
    "kvm_mp_state": "mp_state",
    "kvm_guest_debug": "control pad arch.debugreg",
}

_NEWER = (
    ("KVM_CAP_GUEST_MEMFD_FLAGS", 244, "include/uapi/linux/kvm.h v6.18"),
    ("KVM_X86_TDX_VM", 5, "arch/x86/include/uapi/asm/kvm.h v6.16"),
    ("KVM_EXIT_TDX", 40, "include/uapi/linux/kvm.h v6.16"),
    ("KVM_EXIT_SNP_REQ_CERTS", 43, "include/uapi/linux/kvm.h v7.0"),
)

_INCLUDES = "#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\n#include <linux/kvm_para.h>\n"


def _gcc(include: Path, *args: str, source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["gcc", "-x", "c", "-", "-isystem", str(include), *args],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )


def _names(include: Path) -> list[str]:
    listing = _gcc(include, "-E", "-dM", source=_INCLUDES).stdout
    names = []
    for line in listing.splitlines():
        match = re.match(r"#define (KVM_\w+) (.+)", line)
        if (
            match
            and not _FOREIGN.match(match[1])
            and (_IOCTL.search(match[2]) or _WANTED.match(match[1]))
        ):
            names.append(match[1])
    return sorted(names)


def _run(include: Path, build: Path, lines: list[str]) -> dict[str, int]:
    """Compile and run a program that prints `name value` lines; a line that does not compile is
    dropped."""
    while True:
        head = _INCLUDES + "int main(void) {\n"
        source = head + "\n".join(lines) + "\nreturn 0; }\n"
        built = _gcc(include, "-o", str(build), source=source)
        if built.returncode == 0:
            break
        first = head.count("\n") + 1
        bad = {int(n) - first for n in re.findall(r"<stdin>:(\d+):\d+: error", built.stderr)}
        if not bad:
            raise SystemExit(built.stderr)
        lines = [line for i, line in enumerate(lines) if i not in bad]
    out = subprocess.run([str(build)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in out.splitlines())}


def _literal(name: str, value: int) -> str:
    return f"{name} = {value:#x}" if value > 0xFFFF else f"{name} = {value}"


def main(argv: list[str]) -> None:
    include = Path(argv[1])
    headers = [include / "linux/kvm.h", include / "asm/kvm.h", include / "linux/kvm_para.h"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()
    code = (include / "linux/version.h").read_text()
    version = ".".join(re.findall(r"LINUX_VERSION_(?:MAJOR|PATCHLEVEL|SUBLEVEL) (\d+)", code))
    build = include.parent / "gen_kvm_abi"
    values = _run(
        include,
        build,
        [f'printf("{n} %lu\\n", (unsigned long)({n}));' for n in _names(include)],
    )
    layout = []
    for struct, fields in _STRUCTS.items():
        layout.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        layout += [
            f'printf("{struct}.{f} %zu\\n", offsetof(struct {struct}, {f}));'
            for f in fields.split()
        ]
    offsets = _run(include, build, layout)
    build.unlink()
    out = [
        f"# generated by tools/gen_kvm_abi.py from uapi headers of Linux {version}, sha256 {digest}",
        '"""KVM\'s numbers: ioctls, capabilities, exits, flags; and where the fields of its structures lie."""',
        "",
        "from types import MappingProxyType",
        "",
        *(_literal(name, value) for name, value in sorted(values.items())),
        "",
        "# Not in those headers",
        *(
            f"{_literal(name, value)}  # {source}"
            for name, value, source in _NEWER
            if name not in values
        ),
        "",
        "LAYOUT = MappingProxyType({",
        *(f'    "{name}": {value},' for name, value in offsets.items()),
        "})",
        '"""sizeof(struct) under its name, offsetof(field) under struct.field."""',
        "",
    ]
    _OUTPUT.write_text("\n".join(out))


if __name__ == "__main__":
    main(sys.argv)
