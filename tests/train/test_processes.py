"""A conversion on two processes, the model whole on each (DDP) or cut up (FSDP2, ZeRO-3), gives what one gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from patchattn.train import library
from patchattn.train.convert import convert
from patchattn.train.recipe import load_recipe

from .test_convert import base, losses, recipe_of, transfer  # noqa: F401  (base is a fixture)

ROOT = Path(__file__).parents[2]
PATCH = {"method": "gated_attention", "init": "random", "kind": "elementwise"}

# Tells which parameters are cut up, and dies on request once the first checkpoint of the second stage is written.
SCRIPT = """
import os, signal
from patchattn.train.callbacks import StopCallback
from patchattn.train.trainer import ConversionTrainer
step, whole = ConversionTrainer.training_step, StopCallback.on_step_end

def training_step(self, model, inputs, num_items_in_batch=None):
    if not os.path.exists(f"stage-{type(self.objective).__name__}.txt"):
        cut_up = {"patch" if ".patchattn." in name else "base" for name, parameter in model.named_parameters()
                  if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_shape")}
        open(f"stage-{type(self.objective).__name__}.txt", "w").write(" ".join(sorted(cut_up)))
    return step(self, model, inputs, num_items_in_batch)

def on_step_end(self, args, state, control, **kwargs):
    if "stage-1" in args.output_dir and state.global_step == int(os.environ.get("DIE_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, args, state, control, **kwargs)

ConversionTrainer.training_step, StopCallback.on_step_end = training_step, on_step_end
from patchattn.cli import main
main()
"""


def stages(batch_size: int) -> list[dict[str, object]]:
    tune = {"kind": "tune", "steps": 6, "parameters": ["*.mlp.*", "patch"], "learning_rate": 1e-2}
    return [transfer(batch_size=batch_size, steps=4), {**tune, "batch_size": batch_size}]


def launch(config: str, recipe: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    path = str(library.find(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, "--main_process_port", "0",
               "script.py", "convert", str(recipe)]  # fmt: skip
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables, timeout=240)


def written(values: dict[str, object], folder: Path) -> Path:
    (folder / "in.yaml").write_text(yaml.safe_dump(values))
    return folder / "in.yaml"


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("alone")
    convert(load_recipe(written(recipe_of(base, folder / "out", stages(4), patch=PATCH), folder)))
    return folder / "out"


# Which parts are cut up in the two stages, and whether the run dies on the way and goes on from its checkpoint.
CASES = [
    pytest.param("accelerate/ddp-cpu", ("", ""), False, id="ddp"),
    pytest.param("accelerate/fsdp2-cpu", ("base", "base patch"), True, id="fsdp2"),
    pytest.param("accelerate/zero3-cpu", ("base patch", "base patch"), True, id="zero3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("config", "cut_up", "died"), CASES)
def test_two_processes_give_the_losses_and_weights_of_one(
    config: str,
    cut_up: tuple[str, str],
    died: bool,
    base: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
):
    if "zero3" in config:
        pytest.importorskip("deepspeed", reason="ZeRO-3 needs `pip install deepspeed`")
    values = recipe_of(base, tmp_path / "out", stages(2), patch=PATCH)
    recipe = written(values, tmp_path)
    if died:
        assert launch(config, recipe, tmp_path, DIE_AT="3").returncode != 0
        assert (tmp_path / "out/training/stage-1-tune/checkpoint-2").is_dir()
    done = launch(config, recipe, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on from checkpoint-2" in done.stderr or not died
    for name, wanted in zip(("Transfer", "EndToEnd"), cut_up):
        assert (tmp_path / f"stage-{name}.txt").read_text() == wanted
    for name in ("loss", "eval_loss"):
        torch.testing.assert_close(losses(tmp_path / "out", name), losses(alone, name), rtol=1e-5, atol=1e-7)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", alone)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
