"""LAUNCH_START and LAUNCH_UPDATE: digests against sev-snp-measure, pages, order of checks."""

from collections.abc import Callable

import pytest
from sevsnpmeasure.gctx import GCTX

from softcvm.abi.launch_digest import LaunchPageType
from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import Gstate, SnpAddr, SnpCmd, SnpLaunchStart, SnpStatus
from softcvm.abi.snp_secrets import SecretsPage
from softcvm.hw.profile import GENOA, MILAN
from tests.hw.psp.host import OK, POLICY, Host

CODE = bytes(range(256)) * 16
ZERO = bytes(4096)
VMSA = bytearray(4096)
VMSA[0x178:0x180] = (0xFFF0).to_bytes(8, "little")
VMSA[0x3B0:0x3B8] = (1).to_bytes(8, "little")


def measured(host: Host, gctx: int) -> bytes:
    return host.psp.gctx(gctx).ld


def test_r1_4_launch_update_moves_a_page_through_pre_guest_to_guest_valid(host: Host) -> None:
    gctx = host.launching(asid=3)
    spa = host.pre_guest(3, 0x8000, CODE)
    before = host.soc.rmp.entry(spa >> 12)
    assert host.state(spa) is PageState.PRE_GUEST
    assert (before.assigned, before.immutable, before.asid, before.pagesize) == (1, 1, 3, 0)
    assert (before.gpa, before.validated) == (0x8000, 0)

    assert host.update(gctx, spa) is OK

    after = host.soc.rmp.entry(spa >> 12)
    assert host.state(spa) is PageState.GUEST_VALID
    assert (after.assigned, after.immutable, after.lock, after.validated) == (1, 0, 0, 1)
    assert (after.gpa, after.asid, after.pagesize, after.vmsa) == (0x8000, 3, 0, 0)
    assert after.perms == (0x1F, 0, 0, 0)


def test_r2_2_a_launched_page_is_encrypted_in_place(host: Host) -> None:
    gctx = host.launching()
    spa = host.pre_guest(1, 0, CODE)
    assert host.update(gctx, spa) is OK
    assert host.plain(spa, 1) == CODE
    assert host.raw(spa) != CODE
    assert host.soc.counters.bytes_encrypted == 4096


def test_the_digest_chain_is_that_of_sev_snp_measure(host: Host) -> None:
    gctx = host.launching()
    expected = GCTX()
    pages: list[tuple[int, int, bytes]] = [
        (LaunchPageType.NORMAL, 0xFFFF_F000, CODE),
        (LaunchPageType.ZERO, 0x80_0000, b""),
        (LaunchPageType.UNMEASURED, 0x80_1000, CODE),
        (LaunchPageType.SECRETS, 0x80_D000, b""),
        (LaunchPageType.CPUID, 0x80_E000, b""),
        (LaunchPageType.VMSA, GCTX.VMSA_GPA, bytes(VMSA)),
        (LaunchPageType.VMSA, GCTX.VMSA_GPA, bytes(VMSA)),
    ]
    follow: dict[int, Callable[[int, bytes], None]] = {
        LaunchPageType.NORMAL: lambda gpa, data: expected.update_normal_pages(gpa, data),
        LaunchPageType.ZERO: lambda gpa, _: expected.update_zero_pages(gpa, 4096),
        LaunchPageType.UNMEASURED: lambda gpa, _: expected.update_unmeasured_pages(gpa, 4096),
        LaunchPageType.SECRETS: lambda gpa, _: expected.update_secrets_page(gpa),
        LaunchPageType.CPUID: lambda gpa, _: expected.update_cpuid_page(gpa),
        LaunchPageType.VMSA: lambda _, data: expected.update_vmsa_page(data),
    }
    assert measured(host, gctx) == expected.ld()
    for page_type, gpa, data in pages:
        assert host.update(gctx, host.pre_guest(1, gpa, data), page_type) is OK
        follow[page_type](gpa, data)
        assert measured(host, gctx) == expected.ld()


def test_the_digest_does_not_show_the_page_size(host: Host) -> None:
    image = b"".join(bytes([i & 0xFF, i >> 8]) * 2048 for i in range(512))
    large = host.launching(asid=1)
    spa = host.pre_guest(1, 0x20_0000, image, large=True)
    assert host.update(large, spa, page_size=1) is OK
    expected = GCTX()
    expected.update_normal_pages(0x20_0000, image)
    assert measured(host, large) == expected.ld()
    assert host.plain(spa, 1, len(image)) == image
    assert host.state(spa) is PageState.GUEST_VALID
    assert host.soc.rmp.head(spa >> 12).pagesize == 1


def test_a_vmsa_is_measured_without_its_tsc_fields_and_marked_in_the_rmp(host: Host) -> None:
    gctx = host.launching()
    with_tsc = bytearray(VMSA)
    with_tsc[0x2F0:0x300] = b"\xee" * 16
    spa = host.pre_guest(1, GCTX.VMSA_GPA, bytes(with_tsc))
    assert host.update(gctx, spa, LaunchPageType.VMSA, vmpl1_perms=0) is OK
    expected = GCTX()
    expected.update_vmsa_page(bytes(VMSA))
    assert measured(host, gctx) == expected.ld()
    assert host.soc.rmp.entry(spa >> 12).vmsa == 1
    assert host.plain(spa, 1) == bytes(with_tsc)


def test_register_protection_hides_equal_registers(host: Host) -> None:
    gctx = host.launching()
    vmsa = bytearray(VMSA)
    vmsa[0x3B0:0x3B8] = (1 | 1 << 14).to_bytes(8, "little")
    pages = [host.pre_guest(1, GCTX.VMSA_GPA, bytes(vmsa)) for _ in range(2)]
    for spa in pages:
        assert host.update(gctx, spa, LaunchPageType.VMSA) is OK
    first, second = (host.plain(spa, 1) for spa in pages)
    assert first[0x178:0x180] != second[0x178:0x180]
    for page in (first, second):
        nonce = int.from_bytes(page[0x300:0x308], "little")
        assert nonce
        rip = int.from_bytes(page[0x178:0x180], "little") ^ nonce
        assert rip == 0xFFF0
        assert page[0x3B0:0x3B8] == bytes(vmsa[0x3B0:0x3B8])


def test_permissions_go_to_the_rmp_and_into_the_digest(host: Host) -> None:
    gctx = host.launching()
    spa = host.pre_guest(1, 0, CODE)
    assert host.update(gctx, spa, vmpl1_perms=3, vmpl2_perms=1, vmpl3_perms=0xF) is OK
    assert host.soc.rmp.entry(spa >> 12).perms == (0x1F, 3, 1, 0xF)
    unlike = GCTX()
    unlike.update_normal_pages(0, CODE)
    assert measured(host, gctx) != unlike.ld()


def test_the_secrets_page_holds_the_guests_keys(host: Host) -> None:
    gctx = host.gctx()
    gosvw = bytes(range(16))
    start = SnpLaunchStart(gctx_paddr=gctx, policy=POLICY, gosvw=gosvw)
    assert host.run(SnpCmd.LAUNCH_START, start) is OK
    assert host.activate(gctx, 1) is OK
    spa = host.pre_guest(1, 0x80_D000, CODE)
    assert host.update(gctx, spa, LaunchPageType.SECRETS) is OK
    secrets = SecretsPage(host.plain(spa, 1))
    context = host.psp.gctx(gctx)
    keys = (secrets.vmpck0, secrets.vmpck1, secrets.vmpck2, secrets.vmpck3)
    assert keys == tuple(context.vmpck(i) for i in range(4))
    assert len(set(keys)) == 4
    assert (secrets.version, secrets.fms, secrets.gosvw) == (3, 0xA10F11, gosvw)
    assert bytes(secrets)[0xA0:0x100] == bytes(96)


def test_an_imi_page_extends_both_digests(host: Host) -> None:
    gctx = host.gctx()
    start = SnpLaunchStart(gctx_paddr=gctx, policy=POLICY, imi_en=1)
    assert host.run(SnpCmd.LAUNCH_START, start) is OK
    assert host.activate(gctx, 1) is OK
    spa = host.pre_guest(1, 0, CODE)
    assert host.update(gctx, spa) is SnpStatus.INVALID_PARAM
    assert host.update(gctx, spa, imi_page=1) is OK
    context = host.psp.gctx(gctx)
    assert context.imd == context.ld != bytes(48)


def test_the_context_page_shows_the_host_only_ciphertext(host: Host) -> None:
    gctx = host.launching()
    assert host.raw(gctx) != bytes(host.psp.gctx(gctx))
    assert host.psp.gctx(gctx).vmpck0 not in host.raw(gctx)


POLICIES = [
    (0x3_0000, OK),
    (0x3_0000 | 1 << 8 | 55, OK),
    (0x3_0000 | 1 << 8 | 56, SnpStatus.POLICY_FAILURE),
    (0x3_0000 | 2 << 8, SnpStatus.POLICY_FAILURE),
    (0x1_0000, SnpStatus.POLICY_FAILURE),
    (0x2_0000, SnpStatus.POLICY_FAILURE),
    (0x3_0000 | 1 << 20, OK),
    (0x3_0000 | 1 << 21, SnpStatus.POLICY_FAILURE),
    (0x3_0000 | 1 << 63, SnpStatus.POLICY_FAILURE),
]


@pytest.mark.parametrize(("policy", "status"), POLICIES)
@pytest.mark.parametrize("profile", [GENOA, MILAN], ids=lambda profile: profile.name)
def test_a_policy_the_platform_cannot_keep_is_refused(
    profile: object, policy: int, status: SnpStatus
) -> None:
    assert profile in (GENOA, MILAN)
    host = Host(GENOA if profile is GENOA else MILAN).init()
    gctx = host.gctx()
    start = SnpLaunchStart(gctx_paddr=gctx, policy=policy)
    assert host.run(SnpCmd.LAUNCH_START, start) is status
    state = Gstate.LAUNCH if status is OK else Gstate.INIT
    assert host.psp.gctx(gctx).state == state


def test_a_guest_starts_once(host: Host) -> None:
    gctx = host.launching(asid=None)
    start = SnpLaunchStart(gctx_paddr=gctx, policy=0)
    assert host.run(SnpCmd.LAUNCH_START, start) is SnpStatus.INVALID_GUEST_STATE


def test_a_migration_agent_must_be_allowed_and_not_migratable_itself(host: Host) -> None:
    agent = host.launching(asid=None)
    gctx = host.gctx()
    cmd = SnpLaunchStart(gctx_paddr=gctx, policy=POLICY, ma_gctx_paddr=agent, ma_en=1)
    assert host.run(SnpCmd.LAUNCH_START, cmd) is SnpStatus.POLICY_FAILURE
    cmd.policy = POLICY | 1 << 18
    assert host.run(SnpCmd.LAUNCH_START, cmd) is OK
    assert host.psp.gctx(gctx).report_id_ma == host.psp.gctx(agent).report_id
    third = SnpLaunchStart(
        gctx_paddr=host.gctx(), policy=POLICY | 1 << 18, ma_gctx_paddr=gctx, ma_en=1
    )
    assert host.run(SnpCmd.LAUNCH_START, third) is SnpStatus.POLICY_FAILURE


# Faults of LAUNCH_UPDATE in the order in which firmware meets them.
FAULTS = [
    ("reserved", SnpStatus.INVALID_PARAM),
    ("platform", SnpStatus.INVALID_PLATFORM_STATE),
    ("context", SnpStatus.INVALID_GUEST),
    ("page_state", SnpStatus.INVALID_PAGE_STATE),
    ("page_size", SnpStatus.INVALID_PAGE_SIZE),
    ("page_type", SnpStatus.INVALID_PARAM),
    ("guest_state", SnpStatus.INVALID_GUEST_STATE),
    ("inactive", SnpStatus.INACTIVE),
    ("owner", SnpStatus.INVALID_PAGE_OWNER),
]
# A running guest is active, and a page that is no context has no state.
IMPOSSIBLE = ({"guest_state", "inactive"}, {"context", "guest_state"})
PAIRS = [
    (first, second)
    for i, (first, _) in enumerate(FAULTS)
    for second, _ in FAULTS[i:]
    if {first, second} not in IMPOSSIBLE
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_of_two_faults_at_once_the_earlier_check_wins(first: str, second: str) -> None:
    faults = {first, second}
    host = Host().init()
    if "guest_state" in faults:
        gctx = host.running(asid=1)
    else:
        gctx = host.launching(asid=None if "inactive" in faults else 1)
    asid = 2 if "owner" in faults else 1
    spa = host.guest_page(asid, 0) if "page_state" in faults else host.pre_guest(asid, 0, CODE)
    fields = {"page_size": int("page_size" in faults)}
    if "context" in faults:
        gctx = host.firmware()
    if "reserved" in faults:
        gctx |= 0x10
    if "platform" in faults:
        host.psp.snp_state = type(host.psp.snp_state).UNINIT
    page_type = 7 if "page_type" in faults else LaunchPageType.NORMAL
    before = host.soc.rmp.raw(spa >> 12), host.raw(spa)
    assert host.update(gctx, spa, page_type, **fields) is dict(FAULTS)[first]
    assert (host.soc.rmp.raw(spa >> 12), host.raw(spa)) == before


@pytest.mark.parametrize(
    "page_type", [LaunchPageType.VMSA, LaunchPageType.SECRETS, LaunchPageType.CPUID]
)
def test_special_pages_are_4k(host: Host, page_type: LaunchPageType) -> None:
    gctx = host.launching()
    spa = host.pre_guest(1, 0x20_0000, large=True)
    assert host.update(gctx, spa, page_type, page_size=1) is SnpStatus.INVALID_PAGE_SIZE


def test_a_covered_page_of_a_2m_entry_is_no_operand(host: Host) -> None:
    gctx = host.launching()
    spa = host.pre_guest(1, 0x20_0000, large=True)
    assert host.update(gctx, spa + 4096) is SnpStatus.INVALID_PAGE_STATE


def test_the_rmp_itself_is_no_operand(host: Host) -> None:
    gctx = host.launching()
    assert host.update(gctx, 0x20_0000) is SnpStatus.INVALID_PARAM
    cmd = SnpAddr(address=0x20_0000)
    assert host.run(SnpCmd.GCTX_CREATE, cmd) is SnpStatus.INVALID_PARAM


def test_equal_seeds_make_equal_guests_and_other_seeds_others() -> None:
    def ciphertext(seed: int) -> bytes:
        host = Host(seed=seed).init()
        gctx = host.launching()
        spa = host.pre_guest(1, 0, CODE)
        assert host.update(gctx, spa) is OK
        return host.raw(spa) + host.psp.gctx(gctx).vmpck0

    assert ciphertext(1) == ciphertext(1)
    assert ciphertext(1) != ciphertext(2)
