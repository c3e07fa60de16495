"""The model a recipe starts from: opened, new, or joined of two; with its tokenizer or processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from ..attach import patch
from .schema import ModelSpec, Recipe, TokenizerSpec
from .tasks import Task, task_of

AUTO = {"causal-lm": "AutoModelForCausalLM", "image-classification": "AutoModelForImageClassification",
        "image-text": "AutoModelForImageTextToText"}  # fmt: skip


@dataclass
class Opened:
    """A model with its task, and its tokenizer or processor if it has one."""

    model: nn.Module
    processor: Any
    task: Task


def open_recipe(recipe: Recipe, cache: Path) -> Opened:
    """The model as it is before the first stage: patched, with the recipe's seed.

    Args:
        cache: where a tokenizer that is trained for the recipe is kept.
    """
    set_seed(recipe.seed)
    spec = recipe.model
    processor = _processor(recipe, cache)
    if spec.config is not None:
        model, scheduler = _new_model(spec, processor)
        if spec.task == "image-classification":
            from .images import image_processor

            processor = image_processor(model.config)
    elif spec.vision is not None:
        model, processor, scheduler = *_joined(spec, processor), None
    else:
        assert spec.name is not None
        from ..loading import load_model

        model = load_model(spec.name, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code,
                           revision=spec.revision)  # fmt: skip
        scheduler = _scheduler(spec) if spec.task == "denoising" else None
    if recipe.patch is not None:
        patch(model, recipe.patch)
    return Opened(model.eval(), processor, task_of(spec.task, scheduler))


def _processor(recipe: Recipe, cache: Path) -> Any:
    spec = recipe.model
    if spec.task in ("image-classification", "denoising"):
        return None
    if isinstance(spec.tokenizer, TokenizerSpec):
        return _trained_tokenizer(recipe, spec.tokenizer, cache / "tokenizer")
    name = spec.tokenizer or spec.name
    assert name is not None
    if spec.task == "image-text" and spec.vision is None:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(_local(name), revision=spec.revision,
                                             trust_remote_code=spec.trust_remote_code)  # fmt: skip
    from ..loading import load_tokenizer

    tokenizer = load_tokenizer(name, spec.trust_remote_code, spec.revision)
    if tokenizer is None:
        raise FileNotFoundError(f"there is no tokenizer at {name!r}; name one as model.tokenizer")
    return tokenizer


def _trained_tokenizer(recipe: Recipe, spec: TokenizerSpec, folder: Path) -> Any:
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from .tokenizer import train_tokenizer, training_texts

    with PartialState().main_process_first():
        if not (folder / "tokenizer_config.json").is_file():
            train_tokenizer(spec, training_texts(recipe.data.train)).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _new_model(spec: ModelSpec, processor: Any) -> tuple[nn.Module, Any]:
    values = dict(spec.config or {})
    dtype = torch.float32 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    if spec.task == "denoising":
        import diffusers

        kind = getattr(diffusers, values.pop("_class_name", "DiTTransformer2DModel"))
        return kind.from_config(values).to(dtype), _scheduler(spec)
    import transformers

    if processor is not None and "vocab_size" not in values:
        values["vocab_size"] = len(processor)
    if processor is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            values.setdefault(name, getattr(processor, name))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return getattr(transformers, AUTO[spec.task]).from_config(config, dtype=dtype), None


def _joined(spec: ModelSpec, tokenizer: Any) -> tuple[nn.Module, Any]:
    from ..loading import load_model
    from .llava import join_llava

    assert spec.name is not None and spec.vision is not None
    language = load_model(spec.name, dtype=spec.dtype, revision=spec.revision)
    return join_llava(language, tokenizer, load_model(spec.vision, dtype=spec.dtype))


def _scheduler(spec: ModelSpec) -> Any:
    """The noise schedule: the recipe's, else the one beside the model, else diffusers' default."""
    from diffusers import DDPMScheduler

    if spec.scheduler is not None or spec.name is None:
        return DDPMScheduler(**(spec.scheduler or {}))
    folder = Path(_local(spec.name))
    beside = next((place for place in (folder / "scheduler", folder.parent / "scheduler") if place.is_dir()), None)
    return DDPMScheduler.from_pretrained(beside) if beside is not None else DDPMScheduler()


def _local(name: str) -> str:
    from .. import lab

    return lab.resolve(name)
