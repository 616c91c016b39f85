"""Scenes of things that go wrong and are survived: each kind of fault once, told apart by its code.

Each scene takes a private, validated 2M page of its own and leaves it private and validated.
"""

from softcvm.abi.ghcb import PscOp
from softcvm.abi.insn import (
    Cpuid,
    Load,
    Pvalidate,
    PvalidateOut,
    Rdmsr,
    Rmpadjust,
    Rmpquery,
    RmpqueryOut,
    Store,
    Touch,
)
from softcvm.abi.rmp import PvalidateStatus, RmpadjustStatus, RmpPageSize, VmplPerm
from softcvm.abi.svm import VC_NOT_VALIDATED, ExitCode, GuestException, Msr, Vector
from softcvm.guest.boot_info import Extent
from softcvm.guest.checks import Check, expect
from softcvm.guest.ghcb import GuestSteps, PscRequest
from softcvm.guest.programs.sharing import keeps, pattern, write_patterns
from softcvm.guest.programs.vcpu import Vcpu
from softcvm.sim.addr import PAGE_SIZE

__all__ = (
    "implicit_conversion",
    "intercepts",
    "page_sizes",
    "permissions",
    "rescinded",
    "unaccepted",
)

_4K, _2M = RmpPageSize.PG_4K, RmpPageSize.PG_2M


def rescinded(vcpu: Vcpu, page: int) -> GuestSteps[None]:
    """Use of a page whose validation was given up: #VC 0x404; validated again it has its data."""
    gpa = page + 3 * PAGE_SIZE
    yield from write_patterns([gpa])
    yield from _pvalidate(vcpu, gpa, _4K, False, Check.UNVALIDATED)
    yield from _unvalidated(vcpu, Load(gpa, 8), Check.UNVALIDATED)
    yield from _unvalidated(vcpu, Store(gpa, b"lost"), Check.UNVALIDATED)
    yield from _pvalidate(vcpu, gpa, _4K, True, Check.UNVALIDATED)
    yield from keeps(vcpu, [gpa], Check.UNVALIDATED)


def unaccepted(vcpu: Vcpu, page: int) -> GuestSteps[None]:
    """Use of a page that became private and was not accepted: the same #VC, until it is."""
    gpa = page + 5 * PAGE_SIZE
    yield from vcpu.memory.set_shared([Extent(gpa, gpa + PAGE_SIZE)])
    yield from vcpu.ghcb.page_state_change([PscRequest(gpa, PscOp.PRIVATE)])
    yield from _unvalidated(vcpu, Load(gpa, 8), Check.UNVALIDATED)
    yield from _pvalidate(vcpu, gpa, _4K, True, Check.UNVALIDATED)
    yield from write_patterns([gpa])
    yield from keeps(vcpu, [gpa], Check.UNVALIDATED)


def page_sizes(vcpu: Vcpu, page: int) -> GuestSteps[None]:
    """PVALIDATE of one 4K page in a 2M page has it smashed; 2M on it then fails with SIZEMISMATCH.

    The first is invisible: the processor leaves for the hypervisor, which smashes, and tries again.
    """
    yield from write_patterns([page])
    out: PvalidateOut = yield Pvalidate(page, _4K, True)
    yield from expect(vcpu.console, not out.code and out.cf, Check.DOUBLE_VALIDATION, out)
    out = yield Pvalidate(page, _2M, True)
    mismatch = out.code == PvalidateStatus.FAIL_SIZEMISMATCH
    yield from expect(vcpu.console, mismatch, Check.SIZEMISMATCH, out)
    out = yield Pvalidate(page + PAGE_SIZE, _2M, True)
    yield from expect(
        vcpu.console, out.code == PvalidateStatus.FAIL_INPUT, Check.BAD_INPUT, out
    )
    yield from keeps(vcpu, [page], Check.SIZEMISMATCH)


def permissions(vcpu: Vcpu, page: int) -> GuestSteps[None]:
    """RMPADJUST: nobody changes an equal or higher privilege; a lower one may be given and taken."""
    gpa = page + 7 * PAGE_SIZE
    code: int = yield Rmpadjust(gpa, _4K, 0, VmplPerm.READ)
    yield from expect(
        vcpu.console, code == RmpadjustStatus.FAIL_PERMISSION, Check.PERMISSION, code
    )
    for perms in (VmplPerm.READ | VmplPerm.WRITE, VmplPerm(0)):
        code = yield Rmpadjust(gpa, _4K, 1, perms)
        yield from expect(vcpu.console, code == RmpadjustStatus.SUCCESS, Check.VMPL, code)
        out: RmpqueryOut = yield Rmpquery(gpa, 1)
        yield from expect(vcpu.console, out.perms == perms and not out.code, Check.VMPL, out)


def implicit_conversion(vcpu: Vcpu, page: int) -> GuestSteps[None]:
    """Use pages with the other C-bit without asking for a conversion first.

    Private to shared: the page is converted under the access, and what it held is gone.  Shared to private:
    the page comes back unvalidated, #VC.  A hypervisor that does not convert implicitly never lets go on.
    """
    gpa = page + 9 * PAGE_SIZE
    yield from write_patterns([gpa])
    yield Store(gpa, b"in the open", c=False)
    seen = yield Load(gpa, 11, c=False)
    yield from expect(vcpu.console, seen == b"in the open", Check.IMPLICIT_CONVERSION, seen)
    yield from _unvalidated(vcpu, Touch(gpa), Check.IMPLICIT_CONVERSION)
    yield from _pvalidate(vcpu, gpa, _4K, True, Check.IMPLICIT_CONVERSION)
    after = yield Load(gpa + 0x40, 64)
    yield from expect(
        vcpu.console, after != pattern(gpa), Check.IMPLICIT_CONVERSION, "data survived"
    )
    yield from write_patterns([gpa])
    yield from keeps(vcpu, [gpa], Check.IMPLICIT_CONVERSION)


def intercepts(vcpu: Vcpu) -> GuestSteps[None]:
    """What the hypervisor would have emulated comes to the guest as #VC first."""
    for op, code in ((Cpuid(0x8000_001F), ExitCode.CPUID), (Rdmsr(Msr.SYSCFG), ExitCode.MSR)):
        saw: object = "no #VC"
        try:
            yield op
        except GuestException as exception:
            saw = exception
            if exception.vector is Vector.VC and exception.error_code == code:
                continue
        yield from expect(vcpu.console, False, Check.INTERCEPT, saw)


def _unvalidated(vcpu: Vcpu, op: Load | Store | Touch, check: Check) -> GuestSteps[None]:
    """The access ends in #VC 0x404."""
    saw: object = "no #VC"
    try:
        yield op
    except GuestException as exception:
        saw = exception
        if exception.vector is Vector.VC and exception.error_code == VC_NOT_VALIDATED:
            return
    yield from expect(vcpu.console, False, check, saw)


def _pvalidate(
    vcpu: Vcpu, gpa: int, size: RmpPageSize, validate: bool, check: Check
) -> GuestSteps[None]:
    """PVALIDATE that changes something."""
    out: PvalidateOut = yield Pvalidate(gpa, size, validate)
    yield from expect(vcpu.console, not out.code and not out.cf, check, out)
