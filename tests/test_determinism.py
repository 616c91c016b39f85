"""Same inputs, same bytes: two processes whose hashes of strings differ write equal event streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def stream(folder: Path, hash_seed: str, *options: str) -> tuple[bytes, bytes]:
    """What `softcvm boot` prints and traces in a fresh process."""
    trace = folder / f"trace-{hash_seed}.jsonl"
    command = [
        sys.executable,
        "-m",
        "softcvm",
        "boot",
        "--json",
        "--trace",
        str(trace),
        *options,
    ]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    return done.stdout, trace.read_bytes()


@pytest.mark.parametrize("guest", ["payload", "scripted"])
def test_two_processes_with_other_hash_seeds_write_equal_streams(
    tmp_path: Path, guest: str
) -> None:
    options = ("--guest", guest, "--memory", "256M", "--vcpus", "2")
    one = stream(tmp_path, "1", *options)
    two = stream(tmp_path, "2", *options)
    assert one == two
    assert one[1].count(b"\n") > 1000
