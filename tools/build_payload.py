"""Assembles the payload of the built-in firmware: `python tools/build_payload.py` (needs as and ld: binutils).

What comes of it is committed, so that softcvm itself needs no assembler; a test holds the two together.
"""

import subprocess
import tempfile
from pathlib import Path

from softcvm.guest.firmware import IMAGE_BASE

__all__ = ("assemble", "module")

SOURCE = Path(__file__).parent.parent / "src/softcvm/guest/payload/payload.S"
_WIDTH = 40


def assemble() -> bytes:
    """The machine code, linked to begin where the image does.  CalledProcessError when binutils refuse it."""
    with tempfile.TemporaryDirectory() as folder:
        object_file, binary = f"{folder}/payload.o", f"{folder}/payload.bin"
        subprocess.run(["as", "--64", "-o", object_file, str(SOURCE)], check=True)
        link = ["ld", f"-Ttext={IMAGE_BASE:#x}", "-e", f"{IMAGE_BASE:#x}"]
        subprocess.run(
            [*link, "--oformat", "binary", "-o", binary, object_file],
            check=True,
        )
        return Path(binary).read_bytes()


def module(code: bytes) -> str:
    """The Python module that carries it."""
    rows = [code[at : at + _WIDTH].hex() for at in range(0, len(code), _WIDTH)]
    lines = "\n".join(f'    "{row}"' for row in rows)
    return (
        '"""payload.S as machine code.  Written by tools/build_payload.py."""\n\n'
        f'__all__ = ("CODE",)\n\nCODE = bytes.fromhex(\n{lines}\n)\n'
    )


if __name__ == "__main__":
    (SOURCE.parent / "_generated_payload.py").write_text(module(assemble()), encoding="utf-8")
