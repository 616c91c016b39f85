"""DBG_DECRYPT and DBG_ENCRYPT: only with the owner's leave."""

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.snp_firmware import SnpCmd, SnpDbg, SnpStatus
from softcvm.abi.snp_policy import GuestPolicy
from tests.hw.psp.host import OK, POLICY, Host

DEBUG = POLICY | GuestPolicy.DEBUG
DATA = b"secret of guest!" * 256


def decrypt(host: Host, gctx: int, src: int, dst: int) -> SnpStatus:
    cmd = SnpDbg(gctx_paddr=gctx, src_addr=src, dst_addr=dst)
    return host.run(SnpCmd.DBG_DECRYPT, cmd)


def encrypt(host: Host, gctx: int, src: int, dst: int) -> SnpStatus:
    cmd = SnpDbg(gctx_paddr=gctx, src_addr=src, dst_addr=dst)
    return host.run(SnpCmd.DBG_ENCRYPT, cmd)


def test_a_debuggable_guest_can_be_read_and_patched(host: Host) -> None:
    gctx = host.launching(policy=DEBUG)
    spa = host.pre_guest(1, 0, DATA)
    assert host.update(gctx, spa) is OK
    out = host.firmware()
    assert decrypt(host, gctx, spa, out) is OK
    assert host.raw(out) == DATA
    patch = host.page()
    host.soc.host_write(patch, DATA[::-1])
    assert encrypt(host, gctx, patch, spa) is SnpStatus.INVALID_PAGE_STATE  # Guest-Valid
    host.rmp(spa, assigned=1, immutable=1, asid=1, gpa=0)
    assert encrypt(host, gctx, patch, spa) is OK
    assert host.plain(spa, 1) == DATA[::-1]


def test_the_middle_of_a_2m_page_can_be_read(host: Host) -> None:
    gctx = host.launching(policy=DEBUG)
    spa = host.pre_guest(1, 0x20_0000, DATA * 512, large=True)
    assert host.update(gctx, spa, page_size=1) is OK
    out = host.firmware()
    assert decrypt(host, gctx, spa + 77 * 4096, out) is OK
    assert host.raw(out) == DATA


def test_a_protected_vmsa_is_read_without_its_nonce(host: Host) -> None:
    gctx = host.launching(policy=DEBUG)
    vmsa = bytearray(4096)
    vmsa[0x178] = 0xF0
    vmsa[0x3B0:0x3B8] = (1 | 1 << 14).to_bytes(8, "little")
    spa = host.pre_guest(1, 0, bytes(vmsa))
    assert host.update(gctx, spa, LaunchPageType.VMSA) is OK
    out = host.firmware()
    assert decrypt(host, gctx, spa, out) is OK
    assert host.raw(out, 0x300) == bytes(vmsa[:0x300])


def test_debugging_checks_in_order(host: Host) -> None:
    gctx = host.launching()
    spa = host.pre_guest(2, 0)
    out = host.firmware()
    assert decrypt(host, gctx, spa + 1, out) is SnpStatus.INVALID_PARAM
    assert decrypt(host, out, spa, out) is SnpStatus.INVALID_GUEST
    assert decrypt(host, gctx, spa, host.page()) is SnpStatus.INVALID_PAGE_STATE
    assert decrypt(host, gctx, out, out) is SnpStatus.INVALID_PAGE_STATE
    assert decrypt(host, gctx, spa, out) is SnpStatus.INVALID_PAGE_OWNER
    own = host.pre_guest(1, 0)
    assert decrypt(host, gctx, own, out) is SnpStatus.POLICY_FAILURE
