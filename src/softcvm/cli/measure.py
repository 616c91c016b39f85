"""`softcvm measure`: sev-snp-measure's options, and what it prints.

Beyond it: a list of vCPU counts gives a digest per line, --json gives an object per line, and bad input
ends in one line and status 2.  The digests are vmm/measure.py's.
"""

import argparse
import os
import sys

from softcvm import __version__
from softcvm.abi.cpu_types import CPU_SIGNATURES, cpu_signature
from softcvm.cli.errors import UsageError
from softcvm.cli.sizes import parse_number, parse_size, parse_u64

__all__ = ("DESCRIPTION", "EXAMPLES", "MODES", "VMM_TYPES", "add_arguments", "run")

DESCRIPTION = """\
Compute the launch digest that a SEV, SEV-ES or SEV-SNP guest will attest.
Takes sev-snp-measure's options and prints the same."""

EXAMPLES = """\
examples:
  softcvm measure --mode snp --vcpus 4 --vcpu-type EPYC-v4 --ovmf OVMF.fd
  softcvm measure --mode snp --vcpus 1,2,4,8 --vcpu-type EPYC-Milan --ovmf OVMF.fd \\
      --kernel bzImage --initrd initrd.img --append "console=ttyS0\""""

# The modes, and the names by which --verbose calls them.
MODES = {
    "sev": "SEV",
    "seves": "SEV_ES",
    "snp": "SEV_SNP",
    "snp:ovmf-hash": "SEV_SNP",
    "snp:svsm": "SEV_SNP_SVSM",
}
VMM_TYPES = ("QEMU", "ec2", "gce")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--version", action="version", version=f"softcvm {__version__}")
    add("-v", "--verbose", action="store_true", help="say what is printed")
    add("--mode", required=True, choices=tuple(MODES), help="kind of guest")
    add("--vcpus", metavar="N[,N...]", type=_counts, help="number of vCPUs; a digest for each")
    add("--vcpu-type", metavar="TYPE", help=f"type of vCPU ({', '.join(CPU_SIGNATURES)})")
    add("--vcpu-sig", metavar="VALUE", type=parse_number, help="CPUID signature of the vCPU")
    add("--vcpu-family", metavar="N", type=int, help="family of the vCPU, for its signature")
    add("--vcpu-model", metavar="N", type=int, help="model of the vCPU, for its signature")
    add(
        "--vcpu-stepping", metavar="N", type=int, help="stepping of the vCPU, for its signature"
    )
    add(
        "--vmm-type",
        metavar="VMM",
        default="QEMU",
        help=f"VMM ({', '.join(VMM_TYPES)}; default QEMU)",
    )
    add("--ovmf", metavar="PATH", required=True, help="firmware image")
    add("--kernel", metavar="PATH", help="kernel that the VMM boots directly")
    add("--initrd", metavar="PATH", help="its initrd")
    add("--append", metavar="CMDLINE", help="its command line")
    add(
        "--guest-features",
        metavar="VALUE",
        type=parse_u64,
        default=1,
        help="SEV_FEATURES of the guest (0x1: SNP; 0x21: with DebugSwap; default 0x1)",
    )
    add("--output-format", choices=("hex", "base64"), default="hex", help="default hex")
    add("--json", action="store_true", help="a JSON object for each digest")
    add("--snp-ovmf-hash", metavar="HEX", help="result of mode snp:ovmf-hash for the image")
    add("--dump-vmsa", action="store_true", help="write the measured VMSAs to vmsa<N>.bin")
    svsm = parser.add_argument_group(
        "mode snp:svsm", "needs --svsm and --vars-file or --vars-size"
    )
    svsm.add_argument("--svsm", metavar="PATH", help="SVSM image")
    size = svsm.add_mutually_exclusive_group()
    size.add_argument("--vars-size", metavar="SIZE", type=parse_size, help="size of OVMF_VARS")
    size.add_argument("--vars-file", metavar="PATH", help="the OVMF_VARS file")


def run(args: argparse.Namespace) -> int:
    from softcvm.cli.inputs import read_firmware
    from softcvm.vmm.measure import snp_ovmf_hash

    if args.mode == "snp:ovmf-hash":
        _print_hash(args, snp_ovmf_hash(read_firmware(args.ovmf)))
        return 0
    _check(args)
    signature = _signature(args)
    counts = args.vcpus or (None,)
    for count, digest in zip(counts, _digests(args, signature), strict=True):
        _print_digest(args, signature, count, digest)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What argparse cannot know: which options need, or exclude, which."""
    from softcvm.cli.inputs import check_direct_boot

    if args.vmm_type not in VMM_TYPES:
        raise UsageError(
            f"unknown VMM type {args.vmm_type!r} (there is {', '.join(VMM_TYPES)})"
        )
    check_direct_boot("--kernel", args.kernel, args.initrd, args.append)
    if args.mode == "sev":
        if args.dump_vmsa:
            raise UsageError("--dump-vmsa: no VMSA is measured in mode sev")
        args.vcpus = None
    elif args.vcpus is None:
        raise UsageError(f"mode {args.mode} needs --vcpus")
    if args.snp_ovmf_hash and args.mode != "snp":
        raise UsageError("--snp-ovmf-hash is for mode snp only")
    if args.mode == "snp:svsm":
        if args.vmm_type != "QEMU":
            raise UsageError(f"mode snp:svsm: only QEMU launches an SVSM, not {args.vmm_type}")
        if args.svsm is None or (args.vars_file is None and args.vars_size is None):
            raise UsageError("mode snp:svsm needs --svsm, and --vars-file or --vars-size")


def _signature(args: argparse.Namespace) -> int:
    """The vCPU's signature: from family, model and stepping, else as given, else by type.

    A family or a signature of 0 is none given, as for sev-snp-measure.
    """
    if args.vcpu_type is not None and args.vcpu_type not in CPU_SIGNATURES:
        known = ", ".join(CPU_SIGNATURES)
        raise UsageError(f"unknown vCPU type {args.vcpu_type!r} (there is {known})")
    if args.mode == "sev":
        return 0
    if args.vcpu_family:
        if args.vcpu_model is None or args.vcpu_stepping is None:
            raise UsageError("--vcpu-family needs --vcpu-model and --vcpu-stepping")
        try:
            return cpu_signature(args.vcpu_family, args.vcpu_model, args.vcpu_stepping)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if args.vcpu_sig:
        if not 0 < args.vcpu_sig < 1 << 32:
            raise UsageError(f"--vcpu-sig: {args.vcpu_sig:#x} is not a CPUID signature")
        return int(args.vcpu_sig)
    if args.vcpu_type is not None:
        return CPU_SIGNATURES[args.vcpu_type]
    if args.vmm_type == "QEMU":
        raise UsageError(
            f"mode {args.mode} needs --vcpu-type, or --vcpu-sig, or --vcpu-family, -model and -stepping"
        )
    return 0  # the others show a guest the same one whatever the vCPU


def _digests(args: argparse.Namespace, signature: int) -> list[bytes]:
    from softcvm.cli.inputs import kernel_hashes, naming, read_firmware
    from softcvm.vmm import measure
    from softcvm.vmm.vmsa import VmmType

    if args.mode == "snp:svsm":
        return _svsm_digests(args, signature)
    vmm_type = VmmType(args.vmm_type)
    ovmf_hash = _ovmf_hash(args.snp_ovmf_hash)
    image = read_firmware(args.ovmf)
    hashes = kernel_hashes(args.kernel, args.initrd, args.append)
    with naming(args.ovmf):
        if args.mode == "sev":
            return [measure.sev_launch_digest(image, hashes=hashes)]
        if args.mode == "seves":
            found = measure.seves_launch_digests(
                image, args.vcpus, signature, vmm_type=vmm_type, hashes=hashes
            )
            features = 0
        else:
            features = args.guest_features
            found = measure.launch_digests(
                image,
                args.vcpus,
                signature,
                guest_features=features,
                vmm_type=vmm_type,
                hashes=hashes,
                ovmf_hash=ovmf_hash,
            )
        if args.dump_vmsa:
            _dump(measure.snp_vmsas(image, max(args.vcpus), signature, features, vmm_type))
    return found


def _svsm_digests(args: argparse.Namespace, signature: int) -> list[bytes]:
    from softcvm.cli.inputs import naming, read_firmware
    from softcvm.vmm import measure

    if args.vars_file is not None:
        with naming(args.vars_file):
            vars_size = os.stat(args.vars_file).st_size
    else:
        vars_size = args.vars_size
    ovmf = read_firmware(args.ovmf)
    if vars_size == 0 or vars_size % 4096 or vars_size > ovmf.gpa:
        raise UsageError(
            f"OVMF_VARS of {vars_size} bytes: not a number of 4K pages below the image"
        )
    svsm = read_firmware(args.svsm, end=ovmf.gpa - vars_size)
    with naming(args.svsm):
        found = measure.svsm_launch_digests(ovmf, svsm, args.vcpus, signature)
        if args.dump_vmsa:
            _dump(measure.svsm_vmsas(svsm, max(args.vcpus), signature))
    if args.kernel is not None:
        print("softcvm measure: note: mode snp:svsm measures no kernel", file=sys.stderr)
    return found


def _dump(pages: list[bytes]) -> None:
    from softcvm.cli.inputs import naming

    for number, page in enumerate(pages):
        path = f"vmsa{number}.bin"
        with naming(path), open(path, "wb") as file:
            file.write(page)


def _print_digest(
    args: argparse.Namespace, signature: int, vcpus: int | None, digest: bytes
) -> None:
    shown = _encoded(args, digest)
    if args.json:
        _print_json(
            mode=args.mode,
            vmm_type=args.vmm_type,
            vcpus=vcpus,
            vcpu_sig=signature,
            launch_digest=shown,
        )
    elif args.verbose:
        print(f"Calculated {MODES[args.mode]} guest measurement: {shown}")
    else:
        print(shown)


def _print_hash(args: argparse.Namespace, digest: bytes) -> None:
    """sev-snp-measure prints this one in hex whatever the format, and so do we."""
    if args.json:
        _print_json(mode=args.mode, snp_ovmf_hash=digest.hex())
    else:
        print(digest.hex())


def _print_json(**fields: object) -> None:
    import json

    print(json.dumps(fields))


def _encoded(args: argparse.Namespace, digest: bytes) -> str:
    if args.output_format == "hex":
        return digest.hex()
    from base64 import b64encode

    return b64encode(digest).decode()


def _ovmf_hash(text: str | None) -> bytes | None:
    if not text:
        return None
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 48:
        raise UsageError(
            "--snp-ovmf-hash is not 48 bytes in hex, as mode snp:ovmf-hash prints it"
        )
    return digest


def _counts(text: str) -> tuple[int, ...]:
    """1 or 1,2,4; checked here so that a bad one is named with its option."""
    from softcvm.vmm.measure import check_vcpus

    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number, or several: 1,2,4"
        ) from None
    for count in counts:
        try:
            check_vcpus(count)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return counts
