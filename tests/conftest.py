"""What every test shares: deterministic property tests, and skips that a run may forbid.

SOFTCVM_REQUIRE names things this run must find (`SOFTCVM_REQUIRE=ovmf,gcc`): a test that would skip for
lack of one fails instead.  `pytest --hypothesis-profile=search` draws new examples each time.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("search", parent=settings.get_profile("fixed"), derandomize=False)
settings.load_profile("fixed")

Require = Callable[[str, object, str], None]

_OVMF_FOLDERS = (Path("/usr/share/ovmf"), Path("/usr/share/OVMF"), Path("/usr/share/qemu"))


@pytest.fixture(scope="session")
def require() -> Require:
    """require(name, found, how): skip unless found; fail instead where SOFTCVM_REQUIRE lists the name."""
    wanted = {name.strip() for name in os.environ.get("SOFTCVM_REQUIRE", "").split(",")} - {""}

    def check(name: str, found: object, how: str) -> None:
        if found:
            return
        if name in wanted:
            pytest.fail(f"SOFTCVM_REQUIRE={name}, but it is not here: {how}", pytrace=False)
        pytest.skip(f"needs {name}: {how}")

    return check


@pytest.fixture(scope="session")
def ovmf_images(require: Require) -> list[Path]:
    """Every whole OVMF image at hand (code and variables in one file or code alone), smallest path first."""
    found: dict[Path, Path] = {}
    for folder in _OVMF_FOLDERS:
        for path in sorted(folder.glob("*.fd")):
            if "VARS" not in path.name:
                found.setdefault(path.resolve(), path)
    require("ovmf", found, "apt install ovmf")
    return sorted(found.values())


@pytest.fixture(scope="session")
def ovmf_image(ovmf_images: list[Path]) -> Path:
    """One real OVMF image, the plain one where it is there."""
    plain = [path for path in ovmf_images if path.name in {"OVMF.fd", "OVMF_CODE.fd"}]
    return (plain or ovmf_images)[0]


@pytest.fixture(scope="session")
def gcc(require: Require) -> str:
    """A C compiler, the outsider for sizes and offsets."""
    path = shutil.which("gcc") or shutil.which("cc")
    require("gcc", path, "apt install gcc libc6-dev linux-libc-dev")
    assert path is not None
    return path
