"""Run a recipe: open, patch, train stage by stage, save; and go on where an earlier run stopped.

OUTPUT/
  recipe.yaml        the exact recipe
  conversion.json    versions, machine, seeds, data fingerprints, what each stage took and gave
  metrics.jsonl      everything that was logged; curves.png shows it
  runs/              the same for TensorBoard, where the recipe reports to it
  training/          checkpoints and the results of finished stages; removed at the end
  ...                the patch, or the whole model where the base was trained too
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..environment import environment, peak_memory
from .callbacks import METRICS, MetricsCallback, RampCallback, Stop, StopCallback, last_values
from .recipe import fingerprint, to_yaml
from .schema import AttentionTransfer, DataSpec, IdentifyHeads, Recipe, Stage
from .tasks import Denoising

TRAINING = "training"
RESULT = "result.safetensors"
REPORT = "conversion.json"


class Stopped(RuntimeError):
    """The run ended early, in good order, by a signal or because its budget was spent; the same command goes on."""

    def __init__(self, text: str, signal: int | None) -> None:
        super().__init__(text)
        self.signal = signal


@dataclass(frozen=True)
class Outcome:
    """What a conversion left: the folder, and the report that stands in its conversion.json."""

    folder: Path
    report: dict[str, Any]


def convert(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Run `recipe`, or the rest of it, and return what it gave.

    Args:
        say: called with a line for people at each step on the way.

    Raises:
        Stopped: after SIGINT, SIGTERM or a spent budget, once a checkpoint is written; before the first step at once.
    """
    return _Conversion(recipe, say).run()


class _Conversion:
    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        from accelerate import PartialState

        self.recipe, self.folder = recipe, Path(recipe.output)
        self.training, self.report_file = self.folder / TRAINING, self.folder / REPORT
        self.process = PartialState(cpu=not torch.accelerator.is_available())
        self.say = say if self.process.is_main_process else lambda line: None
        self.stop = Stop(recipe.budget.hours)
        self.adapters: Any = None

    def run(self) -> Outcome:
        self._claim_folder()
        report = self._report()
        if report.get("finished"):
            self.say(f"{self.folder} is finished; name another output to run it again")
            return Outcome(self.folder, report)
        with self.stop.listening():
            try:
                self._open(len(report["stages"]))
                self._try_data()
                for index in range(len(report["stages"]), len(self.recipe.stages)):
                    if self._train(index):
                        self._open(index + 1)
                report = self._finish()
            except KeyboardInterrupt as interrupt:
                raise Stopped(self._interrupted(), self.stop.signal) from interrupt
        return Outcome(self.folder, report)

    def _interrupted(self) -> str:
        """Where a signal ended the run at once, not after a step."""
        if self._holds_nothing():
            return f"{self.stop.reason} before there was anything to keep; the same command starts again"
        return f"{self.stop.reason} without a new checkpoint; the same command goes on from the last"

    # ---- the folder ----------------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        """Write the recipe into an empty folder, or make sure that this is the folder of the same recipe."""
        mark = fingerprint(self.recipe)
        if self.folder.is_file():
            raise FileExistsError(f"output {self.folder} is a file; name a folder")
        if self.process.is_main_process:
            begun = self.report_file.is_file()
            if begun and not self._holds_nothing():
                self._require_same(mark)
            elif not begun and self.folder.is_dir() and any(self.folder.iterdir()):
                raise FileExistsError(f"output {self.folder} is not empty and holds no conversion; name another folder")
            else:
                self.training.mkdir(parents=True, exist_ok=True)
                (self.folder / METRICS).unlink(missing_ok=True)
                (self.folder / "recipe.yaml").write_text(to_yaml(self.recipe), encoding="utf-8")
                self._write_report({"fingerprint": mark, "patchattn": __version__, "environment": environment(),
                                    "seed": self.recipe.seed, "processes": self.process.num_processes,
                                    "data": {}, "stages": [], "finished": False})  # fmt: skip
        self.process.wait_for_everyone()
        if not self.report_file.is_file():
            raise FileNotFoundError(f"process {self.process.process_index} does not see {self.folder}; "
                                    "all processes need the same file system")  # fmt: skip

    def _holds_nothing(self) -> bool:
        """Whether the run in the folder ended before its first checkpoint, as on a mistake that is mended now."""
        return not self._report()["stages"] and not any(self.training.glob("*/checkpoint-*"))

    def _require_same(self, mark: str) -> None:
        if self._report()["fingerprint"] != mark:
            raise ValueError(
                f"output {self.folder} holds a run of another recipe (see its recipe.yaml); name another output, or "
                "remove the folder"
            )

    def _report(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.report_file.read_text(encoding="utf-8"))
        return values

    def _write_report(self, report: dict[str, Any]) -> None:
        written = self.report_file.with_suffix(".tmp")
        written.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        written.replace(self.report_file)

    # ---- the model -----------------------------------------------------------------------------------------

    def _open(self, done: int) -> None:
        """The model as the first `done` stages left it."""
        from transformers import set_seed

        from .opening import open_recipe
        from .stages import finish, prepare

        _open_whole()
        opened = open_recipe(self.recipe, self.training)
        self.model, self.processor, self.task = opened.model, opened.processor, opened.task
        for index in range(done):
            stage = self.recipe.stages[index]
            set_seed(self.recipe.seed + index)
            prepared = prepare(self.model, stage, self.task)
            _load(prepared.model, self._stage_folder(index) / RESULT)
            self.model, self.adapters = finish(prepared, stage)
            self.say(f"stage {index} {stage.kind}: done before")

    def _stage_folder(self, index: int) -> Path:
        return self.training / f"stage-{index}-{self.recipe.stages[index].kind}"

    # ---- one stage -----------------------------------------------------------------------------------------

    def _train(self, index: int) -> bool:
        """Train one stage; returns whether the model was cut up over processes and must be opened again."""
        from transformers import set_seed
        from transformers.trainer_utils import IntervalStrategy

        from .stages import finish, prepare
        from .trainer import ConversionTrainer, NotFinite, last_checkpoint

        stage, folder = self.recipe.stages[index], self._stage_folder(index)
        set_seed(self.recipe.seed + index)
        prepared = prepare(self.model, stage, self.task)
        args = self._arguments(stage, folder)
        data = self._data(stage, args)
        if data.held_out is None:
            args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        unit, per_step = self._units(stage, args)
        with _tensorboard_in(self.folder / "runs" / folder.name):
            trainer = ConversionTrainer(
                model=prepared.model, args=args, objective=prepared.objective, task=self.task, rates=stage.rates,
                train_dataset=data.train, eval_dataset=data.held_out, data_collator=data.collate,
            )  # fmt: skip
        stopping = StopCallback(self.stop, trainer.accelerator, getattr(prepared.objective, "before_step", None))
        metrics = MetricsCallback(self.folder, index, stage.kind, per_step, unit)
        _replace_progress(trainer, stopping, metrics)
        if stage.ramps:
            trainer.add_callback(RampCallback(prepared.model, stage.ramps, stage.ramp_share))
        learning = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
        self.say(f"stage {index} {stage.kind}: {args.max_steps} steps, {learning:,} parameters learn")
        with self.process.main_process_first():  # it removes what was cut short
            checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            self.say(f"stage {index} {stage.kind}: goes on from {checkpoint.name}")
            args.eval_on_start = False
        start = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except NotFinite as error:
            kept = last_checkpoint(folder)
            where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written before"
            raise NotFinite(f"stage {index} {stage.kind}: {error}; try a lower learning_rate, or float32; "
                            f"{where}") from error  # fmt: skip
        if stopping.stopped:
            raise Stopped(f"{self.stop.reason or 'another process was stopped'} at step "
                          f"{trainer.state.global_step} of {args.max_steps} in stage {index} {stage.kind}; "
                          "the same command goes on from there", self.stop.signal)  # fmt: skip
        if args.eval_strategy != "no" and args.max_steps % args.eval_steps:
            trainer.evaluate()
        self._keep(trainer, index, stage, time.perf_counter() - start, metrics.rate(args.max_steps), unit, data)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not sharded:
            self.model, self.adapters = finish(prepared, stage)
        trainer.accelerator.free_memory()
        return sharded

    def _keep(self, trainer: Any, index: int, stage: Stage, seconds: float, rate: float, unit: str, data: Any) -> None:
        """Write what the stage learned, then that it is done; its checkpoints are no longer needed."""
        from safetensors.torch import save_file

        folder = self._stage_folder(index)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
        if self.process.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trainer.learned(state), folder / f"{RESULT}.tmp")
            (folder / f"{RESULT}.tmp").replace(folder / RESULT)
            report = self._report()
            report["data"][str(index)] = data.fingerprints
            report["stages"].append({
                "kind": stage.kind, "steps": trainer.state.global_step, "seconds": round(seconds, 1),
                f"{unit}_per_second": round(rate, 1), "peak_memory_mib": round(peak_memory() / 2**20),
                "learned_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                "last": last_values(self.folder / METRICS),
            })  # fmt: skip
            self._write_report(report)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        self.process.wait_for_everyone()

    def _arguments(self, stage: Stage, folder: Path) -> Any:
        from .trainer import arguments

        given = {**self.recipe.trainer, **stage.trainer}
        if isinstance(stage, AttentionTransfer):  # it keeps no graph of the model; `layerwise` saves the methods' own
            given.pop("gradient_checkpointing", None)
        accumulation = given.get("gradient_accumulation_steps", 1)
        batch = stage.batch_size * accumulation * self.process.num_processes
        steps = stage.steps or math.ceil((stage.tokens or 1) / (batch * self._length(stage)))
        interval = math.ceil(steps / 5)
        ours = {
            "max_steps": steps, "learning_rate": stage.learning_rate, "seed": self.recipe.seed,
            "per_device_train_batch_size": stage.batch_size, "per_device_eval_batch_size": stage.batch_size,
            "lr_scheduler_type": "cosine", "warmup_steps": math.ceil(steps / 20), "logging_steps": max(1, steps // 50),
            "logging_first_step": True, "eval_strategy": "steps", "eval_steps": interval, "eval_on_start": True,
            "save_strategy": "steps", "save_steps": interval, "save_total_limit": 2, "report_to": "none",
            "run_name": f"{self.folder.name} {folder.name}",
            "use_cpu": not torch.accelerator.is_available(),
            # The Trainer writes it into the model's config, which is saved; batches say themselves that they need none.
            "use_cache": self._uses_cache(),
        }  # fmt: skip
        return arguments(folder, **{**ours, **given})

    def _uses_cache(self) -> bool:
        config: Any = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return bool(getattr(config, "use_cache", False))

    def _length(self, stage: Stage) -> int:
        return stage.length or self._data_spec(stage).length

    def _data_spec(self, stage: Stage) -> DataSpec:
        return stage.data or self.recipe.data

    def _try_data(self) -> None:
        """Find tasks that cannot be generated before the first stage is trained, not before their own."""
        from .data import try_generators

        if self.task.token_level:
            for stage in self.recipe.stages:
                spec, length = self._data_spec(stage), self._length(stage)
                try_generators(spec, self.processor, length=length, seed=self.recipe.seed)

    def _data(self, stage: Stage, args: Any) -> Any:
        from .data import open_data

        spec = self._data_spec(stage)
        batch = stage.batch_size * args.gradient_accumulation_steps * self.process.num_processes
        if isinstance(stage, IdentifyHeads):
            spec = replace(spec, packing=False)
        processor = self.task.scheduler if isinstance(self.task, Denoising) else self.processor
        return open_data(
            spec, task=self.recipe.model.task, processor=processor, length=self._length(stage),
            seed=self.recipe.seed, samples=args.max_steps * batch, cache=self.training / "data",
            model_config=self.model.config,
        )  # fmt: skip

    def _units(self, stage: Stage, args: Any) -> tuple[str, int]:
        """What speed is counted in, and how many of it a step takes."""
        samples = stage.batch_size * args.gradient_accumulation_steps * self.process.num_processes
        return ("tokens", samples * self._length(stage)) if self.task.token_level else ("images", samples)

    # ---- the end -------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        from .stages import changes_base

        report = self._report()
        if self.process.is_main_process:
            self._save_patterns()
            whole = self.recipe.model.config is not None or self.recipe.model.vision is not None
            whole = whole or any(changes_base(stage) for stage in self.recipe.stages)
            self._save(whole)
            from .curves import draw

            draw(self.folder)
            report |= {"finished": True, "whole_model": whole, "last": last_values(self.folder / METRICS)}
            self._write_report(report)
            shutil.rmtree(self.training, ignore_errors=True)
        self.process.wait_for_everyone()
        self.say(f"wrote {self.folder}")
        return self._report()

    def _save(self, whole: bool) -> None:
        from ..hub import save
        from ..record import patch_of

        model: Any = self.model
        if self.recipe.save_dtype is not None:
            model = model.to(getattr(torch, self.recipe.save_dtype))
        if self.adapters is not None:
            self.adapters.save_pretrained(self.folder / "adapter")
        if whole or patch_of(model) is None:
            model.save_pretrained(self.folder)
            if self.processor is not None:
                self.processor.save_pretrained(self.folder)
            if isinstance(self.task, Denoising):
                self.task.scheduler.save_pretrained(self.folder / "scheduler")
        else:
            save(model, self.folder, results=self._results())

    def _save_patterns(self) -> None:
        """The gates of each search for heads, in DuoAttention's published layout and as a picture."""
        from safetensors.torch import load_file

        from ..duo import draw_pattern, save_pattern

        for index, stage in enumerate(self.recipe.stages):
            if isinstance(stage, IdentifyHeads):
                learned = load_file(self._stage_folder(index) / RESULT)
                gates = [learned[name] for name in sorted(learned, key=_numbers) if name.endswith(".gates")]
                found = torch.stack(gates).clamp(0, 1)
                folder = save_pattern(self.folder / "pattern", found, stage.sink, stage.recent)
                draw_pattern(folder / "heads.png", found, stage.share)

    def _results(self) -> dict[str, float]:
        found = last_values(self.folder / METRICS)
        return {"held-out loss": round(found["eval_loss"], 4)} if "eval_loss" in found else {}


def _numbers(name: str) -> list[int]:
    """The layer indices in a parameter's name, to sort by."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def summary(outcome: Outcome) -> Any:
    """What each stage took and gave, as a table for people."""
    from ..tables import add_row, table

    rows = table("stage", "steps", "seconds", "speed", "peak memory", "loss", "held-out loss")
    for stage in outcome.report["stages"]:
        speed = next(f"{value:,.0f} {name[: -len('_per_second')]}/s" for name, value in stage.items()
                     if name.endswith("_per_second"))  # fmt: skip
        losses = [f"{stage['last'][name]:.4g}" if name in stage["last"] else None for name in ("loss", "eval_loss")]
        add_row(
            rows, stage["kind"], stage["steps"], stage["seconds"], speed, f"{stage['peak_memory_mib']:,} MiB", *losses
        )
    return rows


def _load(model: nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, so the run cannot go on; remove the output folder to begin again")
    result = model.load_state_dict(load_file(file), strict=False)
    if result.unexpected_keys:
        raise ValueError(f"{file} holds {result.unexpected_keys[0]!r}, which the model of this recipe has not")


def _open_whole() -> None:
    """Have the next model opened whole: after a stage of ZeRO-3 transformers would cut it up while reading it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Where TensorBoard writes, unless the user said: by itself that is among the checkpoints, which are removed."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.get(name)
    os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _replace_progress(trainer: Any, *callbacks: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    for callback in callbacks:
        trainer.add_callback(callback)
