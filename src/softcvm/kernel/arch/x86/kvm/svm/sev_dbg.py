"""KVM_SEV_DBG_DECRYPT and KVM_SEV_DBG_ENCRYPT (arch/x86/kvm/svm/sev.c, v7.2).

The host reads and writes guest memory through firmware, if the guest's policy lets it.  Firmware turns whole
16-byte blocks only; for any other range KVM goes through a page of its own, and an encryption reads, changes
and writes back the blocks at its ends.

Locks: kvm->lock held by the caller.
"""

from errno import EINVAL
from typing import TYPE_CHECKING

from softcvm.abi.sev import KvmSevCmd, KvmSevDbg
from softcvm.abi.sev_firmware import SevDbg
from softcvm.abi.snp_firmware import SevCmd
from softcvm.kernel.arch.x86.kvm.svm.sev import sev_issue_cmd
from softcvm.kernel.arch.x86.kvm.svm.sev_info import sev_info
from softcvm.kernel.arch.x86.kvm.svm.sev_launch import require_sev
from softcvm.kernel.arch.x86.kvm.svm.sev_regions import (
    sev_clflush_pages,
    sev_pin_memory,
    sev_unpin_memory,
)
from softcvm.kernel.errors import KernelError
from softcvm.kernel.mm.uaccess import UserPtr, copy_from_user, copy_to_user
from softcvm.sim.addr import PAGE_MASK, PAGE_SIZE, Hva, Pfn, pfn_to_spa
from softcvm.sim.steps import Steps

if TYPE_CHECKING:
    from softcvm.kernel.task import Process
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = ("sev_dbg_crypt",)

_BLOCK = 16
_ULONG = 1 << 64


def sev_dbg_crypt(kvm: "Kvm", proc: "Process", cmd: KvmSevCmd, *, decrypt: bool) -> Steps[None]:
    """Page by page; what came before a failure is done.

    ENOTTY.  EFAULT.  EINVAL: no length, a wrapping source, no destination.  ENOMEM.  EBADF, EIO.
    """
    require_sev(kvm, cmd)
    argp = UserPtr(proc.mm, cmd.data_ptr)
    debug = KvmSevDbg((yield from argp.read(KvmSevDbg.SIZE)))
    if not debug.len or debug.src_uaddr + debug.len >= _ULONG or not debug.dst_uaddr:
        raise KernelError(
            EINVAL, f"{debug.len:#x} bytes from {debug.src_uaddr:#x} to {debug.dst_uaddr:#x}"
        )
    done = 0
    while done < debug.len:
        src, dst = debug.src_uaddr + done, debug.dst_uaddr + done
        length = min(
            PAGE_SIZE - (src & PAGE_MASK), PAGE_SIZE - (dst & PAGE_MASK), debug.len - done
        )
        yield from _one_page(kvm, proc, cmd, src, dst, length, decrypt=decrypt)
        done += length


def _one_page(
    kvm: "Kvm",
    proc: "Process",
    cmd: KvmSevCmd,
    src: int,
    dst: int,
    length: int,
    *,
    decrypt: bool,
) -> Steps[None]:
    src_page = yield from sev_pin_memory(kvm, proc, src & ~PAGE_MASK, PAGE_SIZE, write=False)
    try:
        dst_page = yield from sev_pin_memory(kvm, proc, dst & ~PAGE_MASK, PAGE_SIZE, write=True)
    except KernelError:
        sev_unpin_memory(kvm, src_page)
        raise
    try:
        sev_clflush_pages(kvm, src_page)
        sev_clflush_pages(kvm, dst_page)
        src_pa = pfn_to_spa(src_page[0][0]) + (src & PAGE_MASK)
        dst_pa = pfn_to_spa(dst_page[0][0]) + (dst & PAGE_MASK)
        if decrypt:
            yield from _decrypt_user(kvm, proc, cmd, src_pa, dst, dst_pa, length)
        else:
            yield from _encrypt_user(kvm, proc, cmd, src, src_pa, dst_pa, length)
    finally:
        sev_unpin_memory(kvm, src_page)
        sev_unpin_memory(kvm, dst_page)


def _decrypt_user(
    kvm: "Kvm", proc: "Process", cmd: KvmSevCmd, src_pa: int, dst: int, dst_pa: int, size: int
) -> Steps[None]:
    """__sev_dbg_decrypt_user()"""
    if not (dst_pa | src_pa | size) % _BLOCK:
        yield from _decrypt(kvm, proc, cmd, src_pa, dst_pa, size)
        return
    linux = kvm.linux
    page = linux.page_alloc.alloc_pages()
    linux.page_alloc.clear_pages(page, 1)
    try:
        yield from _decrypt(kvm, proc, cmd, src_pa, pfn_to_spa(page), size)
        plain = linux.soc.host_read(pfn_to_spa(page) + src_pa % _BLOCK, size)
        yield from copy_to_user(proc.mm, Hva(dst), plain)
    finally:
        linux.page_alloc.free_run(page, 1)


def _encrypt_user(
    kvm: "Kvm", proc: "Process", cmd: KvmSevCmd, src: int, src_pa: int, dst_pa: int, size: int
) -> Steps[None]:
    """__sev_dbg_encrypt_user()"""
    linux = kvm.linux
    pages: list[Pfn] = []
    try:
        if src % _BLOCK:
            pages.append(linux.page_alloc.alloc_pages())
            data = yield from copy_from_user(proc.mm, Hva(src), size)
            src_pa = pfn_to_spa(pages[-1])
            _write(kvm, src_pa, data)
        length = size
        if (dst_pa | size) % _BLOCK:
            pages.append(linux.page_alloc.alloc_pages())
            merged = pfn_to_spa(pages[-1])
            yield from _decrypt(kvm, proc, cmd, dst_pa, merged, size)
            if src % _BLOCK:
                data = linux.soc.host_read(src_pa, size)
            else:
                data = yield from copy_from_user(proc.mm, Hva(src), size)
            _write(kvm, merged + dst_pa % _BLOCK, data)
            # The length is rounded without the offset: a last block that only the offset reaches stays.
            src_pa, dst_pa, length = merged, dst_pa - dst_pa % _BLOCK, _round_up(size)
        yield from _issue(kvm, proc, cmd, SevCmd.DBG_ENCRYPT, src_pa, dst_pa, length)
    finally:
        for page in pages:
            linux.page_alloc.free_run(page, 1)


def _decrypt(
    kvm: "Kvm", proc: "Process", cmd: KvmSevCmd, src_pa: int, dst_pa: int, size: int
) -> Steps[None]:
    """__sev_dbg_decrypt(): the whole blocks around the source."""
    offset = src_pa % _BLOCK
    length = _round_up(size + offset)
    yield from _issue(kvm, proc, cmd, SevCmd.DBG_DECRYPT, src_pa - offset, dst_pa, length)


def _issue(
    kvm: "Kvm",
    proc: "Process",
    cmd: KvmSevCmd,
    command: SevCmd,
    src_pa: int,
    dst_pa: int,
    length: int,
) -> Steps[None]:
    sev = sev_info(kvm)
    data = SevDbg(handle=sev.handle, src_addr=src_pa, dst_addr=dst_pa, len=length)
    yield from sev_issue_cmd(kvm, proc, sev.fd, command, data, cmd)


def _write(kvm: "Kvm", spa: int, data: bytes) -> None:
    linux = kvm.linux
    linux.soc.host_write(spa, data, linux.snp.direct_map.level(Pfn(spa // PAGE_SIZE)))


def _round_up(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
