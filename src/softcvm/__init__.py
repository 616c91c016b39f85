"""A software host for confidential VMs: SEV-SNP, guest_memfd and KVM private memory without the hardware.

    machine = softcvm.Machine(kernel="7.3", cpu="genoa", memory=1 << 40)
    sys = machine.process()

Names are loaded on first use: a command that needs no machine imports none.
"""

TYPE_CHECKING = (
    False  # type checkers read it as true; typing itself costs milliseconds of start-up
)
if TYPE_CHECKING:
    from softcvm.abi.sys import HostSignal, Sys
    from softcvm.attach import HostSys
    from softcvm.machine import Machine

__all__ = ("HostSignal", "HostSys", "Machine", "Sys", "__version__")

__version__ = "0.1.0"

_HOMES = {
    "HostSignal": "softcvm.abi.sys",
    "HostSys": "softcvm.attach",
    "Machine": "softcvm.machine",
    "Sys": "softcvm.abi.sys",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
