"""Files named on the command line: read, or refused with the file's name and what is wrong with it.

A kernel that is booted directly is three options: an initrd and a command line go with a kernel only, and
empty ones count as absent, as they do for sev-snp-measure.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from softcvm.cli.errors import UsageError
from softcvm.vmm.kernel_hashes import hash_table_of_files
from softcvm.vmm.ovmf import FOUR_GIB, OvmfError, OvmfImage, read

__all__ = ("check_direct_boot", "kernel_hashes", "naming", "read_firmware")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """What fails inside is a fault of this file."""
    try:
        yield
    except OvmfError as error:
        raise UsageError(f"{path}: {error}") from error
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: OSError) -> UsageError:
    return UsageError(f"{path or repr('')}: {error.strerror or error}")


def read_firmware(path: str, *, end: int = FOUR_GIB) -> OvmfImage:
    """The image in a file, mapped so that it ends at `end`."""
    with naming(path):
        return read(path, end=end)


def check_direct_boot(
    option: str, kernel: str | None, initrd: str | None, append: str | None
) -> None:
    """`option` is what the kernel is given with."""
    for other, value in (("--initrd", initrd), ("--append", append)):
        if value and kernel is None:
            raise UsageError(f"{other} needs {option}")


def kernel_hashes(kernel: str | None, initrd: str | None, append: str | None) -> bytes | None:
    """The hash table for a kernel that is booted directly; None without one."""
    if kernel is None:
        return None
    try:
        return hash_table_of_files(kernel, initrd, append)
    except OSError as error:
        raise _unusable(error.filename, error) from error
