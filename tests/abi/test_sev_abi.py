"""abi/sev.py and abi/ghcb.py against a C compiler and the kernel's headers.

_OFFSETS was printed by gcc over the headers of Debian's linux-source-6.12 (6.12.117): uapi/asm/kvm.h and
uapi/linux/psp-sev.h.  Where the installed headers know the structures, gcc is asked again.
"""

import subprocess
from pathlib import Path

import pytest

from softcvm.abi import ghcb, sev, sev_firmware
from softcvm.abi.layout import Bits, Layout
from softcvm.abi.snp_platform import SevPlatformStatus, SnpPlatformStatusBuffer

_OFFSETS = {
    "kvm_sev_cmd": "24 id:0 pad0:4 data:8 error:16 sev_fd:20",
    "kvm_sev_init": "48 vmsa_features:0 flags:8 ghcb_version:12 pad1:14 pad2:16",
    "kvm_sev_launch_start": "40 handle:0 policy:4 dh_uaddr:8 dh_len:16 pad0:20 session_uaddr:24 session_len:32 "
    "pad1:36",
    "kvm_sev_launch_update_data": "16 uaddr:0 len:8 pad0:12",
    "kvm_sev_launch_secret": "48 hdr_uaddr:0 hdr_len:8 pad0:12 guest_uaddr:16 guest_len:24 pad1:28 "
    "trans_uaddr:32 trans_len:40 pad2:44",
    "kvm_sev_launch_measure": "16 uaddr:0 len:8 pad0:12",
    "kvm_sev_guest_status": "12 handle:0 policy:4 state:8",
    "kvm_sev_dbg": "24 src_uaddr:0 dst_uaddr:8 len:16 pad0:20",
    "kvm_sev_snp_launch_start": "64 policy:0 gosvw:8 flags:24 pad0:26 pad1:32",
    "kvm_sev_snp_launch_update": "64 gfn_start:0 uaddr:8 len:16 type:24 pad0:25 flags:26 pad1:28 pad2:32",
    "kvm_sev_snp_launch_finish": "88 id_block_uaddr:0 id_auth_uaddr:8 id_block_en:16 auth_key_en:17 "
    "vcek_disabled:18 host_data:19 pad0:51 flags:54 pad1:56",
    "sev_issue_cmd": "16 cmd:0 data:4 error:12",
    "sev_user_data_status": "12 api_major:0 api_minor:1 state:2 flags:3 build:7 guest_count:8",
    "sev_user_data_snp_status": "32 api_major:0 api_minor:1 state:2 build_id:4 guest_count:12 "
    "current_tcb_version:16 reported_tcb_version:24",
}
_FIRMWARE_OFFSETS = {
    "activate": "8 handle:0 asid:4",
    "deactivate": "4 handle:0",
    "decommission": "4 handle:0",
    "guest_status": "13 handle:0 policy:4 asid:8 state:12",
    "launch_start": "36 handle:0 policy:4 dh_cert_address:8 dh_cert_len:16 session_address:24 session_len:32",
    "launch_update_data": "20 handle:0 address:8 len:16",
    "launch_update_vmsa": "20 handle:0 address:8 len:16",
    "launch_measure": "20 handle:0 address:8 len:16",
    "launch_secret": "52 handle:0 hdr_address:8 hdr_len:16 guest_address:24 guest_len:32 trans_address:40 "
    "trans_len:48",
    "launch_finish": "4 handle:0",
    "dbg": "28 handle:0 src_addr:8 dst_addr:16 len:24",
}
"""struct sev_data_* of include/linux/psp-sev.h (6.12.117), which is no user header; the same gcc."""
_NUMBERS = {
    "KVM_SEV_INIT": 0, "KVM_SEV_ES_INIT": 1, "KVM_SEV_LAUNCH_START": 2, "KVM_SEV_LAUNCH_UPDATE_DATA": 3,
    "KVM_SEV_LAUNCH_UPDATE_VMSA": 4, "KVM_SEV_LAUNCH_SECRET": 5, "KVM_SEV_LAUNCH_MEASURE": 6,
    "KVM_SEV_LAUNCH_FINISH": 7, "KVM_SEV_SEND_START": 8, "KVM_SEV_SEND_UPDATE_DATA": 9,
    "KVM_SEV_SEND_UPDATE_VMSA": 10, "KVM_SEV_SEND_FINISH": 11, "KVM_SEV_RECEIVE_START": 12,
    "KVM_SEV_RECEIVE_UPDATE_DATA": 13, "KVM_SEV_RECEIVE_UPDATE_VMSA": 14, "KVM_SEV_RECEIVE_FINISH": 15,
    "KVM_SEV_GUEST_STATUS": 16, "KVM_SEV_DBG_DECRYPT": 17, "KVM_SEV_DBG_ENCRYPT": 18,
    "KVM_SEV_CERT_EXPORT": 19, "KVM_SEV_GET_ATTESTATION_REPORT": 20, "KVM_SEV_SEND_CANCEL": 21,
    "KVM_SEV_INIT2": 22, "KVM_SEV_SNP_LAUNCH_START": 100, "KVM_SEV_SNP_LAUNCH_UPDATE": 101,
    "KVM_SEV_SNP_LAUNCH_FINISH": 102,
}  # fmt: skip
_LAYOUTS: dict[str, type[Layout]] = {
    "kvm_sev_cmd": sev.KvmSevCmd,
    "kvm_sev_init": sev.KvmSevInit,
    "kvm_sev_launch_start": sev.KvmSevLaunchStart,
    "kvm_sev_launch_update_data": sev.KvmSevLaunchUpdateData,
    "kvm_sev_launch_secret": sev.KvmSevLaunchSecret,
    "kvm_sev_launch_measure": sev.KvmSevLaunchMeasure,
    "kvm_sev_guest_status": sev.KvmSevGuestStatus,
    "kvm_sev_dbg": sev.KvmSevDbg,
    "kvm_sev_snp_launch_start": sev.KvmSevSnpLaunchStart,
    "kvm_sev_snp_launch_update": sev.KvmSevSnpLaunchUpdate,
    "kvm_sev_snp_launch_finish": sev.KvmSevSnpLaunchFinish,
    "sev_issue_cmd": sev.SevIssueCmd,
    "sev_user_data_status": SevPlatformStatus,
    "sev_user_data_snp_status": SnpPlatformStatusBuffer,
}
_RENAMED = {"data": "data_ptr"}
_INCLUDES = "#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\n#include <linux/psp-sev.h>\n"


def _recorded(struct: str) -> tuple[int, dict[str, int]]:
    size, *fields = _OFFSETS[struct].split()
    return int(size), {name: int(at) for name, at in (field.split(":") for field in fields)}


@pytest.mark.parametrize("struct", _OFFSETS)
def test_a_layout_lies_as_the_recorded_header_says(struct: str) -> None:
    size, fields = _recorded(struct)
    layout = _LAYOUTS[struct]
    assert size == layout.SIZE
    for name, offset in fields.items():
        place = layout.fields()[_RENAMED.get(name, name)]
        assert (place.lo >> 3 if isinstance(place, Bits) else place.offset) == offset, name


@pytest.mark.parametrize("struct", _FIRMWARE_OFFSETS)
def test_a_legacy_firmware_buffer_lies_as_the_recorded_header_says(struct: str) -> None:
    name = "Sev" + "".join(word.title() for word in struct.split("_"))
    layout: type[Layout] = getattr(sev_firmware, name)
    size, *fields = _FIRMWARE_OFFSETS[struct].split()
    assert int(size) == layout.SIZE
    found = {
        field: place.lo >> 3 if isinstance(place, Bits) else place.offset
        for field, place in layout.fields().items()
    }
    assert found == {field: int(at) for field, at in (part.split(":") for part in fields)}


def test_command_ids_are_the_headers() -> None:
    ids = {f"KVM_SEV_{member.name}": int(member) for member in sev.SevCmdId}
    assert ids.pop("KVM_SEV_SNP_ENABLE_REQ_CERTS") == 103  # v7.0, not in 6.12
    assert ids == _NUMBERS


def test_the_installed_headers_agree_with_the_recorded_ones(
    gcc: str, tmp_path: Path, require: "object"
) -> None:
    def build(lines: list[str]) -> dict[str, int] | None:
        source = _INCLUDES + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
        out = tmp_path / "offsets"
        made = subprocess.run(
            [gcc, "-x", "c", "-", "-o", str(out)], input=source, text=True, capture_output=True
        )
        if made.returncode:
            return None
        listing = subprocess.run([str(out)], text=True, capture_output=True, check=True).stdout
        return {name: int(value) for name, value in map(str.split, listing.splitlines())}

    known = 0
    for struct in _OFFSETS:
        size, fields = _recorded(struct)
        lines = [f'printf("{struct} %zu\\n", sizeof(struct {struct}));']
        lines += [
            f'printf("{name} %zu\\n", offsetof(struct {struct}, {name}));' for name in fields
        ]
        found = build(lines)
        if found is not None:
            assert found == {struct: size, **fields}
            known += 1
    assert callable(require)
    require("kernel headers", known, "apt install linux-libc-dev")


# The GHCB


def test_valid_bits_are_those_that_the_specification_names() -> None:
    # [GHCB-56421 §2.6]: a bit is the field's offset divided by 8.
    assert ghcb.GHCB_VALID["rax"] == 63
    assert ghcb.GHCB_VALID["sw_exit_code"] == 114
    assert ghcb.GHCB_VALID["cpl"] == 25
    assert ghcb.GHCB_VALID["xcr0"] == 125
    assert "valid_bitmap" not in ghcb.GHCB_VALID
    mask = ghcb.valid_mask("rax", "sw_scratch").to_bytes(16, "little")
    assert ghcb.ghcb_valid(mask, "rax")
    assert not ghcb.ghcb_valid(mask, "rbx")


def test_a_full_psc_buffer_has_253_entries_one_more_than_the_thread_says() -> None:
    assert ghcb.PSC_MAX_ENTRIES == 253 == ghcb.PSC_ENTRIES_PROPOSED + 1
    assert ghcb.Ghcb.shared_buffer.offset + ghcb.GHCB_SHARED_BUFFER_SIZE == 0xFF0


def test_msr_protocol_values_encode_as_the_specification_draws_them() -> None:
    assert ghcb.sev_info(2, 1, 51) == 0x0002_0001_3300_0001
    assert ghcb.cpuid_request(0x8000_001F, 1) == 0x8000_001F_4000_0004
    assert ghcb.gpa_request(0x1234) == 0x123_4012
    assert ghcb.psc_request(0xABCDE, 2) == 0x0020_0000_ABCD_E014
    assert ghcb.termination_request(1, 2) == 0x2_1100
    entry = ghcb.PscEntry(ghcb.psc_entry(0x200, 1, huge=True, cur_page=3).to_bytes(8, "little"))
    assert (entry.gfn, entry.operation, entry.pagesize, entry.cur_page) == (0x200, 1, 1, 3)
