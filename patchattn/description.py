"""What a saved patch says of itself: one JSON object, the same beside a patch alone and in a whole model's config.

format_version, patchattn_version, transformers_version    who wrote it
base_model, base_revision, architecture, shape             the model it was made for
plan                                                       layers and methods, as `living.plan_of` gives them
results                                                    what was measured, if anything
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__, card
from .living import plan_of
from .record import record_of, root_of
from .sites import find_sites

FORMAT = 1
CONFIG = "patchattn_config.json"


def describe(model: nn.Module, results: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All there is to know of a patch but its tensors, as JSON-ready data."""
    import transformers

    root, plan, record = root_of(model), plan_of(model), record_of(model)
    description = {
        "format_version": FORMAT,
        "patchattn_version": __version__,
        "transformers_version": transformers.__version__,
        "base_model": record.base_model,
        "base_revision": record.base_revision,
        "architecture": type(root).__name__,
        "shape": _shape(root),
        "plan": plan,
    }
    if results:
        description["results"] = dict(results)
    try:
        return json.loads(json.dumps(description, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the patch or its results cannot be written as JSON: {error}") from None


# What a model must agree in for a patch to fit, and what configs call it.
_SHAPE = {
    "layers": ("num_hidden_layers", "num_layers"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "attention_head_dim"),
    "hidden_size": ("hidden_size",),
}


def _shape(root: nn.Module) -> dict[str, Any]:
    """The sizes that a model's config states; None where it does not."""
    config: Any = getattr(root, "config", None)
    sizes = config.get_text_config() if hasattr(config, "get_text_config") else config
    shape: dict[str, Any] = {"model_type": getattr(config, "model_type", None)}
    own_names = getattr(sizes, "attribute_map", {})
    for field, names in _SHAPE.items():
        # Not by getattr: a config whose layers differ forbids to ask for what they differ in.
        values = (getattr(sizes, "__dict__", {}).get(own_names.get(name, name)) for name in names)
        shape[field] = next((value for value in values if isinstance(value, (int, list))), None)
    return shape


def auto_class(root: nn.Module) -> str | None:
    """The class that opens this kind of model by name: one of transformers' auto classes, or diffusers' own."""
    if any(kind.__module__.startswith("diffusers.") for kind in type(root).__mro__):
        return type(root).__name__
    return next(iter(auto_classes(root)), None)


def auto_classes(root: nn.Module) -> list[str]:
    """The auto classes of transformers that open this kind of model, the most specific first."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    names, config = [], getattr(root, "config", None)
    for name, known in vars(modeling_auto).items():
        if isinstance(known, type) and issubclass(known, _BaseAutoModelClass) and name.startswith("AutoModel"):
            mapping: Any = getattr(known, "_model_mapping", None)
            if type(config) in (mapping or ()):
                classes = mapping[type(config)]
                if type(root) in (classes if isinstance(classes, tuple) else (classes,)):
                    names.append(name)
    return sorted(names, key=lambda name: name in ("AutoModel", "AutoModelForPreTraining"))


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a whole patched model, and not a patch alone."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "patchattn" in values or "patchattn" in (values.get("quantization_config") or {})
    except (OSError, ValueError, AttributeError):
        return False


def read_description(folder: Path, source: str | None = None) -> dict[str, Any]:
    """What the folder, which came from `source`, says of its patch; an error says why it cannot be read."""
    for name, key in ((CONFIG, None), ("config.json", "patchattn")):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            inside = values if key is None or key in values else values.get("quantization_config") or {}
            description = inside if key is None else inside.get(key)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is no JSON object: {error}") from None
        if description is not None:
            check_format(description, str(file))
            return description
    raise FileNotFoundError(
        f"{source or folder} holds no patch: it has neither {CONFIG} nor a config.json with a field 'patchattn'"
    )


def check_format(description: Any, where: str) -> None:
    """Refuse what another version wrote, or what is no description at all."""
    wanted = ("format_version", "patchattn_version", "architecture", "shape", "plan")
    missing = [key for key in wanted if not isinstance(description, dict) or key not in description]
    if missing:
        raise ValueError(f"{where} is not what patchattn writes: it has no field {missing[0]!r}")
    if description["format_version"] != FORMAT:
        newer = isinstance(description["format_version"], int) and description["format_version"] > FORMAT
        raise ValueError(
            f"{where} has format_version {description['format_version']!r}, written by patchattn "
            f"{description['patchattn_version']}; this is patchattn {__version__}, which reads {FORMAT}"
            + ("; run pip install --upgrade patchattn" if newer else "")
        )


def fit(description: Mapping[str, Any], root: nn.Module) -> Callable[[str], str]:
    """How the patch's names become names in this model; an error names what does not fit.

    A causal LM and its bare decoder differ in a prefix only, and a patch of one fits the other.
    """
    made_for, this = f"this patch was made for {description['architecture']}", f"this {type(root).__name__}"
    given: dict[str, Any] = description["shape"]
    for field, value in _shape(root).items():
        if value != given.get(field) and None not in (value, given.get(field)):
            raise ValueError(f"{made_for} with {field} {given[field]!r}; {this} has {value!r}")
    layers = [name for entry in description["plan"] for name in entry["layers"]]
    names = {site.name for site in find_sites(root)}
    prefix = f"{getattr(root, 'base_model_prefix', '')}."
    renamings: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: prefix + name,
        lambda name: name.removeprefix(prefix),
    ]
    for rename in renamings:
        if all(rename(name) in names for name in layers):
            return rename
    missing = next(name for name in layers if name not in names)
    raise ValueError(f"{made_for} with the attention module {missing!r}, which {this} does not have")


def check_base(description: Mapping[str, Any], root: nn.Module) -> None:
    """Names of repositories must agree; of a folder nobody knows what is in it."""
    config = getattr(root, "config", None)
    name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    made_for, made_at = description.get("base_model"), description.get("base_revision")
    if not (card.is_repo_id(name) and card.is_repo_id(made_for)):
        return
    if name != made_for:
        raise ValueError(
            f"this patch was made for {made_for}; this model is {name}. To use it all the same, for a model with the "
            "same origin, pass strict_base=False"
        )
    if revision and made_at and revision != made_at:
        warnings.warn(f"this patch was made for {made_for} at revision {made_at}; this is {revision}", stacklevel=3)
