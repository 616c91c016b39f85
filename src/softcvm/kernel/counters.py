"""What the kernel counts about its own work.  Statistics: no decision reads them."""

from dataclasses import dataclass

__all__ = ("KernelCounters",)


@dataclass(slots=True)
class KernelCounters:
    """One counter per kind of work; pages and entries are counted one by one, however they were
    done."""

    ioctls: int = 0
    kvm_exits: int = 0  # returns from KVM_RUN with an exit reason for user space
    npf: int = 0  # nested page faults taken by KVM
    mmu_retries: int = 0  # faults that lost against an invalidation (RET_PF_RETRY)
    zaps: int = 0  # leaf SPTEs removed
    bytes_zeroed: int = 0
    pages_allocated: int = 0
    pages_freed: int = 0
    direct_map_splits: int = 0  # 2M mappings of the kernel direct map split to 4K
    rmp_lookups: int = 0  # RMP entries that Linux read (snp_lookup_rmpentry())
    rmp_sanity_lookups: int = (
        0  # RMP entries that only the optional check of SnpHost made it read
    )
    rmp_retries: int = 0  # RMPUPDATE and PSMASH issued again after FAIL_OVERLAP or FAIL_INUSE
    warnings: int = 0  # WARN() and KVM_BUG()
    migration_refused: int = (
        0  # guest_memfd folios that compaction, migration or reclaim asked for
    )

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}
