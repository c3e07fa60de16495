"""Hugging Face's Trainer, with a stage's objective, checkpoints of what learns alone, and a stop at NaN."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .stages import Objective, rate_of
from .tasks import Task

STATE = "trainer_state.json"  # what the Trainer writes last
WEIGHTS = "model.safetensors"


class NotFinite(RuntimeError):
    """The loss or a weight became NaN or infinite."""


class ConversionTrainer(Trainer):
    """Trains what `stages.prepare` let learn.

    Differs from the Trainer in this: the loss is the sum of an objective's terms, each divided so that accumulation
    and several processes give what one large batch gives; samples come in the order of the data set; a checkpoint
    holds only what learns; a loss that is no number stops the run.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, objective: Objective, task: Task, rates: Mapping[str, float], **kwargs: Any) -> None:
        self.objective, self.task, self.rates = objective, task, dict(rates)
        self._terms: dict[str, Tensor] = {}
        self._seen = 0  # the step before the first whose terms are summed
        super().__init__(*args, **kwargs)
        if objective.replicated:
            self._keep_whole()

    def create_accelerator_and_postprocess(self) -> None:
        _let_cpus_shard()
        super().create_accelerator_and_postprocess()

    # ---- loss ----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        share, count = 1.0, num_items_in_batch
        if count is None:  # evaluation
            count = max(1, self.task.count(inputs) or 1)
        else:
            share = 1 / self.args.gradient_accumulation_steps
            count = count / self.accelerator.num_processes  # gradients are averaged over the processes
        backward = self.accelerator.backward if torch.is_grad_enabled() else None
        terms = self.objective(model, inputs, share, count, backward)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        if not torch.isfinite(loss):
            found = ", ".join(f"{name} {term.item():.4g}" for name, term in terms.items())
            raise NotFinite(f"the loss is no number at step {self.state.global_step + 1} ({found})")
        if torch.is_grad_enabled():
            self._seen = self._seen if self._terms else self.state.global_step
            for name, term in terms.items():
                self._terms[name] = self._terms.get(name, 0.0) + term.detach()
        return (loss, None) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if loss.requires_grad:  # a layerwise transfer has taken its gradients already
            self.accelerator.backward(loss)
        if self.objective.replicated and self.accelerator.sync_gradients:
            self._average_gradients()
        return loss.detach()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        size = self.objective.size(inputs)
        self._held_out += torch.tensor([loss.item() * size, size], dtype=torch.float64)
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's, with a loss that is the mean over all tokens or targets, however they fall into batches."""
        self._held_out = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, size = self.accelerator.reduce(self._held_out.to(self.args.device).float()).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / size
        for name, values in getattr(self.objective, "noted", {}).items():
            mean = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean").item()
            output.metrics[f"{metric_key_prefix}_{name}"] = mean
            values.clear()
        return output

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        total = torch.tensor(sum(self.task.count(batch) or 0 for batch in batch_samples), device=device)
        return self.accelerator.gather(total).sum().clamp_min(1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        steps = self.state.global_step - self._seen
        if "loss" in logs and steps > 0:
            mean = {name: self.accelerator.gather(term).mean().item() / steps for name, term in self._terms.items()}
            logs = {**logs, **(mean if len(mean) > 1 else {})}
            self._terms, self._seen = {}, self.state.global_step
        super().log(logs, *args, **kwargs)

    # ---- gradients that stay whole on every process --------------------------------------------------------

    def _keep_whole(self) -> None:
        """Leave the patch's parameters out of what FSDP cuts up: nothing else takes gradients in this stage."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            plugin.ignored_modules = [
                module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "patchattn"
            ]

    def _average_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes

    # ---- data and optimizer --------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if hasattr(dataset, "__len__") else None

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.rates:
            trained = self.model if model is None else model
            decays = set(self.get_decay_parameter_names(trained))
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((rate_of(name, self.rates), name in decays), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "lr": self.args.learning_rate * rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for (rate, decay), parameters in groups.items()
                ],
                **options,
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        factor = getattr(self.objective, "rate_factor", None)
        if factor is not None and self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, lambda step: factor(step, num_training_steps))
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def learned(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What training has changed, by name: the parameters that learn, and buffers."""
        state = self.model.state_dict() if state is None else state
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        names += [name for name, _ in self.model.named_buffers()]
        # A copy, since what was gathered from several processes may not have arrived yet.
        return {name: state[name].detach().clone().contiguous() for name in names if name in state}

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        tensors = self.learned(state_dict)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NotFinite(f"{name} holds values that are no numbers after step {self.state.global_step}")
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state file, written next, says that all is there

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            kept = last_checkpoint(folder.parent)
            raise OSError(error.errno, f"cannot write the checkpoint of step {self.state.global_step} "
                          f"({error.strerror or error}); {_kept(kept)}") from error  # fmt: skip

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.unexpected_keys:
            raise ValueError(f"the checkpoint holds {load_result.unexpected_keys[0]!r}, which this model has not")


def _let_cpus_shard() -> None:
    """Have FSDP on CPUs too: accelerate would silently leave it out there, and give every process the whole model."""
    shared = PartialState._shared_state
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and shared.get("distributed_type") == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU  # a kind that may shard; the device stays the CPU


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in `folder` that was written to its end; what was cut short is removed."""
    found = []
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            found.append((json.loads((checkpoint / STATE).read_text())["global_step"], checkpoint))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(found)[1] if found else None


def _kept(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "no checkpoint was written before"
    return f"the last good checkpoint is {checkpoint}; the same command goes on from there"


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    """TrainingArguments of a stage: ours where the recipe says nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    return TrainingArguments(output_dir=str(folder), remove_unused_columns=False, logging_nan_inf_filter=False,
                             label_names=["labels"], **fields)  # fmt: skip
