"""What happens beside a training: a progress bar, metrics.jsonl, stopping in good order."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..living import methods_on, settings

METRICS = "metrics.jsonl"


class Stop:
    """Whether the run should end at the next step, and why: a signal, or the budget."""

    def __init__(self, hours: float | None) -> None:
        self.signal: int | None = None
        self.deadline = None if hours is None else time.monotonic() + hours * 3600
        self.training = False

    @property
    def reason(self) -> str | None:
        if self.signal is not None:
            return f"interrupted by {signal.Signals(self.signal).name}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "the budget of hours is spent"
        return None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM ends a training after its step, with a checkpoint; the second at once.

        So does the first outside a training.
        """

        def handle(number: int, frame: Any) -> None:
            at_once = not self.training or self.signal is not None
            self.signal = number
            if at_once:
                raise KeyboardInterrupt

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns that handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopCallback(TrainerCallback):
    """Saves and ends the training once `Stop` says so, on all processes at the same step."""

    def __init__(self, stop: Stop, accelerator: Any, before_step: Any = None) -> None:
        self.stop, self.accelerator, self.before_step = stop, accelerator, before_step
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.training = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before_step is not None:
            self.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = self.stop.reason is not None
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(int(wanted), device=self.accelerator.device)
            wanted = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        if wanted and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class RampCallback(TrainerCallback):
    """Moves run-time settings of the methods from a first value to their own; between steps they have their own."""

    def __init__(self, model: Any, first: dict[str, float], share: float) -> None:
        self.model, self.first, self.share = model, first, share
        self.own = {name: own for method in methods_on(model) for name, own in vars(method.config).items()
                    if name in first}  # fmt: skip
        self.changed = contextlib.ExitStack()
        with settings(model, **first):  # an error about them comes before the first step
            pass

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = max(0.0, 1 - state.global_step / (self.share * state.max_steps))
        if left:
            values = {name: own + left * (self.first[name] - own) for name, own in self.own.items()}
            self.changed.enter_context(settings(self.model, **values))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.changed.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.changed.close()


class MetricsCallback(TrainerCallback):
    """Appends what is logged to metrics.jsonl: one line a log, `stage` and `step` first."""

    def __init__(self, folder: Path, stage: int, kind: str, units_per_step: int, unit: str) -> None:
        self.file, self.stage, self.kind = folder / METRICS, stage, kind
        self.units_per_step, self.unit = units_per_step, unit
        self.bar: Any = None
        self.started = self.first_step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            forget_after(self.file, self.stage, state.global_step)
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True,
                            desc=f"stage {self.stage} {self.kind}", disable=args.disable_tqdm)  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        shown = {name: value for name, value in logs.items() if name not in _UNWANTED and name != "epoch"}
        if not shown:
            return
        rate = self.rate(state.global_step)
        line = {"stage": self.stage, "kind": self.kind, "step": state.global_step, **shown}
        if "loss" in logs:
            line[f"{self.unit}_per_second"] = round(rate, 1)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.bar is not None:
            values = {name: f"{value:.4g}" for name, value in shown.items() if isinstance(value, float)}
            self.bar.set_postfix({**values, f"{self.unit}/s": f"{rate:.0f}"}, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def rate(self, step: int) -> float:
        """Tokens or images a second since the training began here."""
        return (step - self.first_step) * self.units_per_step / max(time.perf_counter() - self.started, 1e-9)


_UNWANTED = ("total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss",
             "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")  # fmt: skip


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut short is left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def forget_after(file: Path, stage: int, step: int) -> None:
    """Take back what was logged after the checkpoint that a run goes on from."""
    lines = read_metrics(file)
    kept = [line for line in lines if (line["stage"], line["step"]) <= (stage, step)]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def last_values(file: Path) -> dict[str, float]:
    """The last value of everything the last stage logged, the evaluation's included, but for what it began with."""
    found: dict[str, float] = {}
    lines = [line for line in read_metrics(file) if line["step"] > 0]
    for line in (line for line in lines if line["stage"] == lines[-1]["stage"]):
        found.update({name: value for name, value in line.items() if isinstance(value, float) and math.isfinite(value)})
    return found
