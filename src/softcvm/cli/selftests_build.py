"""The kernel's KVM selftests, built: where they are, and how they come to be there.

They are built from a kernel tree, as it is: Debian's linux-source-6.12, unpacked into the user's cache, or one that
the user names.  Nothing is installed and nothing needs root.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from softcvm.cli.errors import UsageError

__all__ = ("BuildError", "cached_tree", "ensure_built", "find_tests")

PACKAGE = "linux-source-6.12"
TARBALL = Path(f"/usr/src/{PACKAGE}.tar.xz")
NEEDS = "gcc make rsync bc flex bison libelf-dev libssl-dev libcap-dev libnuma-dev xz-utils"
_KVM = Path("tools/testing/selftests/kvm")
_FOLDERS = (".", "x86_64", "x86")
"""Tests for every architecture, and those of x86 under the names that they had."""
_NOT_NEEDED = ("drivers", "sound", "fs", "net", "Documentation", "crypto", "samples")


class BuildError(Exception):
    """Why there are no tests to run."""


def cached_tree() -> Path:
    """Where Debian's source is unpacked and built: $XDG_CACHE_HOME/softcvm."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "softcvm" / PACKAGE


def find_tests(tree: Path) -> dict[str, Path]:
    """The built tests of a kernel tree, by name; empty where none is built."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        here = tree / _KVM / folder
        for path in sorted(here.iterdir()) if here.is_dir() else ():
            if path.suffix == "" and path.is_file() and os.access(path, os.X_OK):
                found[path.name] = path
    return dict(sorted(found.items()))


def ensure_built(source: Path | None, *, again: bool) -> Path:
    """The kernel tree with built tests: the user's own, or Debian's in the cache."""
    tree = source or cached_tree()
    if source is not None and not (source / _KVM / "Makefile").is_file():
        raise UsageError(f"{source} is no kernel tree: it has no {_KVM}")
    if find_tests(tree) and not again:
        return tree
    if source is None and not (tree / _KVM / "Makefile").is_file():
        _unpack(tree)
    _build(tree)
    if not find_tests(tree):
        raise BuildError(f"make built no test in {tree / _KVM}")
    return tree


def _unpack(tree: Path) -> None:
    """What the tests need of the source, under another name until it is whole."""
    if not TARBALL.is_file():
        raise BuildError(
            f"{TARBALL} is not here: install {PACKAGE} (Debian; in bookworm from backports), or give --source"
        )
    _say(f"unpacking {TARBALL} into {tree}")
    partial = tree.with_name(tree.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    left_out = [f"--exclude={PACKAGE}/{name}" for name in _NOT_NEEDED]
    _run(["tar", "xf", str(TARBALL), "-C", str(partial), *left_out], partial / "log")
    shutil.rmtree(tree, ignore_errors=True)
    (partial / PACKAGE).rename(tree)
    shutil.rmtree(partial)


def _build(tree: Path) -> None:
    """The headers of this kernel, then the tests.  A test that does not compile does not stop the others."""
    log = tree / "softcvm-selftests.log"
    _say(f"building the selftests in {tree / _KVM} (a minute or two)")
    _run(["make", "-s", "-C", str(tree), "headers_install"], log)
    jobs = f"-j{os.cpu_count() or 1}"
    _run(["make", "-s", "-k", jobs, "-C", str(tree / _KVM)], log, must=False)


def _run(argv: list[str], log: Path, *, must: bool = True) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS")}
    with log.open("ab") as out:
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment
            )
        except FileNotFoundError:
            raise BuildError(f"{argv[0]} is not here; what is needed: {NEEDS}") from None
    if done.returncode and must:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        said = f": {last[0]}" if last else ""
        raise BuildError(f"{' '.join(argv[:3])} failed{said} ({log}); what is needed: {NEEDS}")


def _say(text: str) -> None:
    print(f"softcvm selftests: {text}", file=sys.stderr, flush=True)
