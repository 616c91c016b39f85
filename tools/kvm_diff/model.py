"""The model's side: a fresh machine for each script."""

from softcvm import HostSignal, Machine
from softcvm.kernel.task import Rlimits
from tools.kvm_diff.play import Outcome, play
from tools.kvm_diff.script import NOFILE, Script

__all__ = ("play_on_model",)

_MEMORY = 64 << 20


def play_on_model(kernel: str, script: Script) -> list[Outcome]:
    """What the profile `kernel` answers, up to the first call that is not modelled."""
    sys = Machine(kernel=kernel, memory=_MEMORY).process(Rlimits(nofile=NOFILE))

    def peek(addr: int, length: int) -> bytes | None:
        try:
            return sys.load(addr, length)
        except HostSignal:
            return None

    return play(sys, script, peek)
