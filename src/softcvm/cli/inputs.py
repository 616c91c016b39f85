"""Files named on the command line: read, or refused with the file's name and what is wrong with it."""

from collections.abc import Iterator
from contextlib import contextmanager

from softcvm.cli.errors import UsageError
from softcvm.vmm.kernel_hashes import hash_table_of_files
from softcvm.vmm.ovmf import FOUR_GIB, OvmfError, OvmfImage, read

__all__ = ("kernel_hashes", "naming", "read_firmware")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """What fails inside is a fault of this file."""
    try:
        yield
    except OvmfError as error:
        raise UsageError(f"{path}: {error}") from error
    except OSError as error:
        raise UsageError(f"{path or repr('')}: {error.strerror or error}") from error


def read_firmware(path: str, *, end: int = FOUR_GIB) -> OvmfImage:
    """The image in a file, mapped so that it ends at `end`."""
    with naming(path):
        return read(path, end=end)


def kernel_hashes(kernel: str | None, initrd: str | None, append: str | None) -> bytes | None:
    """The hash table for a kernel that is booted directly; None without one."""
    if kernel is None:
        for option, value in (("--initrd", initrd), ("--append", append)):
            if value is not None:
                raise UsageError(f"{option} needs --kernel")
        return None
    try:
        return hash_table_of_files(kernel, initrd, append)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
