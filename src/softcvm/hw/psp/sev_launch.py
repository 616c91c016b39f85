"""Launching a legacy SEV guest: LAUNCH_START, UPDATE_DATA, UPDATE_VMSA, MEASURE, SECRET, FINISH.

[SEV-API-55766 r3.24; ASPFW].  UPDATE encrypts in place: the bytes at an address are measured as they lie
there, then written back under the guest's key.  The launch digest is one SHA-256 over them all, and knows no
addresses: the order of the commands is all that it binds.

Once SNP is initialised, memory that a command writes must be Firmware or Default pages.  Firmware counts
those pages by the length alone [ASPFW]: a range that starts inside a page and ends in one more than its
length says is not looked at to its end.

An owner's session (a Diffie-Hellman certificate in LAUNCH_START) needs the platform's own keys, which are
not modelled; a guest without one has zeroes for transport keys, as firmware leaves them.
"""

import hmac
from hashlib import sha256
from typing import TYPE_CHECKING

from softcvm.abi.sev_firmware import (
    SEV_CERT_SIZE,
    SevGuestPolicy,
    SevLaunchFinish,
    SevLaunchMeasure,
    SevLaunchSecret,
    SevLaunchStart,
    SevLaunchUpdateData,
    SevLaunchUpdateVmsa,
    SevMeasurement,
    SevPacketHeader,
    SevSession,
)
from softcvm.abi.snp_firmware import SevCmd, SnpStatus
from softcvm.abi.snp_platform import PlatformState
from softcvm.hw.memenc import Key
from softcvm.hw.psp.operands import FIRMWARE_WRITABLE, lookup, read, write
from softcvm.hw.psp.sev_guest import SEV_GUEST_COUNT_MAX, SevGuest, working_guest
from softcvm.sim.addr import PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.errors import Unmodelled

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = (
    "check_writable",
    "sev_launch_finish",
    "sev_launch_measure",
    "sev_launch_secret",
    "sev_launch_start",
    "sev_launch_update_data",
    "sev_launch_update_vmsa",
)

_ALIGN = 15
"""Addresses and lengths are multiples of 16: whole blocks of the cipher."""
_MEASURE_CONTEXT, _SECRET_CONTEXT = b"\x04", b"\x01"
_COMPRESSED = 1 << 0
_SECRET_MAX = 0x5000
"""Firmware's scratch buffer, which a secret must fit into.  [ASPFW]"""


def sev_launch_start(psp: "Psp", cmd: SevLaunchStart) -> SnpStatus:
    # STATE
    if psp.sev_state is PlatformState.UNINIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # SESSION
    if cmd.dh_cert_address:
        if cmd.session_len != SevSession.SIZE or cmd.dh_cert_len != SEV_CERT_SIZE:
            return SnpStatus.INVALID_LENGTH
        raise Unmodelled("SEV LAUNCH_START with an owner's session")
    # KEY: the policy of a guest without a session is not looked at
    if cmd.handle:
        shared = psp.sev_guests.get(cmd.handle)
        if shared is None:
            return SnpStatus.INVALID_GUEST
        if cmd.policy != shared.policy or shared.policy & SevGuestPolicy.NOKS:
            return SnpStatus.POLICY_FAILURE
        vek_seed = shared.vek_seed
    else:
        vek_seed = psp.trng.draw(32)
    # RESOURCES
    free = next((h for h in range(1, SEV_GUEST_COUNT_MAX + 1) if h not in psp.sev_guests), None)
    if free is None:
        return SnpStatus.RESOURCE_LIMIT
    if cmd.policy & SevGuestPolicy.ES and not psp.sev_es:
        return SnpStatus.UNSUPPORTED
    # OUTPUT
    psp.sev_guests[free] = SevGuest(free, cmd.policy, vek_seed)
    psp.sev_state = PlatformState.WORKING
    cmd.handle = free
    return SnpStatus.SUCCESS


def sev_launch_update_data(psp: "Psp", cmd: SevLaunchUpdateData) -> SnpStatus:
    return _launch_update(psp, cmd, SevCmd.LAUNCH_UPDATE_DATA)


def sev_launch_update_vmsa(psp: "Psp", cmd: SevLaunchUpdateVmsa) -> SnpStatus:
    """The checksum that firmware keeps of a VMSA in the trusted region is not modelled: no VMRUN reads it."""
    if cmd.len != PAGE_SIZE:
        return SnpStatus.INVALID_LENGTH
    return _launch_update(psp, cmd, SevCmd.LAUNCH_UPDATE_VMSA)


def _launch_update(
    psp: "Psp", cmd: SevLaunchUpdateData | SevLaunchUpdateVmsa, command: SevCmd
) -> SnpStatus:
    # STATE
    guest = working_guest(psp, cmd.handle)
    if guest.next_state(command) is None:
        return SnpStatus.INVALID_GUEST_STATE
    if command is SevCmd.LAUNCH_UPDATE_VMSA and not guest.es:
        return SnpStatus.UNSUPPORTED
    if not guest.asid:
        return SnpStatus.INACTIVE
    # PARAMETERS
    if cmd.address & _ALIGN:
        return SnpStatus.INVALID_ADDRESS
    if cmd.len & _ALIGN or not cmd.len:
        return SnpStatus.INVALID_LENGTH
    # PAGES
    if not check_writable(psp, cmd.address, cmd.len):
        return SnpStatus.INVALID_PAGE_STATE
    # MEASURE
    plain = read(psp, cmd.address, cmd.len)
    guest.launch_digest.update(plain)
    # OUTPUT
    write(psp, cmd.address, plain, _key(psp, guest))
    return SnpStatus.SUCCESS


def sev_launch_measure(psp: "Psp", cmd: SevLaunchMeasure) -> SnpStatus:
    # STATE
    guest = working_guest(psp, cmd.handle)
    state = guest.next_state(SevCmd.LAUNCH_MEASURE)
    if state is None:
        return SnpStatus.INVALID_GUEST_STATE
    # PARAMETERS
    if cmd.len < SevMeasurement.SIZE:
        cmd.len = SevMeasurement.SIZE
        return SnpStatus.INVALID_LENGTH
    # PAGES
    if not check_writable(psp, cmd.address, cmd.len):
        return SnpStatus.INVALID_PAGE_STATE
    # MEASURE
    profile = psp.soc.profile
    mnonce = psp.trng.draw(16)
    measured = (
        _MEASURE_CONTEXT
        + bytes((profile.api_major, profile.api_minor, profile.build))
        + guest.policy.to_bytes(4, "little")
        + guest.launch_digest.digest()
        + mnonce
    )
    measure = hmac.digest(guest.tik, measured, sha256)
    # OUTPUT
    write(psp, cmd.address, bytes(SevMeasurement(measure=measure, mnonce=mnonce)))
    guest.measurement = measure
    guest.state = state
    return SnpStatus.SUCCESS


def sev_launch_secret(psp: "Psp", cmd: SevLaunchSecret) -> SnpStatus:
    # STATE
    guest = working_guest(psp, cmd.handle)
    # PARAMETERS
    if cmd.guest_address & _ALIGN:
        return SnpStatus.INVALID_ADDRESS
    length = cmd.guest_len
    if cmd.hdr_len != SevPacketHeader.SIZE or length & _ALIGN:
        return SnpStatus.INVALID_LENGTH
    if not 0 < length <= _SECRET_MAX or length != cmd.trans_len:
        return SnpStatus.INVALID_LENGTH
    # GUEST
    if guest.next_state(SevCmd.LAUNCH_SECRET) is None:
        return SnpStatus.INVALID_GUEST_STATE
    if not guest.asid:
        return SnpStatus.INACTIVE
    # PAGES
    if not check_writable(psp, cmd.guest_address, length):
        return SnpStatus.INVALID_PAGE_STATE
    # PACKET
    header = SevPacketHeader(read(psp, cmd.hdr_address, SevPacketHeader.SIZE))
    packet = read(psp, cmd.trans_address, length)
    if not hmac.compare_digest(_packet_mac(guest, header, packet), header.mac):
        return SnpStatus.BAD_MEASUREMENT
    if header.flags & _COMPRESSED:
        return SnpStatus.UNSUPPORTED
    # OUTPUT
    write(psp, cmd.guest_address, _ctr(guest.tek, header.iv, packet), _key(psp, guest))
    return SnpStatus.SUCCESS


def sev_launch_finish(psp: "Psp", cmd: SevLaunchFinish) -> SnpStatus:
    # STATE
    guest = working_guest(psp, cmd.handle)
    state = guest.next_state(SevCmd.LAUNCH_FINISH)
    if state is None:
        return SnpStatus.INVALID_GUEST_STATE
    # OUTPUT
    if guest.asid:
        psp.asids.use(guest.asid)
    guest.tek = guest.tik = bytes(16)
    guest.measurement = b""
    guest.state = state
    return SnpStatus.SUCCESS


def check_writable(psp: "Psp", paddr: int, length: int) -> bool:
    """Whether a legacy command may write there: as many pages from paddr on as `length` fills."""
    if psp.snp_state is not PlatformState.INIT:
        return True
    at, left = paddr, length
    while True:
        page = lookup(psp, at)
        if page.state not in FIRMWARE_WRITABLE:
            return False
        size = page.npages << PAGE_SHIFT
        at += size
        left -= size
        if left <= 0:
            return True


def _key(psp: "Psp", guest: SevGuest) -> Key:
    return psp.soc.keys[guest.asid]


def _packet_mac(guest: SevGuest, header: SevPacketHeader, packet: bytes) -> bytes:
    length = len(packet).to_bytes(4, "little")
    covered = (
        _SECRET_CONTEXT
        + header.flags.to_bytes(4, "little")
        + header.iv
        + length  # uncompressed
        + length
        + packet
        + guest.measurement
    )
    return hmac.digest(guest.tik, covered, sha256)


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import (  # slow to import
        Cipher,
        algorithms,
        modes,
    )

    return Cipher(algorithms.AES(key), modes.CTR(iv)).decryptor().update(data)
