"""One event as one line of text, as a kernel engineer would write it down.

Addresses and page numbers are hexadecimal, runs of pages are [start, end), errnos, error codes and page
states have their names.  An event that this version does not know is shown field by field.
"""

from collections.abc import Callable
from errno import errorcode

from softcvm.abi.svm import PfErr
from softcvm.hw.rmp import Rmp
from softcvm.sim.addr import PAGE_SHIFT
from softcvm.trace.places import rmp_entry
from softcvm.trace.reader import Record

__all__ = ("describe",)

_NAME_WIDTH = 19
_GPA = 0x7_FFFF_FFFF_F000
"""Bits 50:12 of an RMP entry: the frame that it is bound to."""


def describe(record: Record) -> str:
    """The event's name and what happened.  KeyError, TypeError: a field is missing or of another type."""
    name = record["event"]
    words = _WORDS.get(name, _by_field)(record)
    return f"{name:<{_NAME_WIDTH}} {words}".rstrip()


def _by_field(record: Record) -> str:
    return ", ".join(
        f"{field} {_value(field, value)}" for field, value in record.items() if field != "event"
    )


def _value(field: str, value: object) -> str:
    if isinstance(value, int) and field in _HEXADECIMAL:
        return f"{value:#x}"
    return "none" if value is None else str(value)


_HEXADECIMAL = {
    "addr",
    "attributes",
    "end",
    "exit_info_1",
    "exit_info_2",
    "flags",
    "gfn",
    "gpa",
    "pfn",
    "pgoff",
    "port",
    "start",
    "vmsa_gpa",
}


def _pages(record: Record, field: str) -> str:
    start, count = record[field], record["npages"]
    return f"{field} {start:#x}" if count == 1 else f"{field} [{start:#x}, {start + count:#x})"


def _range(record: Record) -> str:
    return f"gfn [{record['start']:#x}, {record['end']:#x})"


def _answer(record: Record) -> str:
    if not record["errno"]:
        return f"= {record['result']}"
    name = errorcode.get(record["errno"], f"errno {record['errno']}")
    return f"= -1 {name}" + (f" ({record['why']})" if record["why"] else "")


def _ioctl(record: Record) -> str:
    return f"{record['name']} on {record['kind']} {_answer(record)}"


def _syscall(record: Record) -> str:
    args = ", ".join(
        f"{arg:#x}" if isinstance(arg, int) else repr(arg) for arg in record["args"]
    )
    return f"{record['name']}({args}) {_answer(record)}"


def _entry(lo: int, hi: int) -> str:
    """What an RMP entry says: its state, and for a guest's page who and where."""
    raw = rmp_entry(lo, hi)
    attrs = lo & ~_GPA | hi << 64
    text = Rmp.decode((attrs, raw.gpa)).name
    if raw.asid:
        text += f" asid {raw.asid} gpa {raw.gpa << PAGE_SHIFT:#x}"
    if raw.pagesize:
        text += " 2M"
    if raw.vmsa and raw.asid:
        text += " VMSA"
    return text


def _rmp_transition(record: Record) -> str:
    old = _entry(record["old_lo"], record["old_hi"])
    new = _entry(record["new_lo"], record["new_hi"])
    pages = _pages(record, "pfn")
    if record["status"] != "SUCCESS":
        return f"{record['agent']} {pages}: {record['status']}, stays {old}"
    return f"{record['agent']} {pages}: {old} -> {new}"


def _error_code(value: int) -> str:
    names = [bit.name or "" for bit in PfErr if value & bit]
    return f"{value:#x} ({'|'.join(names)})" if names else f"{value:#x}"


def _npf(record: Record) -> str:
    frame = f", pfn {record['pfn']:#x}" if record["pfn"] >= 0 else ""
    return (
        f"asid {record['asid']} gpa {record['gpa']:#x}{frame}: {record['check']}, "
        f"error code {_error_code(record['error_code'])}"
    )


def _host_rmp_pf(record: Record) -> str:
    return (
        f"spa {record['spa']:#x}, pfn {record['pfn']:#x}: "
        f"error code {_error_code(record['error_code'])}"
    )


def _vm_exit(record: Record) -> str:
    code = record["exit_code"]
    shown = f"{code:#x}" if isinstance(code, int) else code
    return (
        f"asid {record['asid']} {shown}, "
        f"info {record['exit_info_1']:#x} {record['exit_info_2']:#x}"
    )


def _firmware(record: Record) -> str:
    size = len(record["buffer"]) // 2
    return f"{record['command']} ({size} bytes) = {record['status']}"


def _kvm_page_fault(record: Record) -> str:
    return (
        f"vm {record['vm']} vcpu {record['vcpu']} {_pages(record, 'gfn')}: {record['result']}, "
        f"level {record['level']}, error code {_error_code(record['error_code'])}"
    )


def _rmp_fault(record: Record) -> str:
    psmash = f", PSMASH {record['psmash']}" if record["psmash"] else ""
    return (
        f"gpa {record['gpa']:#x}, pfn {record['pfn']:#x} {record['rmp_level']}{psmash}, "
        f"error code {_error_code(record['error_code'])}"
    )


def _exit(record: Record) -> str:
    end = f" = -1 {errorcode.get(record['errno'], record['errno'])}" if record["errno"] else ""
    return f"vm {record['vm']} vcpu {record['vcpu']} {record['reason']}{end}"


def _spte(record: Record) -> str:
    pfn = record["pfn"]
    return f"vm {record['vm']} {_pages(record, 'gfn')} -> pfn {pfn:#x}, {record['level']}"


def _zapped(record: Record) -> str:
    return f"vm {record['vm']} {_range(record)}, {record['leaves']} leaves"


def _attributes(record: Record) -> str:
    return f"vm {record['vm']} {_range(record)} = {record['attributes']:#x}"


def _memslot(record: Record) -> str:
    return (
        f"vm {record['vm']} {record['change']} slot {record['slot']:#x} "
        f"{_pages(record, 'gfn')} flags {record['flags']:#x}"
    )


def _gmem(record: Record) -> str:
    order = f", order {record['order']}" if "order" in record else ""
    return f"inode {record['inode']} {_pages(record, 'pgoff')}, pfn {record['pfn']:#x}{order}"


def _frames(record: Record) -> str:
    return _pages(record, "pfn")


def _dirty(record: Record) -> str:
    return f"vm {record['vm']} slot {record['slot']:#x} {_pages(record, 'gfn')}"


_WORDS: dict[str, Callable[[Record], str]] = {
    "DirtyLogCleared": _dirty,
    "FirmwareCommand": _firmware,
    "GmemAllocate": _gmem,
    "GmemFree": _gmem,
    "HostRmpPf": _host_rmp_pf,
    "Ioctl": _ioctl,
    "KvmPageFault": _kvm_page_fault,
    "KvmUserspaceExit": _exit,
    "MemslotChange": _memslot,
    "NestedPageFault": _npf,
    "PagesAllocated": _frames,
    "PagesDirtied": _dirty,
    "PagesFreed": _frames,
    "PagesLeaked": _frames,
    "RmpFault": _rmp_fault,
    "RmpTransition": _rmp_transition,
    "SetMemoryAttributes": _attributes,
    "SpteInstalled": _spte,
    "SptesZapped": _zapped,
    "Syscall": _syscall,
    "VmExit": _vm_exit,
}
