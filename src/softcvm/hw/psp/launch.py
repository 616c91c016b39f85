"""SNP_LAUNCH_START and SNP_LAUNCH_UPDATE: a guest's keys, first pages and measurement.

[ABI-56860 r1.58 SNP_LAUNCH_START, §8.17; ASPFW].  Owns what each page type measures and leaves
in memory.  The digest itself is abi/launch_digest.py, finishing is launch_finish.py.

LAUNCH_UPDATE encrypts in place: it reads the raw bytes and writes them back under the guest's
key.  The GPA it measures is the one the RMP binds the page to.  Measuring comes before
encrypting, and both before the page turns from Pre-Guest to Guest-Valid.
"""

from typing import TYPE_CHECKING

from softcvm.abi.launch_digest import (
    INITIAL_LD,
    UNMEASURED_CONTENTS,
    LaunchPageType,
    extend,
    sha384,
    vmsa_contents,
)
from softcvm.abi.rmp import PageState
from softcvm.abi.snp_firmware import SnpCmd, SnpLaunchStart, SnpLaunchUpdate, SnpStatus
from softcvm.abi.snp_platform import PlatformState
from softcvm.abi.snp_policy import GuestPolicy, min_abi
from softcvm.abi.snp_secrets import SECRETS_VERSION, SecretsPage
from softcvm.hw.psp.cpuid_rules import sanitize_page
from softcvm.hw.psp.gctx import NO_MIGRATION_AGENT, Gctx, next_state
from softcvm.hw.psp.operands import (
    PAGE_SIZE_2M,
    Page,
    Refused,
    check_range,
    guest_key,
    lookup,
    read_context,
    reserved_bits_set,
    write_context,
)
from softcvm.hw.psp.vmsa import (
    SECURE_TSC,
    TWEAK_BITMAP,
    VMSA_REG_PROT,
    VmsaLaunch,
    apply_nonce,
)
from softcvm.hw.rmp import IMMUTABLE, LOCK, PERMS_SHIFT, VALIDATED, VMSA
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from softcvm.sim.errors import Unmodelled

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("TSC_FACTOR", "snp_launch_start", "snp_launch_update")

_PAGE_TYPES = frozenset(LaunchPageType)
_4K_ONLY = (LaunchPageType.VMSA, LaunchPageType.SECRETS, LaunchPageType.CPUID)
_VMPL123_MASKS = 0xFF_FFFF << (PERMS_SHIFT + 8)
_ZERO_PAGE = bytes(PAGE_SIZE)

TSC_FACTOR = 200
"""How far the mean TSC frequency is below nominal, in units of 1/100,000 (secrets page)
[ASPFW].
"""


def snp_launch_start(psp: "Psp", cmd: SnpLaunchStart) -> SnpStatus:
    # RESERVED
    if reserved_bits_set(cmd) or (cmd.gctx_paddr | cmd.ma_gctx_paddr) & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    gctx = read_context(psp, cmd.gctx_paddr)
    # GUEST
    state = next_state(gctx, SnpCmd.LAUNCH_START)
    if state is None:
        return SnpStatus.INVALID_GUEST_STATE
    agent = read_context(psp, cmd.ma_gctx_paddr) if cmd.ma_en else None
    # POLICY
    if not _policy_ok(psp, cmd.policy, agent):
        return SnpStatus.POLICY_FAILURE
    # OUTPUT
    gctx.state = state
    gctx.policy = cmd.policy
    gctx.imi_en = cmd.imi_en
    gctx.migration_agent_paddr = cmd.ma_gctx_paddr if agent else NO_MIGRATION_AGENT
    gctx.report_id_ma = agent.report_id if agent else b"\xff" * 32
    gctx.gosvw = cmd.gosvw
    gctx.desired_tsc_khz = cmd.desired_tsc_khz
    gctx.ld = gctx.imd = INITIAL_LD
    for key in ("oek", "vmpck0", "vmpck1", "vmpck2", "vmpck3", "vmrk", "report_id"):
        setattr(gctx, key, psp.trng.draw(32))
    psp.guest_count += 1
    write_context(psp, cmd.gctx_paddr, gctx)
    return SnpStatus.SUCCESS


def _policy_ok(psp: "Psp", policy: int, agent: Gctx | None) -> bool:
    """Whether this platform, with this migration agent, is what the policy asks for."""
    profile = psp.soc.profile
    if policy & ~profile.policy_valid or not policy & GuestPolicy.RSVD_MBO:
        return False
    if profile.smt and not policy & GuestPolicy.SMT:
        return False
    if (profile.api_major, profile.api_minor) < min_abi(policy):
        return False
    if agent is None:
        return True
    if not policy & GuestPolicy.MIGRATE_MA or agent.migration_agent_paddr != NO_MIGRATION_AGENT:
        return False
    single = GuestPolicy.SINGLE_SOCKET
    return not policy & single or bool(agent.policy & single)


def snp_launch_update(psp: "Psp", cmd: SnpLaunchUpdate) -> SnpStatus:
    # RESERVED
    if reserved_bits_set(cmd) or (cmd.gctx_paddr | cmd.address) & PAGE_MASK:
        return SnpStatus.INVALID_PARAM
    # STATE
    if psp.snp_state is not PlatformState.INIT:
        return SnpStatus.INVALID_PLATFORM_STATE
    # PAGES
    gctx = read_context(psp, cmd.gctx_paddr)
    page = lookup(psp, cmd.address)
    if page.state is not PageState.PRE_GUEST:
        return SnpStatus.INVALID_PAGE_STATE
    if page.pagesize != cmd.page_size:
        return SnpStatus.INVALID_PAGE_SIZE
    if page.pagesize and cmd.address % PAGE_SIZE_2M:
        return SnpStatus.INVALID_ADDRESS
    if cmd.page_type not in _PAGE_TYPES:
        return SnpStatus.INVALID_PARAM
    page_type = LaunchPageType(cmd.page_type)
    if page.pagesize and page_type in _4K_ONLY:
        return SnpStatus.INVALID_PAGE_SIZE
    # GUEST
    if next_state(gctx, SnpCmd.LAUNCH_UPDATE) is None:
        return SnpStatus.INVALID_GUEST_STATE
    if not gctx.asid:
        return SnpStatus.INACTIVE
    if page.asid != gctx.asid:
        return SnpStatus.INVALID_PAGE_OWNER
    if gctx.imi_en and not cmd.imi_page:
        return SnpStatus.INVALID_PARAM
    # MEASURE, ENCRYPT
    _measure_and_encrypt(psp, cmd, gctx, page, page_type)
    # OUTPUT
    attrs, gfn = page.value
    attrs = attrs & ~(IMMUTABLE | LOCK | _VMPL123_MASKS) | VALIDATED
    attrs |= (cmd.vmpl1_perms | cmd.vmpl2_perms << 8 | cmd.vmpl3_perms << 16) << (
        PERMS_SHIFT + 8
    )
    if page_type is LaunchPageType.VMSA:
        attrs |= VMSA
    psp.soc.rmp.store("SNP_LAUNCH_UPDATE", page.pfn, page.pfn + page.npages, (attrs, gfn))
    write_context(psp, cmd.gctx_paddr, gctx)
    return SnpStatus.SUCCESS


def _measure_and_encrypt(
    psp: "Psp", cmd: SnpLaunchUpdate, gctx: Gctx, page: Page, page_type: LaunchPageType
) -> None:
    """Fold the page into the digests of `gctx`, 4K by 4K, and write it back encrypted."""
    dram = psp.soc.dram
    key = guest_key(psp, gctx)
    perms = (cmd.vmpl1_perms, cmd.vmpl2_perms, cmd.vmpl3_perms)
    check_range(psp, page.spa, page.npages << PAGE_SHIFT)
    gfn = psp.soc.rmp.gfn(page.pfn)
    for i in range(page.npages):
        spa = page.spa + (i << PAGE_SHIFT)
        contents, plain = _contents(psp, gctx, page_type, spa)
        gpa = gfn + i << PAGE_SHIFT
        gctx.ld = extend(gctx.ld, contents, page_type, gpa, imi=bool(cmd.imi_page), perms=perms)
        if cmd.imi_page:
            gctx.imd = extend(gctx.imd, contents, page_type, gpa, imi=True, perms=perms)
        dram.write(spa, plain, key)


def _contents(
    psp: "Psp", gctx: Gctx, page_type: LaunchPageType, spa: int
) -> tuple[bytes, bytes]:
    """CONTENTS of PAGE_INFO for one 4K page, and the plaintext that the guest will find."""
    dram = psp.soc.dram
    match page_type:
        case LaunchPageType.NORMAL:
            plain = dram.read(spa, PAGE_SIZE)
            return sha384(plain), plain
        case LaunchPageType.VMSA:
            plain = dram.read(spa, PAGE_SIZE)
            return vmsa_contents(plain), _protected_vmsa(psp, plain)
        case LaunchPageType.ZERO:
            return UNMEASURED_CONTENTS, _ZERO_PAGE
        case LaunchPageType.UNMEASURED:
            return UNMEASURED_CONTENTS, dram.read(spa, PAGE_SIZE)
        case LaunchPageType.SECRETS:
            return UNMEASURED_CONTENTS, _secrets(psp, gctx)
        case LaunchPageType.CPUID:
            given = dram.read(spa, PAGE_SIZE)
            corrected = sanitize_page(psp.soc.profile, given)
            if corrected is not None:
                dram.write(spa, corrected)
                raise Refused(SnpStatus.INVALID_PARAM)
            return UNMEASURED_CONTENTS, given


def _protected_vmsa(psp: "Psp", page: bytes) -> bytes:
    vmsa = VmsaLaunch(page)
    if vmsa.sev_features & SECURE_TSC:
        raise Unmodelled("a VMSA with SecureTSC: the TSC scale that firmware computes")
    if not vmsa.sev_features & VMSA_REG_PROT:
        return page
    vmsa.reg_prot_nonce = int.from_bytes(psp.trng.draw(8), "little")
    return apply_nonce(bytes(vmsa))


def _secrets(psp: "Psp", gctx: Gctx) -> bytes:
    return bytes(
        SecretsPage(
            version=SECRETS_VERSION,
            imi_en=gctx.imi_en,
            fms=psp.soc.profile.signature,
            gosvw=gctx.gosvw,
            vmpck0=gctx.vmpck0,
            vmpck1=gctx.vmpck1,
            vmpck2=gctx.vmpck2,
            vmpck3=gctx.vmpck3,
            vmsa_tweak_bitmap=TWEAK_BITMAP,
            tsc_factor=TSC_FACTOR,
        )
    )
