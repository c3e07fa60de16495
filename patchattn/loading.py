"""Open a model by folder or repository, for the command line: with its weights, or as an empty shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import lab
from .attach import apply_plan

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
    "AutoModelForSequenceClassification",
    "AutoModel",
)
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken*")


def load_model(
    name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False, revision: str | None = None
) -> nn.Module:
    """The model at `name`, a folder, a repository of the hub or a lab checkpoint, ready to run.

    Args:
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1", ... or "auto", which spreads a large model over all devices.
    """
    name = lab.resolve(name)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    where = {"device_map": "auto"} if device == "auto" else {}
    if (kind := _diffusers_class(name)) is not None:
        model = kind.from_pretrained(name, torch_dtype=None if wanted == "auto" else wanted, **where)
    else:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        config = _config(name, options)
        model = _class_for(config).from_pretrained(name, dtype=wanted, **where, **options)
    return (model if device == "auto" else model.to(device)).eval()


def load_shell(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> nn.Module:
    """The model at `name` without its weights: only the config is read, nothing takes memory.

    A whole patched model comes patched, with parameters that hold nothing either.
    """
    name = lab.resolve(name)
    with torch.device("meta"):
        if (kind := _diffusers_class(name)) is not None:
            return kind.from_config(kind.load_config(name)).eval()
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        config = _config(name, options)
        kind = _class_for(config)
        if hasattr(kind, "_from_config"):
            model = kind._from_config(config)
        else:
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
    saved = getattr(config, "patchattn", None)
    return (model if saved is None else apply_plan(model, saved["plan"])).eval()


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer beside a model, or None where there is none."""
    from transformers import AutoTokenizer

    name = lab.resolve(name)
    # Some releases make up an empty tokenizer where there is none, so a folder is looked into first.
    folder = Path(name)
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError, KeyError):
        return None


def _config(name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if Path(name).exists() and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"{name} is no model folder: it has no config.json")
    return AutoConfig.from_pretrained(name, **options)


def _class_for(config: Any) -> Any:
    """The class the checkpoint names, else the first auto class that knows its config."""
    import transformers

    if type(config).__module__.startswith("transformers_modules."):  # remote code
        for auto in AUTO_CLASSES:
            if auto in config.auto_map:
                return getattr(transformers, auto)
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    for auto in AUTO_CLASSES:
        if type(config) in getattr(transformers, auto)._model_mapping:
            return getattr(transformers, auto)
    raise ValueError(f"transformers has no model class for a {type(config).__name__}")


def _diffusers_class(name: str) -> Any:
    """The diffusers class that a local folder's config names, or None."""
    file = Path(name, "config.json")
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    if "_diffusers_version" not in values or "_class_name" not in values:
        return None
    import diffusers

    return getattr(diffusers, values["_class_name"])
