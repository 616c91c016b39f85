"""Traces read back: every kind of event in words, filters against a plain search, damaged files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from softcvm.cli import main as cli
from softcvm.trace.listing import describe
from softcvm.trace.places import frames, guest_frames
from softcvm.trace.reader import TraceError, read

PAGE = 4096


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole life of a guest with 4K and 2M pages."""
    path = tmp_path_factory.mktemp("trace") / "run.json"
    assert (
        cli.main(
            [
                "boot",
                "--guest",
                "scripted",
                "--memory",
                "64M",
                "--vcpus",
                "2",
                "--trace",
                str(path),
            ]
        )
        == 0
    )
    return path


@pytest.fixture(scope="module")
def records(trace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trace.read_text().splitlines()]


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    capsys.readouterr()
    assert cli.main(["trace", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_a_listing_has_every_event_once_and_in_order(
    trace: Path, records: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = listed(capsys, str(trace))
    assert [line.split()[:2] for line in lines] == [
        [str(number), record["event"]] for number, record in enumerate(records, 1)
    ]


def test_a_frame_s_events_are_those_with_a_run_of_frames_that_holds_it(
    trace: Path, records: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    pfn = next(r["pfn"] for r in records if r["event"] == "SpteInstalled")
    plain = [
        number
        for number, record in enumerate(records, 1)
        if "pfn" in record and 0 <= pfn - record["pfn"] < record.get("npages", 1)
    ]
    assert len(plain) > 3
    lines = listed(capsys, str(trace), "--pfn", hex(pfn))
    assert [int(line.split()[0]) for line in lines] == plain


def test_a_guest_address_finds_its_rmp_entries_through_the_address_they_are_bound_to(
    trace: Path, records: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    gpa = 0x200000
    bound = [
        number
        for number, record in enumerate(records, 1)
        if record["event"] == "RmpTransition"
        and any(
            record[f"{side}_lo"] >> 51 & 0x3FF  # ASID
            and 0 <= gpa - (record[f"{side}_lo"] & 0x7FFFFFFFFF000) < record["npages"] * PAGE
            for side in ("old", "new")
        )
    ]
    assert bound
    lines = listed(capsys, str(trace), "--gpa", hex(gpa + 0x123), "--event", "RmpTransition")
    assert [int(line.split()[0]) for line in lines] == bound


def test_counts_are_those_of_the_file(
    trace: Path, records: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = listed(capsys, str(trace), "--count", "--json")
    counts = json.loads(line)
    assert sum(counts.values()) == len(records)
    assert counts["RmpTransition"] == sum(r["event"] == "RmpTransition" for r in records)


def test_json_gives_the_recorded_lines_back(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(capsys, str(trace), "--json") == trace.read_text().splitlines()


@pytest.mark.parametrize("field", ["pfn", "gfn", "gpa", "addr", "start", "pgoff"])
def test_pages_and_addresses_are_hexadecimal_in_every_event(
    field: str, records: list[dict[str, Any]]
) -> None:
    named = [record for record in records if record.get(field, -1) >= 0]
    assert named
    for record in named:
        assert f"{record[field]:#x}" in re.split(r"[ ,:[\])]+", describe(record))


def test_an_rmp_transition_names_states_owner_and_address() -> None:
    assigned = 1 | 7 << 51 | 0x1234000  # [PPR-19h-11h]: assigned, asid 7, gpa
    record = {
        "event": "RmpTransition",
        "agent": "RMPUPDATE",
        "pfn": 0x800,
        "npages": 2,
        "old_lo": 0,
        "old_hi": 0,
        "new_lo": assigned,
        "new_hi": 0,
        "status": "SUCCESS",
    }
    words = describe(record).split(None, 1)[1]
    assert words == (
        "RMPUPDATE pfn [0x800, 0x802): HYPERVISOR -> GUEST_INVALID asid 7 gpa 0x1234000"
    )
    refused = describe(record | {"status": "FAIL_OVERLAP", "new_lo": 0})
    assert refused.endswith("pfn [0x800, 0x802): FAIL_OVERLAP, stays HYPERVISOR")


def test_a_refused_call_shows_the_errno_and_the_check() -> None:
    record = {
        "event": "Ioctl",
        "name": "KVM_CREATE_GUEST_MEMFD",
        "kind": "kvm-vm",
        "result": -1,
        "errno": 22,
        "why": "size 0x0",
    }
    assert describe(record).endswith("KVM_CREATE_GUEST_MEMFD on kvm-vm = -1 EINVAL (size 0x0)")


def test_an_event_of_a_later_version_is_shown_field_by_field_and_has_no_place() -> None:
    record = {"event": "Later", "gpa": 4096, "colour": "blue", "absent": None}
    assert describe(record).split(None, 1)[1] == "gpa 0x1000, colour blue, absent none"
    assert frames(record) == guest_frames(record) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is no event"),
        ('{"event":"VmCreated","vm":1,"vm_type":"SNP"}\n{"name":1}', "line 2 is no event"),
        ('{"event":"GmemFree"}', "line 1 is no GmemFree"),
        ('{"event":"PagesFreed","pfn":"x","npages":1}', "line 1 is no PagesFreed"),
        ("[" * 100000, "line 1 is not JSON"),
    ],
)
def test_a_damaged_trace_is_refused_with_the_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged"
    path.write_text(text)
    assert cli.main(["trace", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"softcvm trace: {path}: {said}")
    assert err.count("\n") == 1


def test_a_file_that_is_missing_or_no_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["trace", str(tmp_path / "none")]) == 2
    assert cli.main(["trace", str(tmp_path / "binary")]) == 2
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_reading_is_lazy() -> None:
    lines = iter(['{"event":"VmDestroyed","vm":1}', "broken"])
    found = read(lines)
    assert next(found) == {"event": "VmDestroyed", "vm": 1}
    with pytest.raises(TraceError, match="line 2"):
        next(found)
