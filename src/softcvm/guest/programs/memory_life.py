"""The default program: the whole life of a guest's memory, from launch to the end of the guest.

Accepts all RAM with full page-state buffers, writes and re-reads patterns, exchanges data with a device
through bounce buffers, has 2M pages smashed and rejoins them, provokes each kind of fault and survives,
starts and stops its other processors, then asks for termination.  Each paragraph says on the console what came of it, so that a line there is a
point where the guest is at rest.
"""

from collections.abc import Callable

from softcvm.abi.insn import Program, Touch
from softcvm.guest.boot_info import BootInfo, Extent, free_of, subtract
from softcvm.guest.checks import Check
from softcvm.guest.ghcb import GuestSteps, TermSet, terminate
from softcvm.guest.memory import PMD_SIZE
from softcvm.guest.programs import faults, processors, sharing
from softcvm.guest.programs.vcpu import Vcpu, bring_up, ghcb_pages

__all__ = ("LAB_SIZE", "lab", "memory_life")

_LAB_PAGES = 5
LAB_SIZE = _LAB_PAGES * PMD_SIZE
"""RAM that the experiments need: some 2M pages in a row, none of them launched."""


def lab(info: BootInfo) -> Extent:
    """Where the experiments are made.  Raises ValueError when the guest is too small for them."""
    free = subtract(info.unaccepted(), (ghcb_pages(info),))
    found = free_of(free, LAB_SIZE, PMD_SIZE)
    if found is None:
        raise ValueError(
            f"no {LAB_SIZE >> 20} MiB of RAM in a row, aligned to 2 MiB and not used by the firmware"
        )
    return found


def memory_life(info: BootInfo) -> Callable[[int], Program]:
    """The program of each vCPU.  Raises ValueError when the guest has too little RAM for it."""
    region = lab(info)

    def program(vcpu_id: int) -> Program:
        if vcpu_id:
            return processors.application_processor(info, vcpu_id, region)
        return _boot_processor(info, vcpu_id)

    return program


def _boot_processor(info: BootInfo, vcpu_id: int) -> Program:
    vcpu = yield from bring_up(info, vcpu_id)
    yield from vcpu.console.line(
        f"up: C-bit {vcpu.cpuid.c_bit}, {len(vcpu.cpuid.entries)} CPUID entries, "
        f"hypervisor features {int(vcpu.features):#x}"
    )
    accepted = yield from _accept(vcpu)
    yield from _patterns(vcpu, accepted)
    yield from _experiments(vcpu)
    if info.vcpus > 1:
        count = yield from processors.start_and_stop(vcpu, lab(info))
        yield from vcpu.console.line(f"started and stopped {count} more vCPUs")
    yield from vcpu.console.line("done")
    yield from terminate(TermSet.SOFTCVM, Check.PASSED)


def _accept(vcpu: Vcpu) -> GuestSteps[tuple[Extent, ...]]:
    """All RAM that is neither launched nor shared for good."""
    extents = subtract(vcpu.info.unaccepted(), (ghcb_pages(vcpu.info),))
    yield from vcpu.memory.set_private(extents)
    pages = sum(extent.pages for extent in extents)
    yield from vcpu.console.line(
        f"accepted {pages} pages, {vcpu.memory.huge} as 2M, "
        f"{vcpu.memory.sizemismatches} size mismatches"
    )
    return extents


def _patterns(vcpu: Vcpu, accepted: tuple[Extent, ...]) -> GuestSteps[None]:
    """Private memory keeps what is written, and launched pages can be used as they are."""
    pages = sharing.sample_pages(accepted)
    yield from sharing.write_patterns(pages)
    yield from sharing.keeps(vcpu, pages, Check.MEMORY_KEEPS_DATA)
    for extent in (*accepted, *vcpu.info.launched):
        yield Touch(extent.start, extent.pages)
    yield from vcpu.console.line(f"wrote and read back {len(pages)} pages")


def _experiments(vcpu: Vcpu) -> GuestSteps[None]:
    pages = range(lab(vcpu.info).start, lab(vcpu.info).end, PMD_SIZE)
    say = vcpu.console.line
    shared = yield from sharing.bounce_buffers(vcpu, pages[0])
    yield from say(f"exchanged {shared} bounce buffers with a device")
    huge = yield from sharing.rejoin(vcpu, pages[0])
    yield from say(f"shared and took back a smashed 2M page: {'2M' if huge else '4K'} again")
    smashed, unsmashed = yield from sharing.smash(vcpu, pages[1])
    sizes = tuple("2M" if size else "4K" for size in (smashed, unsmashed))
    yield from say(f"asked for PSMASH and UNSMASH: RMP entries {sizes[0]}, then {sizes[1]}")
    yield from faults.page_sizes(vcpu, pages[2])
    yield from faults.rescinded(vcpu, pages[2])
    yield from faults.permissions(vcpu, pages[2])
    yield from faults.unaccepted(vcpu, pages[3])
    yield from faults.intercepts(vcpu)
    yield from say(
        "survived #VC 0x404, 0x72 and 0x7c, SIZEMISMATCH, FAIL_INPUT, FAIL_PERMISSION"
    )
    yield from faults.implicit_conversion(vcpu, pages[4])
    yield from say("converted a page by using it, both ways")
