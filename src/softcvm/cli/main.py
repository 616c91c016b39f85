"""Entry point of the `softcvm` command: picks the sub-command and turns its end into an exit status.

A sub-command is a module with `add_arguments(parser)` and `run(args) -> exit status`, and with DESCRIPTION
and EXAMPLES for its --help.  Only the chosen one is imported, and nothing here or at the top of such a module
imports what --help can do without.

Exit status: 0 as asked; 1 the command's own finding, or something that is not modelled, or output that could
not be written; 2 bad input, one line on stderr; 130 interrupted; 141 nobody reads the output.  Anything else
is a bug: its traceback is shown.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence

from softcvm import __version__
from softcvm.cli.errors import OutputError, UsageError, printable
from softcvm.sim.errors import Unmodelled

TYPE_CHECKING = (
    False  # type checkers read it as true; typing itself costs milliseconds of start-up
)
if TYPE_CHECKING:
    from typing import NoReturn, TextIO

__all__ = ("COMMANDS", "Parser", "main")

COMMANDS = {
    "boot": (
        "softcvm.cli.boot",
        "launch an SEV-SNP guest and run its memory life, launch to teardown",
    ),
    "measure": (
        "softcvm.cli.measure",
        "compute the launch digest of a guest, as sev-snp-measure does",
    ),
    "exec": (
        "softcvm.cli.exec",
        "run an unmodified program as if this machine had SEV-SNP",
    ),
    "selftests": (
        "softcvm.cli.selftests",
        "run the kernel's own KVM selftests on the software host",
    ),
    "trace": (
        "softcvm.cli.trace",
        "list what a recorded run did, or what happened to one page of it",
    ),
}
"""Name -> (module, what --help says)."""

_STATUS_INTERRUPTED = 128 + 2  # SIGINT, SIGPIPE: as a shell would say it
_STATUS_NO_READER = 128 + 13
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> "NoReturn":
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    name = "softcvm"
    _prepare_streams()
    try:
        if argv and argv[0] in COMMANDS:
            name = f"softcvm {argv[0]}"
            status = _run(name, COMMANDS[argv[0]][0], argv[1:])
        else:
            status = _no_command(argv)
        sys.stdout.flush()
    except UsageError as error:
        _complain(name, str(error))
        return 2
    except OutputError as error:
        _complain(name, str(error))
        return 1
    except Unmodelled as error:
        _complain(name, f"not modelled: {error}")
        return 1
    except KeyboardInterrupt:
        return _STATUS_INTERRUPTED
    except BrokenPipeError:
        _give_up_on(sys.stdout)
        return _STATUS_NO_READER
    except OSError as error:
        # Other files are named by those who open them.
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        _give_up_on(sys.stdout)
        _complain(name, f"standard output: {error.strerror}")
        return 1
    return status


def _prepare_streams() -> None:
    """Streams that take any text: a closed one is None, and stdout refuses what its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    elif sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open to the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _give_up_on(stream: "TextIO") -> None:
    """Python flushes its streams once more when it ends, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(name: str, module_name: str, argv: Sequence[str]) -> int:
    from importlib import import_module

    module = import_module(module_name)
    parser = Parser(
        prog=name,
        description=module.DESCRIPTION,
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        args = parser.parse_args(argv)
    except SystemExit:  # --help, --version: done; a bad argument is a UsageError
        return 0
    status: int = module.run(args)
    return status


def _no_command(argv: Sequence[str]) -> int:
    commands = "\n".join(f"  {name:<9} {line}" for name, (_, line) in COMMANDS.items())
    parser = Parser(
        prog="softcvm",
        usage="softcvm [-h] [--version] COMMAND ...",
        description="A software host for confidential VMs: AMD SEV-SNP and KVM private memory\n"
        "without the hardware.",
        epilog=f"commands (each has its own --help):\n{commands}\n\n"
        "example:\n  softcvm boot --vcpus 4 --memory 4G\n"
        "  softcvm measure --mode snp --vcpus 4 --vcpu-type EPYC-v4 --ovmf OVMF.fd",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"softcvm {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv[:1])
    except SystemExit:  # --help, --version
        return 0
    if args.command is None:
        raise UsageError(f"a command is needed: {', '.join(COMMANDS)} (see softcvm --help)")
    raise UsageError(f"no command {args.command!r}: there is {', '.join(COMMANDS)}")


def _complain(name: str, text: str) -> None:
    try:
        print(f"{name}: {printable(text)}", file=sys.stderr)
    except OSError:  # nowhere to say it: the exit status still does
        _give_up_on(sys.stderr)
