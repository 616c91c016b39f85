"""Compile the hostile program, with the numbers of all ioctls that the model knows."""

import subprocess
from pathlib import Path

from softcvm.uapi.numbers import IOCTL_NAMES
from softcvm.uapi.unmodelled import UNMODELLED_ON_KVM, UNMODELLED_ON_VCPU, UNMODELLED_ON_VM

__all__ = ("build",)

_HERE = Path(__file__).parent
_SOURCES = ("hostile.c", "arguments.c", "guest.c")


def build(folder: Path) -> Path:
    """The program's path.  Needs gcc."""
    (folder / "numbers.h").write_text(_numbers())
    program = folder / "hostile"
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    command += ["-pthread", f"-I{folder}", "-o", str(program)]
    subprocess.run([*command, *(str(_HERE / name) for name in _SOURCES)], check=True)
    return program


def _numbers() -> str:
    """copies: Linux reads the argument before it looks at anything else."""
    unmodelled = {**UNMODELLED_ON_KVM, **UNMODELLED_ON_VCPU, **UNMODELLED_ON_VM}
    lines = []
    for request, name in sorted(IOCTL_NAMES.items()):
        refused = request in unmodelled
        copies = bool(unmodelled.get(request))
        lines.append(f"\t{{ {request:#x}, {int(refused)}, {int(copies)} }}, /* {name} */")
    issue = next(request for request, name in IOCTL_NAMES.items() if name == "SEV_ISSUE_CMD")
    return (
        f"#define SEV_ISSUE_CMD {issue:#x}u\n"
        "struct number { unsigned int request; _Bool unmodelled, copies; };\n"
        "static const struct number numbers[] = {\n" + "\n".join(lines) + "\n};\n"
    )
