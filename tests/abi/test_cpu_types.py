"""vCPU types and signatures: those of sev-snp-measure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevsnpmeasure.vcpu_types import CPU_SIGS, cpu_sig

from softcvm.abi.cpu_types import CPU_SIGNATURES, cpu_signature, family_model_stepping


def test_vcpu_types_are_those_of_sev_snp_measure_in_its_order() -> None:
    assert list(CPU_SIGNATURES.items()) == list(CPU_SIGS.items())


@given(family=st.integers(0, 0x10E), model=st.integers(0, 0xFF), stepping=st.integers(0, 0xF))
def test_signatures_are_those_of_sev_snp_measure_and_can_be_taken_apart(
    family: int, model: int, stepping: int
) -> None:
    signature = cpu_signature(family, model, stepping)
    assert signature == cpu_sig(family, model, stepping)
    assert family_model_stepping(signature) == (family, model, stepping)


@pytest.mark.parametrize(
    "bad", [(0x10F, 0, 0), (-1, 0, 0), (25, 256, 0), (25, 0, 16), (25, -1, 0)]
)
def test_what_no_processor_has_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no CPUID signature has family"):
        cpu_signature(*bad)
