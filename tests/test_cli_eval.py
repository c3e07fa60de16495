"""`patchattn eval` and `patchattn tasks`: what they print, write and refuse."""

import json
import subprocess
import sys

import pytest

from patchattn.evaluate import folder

SMALL = "lengths=[128],depths=[0.5],samples=2"


@pytest.fixture
def run(command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return command_line


@pytest.mark.parametrize("command", ["eval", "tasks"])
def test_help_has_examples(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"patchattn {command}" in out.partition("Examples")[2]


def test_tasks_and_suites_are_listed(run):
    code, out, _ = run("tasks")
    assert code == 0 and "recall_passkey" in out and "quality_local" in out
    found = json.loads(run("tasks", "--json")[1])
    assert found["folder"] == str(folder()) and "quick" in found["suites"]
    assert run("tasks", "--path")[1].strip() == str(folder())


def test_listing_imports_no_torch_and_no_lm_eval():
    code = """
import sys
sys.argv = ["patchattn", "tasks"]
from patchattn.cli import main
try:
    main()
finally:
    assert not {"torch", "transformers", "lm_eval"} & set(sys.modules), "they were imported"
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_eval_prints_a_table_or_json_and_writes_what_the_harness_writes(run, tmp_path):
    pytest.importorskip("lm_eval")
    line = ["eval", "lab-llama", "--tasks", "recall_passkey", "--metadata", SMALL, "--batch_size", "2", "--limit", "1"]
    code, out, err = run(*line, "-m", "duo_attention:heads=0,sink=2,recent=30", "-l", "1-", "--output_path", "out")
    assert code == 0, err
    assert "recall_passkey" in out and "acc" in out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    facts = json.loads(file.read_text())["config"]["patchattn"]
    assert facts["plan"][0]["layers"][0] == "model.layers.1.self_attn"
    code, out, _ = run(*line, "--patch", "duo_attention:heads=0;sink=2;recent=30", "--seed", "7", "--json")
    found = json.loads(out)
    assert code == 0 and found["config"]["patchattn"]["plan"][0]["methods"][0]["recent"] == 30
    assert found["config"]["random_seed"] == found["config"]["fewshot_seed"] == 7


WRONG_USAGE = {
    "no model": ("eval", "--suite", "quick"),
    "no task": ("eval", "lab-llama"),
    "task and suite": ("eval", "lab-llama", "--suite", "quick", "--tasks", "piqa"),
    "no such suite": ("eval", "lab-llama", "--suite", "slow"),
    "no such method": ("eval", "lab-llama", "--suite", "quick", "-m", "nonsense"),
    "no such patch": ("eval", "lab-llama", "--suite", "quick", "--patch", "nonsense"),
    "two patches": ("eval", "lab-llama", "--suite", "quick", "--patch", "dense", "-m", "dense"),
    "patch twice": ("eval", "lab-llama", "--suite", "quick", "--patch", "dense", "--model_args", "patch=dense"),
    "layers of nothing": ("eval", "lab-llama", "--suite", "quick", "-l", "0"),
    "malformed arguments": ("eval", "lab-llama", "--suite", "quick", "--model_args", "float32"),
    "malformed JSON": ("eval", "lab-llama", "--suite", "quick", "--metadata", "{lengths: 3}"),
    "three seeds": ("eval", "lab-llama", "--suite", "quick", "--seed", "1,2,3"),
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_leaves_with_2(run, case):
    code, out, err = run(*WRONG_USAGE[case])
    assert code == 2 and out == "" and "Traceback" not in err
