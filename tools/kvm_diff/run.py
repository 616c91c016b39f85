"""One comparison: scripts of a seed until enough calls were made, and what came of it."""

import platform
from collections import Counter
from dataclasses import dataclass, field

from tools.kvm_diff.compare import Difference, first_difference
from tools.kvm_diff.generate import Generator
from tools.kvm_diff.model import play_on_model
from tools.kvm_diff.real import RealKernel
from tools.kvm_diff.script import Script, as_python
from tools.kvm_diff.shrink import shrink

__all__ = ("Report", "compare")


@dataclass
class Report:
    """What was compared.  `answers` counts, by call, how often each kind of answer came."""

    kernel: str
    seed: int
    lacking: list[str]
    scripts: int = 0
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    unmodelled: Counter[str] = field(default_factory=Counter)
    differences: list[tuple[Script, Difference]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.answers.values())

    def as_text(self) -> str:
        lines = [
            f"Linux {platform.release()} against profile {self.kernel}, seed {self.seed}: "
            f"{self.calls} calls in {self.scripts} scripts, {len(self.differences)} differences",
            "calls compared, with their answers:",
        ]
        for label, kinds in sorted(self.answers.items()):
            told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
            lines.append(f"  {label}: {told}")
        if self.lacking:
            lines.append("not compared, because this kernel lacks them:")
            lines += [f"  {name}" for name in self.lacking]
        if self.unmodelled:
            lines.append("scripts that ended early, because the model refuses:")
            lines += [f"  {why}: {count}" for why, count in self.unmodelled.most_common()]
        for script, difference in self.differences:
            lines += ["", *_told(script, difference)]
        return "\n".join(lines)


def compare(
    real: RealKernel, kernel: str, seed: int, calls: int, stop_after: int = 5
) -> Report:
    """At least `calls` calls, or as many as it takes to find `stop_after` differences."""
    features = real.features()
    report = Report(kernel, seed, features.lacking())
    generator = Generator(seed, features)

    def test(script: Script) -> Difference | None:
        return first_difference(script, real.play(script), play_on_model(kernel, script))

    seen: set[tuple[str, str, str]] = set()
    while report.calls < calls and len(report.differences) < stop_after:
        script = generator.script()
        theirs, ours = real.play(script), play_on_model(kernel, script)
        report.scripts += 1
        found = first_difference(script, theirs, ours)
        until = len(ours) if found is None else found.at
        for call, outcome in zip(script.calls[:until], ours, strict=False):
            if outcome.unmodelled:
                report.unmodelled[outcome.text] += 1
                break
            kinds = report.answers.setdefault(call.label, Counter())
            kinds[_kind(outcome.text)] += 1
        if found is not None:
            key = (found.label, _kind(found.real), _kind(found.model))
            if key not in seen:
                seen.add(key)
                report.differences.append(shrink(script, found, test))
    return report


def _kind(text: str) -> str:
    """An errno or a signal by name, everything else as success."""
    word = text.split()[0]
    return word if word.startswith(("E", "SIG")) else "ok"


def _told(script: Script, difference: Difference) -> list[str]:
    answers = {difference.at: f"real: {difference.real}; model: {difference.model}"}
    return [
        f"{difference.label}: the real kernel says {difference.real}, "
        f"the model {difference.model}",
        as_python(script, answers).rstrip(),
    ]
