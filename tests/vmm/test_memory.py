"""vmm/memory.py on the software host: slots, conversions, and what a conversion frees."""

from collections.abc import Iterator

import pytest

from softcvm.sim.addr import PAGE_SIZE
from softcvm.vmm.errors import VmmError
from softcvm.vmm.memory import GuestMemory
from softcvm.vmm.vmm import Vmm
from tests.vmm.guests import MIB, config, machine

GIB = 1 << 30


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with Vmm(machine().process(), config(memory=4 * GIB)) as vmm:
        yield vmm.memory


def test_user_addresses_are_as_far_from_a_2m_boundary_as_the_guests(
    memory: GuestMemory,
) -> None:
    for slot in memory.slots:
        assert (slot.hva - slot.region.gpa) % (2 * MIB) == 0, slot.region.name


def test_a_range_over_two_slots_comes_in_pieces(memory: GuestMemory) -> None:
    low = memory.slots[0].region
    pieces = list(memory.pieces(low.end - PAGE_SIZE, 0x20_0000))
    assert [length for _, _, length in pieces] == [
        PAGE_SIZE,
        0x20_0000 - PAGE_SIZE - 0x2_0000,  # the video hole lies between
    ]


def test_a_range_that_is_no_memory_is_not_converted_at_all(memory: GuestMemory) -> None:
    assert not memory.convert(memory.slots[0].region.end - PAGE_SIZE, 2 * PAGE_SIZE, False)
    assert memory.conversions == {"to private": 0, "to shared": 0}


def test_shared_contents_are_gone_after_a_conversion_there_and_back(
    memory: GuestMemory,
) -> None:
    gpa = 16 * MIB
    assert memory.convert(gpa, PAGE_SIZE, False)
    memory.write(gpa, b"plain text")
    assert memory.read(gpa, 10) == b"plain text"
    assert memory.convert(gpa, PAGE_SIZE, True)
    assert memory.read(gpa, 10) == bytes(10)


def test_an_address_in_no_slot_is_an_error(memory: GuestMemory) -> None:
    with pytest.raises(VmmError, match="not in one memslot"):
        memory.hva(3 * GIB, PAGE_SIZE)
