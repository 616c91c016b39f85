"""Names of the ioctls, for events and messages."""

from types import MappingProxyType

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.sev import SEV_ISSUE_CMD

__all__ = ("IOCTL_NAMES", "ioctl_name", "is_kvm_ioctl")

_KVMIO = 0xAE
IOCTL_NAMES = MappingProxyType(
    {
        **{
            value: name
            for name, value in vars(k).items()
            if name.startswith("KVM_")
            and isinstance(value, int)
            and value >> 8 & 0xFF == _KVMIO
        },
        SEV_ISSUE_CMD: "SEV_ISSUE_CMD",
    }
)


def ioctl_name(request: int) -> str:
    return IOCTL_NAMES.get(request, f"{request:#x}")


def is_kvm_ioctl(request: int) -> bool:
    """_IOC_TYPE(request) == KVMIO"""
    return request >> 8 & 0xFF == _KVMIO
