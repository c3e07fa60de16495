"""The same calls on the oldest, the pinned and the newest transformers.

Other releases are installed beside the environment, under `.versions/`, on first use; without a package index
the ones that are missing are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DAY = 24 * 3600
# transformers 5.0 cannot be imported beside the `kernels` of today.
NEEDED = {"5.0.0": ["transformers==5.0.0", "kernels<0.11"], "newest": ["transformers"]}


def installed(version: str) -> Path:
    """A folder with that release of transformers and what it needs beside torch."""
    folder = ROOT / ".versions" / f"{version}-py{sys.version_info.major}{sys.version_info.minor}"
    stamp = folder / ".complete"
    fresh = stamp.is_file() and (version != "newest" or time.time() - stamp.stat().st_mtime < DAY)
    if not fresh:
        wanted = NEEDED[version]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{wanted[0]} could not be installed: {done.stderr.strip().splitlines()[-1]}")
        stamp.touch()
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", ["5.0.0", "pinned", "newest"])
def test_forward_padding_decode_and_generate_work_on(version):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    if version != "pinned":
        paths.insert(0, str(installed(version)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(ROOT / "tests" / "version_probe.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ok with transformers" in done.stdout
    if version[0].isdigit():
        assert done.stdout.strip().endswith(version)
