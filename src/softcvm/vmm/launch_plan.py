"""What is launched into an SNP guest, in order: one LaunchUpdate per LAUNCH_UPDATE the VMM asks KVM for.

QEMU's order (sev_snp_launch_start() to sev_snp_launch_finish(), target/i386/sev.c): the firmware image,
then each section of the SEV metadata as listed.  The order is part of the launch digest.  EC2 launches the
CPUID page after all other sections, Google Compute Engine does not measure SEC_MEM.

The VMM executes a plan and measure.py predicts from it, so the two cannot differ.  VMSAs are not in it:
KVM launches them itself, in KVM_SEV_SNP_LAUNCH_FINISH.
"""

from typing import NamedTuple

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.ovmf import HashTable, SectionType
from softcvm.vmm.ovmf import OvmfError, OvmfImage, Section
from softcvm.vmm.vmsa import VmmType

__all__ = (
    "LaunchUpdate",
    "hash_page",
    "hash_table_base",
    "image_update",
    "snp_launch_plan",
    "svsm_launch_plan",
)

_PAGE = 4096

_PAGE_TYPES = {
    SectionType.SEC_MEM: LaunchPageType.ZERO,
    SectionType.SECRETS: LaunchPageType.SECRETS,
    SectionType.CPUID: LaunchPageType.CPUID,
    SectionType.SVSM_CAA: LaunchPageType.ZERO,
    SectionType.KERNEL_HASHES: LaunchPageType.ZERO,  # without hashes; with them: hash_page()
}


class LaunchUpdate(NamedTuple):
    """`npages` 4K pages from `gpa` on, launched as `page_type`.

    `data` is what a NORMAL update puts there.  Other types have None: zeros (ZERO, UNMEASURED), what
    firmware makes (SECRETS), or what the VMM has to bring (the CPUID table).
    """

    gpa: int
    npages: int
    page_type: LaunchPageType
    data: bytes | None
    what: str


def snp_launch_plan(
    image: OvmfImage, *, vmm_type: VmmType = VmmType.QEMU, hashes: bytes | None = None
) -> tuple[LaunchUpdate, ...]:
    """The updates of a guest that boots `image`; `hashes` is a kernel_hashes table or None."""
    if hashes is not None and image.section(SectionType.KERNEL_HASHES) is None:
        raise OvmfError("the firmware has no KERNEL_HASHES section for the hashes of a kernel")
    return (image_update(image), *_section_updates(image, vmm_type, hashes))


def svsm_launch_plan(ovmf: OvmfImage, svsm: OvmfImage) -> tuple[LaunchUpdate, ...]:
    """The updates of a guest that starts in an SVSM: both images, then the SVSM's sections only."""
    return (
        image_update(ovmf, "OVMF image"),
        image_update(svsm, "SVSM image"),
        *_section_updates(svsm, VmmType.QEMU, None),
    )


def image_update(image: OvmfImage, what: str = "OVMF image") -> LaunchUpdate:
    """The image itself, where it is mapped."""
    npages = len(image.data) // _PAGE
    return LaunchUpdate(image.gpa, npages, LaunchPageType.NORMAL, image.data, what)


def hash_page(image: OvmfImage, section: Section, hashes: bytes) -> bytes:
    """The KERNEL_HASHES section with the table where the firmware looks for it."""
    offset = hash_table_base(image) - section.gpa
    if not 0 <= offset <= section.size - len(hashes):
        raise OvmfError(f"the firmware's hash table area is outside its {section}")
    return bytes(offset) + hashes + bytes(section.size - offset - len(hashes))


def hash_table_base(image: OvmfImage) -> int:
    """Where the firmware takes the hash table from; refused if it takes none."""
    area = image.hash_table_area
    if area is None:
        raise OvmfError("the firmware has no hash table area for the hashes of a kernel")
    if area.size < HashTable.SIZE:
        raise OvmfError(
            f"the firmware's hash table area of {area.size} bytes cannot hold a hash table"
        )
    return area.base


def _section_updates(
    image: OvmfImage, vmm_type: VmmType, hashes: bytes | None
) -> tuple[LaunchUpdate, ...]:
    updates = [_section_update(image, section, vmm_type, hashes) for section in image.sections]
    if vmm_type is VmmType.EC2:
        updates.sort(key=lambda update: update.page_type is LaunchPageType.CPUID)
    return tuple(updates)


def _section_update(
    image: OvmfImage, section: Section, vmm_type: VmmType, hashes: bytes | None
) -> LaunchUpdate:
    npages = section.size // _PAGE
    try:
        kind = SectionType(section.type)
    except ValueError:
        raise OvmfError(f"no VMM knows how to launch the {section}") from None
    page_type, data = _PAGE_TYPES[kind], None
    if kind in (SectionType.SECRETS, SectionType.CPUID) and npages != 1:
        raise OvmfError(f"the {section} is not one page")
    if kind is SectionType.SEC_MEM and vmm_type is VmmType.GCE:
        page_type = LaunchPageType.UNMEASURED
    if kind is SectionType.KERNEL_HASHES and hashes is not None:
        page_type, data = LaunchPageType.NORMAL, hash_page(image, section, hashes)
    return LaunchUpdate(section.gpa, npages, page_type, data, kind.name)
