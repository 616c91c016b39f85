"""`softcvm exec`: run an unmodified program on a software host with SEV-SNP."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from softcvm import __version__
from softcvm.cli.errors import UsageError
from softcvm.cli.sizes import parse_size

if TYPE_CHECKING:
    from softcvm.attach.dram_memory import DramMemory
    from softcvm.machine import Machine

__all__ = ("DESCRIPTION", "EXAMPLES", "add_arguments", "run")

DESCRIPTION = """\
Run a program as if this machine had an AMD processor with SEV-SNP, and Linux guest_memfd
and private memory: /dev/kvm and /dev/sev are softcvm's, everything else is this machine's.
The program is not changed on disk, and needs neither root nor a kernel module."""

EXAMPLES = """\
examples:
  softcvm exec -- ./guest_memfd_test
  softcvm exec --kernel 6.12 --machine milan -- ./sev_init2_tests
  softcvm exec --trace run.json -- ./vmm; softcvm trace run.json

Exit status: the program's (128 and the signal's number if one ended it); 2 for bad input;
125 when softcvm itself cannot go on, 126 when the program cannot be executed, 127 when
there is none."""

_STATUS_OURS = 125
_MEMORY = 1 << 36
_SHADOWS = 1 << 28
"""Bytes behind DRAM for pages of SEV guests that the program maps too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--version", action="version", version=f"softcvm {__version__}")
    host = parser.add_argument_group("host")
    host.add_argument("--kernel", metavar="V", default="6.12", help="6.12, 6.18 or 7.3 (6.12)")
    host.add_argument("--machine", metavar="M", default="genoa", help="milan or genoa (genoa)")
    host.add_argument(
        "--memory",
        metavar="SIZE",
        type=parse_size,
        default=_MEMORY,
        help="DRAM of the host (64G); what is not used costs nothing",
    )
    add("--check", action="store_true", help="at the end, check the machine's invariants")
    add("--trace", metavar="FILE", help="write every event as a line of JSON")
    add("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM [ARG ...]")


def run(args: argparse.Namespace) -> int:
    argv = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not argv:
        raise UsageError("a program to run is needed: softcvm exec -- PROGRAM [ARG ...]")
    from softcvm.attach.dram_memory import DramMemory
    from softcvm.attach.kernel_abi import UnavailableError
    from softcvm.attach.start import ExecError
    from softcvm.attach.supervisor import Supervisor
    from softcvm.cli.recording import traced
    from softcvm.sim.errors import Unmodelled

    memory = DramMemory(args.memory + _SHADOWS)
    machine = _machine(args, memory)
    try:
        with traced(machine, args.trace):
            status = Supervisor(machine, memory).run(argv)
            if args.check and (wrong := _wrong(machine)):
                return _give_up("\n".join(wrong), _STATUS_OURS)
    except UnavailableError as error:
        return _give_up(str(error), _STATUS_OURS)
    except ExecError as error:
        return _give_up(str(error), error.status)
    except Unmodelled as error:
        text = f"not modelled: {error}\n(docs/support.md has what is; the program was ended)"
        return _give_up(text, _STATUS_OURS)
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def _wrong(machine: "Machine") -> list[str]:
    """What should not be once a program has ended: a sentence that is not true, and what outlived it."""
    from softcvm.invariants import check_all

    linux = machine.linux
    wrong = [
        f"violated: {checked.sentence}: {checked.violations[0].why}"
        for checked in check_all(machine, hostile=True)
        if not checked.held
    ]
    for what, left in (
        ("processes", linux.processes),
        ("VMs", linux.vm_list),
        ("guest_memfds", linux.gmem_inodes),
    ):
        if left:
            wrong.append(f"{len(left)} {what} outlived the program")
    return wrong


def _give_up(text: str, status: int) -> int:
    print(f"softcvm exec: {text}", file=sys.stderr)
    return status


def _machine(args: argparse.Namespace, memory: "DramMemory") -> "Machine":
    from softcvm.machine import Machine

    try:
        return Machine(args.kernel, args.machine, args.memory, backing=memory)
    except ValueError as error:
        raise UsageError(str(error)) from error
