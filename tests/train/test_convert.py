"""Running recipes: what comes out, and what happens when a run is stopped, killed or goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.cli import app
from patchattn.train import trainer as trainer_module
from patchattn.train.callbacks import StopCallback, last_values, read_metrics
from patchattn.train.convert import Stopped, _Conversion, convert
from patchattn.train.recipe import load_recipe
from patchattn.train.schema import TokenizerSpec
from patchattn.train.tokenizer import train_tokenizer
from patchattn.train.trainer import NotFinite, last_checkpoint

GATES = {"method": "gated_attention", "init": "random"}
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "runs",
    "far",
    "away",
    "from",
    "all",
    "of",
    "the",
    "other",
    "animals",
    "in",
    "the",
    "wood",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("base")
    lines = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(1, 300)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    tokenizer = train_tokenizer(TokenizerSpec(vocab_size=300), lines)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=48)  # fmt: skip
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def recipe_of(base: Path, output: Path, stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "version": 1, "model": str(base / "model"), "patch": GATES, "output": str(output), "stages": stages,
        "data": {"train": [{"kind": "text", "path": str(base / "text.txt"), "separator": "\n\n"}], "length": 32,
                 "held_out_samples": 8},
        **changes,
    }  # fmt: skip


def run(values: dict[str, Any], folder: Path, *overrides: str) -> Any:
    file = folder / "recipe-in.yaml"
    file.write_text(yaml.safe_dump(values))
    return convert(load_recipe(file, overrides))


def transfer(**fields: Any) -> dict[str, Any]:
    return {"kind": "attention_transfer", "steps": 12, "batch_size": 4, "learning_rate": 1e-2, **fields}


def losses(folder: Path, name: str = "loss") -> list[tuple[int, int, float]]:
    return [(line["stage"], line["step"], line[name]) for line in read_metrics(folder / "metrics.jsonl")
            if name in line]  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "patchattn.safetensors")


def test_a_conversion_gives_a_patch_that_loads_in_two_lines_and_can_be_run_again(base: Path, tmp_path: Path):
    stages = [transfer(), {"kind": "distill", "steps": 6, "batch_size": 4, "learning_rate": 1e-3}]
    outcome = run(recipe_of(base, tmp_path / "out", stages), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    patchattn.load(model, tmp_path / "out")
    held_out = losses(tmp_path / "out", "eval_loss")
    assert held_out[-1][:2] == (1, 6) and held_out[0][:2] == (0, 0)
    transferred = [value for stage, _, value in held_out if stage == 0]
    assert transferred[-1] < transferred[0]
    report = outcome.report
    assert report == json.loads((tmp_path / "out/conversion.json").read_text())
    assert report["finished"] and report["seed"] == 0 and report["environment"]["packages"]["torch"]
    assert [stage["kind"] for stage in report["stages"]] == ["attention_transfer", "distill"]
    assert all(stage["tokens_per_second"] > 0 and stage["peak_memory_mib"] > 0 for stage in report["stages"])
    (source,) = report["data"]["0"]["train"]
    assert "sha256" in json.dumps(source)
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/training").exists()
    again = load_recipe(tmp_path / "out/recipe.yaml", [f"output={tmp_path / 'again'}"])
    convert(again)
    torch.testing.assert_close(tensors(tmp_path / "again"), tensors(tmp_path / "out"), rtol=0, atol=0)


def test_the_same_command_after_the_end_changes_nothing(base: Path, tmp_path: Path):
    values = recipe_of(base, tmp_path / "out", [transfer(steps=2)])
    before = run(values, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert run(values, tmp_path).report == before.report
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == files


def test_a_merged_lora_gives_a_whole_model_and_a_kept_one_an_adapter_beside_the_patch(base: Path, tmp_path: Path):
    lora = {"kind": "lora", "steps": 4, "batch_size": 4, "rank": 2, "learning_rate": 1e-2}
    run(recipe_of(base, tmp_path / "whole", [lora]), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    names = [name for name, _ in whole.named_parameters()]
    assert any(".patchattn." in name for name in names) and not any("lora" in name for name in names)
    run(recipe_of(base, tmp_path / "kept", [{**lora, "merge": False}]), tmp_path)
    from peft import PeftModel

    model = patchattn.load(AutoModelForCausalLM.from_pretrained(base / "model"), tmp_path / "kept")
    model = PeftModel.from_pretrained(model, tmp_path / "kept/adapter")
    ids = torch.randint(0, 300, (1, 20))
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_recipe_makes_a_new_model_with_a_tokenizer_of_its_own(base: Path, tmp_path: Path):
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32}  # fmt: skip
    values = recipe_of(base, tmp_path / "new", [{"kind": "tune", "tokens": 1000, "batch_size": 4}], patch=None,
                       model={"config": config, "tokenizer": {"vocab_size": 280}}, save_dtype="bfloat16")  # fmt: skip
    report = run(values, tmp_path).report
    assert report["stages"][0]["steps"] == 8  # 1000 tokens in steps of 4 x 32
    from transformers import AutoTokenizer

    model, tokenizer = (kind.from_pretrained(tmp_path / "new") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer) == 280
    assert model.config.use_cache
    assert tokenizer.decode(tokenizer.encode("a fox 42"), skip_special_tokens=True) == "a fox 42"


def test_a_head_search_writes_the_pattern_and_a_duo_attention_patch(base: Path, tmp_path: Path):
    search = {"kind": "identify_heads", "steps": 4, "batch_size": 1, "learning_rate": 0.02, "sink": 2, "recent": 8}
    source = {"kind": "synthetic", "generator": "multi_passkey", "options": {"passkeys": 2, "words_each": 2}}
    values = recipe_of(base, tmp_path / "heads", [search], patch=None,
                       data={"train": [source], "length": 256, "held_out_samples": 4})  # fmt: skip
    run(values, tmp_path)
    model = patchattn.load(AutoModelForCausalLM.from_pretrained(base / "model"), tmp_path / "heads")
    (entry,) = patchattn.living.plan_of(model)[0]["methods"]
    assert entry["method"] == "duo_attention" and sum(map(sum, entry["heads"])) == 2
    gates = patchattn.duo.load_pattern(tmp_path / "heads/pattern")
    assert len(gates) == 2 and any(value < 1 for row in gates for value in row)
    assert patchattn.duo.binarise(gates, 0.5) == entry["heads"]


VISION = {
    "image-classification": {
        "config": {"model_type": "vit", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "intermediate_size": 48, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10},
        "task": "image-classification",
    },
    "denoising": {
        "config": {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8,
                   "in_channels": 1, "out_channels": 1, "num_layers": 1, "sample_size": 8, "patch_size": 2,
                   "num_embeds_ada_norm": 10},
        "task": "denoising",
    },
}  # fmt: skip


@pytest.mark.parametrize("task", VISION)
def test_the_same_stages_run_on_images(task: str, tmp_path: Path):
    stages = [
        transfer(steps=3),
        {"kind": "distill", "steps": 2},
        {"kind": "tune", "steps": 60, "learning_rate": 5e-3, "batch_size": 32},
    ]
    values = {"version": 1, "model": VISION[task], "patch": GATES, "output": str(tmp_path / "out"), "stages": stages,
              "data": {"train": [{"kind": "images", "path": "digits"}], "held_out_samples": 32}}  # fmt: skip
    report = run(values, tmp_path).report
    found = losses(tmp_path / "out")
    assert [stage["kind"] for stage in report["stages"]] == ["attention_transfer", "distill", "tune"]
    tuned = [value for stage, _, value in found if stage == 2]
    assert sum(tuned[-3:]) < sum(tuned[:3])
    assert all("images_per_second" in stage for stage in report["stages"])
    from patchattn.loading import load_model

    assert patchattn.patch_parameters(load_model(str(tmp_path / "out")))


# ---- stopping and going on ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(recipe_of(base, folder / "out", STAGES), folder)
    return folder / "out"


STAGES = [transfer(), {"kind": "lora", "steps": 10, "batch_size": 4, "rank": 2, "dropout": 0.1, "merge": False}]


def same_result(folder: Path, wanted: Path) -> None:
    torch.testing.assert_close(tensors(folder), tensors(wanted), rtol=0, atol=0)
    adapter = "adapter/adapter_model.safetensors"
    torch.testing.assert_close(load_file(folder / adapter), load_file(wanted / adapter), rtol=0, atol=0)
    assert losses(folder) == losses(wanted)
    assert losses(folder, "eval_loss") == losses(wanted, "eval_loss")


class Interrupt:
    """Sends this process a signal at one step of one stage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: str, step: int, number: int) -> None:
        original = StopCallback.on_step_end

        def on_step_end(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stage in args.output_dir and state.global_step == step:
                os.kill(os.getpid(), number)
            original(callback, args, state, control, **kwargs)

        monkeypatch.setattr(StopCallback, "on_step_end", on_step_end)


@pytest.mark.parametrize(("stage", "step", "number"), [("stage-0", 5, signal.SIGINT), ("stage-1", 7, signal.SIGTERM)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_same_command_goes_on(
    stage: str, step: int, number: int, base: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    handler = signal.getsignal(signal.SIGINT)
    values = recipe_of(base, tmp_path / "out", STAGES)
    with monkeypatch.context() as patching:
        Interrupt(patching, stage, step, number)
        with pytest.raises(Stopped, match=f"interrupted by {signal.Signals(number).name} at step {step} of") as stopped:
            run(values, tmp_path)
    assert stopped.value.signal == number
    (folder,) = (tmp_path / "out/training").glob(f"{stage}-*")
    assert last_checkpoint(folder) == folder / f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGINT) is handler
    run(values, tmp_path)
    same_result(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize(
    ("where", "number"),
    [("_claim_folder", signal.SIGINT), ("_open", signal.SIGTERM), ("_data", signal.SIGINT), ("_data", signal.SIGTERM)],
)
def test_a_signal_before_the_first_step_says_that_the_same_command_starts_again(
    where: str, number: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    file = tmp_path / "recipe-in.yaml"
    file.write_text(yaml.safe_dump(recipe_of(base, tmp_path / "out", STAGES)))

    def interrupted(*args):
        signal.pthread_kill(threading.get_ident(), number)  # to this thread, which alone runs what handles it
        time.sleep(5)

    monkeypatch.setattr(_Conversion, where, interrupted)
    assert app(["convert", str(file)], standalone_mode=False) == 128 + number
    said = capsys.readouterr().err
    assert f"stopped: interrupted by {signal.Signals(number).name} before" in said
    assert "the same command starts again" in said


def test_a_second_signal_ends_a_training_at_once_and_the_same_command_goes_on_from_the_last_checkpoint(
    base: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = recipe_of(base, tmp_path / "out", STAGES)
    with monkeypatch.context() as patching:
        for _ in range(2):
            Interrupt(patching, "stage-1", 5, signal.SIGINT)
        with pytest.raises(Stopped, match="interrupted by SIGINT without a new checkpoint; the same command goes on"):
            run(values, tmp_path)
    run(values, tmp_path)
    same_result(tmp_path / "out", uninterrupted)


def test_a_run_that_is_killed_goes_on_at_its_last_checkpoint(base: Path, uninterrupted: Path, tmp_path: Path):
    slow = tmp_path / "slow.py"  # waits at step 5 of the second stage, past its checkpoint of step 4
    slow.write_text(
        "import sys, time\n"
        "from patchattn.train.callbacks import MetricsCallback\n"
        "original = MetricsCallback.on_step_end\n"
        "def on_step_end(self, args, state, control, **kwargs):\n"
        "    original(self, args, state, control, **kwargs)\n"
        "    if self.stage == 1 and state.global_step == 5:\n"
        "        print('waiting', flush=True)\n"
        "        time.sleep(60)\n"
        "MetricsCallback.on_step_end = on_step_end\n"
        "from patchattn.cli import main\n"
        "main()\n"
    )
    file = tmp_path / "recipe-in.yaml"
    file.write_text(yaml.safe_dump(recipe_of(base, tmp_path / "out", STAGES)))
    command = [sys.executable, str(slow), "convert", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().strip() == "waiting", process.stderr.read()
        process.kill()
    (folder,) = (tmp_path / "out/training").glob("stage-1-*")
    half = folder / "checkpoint-6"  # as if the kill had come while a checkpoint was written
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half of it")
    convert(load_recipe(file))
    same_result(tmp_path / "out", uninterrupted)


def test_a_spent_budget_ends_the_run_in_good_order(base: Path, uninterrupted: Path, tmp_path: Path):
    values = recipe_of(base, tmp_path / "out", STAGES)
    with pytest.raises(Stopped, match="the budget of hours is spent at step 1 of 12 in stage 0") as stopped:
        run(values, tmp_path, "budget.hours=1e-9")
    assert stopped.value.signal is None
    run(values, tmp_path)
    same_result(tmp_path / "out", uninterrupted)


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = trainer_module.ConversionTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if self.state.global_step == 7:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return original(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(trainer_module.ConversionTrainer, "training_step", poisoned)
    message = (
        r"stage 0 attention_transfer: the loss is no number at step 8 \(transfer nan\).*learning_rate.*checkpoint-6"
    )
    with pytest.raises(NotFinite, match=message):
        run(recipe_of(base, tmp_path / "out", [transfer()]), tmp_path)
    learned = load_file(tmp_path / "out/training/stage-0-attention_transfer/checkpoint-6/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in learned.values())


def test_a_full_disk_is_named_and_the_last_good_checkpoint_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values, original = recipe_of(base, tmp_path / "out", [transfer()]), trainer_module.save_file

    def full(tensors: Any, file: Path, metadata: Any = None) -> None:
        if "checkpoint-6" in str(file):
            Path(file).write_bytes(b"as much as there was room for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, file, metadata=metadata)

    with monkeypatch.context() as patching:
        patching.setattr(trainer_module, "save_file", full)
        message = r"cannot write the checkpoint of step 6 \(No space left on device\); the last good .*checkpoint-3"
        with pytest.raises(OSError, match=message):
            run(values, tmp_path)
    folder = tmp_path / "out/training/stage-0-attention_transfer"
    assert [file.name for file in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    run(values, tmp_path)
    wanted = recipe_of(base, tmp_path / "wanted", [transfer()])
    run(wanted, tmp_path)
    torch.testing.assert_close(tensors(tmp_path / "out"), tensors(tmp_path / "wanted"), rtol=0, atol=0)


def test_an_output_that_holds_something_else_is_refused_and_left_as_it_is(base: Path, tmp_path: Path):
    values = recipe_of(base, tmp_path / "out", [transfer(steps=2)])
    run(values, tmp_path)
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run(values, tmp_path, "stages.0.steps=3")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no conversion"):
        run(values, tmp_path, f"output={foreign}")
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        run(values, tmp_path, f"output={foreign / 'thesis.txt'}")
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]


def test_data_that_a_late_stage_cannot_have_stops_the_run_before_the_first_and_may_be_mended(
    base: Path, tmp_path: Path
):
    def values(shortest: int) -> dict[str, Any]:
        options = {"pairs": 4, "length": [shortest, 32]}
        late = {"train": [{"kind": "synthetic", "generator": "mqar", "options": options}], "length": 32}
        return recipe_of(base, tmp_path / "out", [transfer(steps=1), transfer(steps=1, data=late)])

    with pytest.raises(ValueError, match=r"mqar: length is 3; .* must be at least"):
        run(values(3), tmp_path)
    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert run(values(32), tmp_path).report["finished"]


def test_what_is_reported_to_tensorboard_stays_after_the_end(base: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stages = [transfer(steps=3, trainer={"logging_steps": 1})] * 2
    run(recipe_of(base, tmp_path / "out", stages, trainer={"report_to": "tensorboard"}), tmp_path)
    for index in range(2):
        events = EventAccumulator(str(tmp_path / f"out/runs/stage-{index}-attention_transfer")).Reload()
        told = [(event.step, event.value) for event in events.Scalars("train/loss")]
        wanted = [(step, loss) for stage, step, loss in losses(tmp_path / "out") if stage == index]
        assert [step for step, _ in told] == [1, 2, 3]
        torch.testing.assert_close(told, wanted)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_a_checkpoint_cut_short_is_not_resumed_from(tmp_path: Path):
    for step, state in ((10, '{"global_step": 10}'), (20, '{"global_st'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-10"]


# ---- training arguments ------------------------------------------------------------------------------------


def test_accumulated_batches_give_the_gradients_of_one_large_batch(base: Path, tmp_path: Path):
    stage = {"kind": "tune", "steps": 5, "parameters": "patch", "learning_rate": 1e-2}
    for name, batch, accumulated in (("large", 8, 1), ("small", 2, 4)):
        run(recipe_of(base, tmp_path / name, [{**stage, "batch_size": batch}],
                      trainer={"gradient_accumulation_steps": accumulated}), tmp_path)  # fmt: skip
    torch.testing.assert_close(tensors(tmp_path / "small"), tensors(tmp_path / "large"), rtol=1e-4, atol=1e-5)


def test_ramps_move_a_setting_to_that_of_the_patch_and_leave_it_there(base: Path, tmp_path: Path, monkeypatch: Any):
    seen: list[float] = []
    plain = patchattn.MoH.forward

    def forward(self: Any, ctx: Any) -> Any:
        if self.training:
            seen.append(self.config.extra)
        return plain(self, ctx)

    monkeypatch.setattr(patchattn.MoH, "forward", forward)
    moh = {"method": "moh", "router": "linear", "shared": 1, "top_k": 2}
    stages = [{"kind": "distill", "steps": 6, "batch_size": 2, "ramps": {"extra": 1.0}, "ramp_share": 0.5}]
    run(recipe_of(base, tmp_path / "out", stages, patch=moh), tmp_path)
    assert seen[::2] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0])  # two layers
    settings = json.loads((tmp_path / "out" / "patchattn_config.json").read_text())
    assert settings["plan"][0]["methods"][0]["extra"] == 0.0
    stages[0]["ramps"] = {"extras": 1.0}
    with pytest.raises(ValueError, match="'extras' cannot be changed at run time; allowed: balance, extra"):
        run(recipe_of(base, tmp_path / "other", stages, patch=moh), tmp_path)


def test_rates_make_some_parameters_learn_faster(base: Path, tmp_path: Path):
    stage = {"kind": "tune", "steps": 1, "batch_size": 4, "learning_rate": 1e-4, "rates": {"*.patchattn.*": 100.0},
             "trainer": {"lr_scheduler_type": "constant", "warmup_steps": 0}}  # fmt: skip
    run(recipe_of(base, tmp_path / "out", [stage], patch={**GATES, "init": "identity"}), tmp_path)
    before = AutoModelForCausalLM.from_pretrained(base / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = {name: (after[name] - before.get(name, 0)).abs().max().item() for name in after}
    for name, distance in moved.items():
        wanted = 1e-2 if ".patchattn." in name else 1e-4  # Adam's first step has the size of the learning rate
        assert distance == pytest.approx(wanted, rel=0.02), name


def test_what_a_stage_ended_with_is_not_what_it_or_an_earlier_one_began_with(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"stage": 0, "step": 0, "eval_loss": 3.0},
        {"stage": 0, "step": 5, "loss": 2.5, "eval_loss": 2.0},
        {"stage": 1, "step": 0, "eval_loss": 2.0},
        {"stage": 1, "step": 7, "loss": 1.0},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]), encoding="utf-8")
    assert last_values(file) == {"loss": 2.5, "eval_loss": 2.0}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert last_values(file) == {"loss": 1.0}
