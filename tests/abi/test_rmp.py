"""The RMP's tables against a C compiler, which decides where bit-fields lie."""

import subprocess
from pathlib import Path

from softcvm.abi.layout import Bits
from softcvm.abi.rmp import RmpEntryRaw, RmpReadOut, RmpStateLayout

# Widths of the fields in order, as [PPR-19h-11h] lists them; gcc turns widths into positions.
PROGRAM = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <stddef.h>

struct entry {
    uint64_t assigned : 1, pagesize : 1, immutable : 1, subpage_count : 9, gpa : 39, asid : 10,
             vmsa : 1, validated : 1, lock : 1;
    uint64_t vmpl0 : 8, vmpl1 : 8, vmpl2 : 8, vmpl3 : 8, rest : 32;
} __attribute__((packed));

struct state {
    uint64_t gpa;
    uint8_t assigned, pagesize, immutable, reserved;
    uint32_t asid;
} __attribute__((packed));

static void show(const char *table, const char *name, const void *at, size_t size)
{
    printf("%s %s ", table, name);
    for (size_t i = 0; i < size; i++)
        printf("%02x", ((const unsigned char *)at)[i]);
    printf("\n");
}
#define ENTRY(f) do { struct entry e; memset(&e, 0, sizeof e); e.f = -1; show("entry", #f, &e, sizeof e); } while (0)
#define STATE(f) do { struct state s; memset(&s, 0, sizeof s); s.f = -1; show("state", #f, &s, sizeof s); } while (0)

int main(void)
{
    ENTRY(assigned); ENTRY(pagesize); ENTRY(immutable); ENTRY(subpage_count); ENTRY(gpa); ENTRY(asid);
    ENTRY(vmsa); ENTRY(validated); ENTRY(lock); ENTRY(vmpl0); ENTRY(vmpl1); ENTRY(vmpl2); ENTRY(vmpl3);
    STATE(gpa); STATE(assigned); STATE(pagesize); STATE(immutable); STATE(asid);
    return 0;
}
"""


def test_every_field_lies_where_a_c_compiler_puts_it(gcc: str, tmp_path: Path) -> None:
    source = tmp_path / "rmp.c"
    source.write_text(PROGRAM)
    subprocess.run([gcc, "-Wall", "-Werror", "-o", tmp_path / "rmp", source], check=True)
    output = subprocess.run(
        [tmp_path / "rmp"], check=True, capture_output=True, text=True
    ).stdout
    tables = {"entry": RmpEntryRaw, "state": RmpStateLayout}
    seen: dict[str, set[str]] = {"entry": set(), "state": set()}
    for line in output.splitlines():
        table, name, expected = line.split()
        field = tables[table].fields()[name]
        assert isinstance(field, Bits)
        record = tables[table]()
        setattr(record, name, field.mask)
        assert bytes(record).hex() == expected, f"{table}.{name}"
        seen[table].add(name)
    assert {key: set(value.fields()) for key, value in tables.items()} == seen


def test_rmpread_answers_in_the_shape_that_rmpupdate_takes() -> None:
    assert RmpReadOut.SIZE == RmpStateLayout.SIZE == 16
    assert bytes(RmpReadOut(hpage_region_status=1, rmpread_pagesize=1)) == bytes(
        9
    ) + b"\3" + bytes(6)
