"""Random scripts on the real kernel and on the model: 0 differences (tools/kvm_diff).

The first tests need no /dev/kvm: they hold the tool itself against two profiles that are known
to differ.  `pytest -m long -k real_kernel -s` prints what was compared.
"""

import pytest

from softcvm import Machine
from tests.conftest import Require
from tools.kvm_diff.compare import Difference, first_difference
from tools.kvm_diff.generate import Features, Generator
from tools.kvm_diff.model import play_on_model
from tools.kvm_diff.play import Player
from tools.kvm_diff.real import nearest_profile, real_kernel, why_not
from tools.kvm_diff.run import compare
from tools.kvm_diff.script import ARENA, PAGE, Script, Struct, as_python
from tools.kvm_diff.shrink import shrink


def older_and_newer(script: Script) -> Difference | None:
    """6.12 has no mmap of guest_memfd; 6.18 has."""
    return first_difference(
        script, play_on_model("6.18", script), play_on_model("6.12", script)
    )


def a_difference() -> tuple[Script, Difference]:
    generator = Generator(7, Features())
    for _ in range(50):
        script = generator.script()
        found = older_and_newer(script)
        if found is not None and found.label == "KVM_CREATE_GUEST_MEMFD":
            return shrink(script, found, older_and_newer)
    raise AssertionError("50 scripts without a gmem that only 6.18 makes")


def test_a_difference_is_shrunk_to_the_calls_that_it_needs() -> None:
    script, found = a_difference()
    assert [call.label for call in script.calls] == [
        "open",
        "KVM_CREATE_VM",
        "KVM_CREATE_GUEST_MEMFD",
    ]
    assert (found.at, found.model) == (2, "EINVAL")
    assert older_and_newer(script) == found


def test_a_script_is_printed_as_python_that_repeats_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, _ = a_difference()
    text = as_python(script, {2: "differs"})
    assert text.rstrip().endswith("# differs")
    on_model = 'Player(Machine(kernel="6.12", memory=256 << 20).process())'
    exec(text.replace("Player(HostSys())", on_model), {})
    assert capsys.readouterr().out.split() == [
        *("open:", "3", "ioctl:", "4"),
        *("ioctl:", "EINVAL"),
    ]


def test_the_same_seed_writes_the_same_scripts() -> None:
    first, second = Generator(3, Features()), Generator(3, Features())
    assert [first.script() for _ in range(5)] == [second.script() for _ in range(5)]


def test_no_script_asks_the_host_for_much() -> None:
    """What a script could make a kernel allocate: private memory by a long file or fallocate,
    memslot metadata by a large slot.  And no vCPU runs."""
    generator = Generator(11, Features())
    for call in (call for _ in range(300) for call in generator.script().calls):
        structs = [arg for arg in call.args if isinstance(arg, Struct)]
        fields = dict(structs[0].fields) if structs else {}
        match call.label:
            case "KVM_CREATE_GUEST_MEMFD" if call.method == "ioctl":
                assert fields["size"] <= 32 * PAGE  # type: ignore[operator]
            case "KVM_SET_USER_MEMORY_REGION" | "KVM_SET_USER_MEMORY_REGION2" if fields:
                size = fields["memory_size"]
                assert isinstance(size, int)
                assert size <= 32 * PAGE or size >= 1 << 43
            case "mmap":
                addr, length = (arg for arg in call.args[:2] if isinstance(arg, int))
                if call.method == "mmap" and length < 1 << 47 and addr < 1 << 46:
                    assert addr >= ARENA
                    assert addr + length <= ARENA + (1 << 41)
            case "KVM_RUN":
                assert call.args[2] == 1
            case _:
                pass


def test_an_unwatched_page_is_compared_by_the_loads_of_the_script() -> None:
    machine = Machine(kernel="6.18", memory=64 << 20).process()
    player = Player(machine)
    mapped = ("mmap", (ARENA, PAGE, 3, 0x32, -1, 0))
    script = Generator(1, Features()).script()
    call = script.calls[0]._replace(label="mmap", method=mapped[0], args=mapped[1])
    assert player.do(call) == hex(ARENA)
    load = call._replace(label="load", method="load", args=(ARENA, 8))
    assert player.do(load) == "data 00*8"
    assert player.do(load._replace(args=(ARENA - 8, 8))) == f"SIGSEGV at {ARENA - 8:#x}"


def against_the_real_kernel(require: Require, seed: int, calls: int) -> None:
    require("kvm", not why_not(), why_not())
    with real_kernel() as real:
        report = compare(real, nearest_profile(), seed, calls)
    print(report.as_text())
    assert report.calls >= calls
    assert not report.differences, report.as_text()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_real_kernel_agrees(require: Require, seed: int) -> None:
    against_the_real_kernel(require, seed, 3_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [101, 102, 103])
def test_the_real_kernel_agrees_over_100_000_calls(require: Require, seed: int) -> None:
    against_the_real_kernel(require, seed, 100_000)
