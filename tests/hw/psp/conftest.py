"""Fixtures of the firmware tests."""

import pytest

from tests.hw.psp.host import Host


@pytest.fixture
def host() -> Host:
    """A Genoa host with SNP initialised and every ASID clean."""
    return Host().init()
