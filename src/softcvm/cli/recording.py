"""`--trace FILE`: a machine's events, written down as they happen."""

from collections.abc import Iterator
from contextlib import contextmanager

from softcvm.cli.errors import OutputError
from softcvm.cli.inputs import naming
from softcvm.machine import Machine
from softcvm.sim.events import encode

__all__ = ("traced",)


@contextmanager
def traced(machine: Machine, path: str | None) -> Iterator[None]:
    """Every event of the machine as a line of JSON (docs/trace-format.md).  Without a path, nothing."""
    if path is None:
        yield
        return
    with naming(path):
        file = open(path, "w", encoding="ascii")  # noqa: SIM115 - closing can fail, too

    def write(event: tuple[object, ...]) -> None:
        # An OSError would look like one of the machine's system calls to the VMM.
        try:
            print(encode(event), file=file)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}") from error

    detach = machine.events.attach(write)
    try:
        yield
    finally:
        detach()
        try:
            file.close()
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}") from error
