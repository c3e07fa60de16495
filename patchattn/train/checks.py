"""What cannot go together in a recipe, though each value alone is allowed.

A check is a function of one part of the recipe; it yields the key and what is wrong with it. Checks run on everything
that could be read, so that a typing mistake in one place hides no mistake in another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import typing
from collections.abc import Callable, Iterator
from typing import Any

from . import schema
from .typed import Part, Unreadable, choose, describe, fits, options, shown

Found = Iterator[tuple[str, str]]
Check = Callable[[str, Any, Any], Found]

IMAGES = ("image-classification", "denoising")

# Fields of TrainingArguments that the engine sets itself, and what to write instead.
RESERVED = {
    "output_dir": "use the recipe's output",
    **dict.fromkeys(("max_steps", "num_train_epochs"), "use the stage's steps or tokens"),
    "learning_rate": "use the stage's learning_rate",
    "per_device_train_batch_size": "use the stage's batch_size",
    "auto_find_batch_size": "use the stage's batch_size",
    **dict.fromkeys(("seed", "data_seed"), "use the recipe's seed"),
    "label_smoothing_factor": "use the stage's losses",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the stages say what is done"),
    **dict.fromkeys(("resume_from_checkpoint", "ignore_data_skip", "save_only_model"),
                    "the same command goes on where a run stopped"),
    **dict.fromkeys(("remove_unused_columns", "label_names", "train_sampling_strategy", "length_column_name"),
                    "the data decides this"),
    "logging_nan_inf_filter": "a loss that is no number always stops the run",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
                     "hub_revision"), "use `patchattn push` when it is done"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config", "local_rank"),
                    "use `accelerate launch --config_file`"),
}  # fmt: skip

_CHECKS: list[tuple[type, Check]] = []


def check(of: type) -> Callable[[Check], Check]:
    """Decorator: run this function on every part of this class."""

    def add(function: Check) -> Check:
        _CHECKS.append((of, function))
        return function

    return add


def conflicts(recipe: Any) -> list[tuple[str, str]]:
    """The keys that do not go with the rest of the recipe, and why."""
    found = []
    for path, part in _parts("", recipe):
        of = vars(part).get("part_of", type(part))
        for wanted, function in _CHECKS:
            if issubclass(of, wanted):
                with contextlib.suppress(Unreadable):
                    for problem in function(path, part, recipe):  # one by one: what came before an Unreadable counts
                        found.append(problem)
    return found


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every dataclass in the recipe with its key."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _parts(f"{path}.{index}", item)
    elif isinstance(value, Part) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        yield path, value
        for name, inner in vars(value).items():
            yield from _parts(f"{path}.{name}" if path else name, inner)


# ---- model -------------------------------------------------------------------------------------------------


@check(schema.ModelSpec)
def _named_or_new(path: str, model: Any, recipe: Any) -> Found:
    if model.name is None and model.config is None:
        yield path, "it has neither name nor config; give name, for a pretrained model, or config, for a new one"
    if model.name is not None and model.config is not None:
        yield path, "it has both name and config; give name, for a pretrained model, or config, for a new one"


@check(schema.ModelSpec)
def _new_model(path: str, model: Any, recipe: Any) -> Found:
    if model.config is None:
        return
    kind = "_class_name" if model.task == "denoising" else "model_type"
    if kind not in model.config:
        yield f"{path}.config", f"{kind} is missing; a new model for {model.task} needs it"
    if model.task == "image-text":
        yield f"{path}.config", "an image-text model is opened by name, or joined from name and vision"
    elif model.task not in IMAGES and model.tokenizer is None:
        yield f"{path}.tokenizer", "missing; a new model has none: name one, or give a vocab_size to train one"
    if model.revision is not None:
        yield f"{path}.revision", "a new model has no revision; leave it out"


@check(schema.ModelSpec)
def _tokenizer(path: str, model: Any, recipe: Any) -> Found:
    if model.tokenizer is None:
        return
    if model.task in IMAGES:
        yield f"{path}.tokenizer", f"{model.task} reads no text; leave it out"
    elif model.name is not None and not isinstance(model.tokenizer, str):
        yield f"{path}.tokenizer", "a pretrained model knows the tokens of its own tokenizer; leave it out"


@check(schema.ModelSpec)
def _joined(path: str, model: Any, recipe: Any) -> Found:
    if model.vision is not None and model.task != "image-text":
        yield f"{path}.vision", f"it makes an image-text model, and the task is {model.task}; leave it out"


@check(schema.ModelSpec)
def _schedule(path: str, model: Any, recipe: Any) -> Found:
    if model.scheduler is not None and model.task != "denoising":
        yield f"{path}.scheduler", f"only denoising has a noise schedule, and the task is {model.task}; leave it out"


# ---- patch -------------------------------------------------------------------------------------------------


@check(schema.Recipe)
def _patch(path: str, recipe: Any, _: Any) -> Found:
    what = recipe.patch
    if what is None:
        return
    from ..method import as_methods

    plan = what if isinstance(what, dict) and "method" not in what else {None: what}
    if not plan:
        yield "patch", "an empty plan; name a method, or {layers: methods}"
    for selector, methods in plan.items():
        try:
            as_methods(methods)
        except (ValueError, TypeError) as error:
            yield "patch" if selector is None else f"patch.{selector}", f"{shown(methods)} is not allowed; {error}"


# ---- data --------------------------------------------------------------------------------------------------


@check(schema.DataSpec)
def _sources(path: str, data: Any, recipe: Any) -> Found:
    if not data.train:
        yield f"{path}.train", "an empty list; give at least one source"
    if data.held_out == []:
        yield f"{path}.held_out", "an empty list; give 0 to hold nothing out"
    if isinstance(data.held_out, float) and not 0 <= data.held_out < 1:
        yield f"{path}.held_out", f"{data.held_out} is not allowed; a share is at least 0 and below 1"


@check(schema.Source)
def _serves(path: str, source: Any, recipe: Any) -> Found:
    task = recipe.model.task
    if task not in source.tasks:
        serving = [kind.kind for kind in schema.SOURCES if task in kind.tasks]
        yield f"{path}.kind", f"{source.kind!r} is no data for {task}; allowed: {', '.join(serving)}"


@check(schema.SyntheticSource)
def _options(path: str, source: Any, recipe: Any) -> Found:
    if not source.options:
        return
    from .synthetic import GENERATORS

    fields = dataclasses.fields(GENERATORS[source.generator])
    known = [field.name for field in fields if field.name not in ("tokenizer", "seed")]
    for name in source.options:
        if name not in known:
            yield f"{path}.options.{name}", f"unknown option of {source.generator}; {choose(name, known)}"


# ---- stages ------------------------------------------------------------------------------------------------


@check(schema.Recipe)
def _any_stage(path: str, recipe: Any, _: Any) -> Found:
    if not recipe.stages:
        yield "stages", "an empty list; give at least one stage"


@check(schema.Stage)
def _how_long(path: str, stage: Any, recipe: Any) -> Found:
    if stage.steps is None and stage.tokens is None:
        yield path, "it has neither steps nor tokens; give one of them"
    elif stage.steps is not None and stage.tokens is not None:
        yield path, "it has both steps and tokens; give one of them"
    elif stage.tokens is not None and recipe.model.task in IMAGES:
        yield f"{path}.tokens", f"{recipe.model.task} has no tokens; give steps"


@check(schema.Stage)
def _patched(path: str, stage: Any, recipe: Any) -> Found:
    wants = {"attention_transfer": "a patched model", "distill": "a patched model"}.get(stage.kind)
    if stage.kind == "tune" and "patch" in _list(stage.parameters):
        wants = "a patch, whose parameters it trains"
    if wants and not _is_patched(recipe, path):
        yield path, f"{stage.kind} needs {wants}; give the recipe a patch"


@check(schema.IdentifyHeads)
def _own_patch(path: str, stage: Any, recipe: Any) -> Found:
    if recipe.model.task != "causal-lm":
        yield f"{path}.kind", f"identify_heads searches the heads of a causal-lm, and the task is {recipe.model.task}"
    if _is_patched(recipe, path):
        yield path, "identify_heads puts its own patch on; leave out the recipe's patch, and search once"


@check(schema.Trained)
def _losses(path: str, stage: Any, recipe: Any) -> Found:
    for name, weight in stage.losses.items():
        if name not in schema.LOSS_TERMS:
            yield f"{path}.losses.{name}", f"unknown term; {choose(name, schema.LOSS_TERMS)}"
        if weight < 0 and name != "sink":
            yield f"{path}.losses.{name}", f"{weight} is not allowed; a weight is at least 0"
        if name == "sink" and weight and recipe.model.task not in ("causal-lm", "image-text"):
            yield f"{path}.losses.sink", f"a first token draws attention in text, and the task is {recipe.model.task}"
    if stage.losses and not any(stage.losses.values()):
        yield f"{path}.losses", "every weight is 0; nothing would be learned"


@check(schema.Trained)
def _distilled(path: str, stage: Any, recipe: Any) -> Found:
    terms = {name for name, weight in (stage.losses or stage.DEFAULT_LOSSES).items() if weight}
    taught = terms & {"logits", "hidden"}
    if taught and stage.kind != "distill" and not _is_patched(recipe, path):
        yield f"{path}.losses", f"{' and '.join(sorted(taught))} are learned from the unpatched model; give a patch"
    if stage.top_k is not None and "logits" not in terms:
        yield f"{path}.top_k", "no logits are distilled; give losses a weight for logits, or leave it out"
    elif stage.top_k is not None and recipe.model.task == "denoising":
        yield f"{path}.top_k", "a denoising model gives no logits; leave it out"


@check(schema.Trained)
def _moving_teacher(path: str, stage: Any, recipe: Any) -> Found:
    terms = {name for name, weight in (stage.losses or stage.DEFAULT_LOSSES).items() if weight > 0}
    if terms & {"logits", "hidden"} and getattr(stage, "parameters", "patch") != "patch":
        yield f"{path}.parameters", "the base model teaches and must stay as it is; train the patch, or use stage lora"


@check(schema.Trained)
def _on(path: str, stage: Any, recipe: Any) -> Found:
    if stage.on not in ("all", "labelled") and not (isinstance(stage.on, int) and stage.on >= 1):
        yield f"{path}.on", f"{shown(stage.on)} is not allowed; allowed: all, labelled, or a whole number of at least 1"


@check(schema.Distill)
@check(schema.Tune)
def _parameters(path: str, stage: Any, recipe: Any) -> Found:
    if not _list(stage.parameters) or not all(_list(stage.parameters)):
        yield f"{path}.parameters", "it names nothing; give patch, all, or globs over parameter names"


@check(schema.Lora)
def _targets(path: str, stage: Any, recipe: Any) -> Found:
    if not stage.targets or not all(stage.targets):
        yield f"{path}.targets", "it names nothing; give names of modules, such as q_proj"


@check(schema.Stage)
def _rates(path: str, stage: Any, recipe: Any) -> Found:
    for glob, rate in stage.rates.items():
        if rate < 0:
            yield f"{path}.rates.{glob}", f"{rate} is not allowed; a factor is at least 0"


@check(schema.Recipe)
@check(schema.Stage)
def _trainer(path: str, part: Any, recipe: Any) -> Found:
    if not part.trainer:
        return
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in RESERVED]
    for name, value in part.trainer.items():
        key = f"{path}.trainer.{name}" if path else f"trainer.{name}"
        if name in RESERVED:
            yield key, f"the engine sets this itself; {RESERVED[name]}"
        elif name not in names:
            hint = difflib.get_close_matches(name, names, n=3)
            close = f"did you mean {', '.join(hint)}? " if hint else ""
            yield key, f"unknown key; {close}allowed: the fields of transformers' TrainingArguments"
        elif not any(fits(value, option) for option in _strict(hints[name])):
            yield key, f"{shown(value)} is not allowed; it must be {' or '.join(map(describe, _strict(hints[name])))}"


def _is_patched(recipe: Any, path: str) -> bool:
    """Whether the model wears a patch when the stage at `path` begins."""
    index = int(path.split(".")[1])
    return recipe.patch is not None or any(stage.kind == "identify_heads" for stage in recipe.stages[:index])


def _strict(hint: Any) -> list[Any]:
    """The types a field takes; where it takes the words of an enumeration, not any other text."""
    kinds = options(hint)
    words = any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds)
    return [kind for kind in kinds if not (words and kind is str)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
