"""What a guest asks of firmware: an attestation report, or a key derived from its identity.

[ABI-56860 r1.58 MSG_REPORT_REQ, MSG_KEY_REQ; ASPFW].  Both always answer; a request that may
not be is a status in the answer.  Reports are signed by the VCEK of the reported TCB; no VLEK
can be loaded (SNP_VLEK_LOAD is not modelled), so a request for one alone is INVALID_KEY.  The
derivation mixes the fields that the ABI lists, in an order of the model's own: its roots are
not AMD's, so a derived key has no outside reference.
"""

from typing import TYPE_CHECKING

from softcvm.abi.id_block import ALGO_ECDSA_P384_SHA384, IdBlock
from softcvm.abi.snp_firmware import SnpStatus
from softcvm.abi.snp_guest_msg import (
    GuestField,
    KeySel,
    MsgKeyReq,
    MsgKeyRsp,
    MsgReportReq,
    MsgReportRsp,
    RootKey,
)
from softcvm.abi.snp_report import (
    REPORT_SIGNED_BYTES,
    REPORT_VERSION,
    AttestationReport,
    PlatformInfo,
    SigningKey,
)
from softcvm.hw.psp.gctx import Gctx
from softcvm.hw.psp.keys import kdf, sign
from softcvm.hw.psp.operands import reserved_bits_set
from softcvm.hw.psp.status import tcb_newer

if TYPE_CHECKING:
    from softcvm.hw.psp.platform import Psp

__all__ = ("derived_key", "report")

_ALL_FIELDS = sum(GuestField)


def report(psp: "Psp", gctx: Gctx, vmpck: int, request: MsgReportReq) -> bytes:
    """MSG_REPORT_RSP to a request that came under this communication key."""
    refused = _refuse_report(gctx, vmpck, request)
    if refused is not None:
        return bytes(MsgReportRsp(status=refused, report_size=AttestationReport.SIZE))
    body = _unsigned(psp, gctx, request)
    if not psp.mask_chip_key:
        signed = bytes(body)[:REPORT_SIGNED_BYTES]
        body.signature = bytes(sign(psp.chip.vcek(psp.reported_tcb), signed))
    return bytes(MsgReportRsp(report_size=AttestationReport.SIZE, report=bytes(body)))


def _refuse_report(gctx: Gctx, vmpck: int, request: MsgReportReq) -> SnpStatus | None:
    if reserved_bits_set(request):
        return SnpStatus.INVALID_PARAM
    if not _key_allowed(gctx, request.key_sel):
        return SnpStatus.INVALID_KEY
    if request.vmpl < vmpck:
        return SnpStatus.INVALID_PARAM
    return None


def _key_allowed(gctx: Gctx, key_sel: int) -> bool:
    """Whether the endorsement key a guest selects exists and is not disabled for it."""
    return key_sel in (KeySel.VLEK_VCEK, KeySel.VCEK) and not gctx.vcek_dis


def _unsigned(psp: "Psp", gctx: Gctx, request: MsgReportReq) -> AttestationReport:
    profile = psp.soc.profile
    block = IdBlock(gctx.id_block)
    info = PlatformInfo(0)
    if profile.smt:
        info |= PlatformInfo.SMT_EN
    if profile.alias_check:
        info |= PlatformInfo.ALIAS_CHECK_COMPLETE
    return AttestationReport(
        version=REPORT_VERSION,
        guest_svn=block.guest_svn,
        policy=gctx.policy,
        family_id=block.family_id,
        image_id=block.image_id,
        vmpl=request.vmpl,
        signature_algo=ALGO_ECDSA_P384_SHA384,
        current_tcb=psp.tcb,
        platform_info=info,
        author_key_en=gctx.author_key_en,
        mask_chip_key=psp.mask_chip_key,
        signing_key=SigningKey.NONE if psp.mask_chip_key else SigningKey.VCEK,
        report_data=request.report_data,
        measurement=gctx.ld,
        host_data=gctx.host_data,
        id_key_digest=gctx.id_key_digest,
        author_key_digest=gctx.author_key_digest,
        report_id=gctx.report_id,
        report_id_ma=gctx.report_id_ma,
        reported_tcb=psp.reported_tcb,
        chip_id=bytes(64) if psp.mask_chip_id else psp.chip.chip_id,
        committed_tcb=psp.tcb,
        current_build=profile.build,
        current_minor=profile.api_minor,
        current_major=profile.api_major,
        committed_build=profile.build,
        committed_minor=profile.api_minor,
        committed_major=profile.api_major,
        launch_tcb=gctx.launch_tcb,
    )


def derived_key(psp: "Psp", gctx: Gctx, vmpck: int, request: MsgKeyReq) -> bytes:
    """MSG_KEY_RSP to a request that came under this communication key."""
    refused = _refuse_key(psp, gctx, vmpck, request)
    if refused is not None:
        return bytes(MsgKeyRsp(status=refused))
    fields = GuestField(request.guest_field_select)
    tcb = request.tcb_version if fields & GuestField.TCB_VERSION else psp.reported_tcb
    root = gctx.vmrk if request.root_key_select == RootKey.VMRK else psp.chip.vcek_seed(tcb)
    key = kdf(root, b"gmsg-keyreq", _mixed(gctx, request, fields), 32)
    return bytes(MsgKeyRsp(derived_key=key))


def _refuse_key(psp: "Psp", gctx: Gctx, vmpck: int, request: MsgKeyReq) -> SnpStatus | None:
    if reserved_bits_set(request):
        return SnpStatus.INVALID_PARAM
    usable = not psp.mask_chip_key and _key_allowed(gctx, request.key_sel)
    if request.root_key_select == RootKey.VCEK and not usable:
        return SnpStatus.INVALID_KEY
    if request.vmpl < vmpck or request.guest_field_select & ~_ALL_FIELDS:
        return SnpStatus.INVALID_PARAM
    fields = GuestField(request.guest_field_select)
    if fields & GuestField.TCB_VERSION and tcb_newer(request.tcb_version, psp.tcb):
        return SnpStatus.INVALID_PARAM
    if fields & GuestField.GUEST_SVN and request.guest_svn > IdBlock(gctx.id_block).guest_svn:
        return SnpStatus.INVALID_PARAM
    return None


def _mixed(gctx: Gctx, request: MsgKeyReq, fields: GuestField) -> bytes:
    """The guest's identity as far as it was selected; what was not selected is zero."""
    block = IdBlock(gctx.id_block)
    key_digest = gctx.author_key_digest if gctx.author_key_en else gctx.id_key_digest
    selected = (
        (GuestField.TCB_VERSION, request.tcb_version),
        (GuestField.GUEST_SVN, request.guest_svn.to_bytes(4, "little")),
        (GuestField.GUEST_POLICY, gctx.policy.to_bytes(8, "little")),
        (GuestField.IMAGE_ID, block.image_id),
        (GuestField.FAMILY_ID, block.family_id),
        (GuestField.MEASUREMENT, gctx.ld),
    )
    head = bytes([request.root_key_select, gctx.id_block_en + gctx.author_key_en])
    head += fields.to_bytes(8, "little") + request.vmpl.to_bytes(4, "little")
    mixed = b"".join(
        value if field & fields else bytes(len(value)) for field, value in selected
    )
    return head + mixed + gctx.host_data + key_digest
