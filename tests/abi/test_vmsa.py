"""The VMSA's table against the kernel's struct as a C compiler lays it out, and against sev-snp-measure's."""

import subprocess
from pathlib import Path

from sevsnpmeasure.vmsa import SevEsSaveArea

from softcvm.abi.layout import Bits
from softcvm.abi.vmsa import Segment, Vmsa

# Members of struct sev_es_save_area in order (arch/x86/include/asm/svm.h, v7.2), with its 24 reserved
# bytes at 0x2F0 named as firmware uses them.  [APM2-24593 Table B-4]
MEMBERS = """
seg es cs ss ds fs gs gdtr ldtr idtr tr
u64 pl0_ssp pl1_ssp pl2_ssp pl3_ssp u_cet
2 reserved_0xc8
u8 vmpl cpl
4 reserved_0xcc
u64 efer
104 reserved_0xd8
u64 xss cr4 cr3 cr0 dr7 dr6 rflags rip dr0 dr1 dr2 dr3
u64 dr0_addr_mask dr1_addr_mask dr2_addr_mask dr3_addr_mask
24 reserved_0x1c0
u64 rsp s_cet ssp isst_addr rax star lstar cstar sfmask kernel_gs_base
u64 sysenter_cs sysenter_esp sysenter_eip cr2
32 reserved_0x248
u64 g_pat dbgctl br_from br_to last_excp_from last_excp_to
80 reserved_0x298
u32 pkru tsc_aux
u64 guest_tsc_scale guest_tsc_offset reg_prot_nonce
u64 rcx rdx rbx reserved_0x320 rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15
16 reserved_0x380
u64 guest_exit_info_1 guest_exit_info_2 guest_exit_int_info guest_nrip
u64 sev_features vintr_ctrl guest_exit_code virtual_tom tlb_id pcpu_id event_inj xcr0
16 reserved_0x3f0
u64 x87_dp
u32 mxcsr
u16 x87_ftw x87_fsw x87_fcw x87_fop x87_ds x87_cs
u64 x87_rip
80 fpreg_x87
256 fpreg_xmm fpreg_ymm
"""
TYPES = {
    "seg": "struct seg",
    "u64": "uint64_t",
    "u32": "uint32_t",
    "u16": "uint16_t",
    "u8": "uint8_t",
}

# sev-snp-measure keeps older names of the kernel's.
THEIR_NAMES = {f"pl{n}_ssp": f"vmpl{n}_ssp" for n in range(4)} | {"dbgctl": "dbgctrl"}
NOT_THEIRS = {"guest_tsc_scale", "guest_tsc_offset", "reg_prot_nonce"}


def places() -> dict[str, tuple[int, int]]:
    """Name -> byte offset and size, as the model has it."""
    found = {}
    for name, field in Vmsa.fields().items():
        if isinstance(field, Bits):
            found[name] = (field.lo // 8, (field.hi - field.lo + 1) // 8)
        else:
            found[name] = (field.offset, field.length)
    return found


def test_every_field_lies_where_a_c_compiler_puts_it(gcc: str, tmp_path: Path) -> None:
    body, names = "", []
    for line in MEMBERS.split("\n"):
        kind, *members = line.split() or [""]
        for name in members:
            named = f"{TYPES[kind]} {name}" if kind in TYPES else f"uint8_t {name}[{kind}]"
            body += f"    {named};\n"
            names.append(name)
    shown = "".join(
        f'    printf("{n} %zu %zu\\n", offsetof(struct vmsa, {n}), sizeof v.{n});\n'
        for n in names
        if not n.startswith("reserved")
    )
    source = tmp_path / "vmsa.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n"
        "struct seg { uint16_t selector, attrib; uint32_t limit; uint64_t base; } "
        "__attribute__((packed));\n"
        f"struct vmsa {{\n{body}}} __attribute__((packed));\n"
        f"int main(void)\n{{\n    static struct vmsa v;\n{shown}    return 0;\n}}\n"
    )
    program = tmp_path / "vmsa"
    subprocess.run([gcc, "-Wall", "-Werror", "-o", program, source], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    expected = {
        n: (int(at), int(size)) for n, at, size in (line.split() for line in lines if line)
    }
    assert places() == expected


def test_every_field_lies_where_sev_snp_measure_has_it() -> None:
    theirs = {name: getattr(SevEsSaveArea, name) for name, _ in SevEsSaveArea._fields_}
    for name, (offset, size) in places().items():
        if name in NOT_THEIRS:
            continue
        field = theirs[THEIR_NAMES.get(name, name)]
        assert (name, offset, size) == (name, field.offset, field.size)


def test_a_segment_is_packed_as_the_kernel_packs_it() -> None:
    segment = Segment(selector=0xF000, attrib=0x9B, limit=0xFFFF, base=0xFFFF_0000)
    assert bytes(segment).hex(" ", 2) == "00f0 9b00 ffff 0000 0000 ffff 0000 0000"
