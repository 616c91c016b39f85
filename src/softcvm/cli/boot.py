"""`softcvm boot`: launch a firmware image on a software host and run its guest's memory life to the end.

Owns the options and what is wrong with them; the life itself is boot_run.py, its report boot_report.py.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from softcvm import __version__
from softcvm.abi.cpu_types import CPU_SIGNATURES
from softcvm.cli.errors import UsageError
from softcvm.cli.sizes import format_size, parse_number, parse_size, parse_u64

if TYPE_CHECKING:
    from softcvm.hw.profile import CpuProfile
    from softcvm.machine import Machine
    from softcvm.vmm.ovmf import OvmfImage
    from softcvm.vmm.vmm import GuestConfig

__all__ = ("DESCRIPTION", "EXAMPLES", "add_arguments", "run")

DESCRIPTION = """\
Launch an SEV-SNP guest from an OVMF image on a software host, run its memory life
from launch to teardown, and report digest, pages by RMP state, counters, invariants.

The built-in firmware carries a guest in machine code, the payload: it accepts some memory,
prints through its GHCB, shares a page and takes it back, and reads its secrets.  With
--guest scripted, and with any other image, the guest is a script: it accepts all memory, shares
bounce buffers, has 2M pages smashed and rejoins them, and provokes each kind of fault once."""

EXAMPLES = """\
examples:
  softcvm boot
  softcvm boot --guest scripted
  softcvm boot /usr/share/ovmf/OVMF.fd --vcpus 4 --memory 64G
  softcvm boot --cpu milan --kernel 6.12 --gmem-order 0 --no-prefault --json

Exit status: 0 when the guest ended well and everything held, 1 when not, 2 for bad input."""

_HOST_MEMORY = 1 << 40
_PAYLOAD_HOST, _PAYLOAD_HOST_MAX = 1 << 36, 1 << 39
"""Of a host that executes machine code, whose engine takes addresses of 40 bits."""
DEFAULT_MEMORY = "1G"
BUILTIN = "built-in firmware"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--version", action="version", version=f"softcvm {__version__}")
    add("firmware", nargs="?", metavar="FIRMWARE", help="OVMF image (default: a built-in one)")
    add("--vcpus", metavar="N", type=_count, default=1, help="number of vCPUs (1)")
    add(
        "--memory",
        metavar="SIZE",
        type=parse_size,
        default=parse_size(DEFAULT_MEMORY),
        help=f"RAM of the guest, such as 512M or 64G ({DEFAULT_MEMORY})",
    )
    add(
        "--vcpu-type",
        metavar="TYPE",
        default="EPYC-v4",
        help=f"QEMU's type of vCPU ({', '.join(CPU_SIGNATURES)}; EPYC-v4)",
    )
    add(
        "--guest-features",
        metavar="VALUE",
        type=parse_u64,
        default=1,
        help="SEV_FEATURES of the guest (0x1: SNP; 0x21: with DebugSwap; default 0x1)",
    )
    add(
        "--guest",
        choices=("payload", "scripted"),
        help="what runs: the machine code in the built-in firmware, or a script "
        "(default: the payload where there is one)",
    )
    host = parser.add_argument_group("host")
    host.add_argument("--cpu", metavar="CPU", default="genoa", help="milan or genoa (genoa)")
    host.add_argument("--kernel", metavar="V", default="7.3", help="6.12, 6.18 or 7.3 (7.3)")
    host.add_argument(
        "--gmem-order",
        metavar="N",
        type=parse_number,
        default=9,
        help="folios of guest_memfd: 9 for 2M, as proposed upstream (default), "
        "0 for 4K, as in every release",
    )
    direct = parser.add_argument_group("direct kernel boot", "hashes that the firmware checks")
    direct.add_argument("--kernel-image", metavar="PATH", help="kernel that the VMM boots")
    direct.add_argument("--initrd", metavar="PATH", help="its initrd")
    direct.add_argument("--append", metavar="CMDLINE", help="its command line")
    vmm = parser.add_argument_group("VMM")
    vmm.add_argument(
        "--no-prefault",
        action="store_true",
        help="leave newly private memory to page faults (default: KVM_PRE_FAULT_MEMORY)",
    )
    vmm.add_argument(
        "--no-implicit-conversion",
        action="store_true",
        help="give up when the guest uses memory in its other state without asking",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--trace", metavar="FILE", help="write every event as a line of JSON")


def run(args: argparse.Namespace) -> int:
    from softcvm.cli import boot_report
    from softcvm.cli.boot_run import boot
    from softcvm.cli.recording import traced
    from softcvm.vmm.errors import VmmError

    if args.guest == "payload" and args.firmware is not None:
        raise UsageError("--guest payload: it is in the built-in firmware only")
    args.guest = args.guest or ("payload" if args.firmware is None else "scripted")
    name, image = _firmware(args.firmware)
    config = _config(args, name, image)
    machine = _machine(args)
    lines: list[str] = []
    with traced(machine, args.trace), boot_report.progress() as progress:
        try:
            result = boot(
                machine, config, lines.append, progress, scripted=args.guest == "scripted"
            )
        except VmmError as error:
            print(f"softcvm boot: {error}", file=sys.stderr)
            return 1
    if result.failure:
        print(f"softcvm boot: {result.failure}", file=sys.stderr)
    if args.json:
        boot_report.print_json(config, result)
    else:
        host = f"{args.cpu}, Linux {args.kernel}, guest_memfd order {args.gmem_order}"
        boot_report.print_report(name, host, config, result, lines)
    return 0 if result.good else 1


def _firmware(path: str | None) -> tuple[str, "OvmfImage"]:
    from softcvm.cli.inputs import read_firmware
    from softcvm.vmm.ovmf import parse

    if path is not None:
        return path, read_firmware(path)
    from softcvm.guest.firmware import build

    return BUILTIN, parse(build())


def _config(args: argparse.Namespace, name: str, image: "OvmfImage") -> "GuestConfig":
    """Everything about the guest, refused here if it cannot be."""
    from softcvm.cli.boot_run import boot_info
    from softcvm.cli.inputs import naming
    from softcvm.guest.firmware import PAYLOAD_MEMORY
    from softcvm.guest.programs.memory_life import lab
    from softcvm.kernel.virt.kvm.kvm_main import KVM_MAX_VCPUS
    from softcvm.vmm.board import BoardError, plan_board
    from softcvm.vmm.measure import snp_vmsas
    from softcvm.vmm.run import ExitPolicy
    from softcvm.vmm.vmm import GuestConfig

    if args.vcpus > KVM_MAX_VCPUS:
        raise UsageError(f"--vcpus {args.vcpus}: KVM gives a VM at most {KVM_MAX_VCPUS}")
    signature = CPU_SIGNATURES.get(args.vcpu_type)
    if signature is None:
        raise UsageError(
            f"--vcpu-type {args.vcpu_type!r}: there is {', '.join(CPU_SIGNATURES)}"
        )
    if not args.guest_features & 1:
        raise UsageError(f"--guest-features {args.guest_features:#x}: bit 0, SNP, must be set")
    if not image.has_table:
        raise UsageError(f"{name}: not an OVMF image: no footer table at its end")
    if not image.has_metadata:
        raise UsageError(f"{name}: no SEV metadata: this firmware cannot boot an SNP guest")
    cpu = _cpu(args.cpu)
    try:
        board = plan_board(args.memory, len(image.data), cpu.phys_bits)
    except BoardError as error:
        raise UsageError(f"--memory {format_size(args.memory)}: {error}") from error
    for section in image.sections:
        inside = any(
            s <= section.gpa and section.gpa + section.size <= e for s, e in board.e820
        )
        if not inside:
            raise UsageError(
                f"{name}: {section} is outside the {format_size(args.memory)} of RAM"
            )
    with naming(name):
        # Refuses what has no place for its vCPUs to start at.
        snp_vmsas(image, args.vcpus, signature, args.guest_features)
        config = GuestConfig(
            image=image,
            board=board,
            vcpus=args.vcpus,
            vcpu_sig=signature,
            guest_features=args.guest_features,
            hashes=_hashes(args),
            exits=ExitPolicy(
                prefault=not args.no_prefault,
                implicit_conversion=not args.no_implicit_conversion,
            ),
        )
        info = boot_info(config)
    if args.guest == "payload":
        if args.memory < PAYLOAD_MEMORY:
            raise UsageError(
                f"--memory {format_size(args.memory)} is too small: the payload needs "
                f"{format_size(PAYLOAD_MEMORY)}"
            )
        return config
    try:
        lab(info)
    except ValueError as error:
        raise UsageError(
            f"--memory {format_size(args.memory)} is too small: {error}"
        ) from error
    return config


def _hashes(args: argparse.Namespace) -> bytes | None:
    from softcvm.cli.inputs import check_direct_boot, kernel_hashes

    check_direct_boot("--kernel-image", args.kernel_image, args.initrd, args.append)
    return kernel_hashes(args.kernel_image, args.initrd, args.append)


def _cpu(name: str) -> "CpuProfile":
    from softcvm.hw.profile import PROFILES

    if name not in PROFILES:
        raise UsageError(f"--cpu {name!r}: there is {', '.join(PROFILES)}")
    return PROFILES[name]


def _machine(args: argparse.Namespace) -> "Machine":
    """A host with at least twice the guest's memory, where the processor can address it."""
    from softcvm.kernel.profile import PROFILES
    from softcvm.machine import Machine

    if args.kernel not in PROFILES:
        raise UsageError(f"--kernel {args.kernel!r}: there is {', '.join(PROFILES)}")
    if args.gmem_order not in (0, 9):
        raise UsageError(f"--gmem-order {args.gmem_order}: it is 0 (4K) or 9 (2M)")
    limit = 1 << _cpu(args.cpu).phys_bits
    memory = _PAYLOAD_HOST if args.guest == "payload" else _HOST_MEMORY
    while memory < min(2 * args.memory, limit):
        memory *= 2
    backing = None
    if args.guest == "payload" and memory > _PAYLOAD_HOST_MAX:
        most = format_size(_PAYLOAD_HOST_MAX // 2)
        raise UsageError(
            f"--memory {format_size(args.memory)}: machine code runs in guests up to {most}; "
            "see --guest scripted"
        )
    if args.guest == "payload":
        from softcvm.attach.dram_memory import DramMemory

        backing = DramMemory(memory + (1 << 28))
    return Machine(
        kernel=args.kernel,
        cpu=args.cpu,
        memory=memory,
        gmem_max_order=args.gmem_order,
        backing=backing,
    )


def _count(text: str) -> int:
    value = parse_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a guest has at least one vCPU")
    return value
