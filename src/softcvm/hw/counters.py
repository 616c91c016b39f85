"""What the silicon counts.  Statistics: the model never reads them to decide anything."""

from dataclasses import dataclass

__all__ = ("HwCounters",)


@dataclass(slots=True)
class HwCounters:
    """Instructions are counted one per unit, however many a run took at once; bytes are bytes."""

    rmpupdate: int = 0
    psmash: int = 0
    rmpread: int = 0
    pvalidate: int = 0
    rmpadjust: int = 0
    rmpquery: int = 0
    rmp_violations: int = 0
    """Accesses refused by the RMP: host #PF and #VMEXIT(NPF) with the RMP bit."""
    vc_unvalidated: int = 0
    """#VC 0x404 delivered to a guest."""
    rmp_broadcasts: int = 0
    """Global flushes of cached RMP data that RMPUPDATE and PSMASH imply."""
    tlb_flushes: int = 0
    """Flushes of an ASID's translations that the hypervisor asked for."""
    clflush_pages: int = 0
    wbinvd: int = 0
    """WBINVD, counted per logical processor."""
    page_flushes: int = 0
    """VM_PAGE_FLUSH writes."""
    df_flush: int = 0
    bytes_encrypted: int = 0
    """Bytes written to DRAM through a guest's key, by the guest or by firmware."""
    firmware_commands: int = 0
    vmrun: int = 0
    vmexit: int = 0
