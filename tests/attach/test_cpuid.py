"""CPUID in caught programs: found where a disassembler finds it, answered as the machine's processor."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from softcvm.attach.cpuid_sites import cpuid_sites
from softcvm.hw.cpu.cpuid import cpuid
from softcvm.hw.profile import PROFILES
from tests.attach.caught import softcvm_exec

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc: apt install gcc")
needs_objdump = pytest.mark.skipif(
    shutil.which("objdump") is None, reason="needs objdump: apt install binutils"
)

PROGRAM = r"""
#include <cpuid.h>
#include <stdio.h>
#include <string.h>
#include <pthread.h>
static unsigned long ebx(unsigned leaf) { unsigned a, b, c, d; __cpuid(leaf, a, b, c, d); return b; }
static void *many(void *sum) {
    for (int i = 0; i < 50; i++) *(unsigned long *)sum += ebx(0x8000001f) & 63;
    return 0;
}
int main(void) {
    unsigned a, b, c, d, hidden = 0xa20f1234;
    char vendor[13] = {0};
    __cpuid(0, a, b, c, d);
    memcpy(vendor, &b, 4); memcpy(vendor + 4, &d, 4); memcpy(vendor + 8, &c, 4);
    printf("%s\n", vendor);
    __cpuid(1, a, b, c, d); printf("%x\n", a);
    __cpuid(0x8000001f, a, b, c, d); printf("%x %x %x %x\n", a, b, c, d);
    __asm__ volatile("movl $0xa20fa20f, %0" : "=r"(hidden)); printf("%x\n", hidden);
    pthread_t t[3]; unsigned long sums[3] = {0};
    for (int i = 0; i < 3; i++) pthread_create(&t[i], 0, many, &sums[i]);
    for (int i = 0; i < 3; i++) { pthread_join(t[i], 0); printf("%lu\n", sums[i]); }
}
"""


@needs_objdump
@pytest.mark.parametrize(
    "name", ["ld-linux-x86-64.so.2", "libc.so.6", "libstdc++.so.6", "python"]
)
def test_sites_are_those_that_a_disassembler_shows(name: str) -> None:
    folders = ("/lib64", "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")
    paths = (
        [Path(folder, name) for folder in folders]
        if name != "python"
        else [Path(sys.executable)]
    )
    path = next((p.resolve() for p in paths if p.exists()), None)
    if path is None:
        pytest.skip(f"no {name} on this machine")
    text = subprocess.run(
        ["objdump", "-d", path], capture_output=True, text=True, check=True
    ).stdout
    shown = re.findall(r"^ *[0-9a-f]+:\t0f a2 *\tcpuid", text, re.M)
    assert len(cpuid_sites(str(path))) == len(shown)


@needs_gcc
@pytest.mark.parametrize("machine", ["genoa", "milan"])
def test_the_instruction_tells_of_the_machines_processor(machine: str, tmp_path: Path) -> None:
    binary = tmp_path / "cpuid"
    source = tmp_path / "cpuid.c"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", binary, source], check=True)
    before = binary.read_bytes()
    done = softcvm_exec(str(binary), options=("--machine", machine))
    assert done.returncode == 0, done.stderr
    profile = PROFILES[machine]
    leaf = cpuid(profile, 0x8000_001F)
    c_bits = str(50 * profile.c_bit)
    assert done.stdout.split() == [
        "AuthenticAMD",
        f"{profile.signature:x}",
        *(f"{word:x}" for word in leaf),
        "a20fa20f",
        *[c_bits] * 3,
    ]
    assert binary.read_bytes() == before


@needs_gcc
def test_a_library_that_is_loaded_later_is_patched_too(tmp_path: Path) -> None:
    source, library = tmp_path / "lib.c", tmp_path / "lib.so"
    source.write_text(
        "#include <cpuid.h>\n"
        "int c_bit(void) { unsigned a, b, c, d; __cpuid(0x8000001f, a, b, c, d); return b & 63; }\n"
    )
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    code = f"import ctypes; print(ctypes.CDLL({os.fspath(library)!r}).c_bit())"
    done = softcvm_exec(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "51\n"), done.stderr
