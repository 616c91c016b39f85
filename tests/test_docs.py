"""The pages in docs/ that can be wrong by themselves: generated ones, links, cited sources."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from docs.generate_invariants import page
from docs.generate_planted import page as planted_page
from docs.generate_session import readme
from docs.generate_support import ioctl_states, support
from softcvm.abi.ghcb import GhcbExit
from softcvm.abi.kvm.run import KvmExit
from softcvm.abi.sev import SevCmdId, SevUserCmd
from softcvm.abi.snp_firmware import SevCmd, SnpCmd
from softcvm.hw.psp import platform
from softcvm.kernel.profile import PROFILES
from softcvm.uapi.numbers import IOCTL_NAMES, is_kvm_ioctl
from softcvm.uapi.unmodelled import UNMODELLED_ON_VCPU, UNMODELLED_ON_VM

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])


def test_the_page_of_invariants_is_what_the_code_says() -> None:
    assert (DOCS / "invariants.md").read_text() == page(), "run docs/generate_invariants.py"


def test_the_page_of_planted_defects_is_what_the_tables_say() -> None:
    assert (DOCS / "planted.md").read_text() == planted_page(), "run docs/generate_planted.py"


def test_the_session_in_the_readme_is_what_boot_prints() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == readme(text), "run docs/generate_session.py"


def words(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", text))


def test_support_names_every_firmware_command_as_it_is() -> None:
    text = (DOCS / "support.md").read_text()
    snp = text.split("## SNP firmware commands")[1].split("Legacy SEV:")[0]
    legacy = text.split("Legacy SEV:")[1].split("##")[0]
    modelled, missing = legacy.split("Unmodelled:")
    unmodelled_row = next(line for line in snp.splitlines() if line.endswith("| Unmodelled |"))
    for cmd in SnpCmd:
        assert cmd.name in words(snp)
        assert (cmd.name in words(unmodelled_row)) == (cmd not in platform._COMMANDS), cmd
    for old in SevCmd:
        assert old.name in words(modelled if old in platform._COMMANDS else missing), old


def test_the_tables_of_support_are_what_the_model_answers() -> None:
    text = (DOCS / "support.md").read_text()
    assert text == support(text), "run docs/generate_support.py"


@pytest.mark.parametrize(
    ("file", "unmodelled"), [("VM", UNMODELLED_ON_VM), ("vCPU", UNMODELLED_ON_VCPU)]
)
def test_what_support_calls_unmodelled_stops_the_run_and_nothing_else_does(
    file: str, unmodelled: Mapping[int, int]
) -> None:
    """The table against the lists in the code, on each kernel; every number has a row or is named below."""
    text = (DOCS / "support.md").read_text()
    named = words(text.split("<!-- ioctls -->")[1].split("<!-- end of ioctls -->")[0])
    assert {name for number, name in IOCTL_NAMES.items() if is_kvm_ioctl(number)} <= named
    for kernel in PROFILES:
        found = {n for n, files in ioctl_states(kernel).items() if files[file] == "Unmodelled"}
        listed = {IOCTL_NAMES[request] for request in unmodelled}
        assert found - listed <= {"KVM_GET_ONE_REG", "KVM_SET_ONE_REG", "KVM_GET_REG_LIST"}
        assert listed <= found


def test_support_names_every_command_exit_and_event() -> None:
    text = words((DOCS / "support.md").read_text())
    for names in (SevCmdId, SevUserCmd, KvmExit, GhcbExit):
        assert {each.name for each in names} <= text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", path.read_text())
    assert [t for t in targets if not (path.parent / t).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path: Path) -> None:
    layers = "sim|abi|hw|guest|vmm|kernel|uapi|machine|invariants|cli"
    named = re.findall(rf"(?<![\w/])((?:{layers})/[\w/]+\.py)\b", path.read_text())
    assert [name for name in named if not (ROOT / "src" / "softcvm" / name).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    assert [
        p.name for p in DOCS.glob("*.md") if p.name not in index and p.name != "index.md"
    ] == []


def test_every_cited_key_is_in_sources() -> None:
    known = set(
        re.findall(r"^\| `([A-Z0-9a-z-]+)`", (DOCS / "sources.md").read_text(), re.MULTILINE)
    )
    assert known
    used: dict[str, str] = {}
    for path in [*(ROOT / "src").rglob("*.py"), *DOCS.glob("*.md")]:
        for text in re.findall(r"\[[^\]\n]{3,200}\]", path.read_text()):
            for key in re.findall(
                r"\b(?:ABI|SEV|APM2|APM3|GHCB|PPR|SEV-API)-[0-9][0-9a-zA-Z-]*\b", text
            ):
                used.setdefault(key, str(path.relative_to(ROOT)))
            if "ASPFW" in text:
                used.setdefault("ASPFW", str(path.relative_to(ROOT)))
    assert {key: where for key, where in used.items() if key not in known} == {}
