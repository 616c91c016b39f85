"""struct kvm_sev_info: what a VM has of SEV, SEV-ES or SNP (arch/x86/kvm/svm/svm.h, v7.2).

Every VM has one; a VM without encryption leaves it as it was created.

kvm->lock guards all of it but three: mirror_vms and enc_context_owner are changed under sev_mirror_lock,
because a mirror that goes away holds no lock of its owner's; migration_in_progress is taken without a lock.
"""

from typing import TYPE_CHECKING, NamedTuple

from softcvm.abi.svm import SevFeatures
from softcvm.kernel.locks import Rank
from softcvm.sim.addr import Asid, Pfn
from softcvm.sim.state import State
from softcvm.sim.steps import Lockdep, Mutex

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = (
    "EncRegion",
    "KvmSevInfo",
    "is_mirroring_enc_context",
    "sev_es_guest",
    "sev_guest",
    "sev_info",
    "sev_snp_guest",
)


class EncRegion(NamedTuple):
    """struct enc_region: user memory that stays where it is.  runs: its pinned frames, in order."""

    uaddr: int
    size: int
    runs: tuple[tuple[Pfn, int], ...]


class KvmSevInfo(State):
    """need_init: the VM type asks for KVM_SEV_INIT2, which has not come yet.

    handle: firmware's name for a SEV or SEV-ES guest, 0 before LAUNCH_START.
    fd: the *number* of the /dev/sev file given to LAUNCH_START, looked up anew for each later command.
    pages_locked: how many user pages it pins, against RLIMIT_MEMLOCK.
    enc_context_owner: the VM whose ASID this one shares, which it holds a reference to; mirror_vms: who
    shares this one's.
    migration_in_progress: a MOVE or COPY is under way, as source or destination.
    guest_req_buf, guest_resp_buf: bounce pages of guest requests; firmware writes the second.
    """

    saved = (
        "active",
        "es_active",
        "need_init",
        "asid",
        "handle",
        "fd",
        "pages_locked",
        "regions",
        "mirror_vms",
        "enc_context_owner",
        "vmsa_features",
        "ghcb_version",
        "ap_jump_table",
        "snp_context",
        "guest_req_buf",
        "guest_resp_buf",
        "snp_certs_enabled",
    )
    derived = {
        "guest_req_mutex": "free at quiescent points",
        "migration_in_progress": "false at quiescent points",
    }

    def __init__(self, lockdep: Lockdep) -> None:
        self.active = False
        self.es_active = False
        self.need_init = False
        self.asid = Asid(0)
        self.handle = 0
        self.fd = 0
        self.pages_locked = 0
        self.regions: list[EncRegion] = []
        self.mirror_vms: list[Kvm] = []
        self.enc_context_owner: Kvm | None = None
        self.migration_in_progress = False
        self.vmsa_features = 0
        self.ghcb_version = 0
        self.ap_jump_table = 0
        self.snp_context: Pfn | None = None
        self.guest_req_buf: Pfn | None = None
        self.guest_resp_buf: Pfn | None = None
        self.snp_certs_enabled = False
        """User space is asked for certificates (KVM_EXIT_SNP_REQ_CERTS)."""
        self.guest_req_mutex = Mutex(lockdep, "sev->guest_req_mutex", Rank.GUEST_REQ_MUTEX)


_SNP_ACTIVE = int(SevFeatures.SNP_ACTIVE)


def sev_info(kvm: "Kvm") -> KvmSevInfo:
    """to_kvm_sev_info()"""
    sev = kvm.arch.sev
    assert sev is not None, "kvm_amd gives every VM its sev_info in vm_init"
    return sev


def sev_guest(kvm: "Kvm") -> bool:
    return sev_info(kvm).active


def sev_es_guest(kvm: "Kvm") -> bool:
    sev = sev_info(kvm)
    return sev.active and sev.es_active


def sev_snp_guest(kvm: "Kvm") -> bool:
    return sev_es_guest(kvm) and bool(sev_info(kvm).vmsa_features & _SNP_ACTIVE)


def is_mirroring_enc_context(kvm: "Kvm") -> bool:
    return sev_info(kvm).enc_context_owner is not None
