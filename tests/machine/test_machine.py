"""The machine as a whole: boot, census, snapshot, fingerprint, determinism, and that nothing is
lost."""

import subprocess
import sys as python
from collections.abc import Iterator

import pytest

from softcvm import Machine
from softcvm.abi.kvm.memory import VmType
from softcvm.sim.events import encode
from softcvm.sim.state import State, unlisted
from tests.uapi.calls import KEEP_SIZE, MIB, PAGE, PUNCH_HOLE, VmCalls, anon, errno_of

BUSY = """
from softcvm import Machine
from softcvm.sim.events import encode
from tests.machine.test_machine import busy
machine = Machine(memory=256 << 20, collector=lambda event: print(encode(event)))
busy(machine)
machine.teardown()
print(machine.fingerprint())
"""


def busy(machine: Machine) -> VmCalls:
    """A bit of everything, left open."""
    process = machine.process()
    calls = VmCalls(process)
    gmem = calls.private_slot(size=8 * MIB)
    vcpu = calls.vcpu()
    calls.prefault(vcpu, 0, 8 * MIB)
    calls.attributes(MIB, MIB, 0)
    calls.prefault(vcpu, MIB, 2 * PAGE)
    process.fallocate(gmem, KEEP_SIZE | PUNCH_HOLE, 4 * MIB, MIB)
    process.store(anon(process, 4 * PAGE), b"some bytes")
    assert errno_of(lambda: calls.attributes(1, 1, 1)) == "EINVAL"
    VmCalls(machine.process(), VmType.SNP).gmem()
    return calls


@pytest.mark.parametrize("cpu", ["milan", "genoa"])
@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_every_machine_boots_with_snp_on(kernel: str, cpu: str) -> None:
    machine = Machine(kernel, cpu, 256 * MIB)
    census = machine.census()
    assert sum(census.values()) == 256 * MIB // PAGE
    assert set(census) == {"HYPERVISOR", "HV_FIXED", "FIRMWARE"}
    assert machine.linux.kvm_x86_ops.supported_vm_types() >> VmType.SNP & 1


def test_the_default_machine_has_a_tebibyte_and_costs_nothing() -> None:
    machine = Machine()
    assert sum(machine.census().values()) == 1 << 28
    assert len(machine.rmp.map) < 20


@pytest.mark.parametrize(
    "wrong",
    [{"cpu": "z80"}, {"kernel": "2.4"}, {"memory": 4097}, {"memory": 0}, {"memory": 1 << 60}],
)
def test_a_machine_that_there_is_none_of(wrong: dict[str, str | int]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Machine(**wrong)  # type: ignore[arg-type]


def test_everything_comes_back_when_everybody_left() -> None:
    machine = Machine(memory=256 * MIB)
    free, census = machine.linux.page_alloc.free_pages, machine.census()
    busy(machine)
    assert machine.linux.page_alloc.free_pages < free
    machine.teardown()
    assert machine.linux.page_alloc.free_pages == free
    assert machine.census() == census
    assert not machine.linux.vm_list
    assert not machine.linux.processes


def test_a_snapshot_is_equal_and_independent() -> None:
    machine = Machine(memory=256 * MIB)
    busy(machine)
    copy = machine.snapshot()
    assert copy.fingerprint() == machine.fingerprint()
    before = copy.fingerprint()
    machine.teardown()
    assert copy.fingerprint() == before != machine.fingerprint()
    copy.teardown()
    assert copy.fingerprint() == machine.fingerprint()


def test_a_difference_anywhere_changes_the_fingerprint() -> None:
    prints = set()
    for change in ("nothing", "byte", "attribute", "page", "fd"):
        machine = Machine(memory=256 * MIB)
        calls = busy(machine)
        match change:
            case "byte":
                machine.linux.soc.dram.write(0x500_0000, b"x")
            case "attribute":
                calls.attributes(6 * MIB, PAGE, 0)
            case "page":
                calls.sys.fallocate(calls.fds[0], KEEP_SIZE, 4 * MIB, PAGE)
            case "fd":
                calls.sys.open("/dev/kvm")
            case _:
                pass
        prints.add(machine.fingerprint())
    assert len(prints) == 5


def _states(root: object, seen: set[int]) -> Iterator[State]:
    if id(root) in seen:
        return
    seen.add(id(root))
    if isinstance(root, State):
        yield root
        children = [
            getattr(root, n, None) for k in type(root).__mro__ for n in vars(k).get("saved", ())
        ]
    elif isinstance(root, dict):
        children = list(root.values())
    elif isinstance(root, list | tuple):
        children = list(root)
    else:
        return
    for child in children:
        yield from _states(child, seen)


def test_no_attribute_is_neither_saved_nor_called_derived() -> None:
    machine = Machine(memory=256 * MIB)
    busy(machine)
    found = {type(s).__name__: unlisted(s) for s in _states(machine, set())}
    assert len(found) > 15
    assert {name: names for name, names in found.items() if names} == {}


def test_same_inputs_give_the_same_bytes_whatever_the_hash_seed() -> None:
    outs = [
        subprocess.run(
            [python.executable, "-c", BUSY],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "src:."},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outs[0] == outs[1]
    assert outs[0].count(b"\n") > 50


def test_a_collector_sees_the_boot_and_can_leave() -> None:
    seen: list[str] = []
    machine = Machine(memory=256 * MIB, collector=lambda e: seen.append(encode(e)))
    assert any('"RmpTransition"' in line for line in seen)
    detach = machine.events.attach(lambda e: seen.append("second"))
    machine.process().open("/dev/kvm")
    assert seen[-1] == "second"
    detach()
    machine.process().open("/dev/kvm")
    assert seen[-1] != "second"
