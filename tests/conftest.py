"""Everything runs offline, on the CPU, with the same seed."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def same_for_every_test(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it in its workers


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs `patchattn` with these arguments; gives exit code, stdout, stderr."""
    from patchattn import cli

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["patchattn", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return command
