"""A method somebody else wrote: the tutorial's, in one file, by decorator and by entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
FILE = DOCS / "tutorial_method.py"


def run(code: str, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_tutorials_method_is_one_file_of_at_most_100_lines():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.timeout(600)
def test_the_tutorials_method_keeps_the_contract():
    code = """
from tutorial_method import LogNScaling
from patchattn.testing import check_method
print(check_method(LogNScaling(train_length=8), families=["llama", "mistral-window", "vit"]))
"""
    out = run(code, DOCS)
    assert "LogNScaling: all passed" in out and out.count("passed") > 40


BROKEN = """
import dataclasses, torch
from patchattn import Method, MethodConfig, register
from patchattn.testing import check_method

@register("peeking")
class Peeking(Method):
    @dataclasses.dataclass(frozen=True)
    class Config(MethodConfig):
        pass
    def forward(self, ctx):
        out = ctx.attend()
        return out + out.mean(dim=(0, 1), keepdim=True)  # looks at the future and at other rows

report = check_method(Peeking, families=["llama"], raise_on_failure=False)
assert not report.passed
failed = {check for _, check, result, _ in report.rows if result != "passed"}
assert {"rows_do_not_mix", "incremental_equals_full", "padding_does_not_matter"} <= failed, failed
assert "unpatch_restores_everything" not in failed
try:
    check_method(Peeking, families=["llama"])
except AssertionError as error:
    assert "Peeking: FAILED" in str(error) and "row 0 alone and in the batch: they differ by" in str(error)
else:
    raise SystemExit("a broken method passed")
try:
    check_method(Peeking, families=["lama"])
except ValueError as error:
    assert "unknown family 'lama'; allowed: llama, qwen3" in str(error)
"""


def test_a_method_that_breaks_the_contract_is_caught():
    run(BROKEN)


def test_a_method_is_found_by_its_entry_point(tmp_path):
    info = tmp_path / "somebodys_attention-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-attention\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[patchattn.methods]\nlog_n_scaling = tutorial_method:LogNScaling\n")
    code = """
import patchattn
from transformers import LlamaForCausalLM
from patchattn.testing import FAMILIES
model = patchattn.patch(FAMILIES["llama"].build(), "log-n-scaling:train_length=16")
print(type(model.model.layers[0].self_attn.patchattn[0]).__name__)
"""
    assert "LogNScaling" in run(code, DOCS, tmp_path)


def test_a_taken_name_is_refused():
    code = """
import patchattn, pytest
from patchattn.method import methods
methods()
with pytest.raises(ValueError, match="the name 'dense' is taken by patchattn.methods.dense.Dense"):
    @patchattn.register("dense")
    class Other(patchattn.Method):
        pass
with pytest.raises(ValueError, match="name is 'Bad-Name'; it must be lower_case"):
    patchattn.register("Bad-Name")(patchattn.Method)
"""
    run(code)
