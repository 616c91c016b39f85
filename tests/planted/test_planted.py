"""Every planted defect is seen by what is said to see it, and nothing is seen where there is none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softcvm.cli.selftests_build import NEEDS, PACKAGE, cached_tree, find_tests
from softcvm.invariants import registered
from tests.conftest import Require
from tests.planted.defects import DEFECTS
from tests.planted.plant import Defect, Edit, Scene, Selftest, planted
from tests.planted.scenes import CLAIMS, SCENES, broken_in

ROOT = Path(__file__).parent.parent.parent
SKIPPED, OURS = 4, 125
SLOW = {"private_mem_conversions_test"}
IN_SCENES = [defect for defect in DEFECTS.values() if isinstance(defect.caught_by, Scene)]
IN_SELFTESTS = [defect for defect in DEFECTS.values() if isinstance(defect.caught_by, Selftest)]


def _marked(value: Any, name: str, *, long: bool) -> Any:
    return pytest.param(value, id=name, marks=[pytest.mark.long] if long else [])


def _exec(require: Require, defect: str, test: str) -> tuple[int, str]:
    built = find_tests(cached_tree())
    require("selftests", test in built, f"softcvm selftests --build (needs {PACKAGE}, {NEEDS})")
    done = subprocess.run(
        [sys.executable, "-m", "tests.planted.exec_with", defect, str(built[test])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("scene", SCENES)
def test_nothing_is_broken_without_a_defect(scene: str) -> None:
    assert broken_in(scene) == set()


@pytest.mark.parametrize("defect", [_marked(d, d.name, long=d.long) for d in IN_SCENES])
def test_a_defect_breaks_the_sentence_about_it(defect: Defect) -> None:
    assert isinstance(defect.caught_by, Scene)
    with planted(defect.edits):
        broken = broken_in(defect.caught_by.scene)
    assert defect.caught_by.breaks in broken


@pytest.mark.parametrize(
    "test",
    [
        _marked(name, name, long=name in SLOW)
        for name in sorted({d.caught_by.name for d in IN_SELFTESTS})  # type: ignore[union-attr]
    ],
)
def test_the_kernels_test_passes_without_a_defect(require: Require, test: str) -> None:
    status, text = _exec(require, "none", test)
    assert status == 0, text


@pytest.mark.parametrize("defect", [_marked(d, d.name, long=d.long) for d in IN_SELFTESTS])
def test_the_kernels_own_test_fails_with_a_defect(require: Require, defect: Defect) -> None:
    assert isinstance(defect.caught_by, Selftest)
    status, text = _exec(require, defect.name, defect.caught_by.name)
    assert status not in (0, SKIPPED, OURS), text
    assert defect.caught_by.says in text


def test_a_defect_is_gone_when_its_block_is_left() -> None:
    (defect,) = (d for d in IN_SCENES if d.name == "punch_hole_does_not_zap")
    with planted(defect.edits):
        assert broken_in("memory")
    assert broken_in("memory") == set()


def test_a_defect_whose_text_is_gone_is_an_error() -> None:
    gone = Edit("kernel.virt.kvm.gmem_inode:kvm_gmem_fallocate", "no such text", "")
    with pytest.raises(ValueError, match="0 times"), planted([gone]):
        pass


def test_defects_have_names_of_their_own_and_sentences_that_exist() -> None:
    always, on_event, _ = registered()
    known = {rule.name for rule in always} | {rule.name for rule in on_event} | CLAIMS.keys()
    told = {d.caught_by.breaks for d in IN_SCENES if isinstance(d.caught_by, Scene)}
    assert told <= known
    assert len(DEFECTS) == len({(d.edits, d.caught_by) for d in DEFECTS.values()})
    assert len(IN_SELFTESTS) >= 8
    assert len(told - CLAIMS.keys()) >= 8
