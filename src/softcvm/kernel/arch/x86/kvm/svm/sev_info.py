"""struct kvm_sev_info: what a VM has of SEV, SEV-ES or SNP (arch/x86/kvm/svm/svm.h, v7.2).

Every VM has one; a VM without encryption leaves it as it was created.
"""

from typing import TYPE_CHECKING

from softcvm.abi.svm import SevFeatures
from softcvm.kernel.locks import Rank
from softcvm.sim.addr import Asid, Pfn
from softcvm.sim.state import State
from softcvm.sim.steps import Lockdep, Mutex

if TYPE_CHECKING:
    from softcvm.kernel.virt.kvm.kvm_main import Kvm

__all__ = ("KvmSevInfo", "sev_es_guest", "sev_guest", "sev_info", "sev_snp_guest")


class KvmSevInfo(State):
    """need_init: the VM type asks for KVM_SEV_INIT2, which has not come yet.

    fd: the *number* of the /dev/sev file given to LAUNCH_START, looked up anew for each later command.
    guest_req_buf, guest_resp_buf: bounce pages of guest requests; firmware writes the second.
    """

    saved = (
        "active",
        "es_active",
        "need_init",
        "asid",
        "fd",
        "vmsa_features",
        "ghcb_version",
        "ap_jump_table",
        "snp_context",
        "guest_req_buf",
        "guest_resp_buf",
    )
    derived = {"guest_req_mutex": "free at quiescent points"}

    def __init__(self, lockdep: Lockdep) -> None:
        self.active = False
        self.es_active = False
        self.need_init = False
        self.asid = Asid(0)
        self.fd = 0
        self.vmsa_features = 0
        self.ghcb_version = 0
        self.ap_jump_table = 0
        self.snp_context: Pfn | None = None
        self.guest_req_buf: Pfn | None = None
        self.guest_resp_buf: Pfn | None = None
        self.guest_req_mutex = Mutex(lockdep, "sev->guest_req_mutex", Rank.GUEST_REQ_MUTEX)


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
    return sev_es_guest(kvm) and bool(sev_info(kvm).vmsa_features & SevFeatures.SNP_ACTIVE)
