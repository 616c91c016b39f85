"""The two pages that firmware fills in at launch: the secrets page and the CPUID table.

Both are encrypted and measured by their place, so a guest may believe them; what the hypervisor says about
the same things it may not.  [ABI-56860 r1.58 §8.17.2.5, §8.17.2.6]
"""

from softcvm.abi.cpuid import SNP_CPUID_COUNT_MAX, CpuidEntry, CpuidPage, read_page
from softcvm.abi.insn import Load
from softcvm.abi.snp_secrets import SecretsPage
from softcvm.guest.ghcb import GuestSteps, LinuxTerm, TermSet, terminate
from softcvm.sim.addr import PAGE_SIZE

__all__ = ("CpuidTable", "read_cpuid_table", "read_secrets")

_MEMORY_ENCRYPTION = 0x8000_001F


class CpuidTable:
    """CPUID results by leaf.  What is not listed is zero, as firmware promises."""

    def __init__(self, entries: list[CpuidEntry]) -> None:
        self.entries = entries

    def leaf(self, function: int, index: int = 0) -> CpuidEntry:
        for entry in self.entries:
            if entry.eax_in == function and entry.ecx_in == index:
                return entry
        return CpuidEntry(function, index)

    @property
    def c_bit(self) -> int:
        return self.leaf(_MEMORY_ENCRYPTION).ebx & 0x3F

    @property
    def coherency_sfw_no(self) -> bool:
        """No cache-line eviction is needed after PVALIDATE."""
        return bool(self.leaf(_MEMORY_ENCRYPTION).ebx >> 31)


def read_cpuid_table(gpa: int) -> GuestSteps[CpuidTable]:
    """The CPUID page.  An empty or overfull one ends the guest."""
    page: bytes = yield Load(gpa, PAGE_SIZE)
    if not 0 < CpuidPage(page).count <= SNP_CPUID_COUNT_MAX:
        yield from terminate(TermSet.LINUX, LinuxTerm.CPUID)
    return CpuidTable(read_page(page))


def read_secrets(gpa: int) -> GuestSteps[SecretsPage]:
    """The secrets page.  One without a key to talk to firmware ends the guest."""
    page = SecretsPage((yield Load(gpa, PAGE_SIZE)))
    if not page.version or not any(page.vmpck0):
        yield from terminate(TermSet.LINUX, LinuxTerm.SECRETS_PAGE)
    return page
