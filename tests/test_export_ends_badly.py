"""An export that is killed, or finds the disk full, leaves no half bundle and loses none."""

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exported import checkpoint
from mmmamba_edge.bundle import read_manifest, verify_files

KILLS = 5


def start(out: Path, **options) -> subprocess.Popen:
    args = ("export", str(checkpoint("small", "hybrid")), "--to", "onnx", "--out", str(out))
    command = (sys.executable, "-m", "mmmamba_edge", *args, "--quant", "int4", "--json")
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def succeed(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_killed_at_random_moments(tmp_path):
    began = time.perf_counter()
    succeed(start(tmp_path / "whole"))
    length = time.perf_counter() - began
    again = tmp_path / "again"
    random.seed(length)  # other moments every time
    for i in range(KILLS):
        out = again if i % 2 else tmp_path / "fresh"
        if out is again and not again.exists():
            succeed(start(again))
        process = start(out)
        time.sleep(length * random.uniform(0.3, 1.0))
        kill(process)
        if out is again or out.exists():  # what was there before stays until it is replaced
            verify_files(out, read_manifest(out), hashes=True)
    succeed(start(tmp_path / "fresh"))
    succeed(start(again))
    assert hidden(tmp_path) == []  # what kills left is gone


def test_killed_while_writing_is_cleaned_up_by_the_next(tmp_path):
    process = start(tmp_path / "out")
    while not any(name.endswith(".part") for name in hidden(tmp_path)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    other = start(tmp_path / "other")  # another bundle's folder is not touched
    kill(process)
    assert hidden(tmp_path) and not (tmp_path / "out").exists()
    succeed(other)
    assert hidden(tmp_path)
    succeed(start(tmp_path / "out"))
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("limit", [10_000, 100_000])
def test_a_full_disk_is_one_error(tmp_path, limit):
    """A limit on file sizes fails a write as a full disk does, with another number."""
    process = start(
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    out, error = process.communicate()
    assert process.returncode == 2 and out == ""
    assert error.splitlines()[-1] == (
        f"mmmamba-edge: error: {tmp_path}/out: not written (File too large)"
    )
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []
