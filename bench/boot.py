"""A guest's whole life as its memory grows."""

from contextlib import redirect_stdout
from io import StringIO

from bench.sides import Bench, Side, timed
from softcvm.cli.main import main

__all__ = ("BENCHES",)


def _boot(memory: str) -> Side:
    def call() -> None:
        with redirect_stdout(StringIO()):
            status = main(["boot", "--memory", memory, "--json"])
        if status:
            raise RuntimeError(f"softcvm boot --memory {memory}: exit status {status}")

    return timed(call)


BENCHES = (
    Bench(
        "boot-64g",
        "softcvm boot --memory 64G",
        "softcvm boot --memory 1G",
        3.0,
        lambda: (_boot("64G"), _boot("1G")),
    ),
)
