"""What an import contract cannot see: the model reads no environment, file or console.

Imports of clocks, threads and random sources are import-linter's (pyproject.toml).
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "softcvm"
BELOW_CLI = ("sim", "abi", "hw", "guest", "vmm", "kernel", "uapi", "machine", "invariants")
MODEL = ("sim", "abi", "hw", "kernel", "uapi", "machine", "invariants")
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
CONSOLE_AND_FILES = {"print", "input", "open", "breakpoint"}


def sources(layers: tuple[str, ...]) -> list[Path]:
    return sorted(path for layer in layers for path in (SOURCE / layer).rglob("*.py"))


def environment_reads(tree: ast.AST) -> list[int]:
    """Lines that name os.environ, os.getenv and the like, however os was imported."""
    found: list[int] = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, value=ast.Name()) if name in ENVIRONMENT:
                found.append(node.lineno)
            case ast.ImportFrom(module="os", names=names):
                found += [node.lineno for alias in names if alias.name in ENVIRONMENT]
            case _:
                pass
    return found


def console_calls(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in CONSOLE_AND_FILES
    ]


def test_nothing_below_the_command_line_reads_the_environment() -> None:
    found = {p: environment_reads(ast.parse(p.read_text())) for p in sources(BELOW_CLI)}
    assert found, "no sources: this test looked in the wrong place"
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_the_model_neither_prints_nor_opens_files() -> None:
    found = {p: console_calls(ast.parse(p.read_text())) for p in sources(MODEL)}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ['X']",
        "import os\nos.getenv('X')",
        "import os as o\no.environ.get('X')",
        "from os import environ",
        "from os import getenv as g",
    ],
)
def test_the_scan_sees_each_way_to_read_the_environment(text: str) -> None:
    assert environment_reads(ast.parse(text))


def test_the_scan_sees_a_print() -> None:
    assert console_calls(ast.parse("def f():\n    print(1)")) == [2]
