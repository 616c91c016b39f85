"""An SNP guest launched by a C program through linux/kvm.h: each exit that it causes, and what was measured.

The expected exits are those of Linux 6.12: Documentation/virt/kvm/api.rst (KVM_EXIT_HYPERCALL, _MEMORY_FAULT,
_SYSTEM_EVENT), the GHCB specification's response codes, and arch/x86/kvm/svm/sev.c.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sevsnpmeasure.ovmf import OVMF

from softcvm.cli.main import main
from softcvm.cli.selftests_build import NEEDS, PACKAGE, cached_tree
from tests.attach.caught import softcvm_exec

SOURCE = Path(__file__).with_name("snp_guest.c")
FIRMWARE = Path("/usr/share/ovmf/OVMF.fd")
PAGE_TYPES = {"SNP_SEC_MEM": 3, "SNP_SECRETS": 5, "CPUID": 6}
"""KVM_SEV_SNP_PAGE_TYPE_* for a section of the image, as QEMU has them."""


@pytest.fixture(scope="module")
def program(
    tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, bool, str], None]
) -> str:
    headers = cached_tree() / "usr/include"
    require(
        "selftests",
        (headers / "linux/kvm.h").exists(),
        f"softcvm selftests --build (needs {PACKAGE}, {NEEDS})",
    )
    require("gcc", shutil.which("gcc") is not None, "apt install gcc")
    path = tmp_path_factory.mktemp("snp") / "snp_guest"
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Werror", "-I", str(headers), "-o", str(path), str(SOURCE)],
        check=True,
    )
    return str(path)


def test_an_snp_guest_speaks_ghcb_and_converts_memory_both_ways_with_the_kernels_exits(
    program: str,
) -> None:
    done = softcvm_exec(program)
    assert (done.returncode, done.stderr) == (0, "")
    exits = [line for line in done.stdout.splitlines() if not line.startswith("log")]
    assert exits == [
        "io out 0x3f8 size 1 count 1 0x41",
        "io in 0x80 size 1 count 1",
        "hypercall 12 0x50000 1 0",  # KVM_HC_MAP_GPA_RANGE, decrypted, by the MSR protocol
        "io out 0xe0 size 1 count 1 0x1 host sees 0x1122",
        "hypercall 12 0x50000 1 0x10",  # encrypted, by the GHCB page
        "memory fault flags 0 gpa 0x50000 size 0x1000",
        "memory fault flags 0x8 gpa 0x50000 size 0x1000",  # KVM_MEMORY_EXIT_FLAG_PRIVATE
        "system event 6 ndata 1 0x17100",  # KVM_SYSTEM_EVENT_SEV_TERM
        "host sees 0x99 of the private page",
        "registers: Invalid argument",
    ]


def test_what_an_snp_guest_sees_is_what_the_specifications_say(program: str) -> None:
    lines = softcvm_exec(program).stdout.splitlines()
    log = [int(line.split()[2], 16) for line in lines if line.startswith("log")]
    assert log == [
        2 << 48 | 1 << 32 | 51 << 24 | 0x001,  # GHCB versions 1 to 2, the C-bit
        3 << 12 | 0x081,  # SNP and AP creation
        0x40013,  # the GHCB's GPA is registered
        0x5A,  # IN
        0x72,  # #VC: CPUID
        int.from_bytes(b"Auth", "little"),
        0,  # PVALIDATE: rescinded
        0x15,  # page state change: no error
        0x3344,  # the host's word in the shared page
        0,  # PVALIDATE: validated, CF=0
        0x5566,
        1 << 32,  # CF=1: Linux has not taken the page away, so that it is validated still
        0,  # RMPADJUST
        3,  # version of the secrets page
    ]


def test_the_digest_of_a_firmware_that_a_c_program_launches_is_what_measure_predicts(
    program: str,
    require: Callable[[str, bool, str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    require("ovmf", FIRMWARE.exists(), "apt install ovmf")
    sections = [
        f"{item.gpa:#x}:{item.size:#x}:{PAGE_TYPES[item.section_type().name]}"
        for item in OVMF(str(FIRMWARE)).metadata_items()
    ]
    code = """
import sys
from softcvm.attach.dram_memory import DramMemory
from softcvm.attach.supervisor import Supervisor
from softcvm.cli.boot_run import executed_digest
from softcvm.hw.psp.events import FirmwareCommand
from softcvm.machine import Machine
memory = DramMemory(1 << 36)
machine = Machine("6.12", "genoa", 1 << 36, backing=memory)
def look(event):
    if isinstance(event, FirmwareCommand) and "LAUNCH_FINISH" in event.command:
        print(executed_digest(machine).hex(), flush=True)
machine.events.attach(look)
sys.exit(Supervisor(machine, memory).run(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, program, str(FIRMWARE), *sections],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    signature, digest = done.stdout.split()
    arguments = ["--mode", "snp", "--vcpus", "1", "--ovmf", str(FIRMWARE)]
    capsys.readouterr()
    assert main(["measure", *arguments, "--vcpu-sig", signature]) == 0
    assert digest == capsys.readouterr().out.strip()
