"""The built-in firmware image, as sev-snp-measure and a processor see it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from sevsnpmeasure.ovmf import OVMF
from unicorn import UC_ARCH_X86, UC_MODE_16, Uc
from unicorn.x86_const import UC_X86_REG_CS, UC_X86_REG_EIP

from softcvm.guest import firmware
from softcvm.guest.payload._generated_payload import CODE
from tools.build_payload import assemble


def test_the_image_is_the_same_whenever_it_is_built() -> None:
    image = firmware.build()
    assert image == firmware.build()
    assert len(image) == firmware.IMAGE_SIZE


def test_sev_snp_measure_finds_all_that_a_launch_needs(tmp_path: Path) -> None:
    path = tmp_path / "firmware.fd"
    path.write_bytes(firmware.build())
    image = OVMF(str(path))
    assert [(d.gpa, d.size, d.section_type_int) for d in image.metadata_items()] == [
        tuple(section) for section in firmware.SECTIONS
    ]
    assert {d.section_type().name for d in image.metadata_items()} == {
        "SNP_SEC_MEM",
        "SNP_SECRETS",
        "CPUID",
        "SVSM_CAA",
        "SNP_KERNEL_HASHES",
    }
    assert image.is_sev_hashes_table_supported()
    assert image.sev_es_reset_eip() == firmware.AP_RESET_EIP


def test_other_processors_run_into_a_halt() -> None:
    machine = at_reset(firmware.AP_RESET_EIP)
    machine.emu_start(0xF_0000 + (firmware.AP_RESET_EIP & 0xFFFF), 0, count=10)
    at = int(machine.reg_read(UC_X86_REG_EIP)) & 0xFFFF
    assert firmware.build()[at - 1 : at] == b"\xf4", "stopped after something else than a hlt"


def test_the_reset_vector_leads_to_the_payload() -> None:
    machine = at_reset(0xFFFF_FFF0)
    machine.emu_start(0xF_FFF0, 0, count=1)
    assert machine.reg_read(UC_X86_REG_EIP) & 0xFFFF == 0


def test_the_payload_is_what_the_assembler_makes_of_its_source(
    require: Callable[[str, bool, str], None],
) -> None:
    found = shutil.which("as") is not None and shutil.which("ld") is not None
    require("as", found, "apt install binutils")
    assert assemble() == CODE, "run tools/build_payload.py"


def at_reset(eip: int) -> Uc:
    """A processor at reset: CS:IP is F000:offset and the code is where the segment's base says."""
    image = firmware.build()
    machine = Uc(UC_ARCH_X86, UC_MODE_16)
    machine.mem_map(0xF_0000, len(image))
    machine.mem_write(0xF_0000, image)
    machine.reg_write(UC_X86_REG_CS, 0xF000)
    return machine
