"""Every defect, by name."""

from tests.planted.defects_hardware import HARDWARE
from tests.planted.defects_memory import MEMORY
from tests.planted.defects_sev import SEV
from tests.planted.plant import Defect

__all__ = ("DEFECTS",)

DEFECTS: dict[str, Defect] = {defect.name: defect for defect in (*MEMORY, *SEV, *HARDWARE)}
