"""Legacy SEV guests: what firmware keeps of one, its hold on an ASID, and its end.

[SEV-API-55766 r3.24; ASPFW].  Owns SevGuest, ACTIVATE, DEACTIVATE, DECOMMISSION and GUEST_STATUS; launching
is sev_launch.py.  A legacy guest is named by a handle and lives in firmware's own memory: no page of the
host's holds it, and the RMP knows nothing of it.

LIFE is the table of states; the states of a migration are not in it, because SEND and RECEIVE are not
modelled.  DEACTIVATE leaves the key in the memory controllers: only the next ACTIVATE of the ASID
overwrites it.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from softcvm.abi.sev_firmware import (
    SevActivate,
    SevDeactivate,
    SevDecommission,
    SevGuestPolicy,
    SevGuestState,
    SevGuestStatus,
)
from softcvm.abi.snp_firmware import SevCmd, SnpStatus
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.memenc import Key
from softcvm.hw.psp.keys import memory_key_material
from softcvm.hw.psp.operands import Refused
from softcvm.sim.state import State

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = (
    "LIFE",
    "SEV_GUEST_COUNT_MAX",
    "LaunchDigest",
    "SevGuest",
    "sev_activate",
    "sev_deactivate",
    "sev_decommission",
    "sev_guest_status",
    "sev_release_guests",
    "working_guest",
)

SEV_GUEST_COUNT_MAX: Final = 1024

LIFE: Final[Mapping[tuple[SevGuestState, SevCmd], SevGuestState]] = {
    (SevGuestState.UNINIT, SevCmd.LAUNCH_START): SevGuestState.LUPDATE,
    (SevGuestState.LUPDATE, SevCmd.LAUNCH_UPDATE_DATA): SevGuestState.LUPDATE,
    (SevGuestState.LUPDATE, SevCmd.LAUNCH_UPDATE_VMSA): SevGuestState.LUPDATE,
    (SevGuestState.LUPDATE, SevCmd.LAUNCH_MEASURE): SevGuestState.LSECRET,
    (SevGuestState.LSECRET, SevCmd.LAUNCH_SECRET): SevGuestState.LSECRET,
    (SevGuestState.LSECRET, SevCmd.LAUNCH_FINISH): SevGuestState.RUNNING,
}
"""A launch command that is not here for a state is INVALID_GUEST_STATE; the others take any state."""


class LaunchDigest:
    """SHA-256 over everything that was launched so far, in the order of the commands."""

    __slots__ = ("_sha",)

    def __init__(self) -> None:
        self._sha = sha256()

    def update(self, data: bytes) -> None:
        self._sha.update(data)

    def digest(self) -> bytes:
        return self._sha.digest()

    def __deepcopy__(self, memo: object) -> "LaunchDigest":
        copy = LaunchDigest()
        copy._sha = self._sha.copy()
        return copy

    def state(self) -> tuple[bytes]:
        return (self.digest(),)


class SevGuest(State):
    """tek, tik: transport keys; zeroes for a guest launched without its owner's session."""

    saved = (
        "handle",
        "policy",
        "state",
        "asid",
        "vek_seed",
        "tek",
        "tik",
        "launch_digest",
        "measurement",
    )

    def __init__(self, handle: int, policy: int, vek_seed: bytes) -> None:
        self.handle = handle
        self.policy = policy
        self.state = SevGuestState.LUPDATE
        self.asid = 0
        """0 while it is not activated."""
        self.vek_seed = vek_seed
        self.tek = bytes(16)
        self.tik = bytes(16)
        self.launch_digest = LaunchDigest()
        self.measurement = b""
        """MEASURE of LAUNCH_MEASURE, which authenticates secrets."""

    @property
    def es(self) -> bool:
        return bool(self.policy & SevGuestPolicy.ES)

    def next_state(self, command: SevCmd) -> SevGuestState | None:
        return LIFE.get((self.state, command))


def working_guest(psp: "Psp", handle: int) -> SevGuest:
    """The guest that a command names.  Refused: INVALID_PLATFORM_STATE, then INVALID_GUEST."""
    if psp.sev_state is not PlatformState.WORKING:
        raise Refused(SnpStatus.INVALID_PLATFORM_STATE)
    guest = psp.sev_guests.get(handle)
    if guest is None:
        raise Refused(SnpStatus.INVALID_GUEST)
    return guest


def sev_activate(psp: "Psp", cmd: SevActivate) -> SnpStatus:
    soc, asids, asid = psp.soc, psp.asids, cmd.asid
    # STATE
    guest = working_guest(psp, cmd.handle)
    # ASID
    if not 0 < asid <= soc.profile.max_asid:
        return SnpStatus.INVALID_ASID
    if asids.taken(asid):
        return SnpStatus.ASID_OWNED
    if guest.asid:
        return SnpStatus.ACTIVE
    if asid in asids.dirty:
        return SnpStatus.DFFLUSH_REQUIRED
    if guest.es is not (asid < soc.profile.min_sev_asid):
        return SnpStatus.INVALID_ASID
    # OUTPUT
    soc.keys[asid] = Key(memory_key_material(guest.vek_seed, soc.profile.xts_key_bytes))
    asids.allocate(asid)
    if guest.state is SevGuestState.RUNNING:
        asids.use(asid)
    guest.asid = asid
    return SnpStatus.SUCCESS


def sev_deactivate(psp: "Psp", cmd: SevDeactivate) -> SnpStatus:
    # STATE
    guest = working_guest(psp, cmd.handle)
    if not guest.asid:
        return SnpStatus.INACTIVE
    # OUTPUT
    psp.asids.release(guest.asid)
    guest.asid = 0
    return SnpStatus.SUCCESS


def sev_decommission(psp: "Psp", cmd: SevDecommission) -> SnpStatus:
    """The handle is free again; the last guest takes the platform back from WORKING to INIT."""
    # STATE
    guest = working_guest(psp, cmd.handle)
    if guest.asid:
        return SnpStatus.ACTIVE
    # OUTPUT
    del psp.sev_guests[cmd.handle]
    if not psp.sev_guests:
        psp.sev_state = PlatformState.INIT
    return SnpStatus.SUCCESS


def sev_guest_status(psp: "Psp", cmd: SevGuestStatus) -> SnpStatus:
    """A handle without a guest is no failure: its state reads UNINIT, and nothing else is written."""
    # STATE
    if psp.sev_state is PlatformState.UNINIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # OUTPUT
    guest = psp.sev_guests.get(cmd.handle)
    if guest is None:
        cmd.state = SevGuestState.UNINIT
        return SnpStatus.SUCCESS
    cmd.state = guest.state
    cmd.asid = guest.asid
    cmd.policy = guest.policy
    return SnpStatus.SUCCESS


def sev_release_guests(psp: "Psp") -> None:
    """SHUTDOWN: every legacy guest is forgotten, its ASID released as DEACTIVATE would."""
    for guest in psp.sev_guests.values():
        if guest.asid:
            psp.asids.release(guest.asid)
    psp.sev_guests.clear()
