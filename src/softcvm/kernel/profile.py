"""Kernel profiles: the dated, cited differences between the Linux versions that this model
serves.

One kernel is written down, the newest; a field here says where an older one differs.  "6.12" is
the stable 6.12.117, which carries many fixes of 2025 and 2026; "6.18" and "7.3" are the
mainline releases.  Options that no release has (folios larger than a page) are fields too, off
by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

__all__ = ("PROFILES", "KernelProfile", "kernel_profile")


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """What one kernel does.  The comment of a field names the change that set it."""

    name: str
    # Linux 6.18: KVM_CREATE_GUEST_MEMFD flags MMAP and INIT_SHARED, KVM_CAP_GUEST_MEMFD_FLAGS,
    # guest_memfd for every VM type, internal KVM_MEMSLOT_GMEM_ONLY.
    gmem_mmap: bool
    # 6.17: FALLOC_FL_WRITE_ZEROES is a mode that the VFS knows, and that guest_memfd refuses
    # later.
    falloc_write_zeroes: bool
    # 6.18, 3ccbf6f47098: KVM_PRE_FAULT_MEMORY gives EAGAIN when its memslot is going, instead
    # of retrying.
    prefault_eagain_on_dying_slot: bool
    # 6.18, 00f0b959ffb0: KVM_SEV_INIT2 for SNP refuses a maximum GHCB protocol version below
    # this.
    snp_min_ghcb_version: int
    # 7.0: populate takes the invalidate lock and a pinned source page for each page
    # (2a62345b3052); before, one lock over the range, source copied with it held, folios that
    # are already prepared give EEXIST.
    populate_per_page: bool
    # 7.0: "uptodate" says the contents are initialised and the arch prepares on every lookup;
    # from 6.11 (d04c77d23122) to 6.19 it says that the folio is prepared.
    uptodate_means_initialised: bool
    # 7.0, fa9893fadbc2: KVM_EXIT_SNP_REQ_CERTS and KVM_SEV_SNP_ENABLE_REQ_CERTS.
    snp_req_certs: bool
    # 7.2, 5d40e5b49442: hypercall.ret of a page-state change may be 0, EINVAL or EAGAIN only.
    map_gpa_range_ret_checked: bool
    # 2026, with the populate rework: KVM_SEV_SNP_LAUNCH_UPDATE refuses len 0, which was a
    # successful no-op.
    snp_launch_update_refuses_empty: bool
    # May 2026 (fixes 2a62345b3052): the source of a CPUID page is pinned for writing.
    populate_writable_source: bool
    # 6.15, 72d12715edcd: VMRUN with an invalid VMSA is refused with KVM_EXIT_FAIL_ENTRY.
    refuse_vmrun_without_vmsa: bool
    # CVE-2026-72286, in 7.3 and in the stable 6.12.117: SNP VMs are neither migrated nor
    # mirrored.
    snp_no_intra_host_migration: bool
    # 2026, cb923ee6a80f: LAUNCH_FINISH holds every vCPU's mutex while it writes and measures
    # the VMSAs.
    sync_vmsa_locks_all_vcpus: bool
    # 6.14: KVM sets hypercall.ret to 0 before it leaves for MAP_GPA_RANGE; before, user space
    # had to write it.
    hypercall_ret_cleared: bool
    # 2026, 1797e00bf802: #VMGEXIT with a GHCB that is not registered is answered to the guest;
    # it was EINVAL from KVM_RUN.
    unregistered_ghcb_answered: bool
    # Proposed upstream ("KVM: gmem: 2MB THP support", RFC 2024), in no release: largest folio
    # order of guest_memfd; 0 is every release, 9 is 2M.
    gmem_max_order: int = 0


_OLDEST = KernelProfile(
    name="6.12",
    gmem_mmap=False,
    falloc_write_zeroes=False,
    prefault_eagain_on_dying_slot=False,
    snp_min_ghcb_version=1,
    populate_per_page=False,
    uptodate_means_initialised=False,
    snp_req_certs=False,
    map_gpa_range_ret_checked=False,
    snp_launch_update_refuses_empty=False,
    populate_writable_source=False,
    refuse_vmrun_without_vmsa=False,
    snp_no_intra_host_migration=True,
    sync_vmsa_locks_all_vcpus=False,
    unregistered_ghcb_answered=False,
    hypercall_ret_cleared=False,
)

_V6_18 = KernelProfile(
    name="6.18",
    gmem_mmap=True,
    falloc_write_zeroes=True,
    prefault_eagain_on_dying_slot=True,
    snp_min_ghcb_version=2,
    populate_per_page=False,
    uptodate_means_initialised=False,
    snp_req_certs=False,
    map_gpa_range_ret_checked=False,
    snp_launch_update_refuses_empty=False,
    populate_writable_source=False,
    refuse_vmrun_without_vmsa=True,
    snp_no_intra_host_migration=False,
    sync_vmsa_locks_all_vcpus=False,
    unregistered_ghcb_answered=False,
    hypercall_ret_cleared=True,
)

_V7_3 = KernelProfile(
    name="7.3",
    gmem_mmap=True,
    falloc_write_zeroes=True,
    prefault_eagain_on_dying_slot=True,
    snp_min_ghcb_version=2,
    populate_per_page=True,
    uptodate_means_initialised=True,
    snp_req_certs=True,
    map_gpa_range_ret_checked=True,
    snp_launch_update_refuses_empty=True,
    populate_writable_source=True,
    refuse_vmrun_without_vmsa=True,
    snp_no_intra_host_migration=True,
    sync_vmsa_locks_all_vcpus=True,
    unregistered_ghcb_answered=True,
    hypercall_ret_cleared=True,
)

PROFILES: Mapping[str, KernelProfile] = MappingProxyType(
    {p.name: p for p in (_OLDEST, _V6_18, _V7_3)}
)


def kernel_profile(name: str, *, gmem_max_order: int = 0) -> KernelProfile:
    """The profile of a kernel version, with the options that no release has.

    Raises ValueError for a version without a profile or an order that nobody proposed.
    """
    if name not in PROFILES:
        raise ValueError(f"no profile for kernel {name!r}; there are {', '.join(PROFILES)}")
    if gmem_max_order not in (0, 9):
        raise ValueError(f"guest_memfd folio order is 0 (4K) or 9 (2M), not {gmem_max_order}")
    profile = PROFILES[name]
    if gmem_max_order:
        return replace(profile, gmem_max_order=gmem_max_order)
    return profile
