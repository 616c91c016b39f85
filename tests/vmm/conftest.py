"""Images as files: sev-snp-measure reads nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from softcvm.guest import firmware
from tests.vmm.images import IMAGES

Write = Callable[[bytes], Path]


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """write(data) -> a file with these bytes; the next call overwrites it."""
    path = tmp_path_factory.mktemp("image") / "image.fd"

    def write_it(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    return write_it


@pytest.fixture(params=[*IMAGES, "built-in"])
def synthetic(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Each made-up image that can be measured, and the built-in one."""
    path = tmp_path / "firmware.fd"
    build = IMAGES.get(request.param, firmware.build)
    path.write_bytes(build())
    return path
