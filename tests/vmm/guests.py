"""Guests for tests of the VMM: a configuration in a line, a launch without a run, and a whole boot."""

from pathlib import Path

from softcvm.abi.cpu_types import CPU_SIGNATURES
from softcvm.cli.boot_run import BootResult, boot, executed_digest
from softcvm.guest import firmware
from softcvm.machine import Machine
from softcvm.vmm.board import plan_board
from softcvm.vmm.ovmf import OvmfImage, parse, read
from softcvm.vmm.run import ExitPolicy
from softcvm.vmm.vmm import GuestConfig, Vmm

__all__ = ("MIB", "booted", "config", "launched_digest", "machine")

MIB = 1 << 20


def config(
    image: OvmfImage | Path | None = None,
    vcpus: int = 1,
    cpu_type: str = "EPYC-v4",
    *,
    memory: int = 64 * MIB,
    features: int = 1,
    hashes: bytes | None = None,
    exits: ExitPolicy = ExitPolicy(),  # noqa: B008 - frozen
) -> GuestConfig:
    if image is None:
        image = parse(firmware.build())
    elif isinstance(image, Path):
        image = read(str(image))
    return GuestConfig(
        image=image,
        board=plan_board(memory, len(image.data), phys_bits=43),
        vcpus=vcpus,
        vcpu_sig=CPU_SIGNATURES[cpu_type],
        guest_features=features,
        hashes=hashes,
        exits=exits,
    )


def machine(kernel: str = "7.3", cpu: str = "genoa", order: int = 9) -> Machine:
    return Machine(kernel=kernel, cpu=cpu, memory=1 << 36, gmem_max_order=order)


def launched_digest(subject: GuestConfig, on: Machine | None = None) -> str:
    """Launch, ask firmware for the digest, tear down without running."""
    host = on or machine()
    with Vmm(host.process(), subject) as vmm:
        vmm.launch()
        return executed_digest(host).hex()


def booted(subject: GuestConfig, on: Machine | None = None) -> tuple[BootResult, list[str]]:
    """A whole life, and what the guest said."""
    lines: list[str] = []
    return boot(on or machine(), subject, lines.append), lines
