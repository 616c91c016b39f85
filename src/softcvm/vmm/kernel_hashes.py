"""QEMU's table of kernel, initrd and command line hashes, which firmware checks before it boots them.

sev_add_kernel_loader_hashes() of QEMU's target/i386/sev.c.  SNP measures the page it lies in; SEV and
SEV-ES measure the table alone.
"""

from hashlib import file_digest, sha256

from softcvm.abi import ovmf as abi

__all__ = ("hash_table", "hash_table_of_files")


def hash_table(kernel: bytes, initrd: bytes, cmdline: bytes) -> bytes:
    """The padded table of three SHA-256 digests.  `cmdline` is the digest of the line with its NUL."""
    entry = abi.HashTableEntry
    table = abi.HashTable(
        guid=abi.HASH_TABLE_GUID,
        length=168,
        cmdline=bytes(entry(guid=abi.CMDLINE_ENTRY_GUID, length=entry.SIZE, hash=cmdline)),
        initrd=bytes(entry(guid=abi.INITRD_ENTRY_GUID, length=entry.SIZE, hash=initrd)),
        kernel=bytes(entry(guid=abi.KERNEL_ENTRY_GUID, length=entry.SIZE, hash=kernel)),
    )
    return bytes(table)


def hash_table_of_files(kernel: str, initrd: str | None, append: str | None) -> bytes:
    """The table for these files and this command line; what is absent is hashed as empty.

    An OSError names the file, also where it could be opened but not read.
    """
    line = (append or "").encode("utf-8", "surrogateescape") + b"\0"
    return hash_table(
        _file_sha256(kernel),
        _file_sha256(initrd) if initrd else sha256(b"").digest(),
        sha256(line).digest(),
    )


def _file_sha256(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file_digest(file, "sha256").digest()
    except OSError as error:
        error.filename = path
        raise
