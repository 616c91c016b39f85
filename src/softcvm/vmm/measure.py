"""Launch digests predicted from a firmware image: what a host that launches it as planned will attest.

SNP digests follow the launch plan; SEV and SEV-ES digest the image, the hash table and the VMSAs with one
SHA-256, in order.  [ABI-56860 §8.17.2; SEV-55766 LAUNCH_UPDATE_DATA, LAUNCH_UPDATE_VMSA]  Results are those
of sev-snp-measure 0.0.13, whose modes are snp, snp:svsm, snp:ovmf-hash, seves and sev.

Only the VMSAs depend on the number of vCPUs, and they come last: many counts share all that comes before.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import repeat

from softcvm.abi.launch_digest import (
    INITIAL_LD,
    UNMEASURED_CONTENTS,
    VMSA_GPA,
    LaunchPageType,
    extend,
    extend_run,
    page_digests,
    vmsa_contents,
)
from softcvm.vmm.launch_plan import (
    LaunchUpdate,
    hash_table_base,
    image_update,
    snp_launch_plan,
    svsm_launch_plan,
)
from softcvm.vmm.ovmf import OvmfError, OvmfImage
from softcvm.vmm.vmsa import BSP_RESET_EIP, VmmType, initial_vmsa, initial_vmsa_svsm

__all__ = (
    "MAX_VCPUS",
    "check_vcpus",
    "launch_digest",
    "launch_digests",
    "sev_launch_digest",
    "seves_launch_digests",
    "seves_vmsas",
    "snp_ovmf_hash",
    "snp_vmsas",
    "svsm_launch_digests",
    "svsm_vmsas",
)

MAX_VCPUS = 4096
"""KVM_MAX_VCPUS at its largest (CONFIG_KVM_MAX_NR_VCPUS, arch/x86/kvm/Kconfig, v7.2)."""


def launch_digest(
    image: OvmfImage,
    vcpus: int,
    vcpu_sig: int,
    *,
    guest_features: int = 1,
    vmm_type: VmmType = VmmType.QEMU,
    hashes: bytes | None = None,
    ovmf_hash: bytes | None = None,
) -> bytes:
    """The SNP launch digest of a guest with `vcpus` vCPUs; see `launch_digests`."""
    return launch_digests(
        image,
        (vcpus,),
        vcpu_sig,
        guest_features=guest_features,
        vmm_type=vmm_type,
        hashes=hashes,
        ovmf_hash=ovmf_hash,
    )[0]


def launch_digests(
    image: OvmfImage,
    vcpu_counts: Sequence[int],
    vcpu_sig: int,
    *,
    guest_features: int = 1,
    vmm_type: VmmType = VmmType.QEMU,
    hashes: bytes | None = None,
    ovmf_hash: bytes | None = None,
) -> list[bytes]:
    """SNP launch digests, one for each count of vCPUs.

    `hashes` is a table of kernel_hashes.py if a kernel is booted directly.  `ovmf_hash`, a result of
    snp_ovmf_hash(), stands for the image's own bytes: only its metadata is then used.
    """
    pages = snp_vmsas(image, _most(vcpu_counts), vcpu_sig, guest_features, vmm_type)
    plan = snp_launch_plan(image, vmm_type=vmm_type, hashes=hashes)
    if ovmf_hash is None:
        ld = _extend_plan(INITIAL_LD, plan)
    else:
        ld = _extend_plan(ovmf_hash, plan[1:])
    return _with_vmsas(ld, pages, vcpu_counts)


def svsm_launch_digests(
    ovmf: OvmfImage, svsm: OvmfImage, vcpu_counts: Sequence[int], vcpu_sig: int
) -> list[bytes]:
    """SNP launch digests of a guest that starts in an SVSM, one for each count of vCPUs."""
    pages = svsm_vmsas(svsm, _most(vcpu_counts), vcpu_sig)
    ld = _extend_plan(INITIAL_LD, svsm_launch_plan(ovmf, svsm))
    return _with_vmsas(ld, pages, vcpu_counts)


def snp_ovmf_hash(image: OvmfImage) -> bytes:
    """The launch digest as far as the image goes: what `ovmf_hash` of launch_digests() takes."""
    return _extend_plan(INITIAL_LD, (image_update(image),))


def seves_launch_digests(
    image: OvmfImage,
    vcpu_counts: Sequence[int],
    vcpu_sig: int,
    *,
    vmm_type: VmmType = VmmType.QEMU,
    hashes: bytes | None = None,
) -> list[bytes]:
    """SEV-ES launch digests, one for each count of vCPUs."""
    pages = seves_vmsas(image, _most(vcpu_counts), vcpu_sig, vmm_type)
    digest = sha256(_sev_measured(image, hashes))
    done, found = 0, {}
    for count in sorted(set(vcpu_counts)):
        for page in pages[done:count]:
            digest.update(page)
        done, found[count] = count, digest.digest()
    return [found[count] for count in vcpu_counts]


def sev_launch_digest(image: OvmfImage, *, hashes: bytes | None = None) -> bytes:
    """The SEV launch digest: registers are not part of it, nor is the number of vCPUs."""
    return sha256(_sev_measured(image, hashes)).digest()


def snp_vmsas(
    image: OvmfImage,
    vcpus: int,
    vcpu_sig: int,
    guest_features: int = 1,
    vmm_type: VmmType = VmmType.QEMU,
) -> list[bytes]:
    """The VMSA page of each vCPU of an SNP guest, boot processor first."""
    check_vcpus(vcpus)
    ap_eip = image.ap_reset_eip
    bsp = bytes(initial_vmsa(BSP_RESET_EIP, vcpu_sig, guest_features, vmm_type))
    if vcpus == 1:
        return [bsp]
    if ap_eip == 0:
        raise OvmfError("the firmware's AP reset address is 0: it starts one vCPU only")
    ap = bytes(initial_vmsa(ap_eip, vcpu_sig, guest_features, vmm_type))
    return [bsp, *repeat(ap, vcpus - 1)]


def seves_vmsas(
    image: OvmfImage, vcpus: int, vcpu_sig: int, vmm_type: VmmType = VmmType.QEMU
) -> list[bytes]:
    """The VMSA page of each vCPU of a SEV-ES guest, boot processor first."""
    return snp_vmsas(image, vcpus, vcpu_sig, 0, vmm_type)


def svsm_vmsas(svsm: OvmfImage, vcpus: int, vcpu_sig: int) -> list[bytes]:
    """The VMSA page of each vCPU of a guest that starts in an SVSM: all enter at the same place."""
    check_vcpus(vcpus)
    return [bytes(initial_vmsa_svsm(svsm.svsm_entry, vcpu_sig))] * vcpus


def check_vcpus(vcpus: int) -> None:
    if not 1 <= vcpus <= MAX_VCPUS:
        raise ValueError(f"a guest has 1 to {MAX_VCPUS} vCPUs, not {vcpus}")


def _most(vcpu_counts: Sequence[int]) -> int:
    if not vcpu_counts:
        raise ValueError("no count of vCPUs given")
    for count in vcpu_counts:
        check_vcpus(count)
    return max(vcpu_counts)


def _extend_plan(ld: bytes, plan: Iterable[LaunchUpdate]) -> bytes:
    for update in plan:
        contents: Iterable[bytes]
        if update.page_type is LaunchPageType.NORMAL and update.data is not None:
            contents = page_digests(update.data)
        else:
            contents = repeat(UNMEASURED_CONTENTS, update.npages)
        ld = extend_run(ld, contents, update.page_type, update.gpa)
    return ld


def _with_vmsas(ld: bytes, pages: list[bytes], vcpu_counts: Sequence[int]) -> list[bytes]:
    """The digests after as many VMSAs as each count says; a page that repeats is hashed once."""
    found = {}
    wanted = set(vcpu_counts)
    hashed, contents = b"", b""
    for number, page in enumerate(pages, 1):
        if page is not hashed:
            hashed, contents = page, vmsa_contents(page)
        ld = extend(ld, contents, LaunchPageType.VMSA, VMSA_GPA)
        if number in wanted:
            found[number] = ld
    return [found[count] for count in vcpu_counts]


def _sev_measured(image: OvmfImage, hashes: bytes | None) -> bytes:
    """What SEV and SEV-ES measure before any VMSA."""
    if hashes is None:
        return image.data
    hash_table_base(image)
    return image.data + hashes
