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
    # "anon_inode: raise SB_I_NODEV and SB_I_NOEXEC" (2025): VM and vCPU files are noexec; not in
    # 6.12.117.
    anon_inode_noexec: bool
    # 6.17: FALLOC_FL_WRITE_ZEROES is a mode that the VFS knows, and that guest_memfd refuses
    # later.
    falloc_write_zeroes: bool
    # 6.18 computes the end of a binding in signed 64 bits: an offset just below 2^63 passes for
    # one inside the file.  eba85fee7fc6 (2026) is the fix; 6.12 had unsigned numbers.
    gmem_bind_offset_signed: bool
    # 6.18: KVM_GET_ONE_REG and KVM_SET_ONE_REG on x86, for CET (KVM_CAP_ONE_REG).
    x86_one_reg: bool
    # 2026, 6517dfbcc918, in the stable 6.18.44 too: two more flags in KVM_CAP_X2APIC_API, to
    # suppress EOI broadcasts.
    x2apic_suppress_eoi: bool
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
    # 6.15 (fixes e366f92ea99e): AP creation compares all of SEV_FEATURES with KVM's; before, only
    # how interrupts are injected.
    ap_features_all_match: bool
    # 6.16, 309d28576f0a: AP creation waits until the target has left the guest.
    ap_request_waits: bool
    # CVE-2026-72286, in 7.3 and in the stable 6.12.117: SNP VMs are neither migrated nor
    # mirrored.
    snp_no_intra_host_migration: bool
    # 2026, 93de2a6a4b91 and 973ea70393e8: moving an encryption context flushes caches on behalf of
    # the source, whose processors the destination does not know.
    sev_move_flushes_source: bool
    # 2026, cb923ee6a80f: LAUNCH_FINISH holds every vCPU's mutex while it writes and measures
    # the VMSAs.
    sync_vmsa_locks_all_vcpus: bool
    # 2026, 9b9f7962e3e8: the VMSA of a vCPU is synced once.  Before, LAUNCH_UPDATE_VMSA of SEV-ES could be
    # repeated, as sev_migrate_tests of 6.12 does; repeating SNP's LAUNCH_FINISH crashed the host, so that
    # every profile has that half of the fix.
    encrypted_vmsa_refused: bool
    # 6.14: KVM sets hypercall.ret to 0 before it leaves for MAP_GPA_RANGE; before, user space
    # had to write it.
    hypercall_ret_cleared: bool
    # 2026, 1797e00bf802: #VMGEXIT with a GHCB that is not registered is answered to the guest;
    # it was EINVAL from KVM_RUN.
    unregistered_ghcb_answered: bool
    # Proposed upstream ("KVM: gmem: 2MB THP support", RFC 2024), in no release: largest folio
    # order of guest_memfd; 0 is every release, 9 is 2M.
    gmem_max_order: int = 0
    # Proposed upstream (RFC v2, May 2025), in no release: KVM_LINK_GUEST_MEMFD gives a guest_memfd a
    # second file, which is another VM's view of the same inode.
    gmem_link: bool = False
    # Sketched in review ("KVM: Add KVM_CREATE_GUEST_MEMFD ioctl()", 2 Nov 2023), in no release: the host may touch
    # the shared parts of a private VM's guest_memfd (MMAP), and KVM_SET_MEMORY_ATTRIBUTES takes host mappings
    # of what becomes private away.  Needs "uptodate" to mean initialised.
    gmem_in_place: bool = False


_OLDEST = KernelProfile(
    name="6.12",
    gmem_mmap=False,
    anon_inode_noexec=False,
    gmem_bind_offset_signed=False,
    falloc_write_zeroes=False,
    x86_one_reg=False,
    x2apic_suppress_eoi=False,
    prefault_eagain_on_dying_slot=False,
    snp_min_ghcb_version=1,
    populate_per_page=False,
    uptodate_means_initialised=False,
    snp_req_certs=False,
    map_gpa_range_ret_checked=False,
    snp_launch_update_refuses_empty=False,
    populate_writable_source=False,
    refuse_vmrun_without_vmsa=False,
    ap_features_all_match=False,
    ap_request_waits=False,
    snp_no_intra_host_migration=True,
    sev_move_flushes_source=False,
    sync_vmsa_locks_all_vcpus=False,
    encrypted_vmsa_refused=False,
    unregistered_ghcb_answered=False,
    hypercall_ret_cleared=False,
)

_V6_18 = KernelProfile(
    name="6.18",
    gmem_mmap=True,
    anon_inode_noexec=True,
    gmem_bind_offset_signed=True,
    falloc_write_zeroes=True,
    x86_one_reg=True,
    x2apic_suppress_eoi=True,
    prefault_eagain_on_dying_slot=True,
    snp_min_ghcb_version=2,
    populate_per_page=False,
    uptodate_means_initialised=False,
    snp_req_certs=False,
    map_gpa_range_ret_checked=False,
    snp_launch_update_refuses_empty=False,
    populate_writable_source=False,
    refuse_vmrun_without_vmsa=True,
    ap_features_all_match=True,
    ap_request_waits=True,
    snp_no_intra_host_migration=False,
    sev_move_flushes_source=False,
    sync_vmsa_locks_all_vcpus=False,
    encrypted_vmsa_refused=True,
    unregistered_ghcb_answered=False,
    hypercall_ret_cleared=True,
)

_V7_3 = KernelProfile(
    name="7.3",
    gmem_mmap=True,
    anon_inode_noexec=True,
    gmem_bind_offset_signed=False,
    falloc_write_zeroes=True,
    x86_one_reg=True,
    x2apic_suppress_eoi=True,
    prefault_eagain_on_dying_slot=True,
    snp_min_ghcb_version=2,
    populate_per_page=True,
    uptodate_means_initialised=True,
    snp_req_certs=True,
    map_gpa_range_ret_checked=True,
    snp_launch_update_refuses_empty=True,
    populate_writable_source=True,
    refuse_vmrun_without_vmsa=True,
    ap_features_all_match=True,
    ap_request_waits=True,
    snp_no_intra_host_migration=True,
    sev_move_flushes_source=True,
    sync_vmsa_locks_all_vcpus=True,
    encrypted_vmsa_refused=True,
    unregistered_ghcb_answered=True,
    hypercall_ret_cleared=True,
)

PROFILES: Mapping[str, KernelProfile] = MappingProxyType(
    {p.name: p for p in (_OLDEST, _V6_18, _V7_3)}
)


def kernel_profile(
    name: str,
    *,
    gmem_max_order: int = 0,
    gmem_link: bool = False,
    gmem_in_place: bool = False,
) -> KernelProfile:
    """The profile of a kernel version, with the options that no release has.

    Raises ValueError for a version without a profile or an order that nobody proposed.
    """
    if name not in PROFILES:
        raise ValueError(f"no profile for kernel {name!r}; there are {', '.join(PROFILES)}")
    if gmem_max_order not in (0, 9):
        raise ValueError(f"guest_memfd folio order is 0 (4K) or 9 (2M), not {gmem_max_order}")
    profile = PROFILES[name]
    if gmem_in_place and not profile.uptodate_means_initialised:
        raise ValueError(f"kernel {name} has no way to convert guest_memfd pages in place")
    if gmem_max_order or gmem_link or gmem_in_place:
        return replace(
            profile,
            gmem_max_order=gmem_max_order,
            gmem_link=gmem_link,
            gmem_in_place=gmem_in_place,
        )
    return profile
