"""A booted host for the rows, with every option of a machine, and the small SNP VM of
tests/kernel/svm on it."""

from collections.abc import Callable
from typing import Any

import pytest

from softcvm import Machine
from softcvm.sim.addr import PAGE_SHIFT
from tests.kernel.svm.conftest import Host


@pytest.fixture(scope="session")
def boot() -> Callable[..., Host]:
    """boot(kernel="7.3", cpu="genoa", order=0, pages=..., **options of Machine) -> Host"""

    def make(
        kernel: str = "7.3",
        cpu: str = "genoa",
        order: int = 0,
        pages: int = 1 << 16,
        **options: Any,
    ) -> Host:
        return Host(Machine(kernel, cpu, pages << PAGE_SHIFT, gmem_max_order=order, **options))

    return make


@pytest.fixture
def host(boot: Callable[..., Host]) -> Host:
    return boot()
