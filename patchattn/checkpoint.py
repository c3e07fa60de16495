"""Whole patched models: `model.save_pretrained`, and `from_pretrained` of what it wrote.

The folder is what transformers or diffusers would have written of the model without its patch, and beside it

    patchattn.safetensors     the patch's own tensors, listed in the index of the weights like any other shard
    config.json               one more field, `patchattn` (see `description.py`), and two that lead to us:
                              `quantization_config`, for which `import patchattn` registers a reader, and
                              `auto_map`, for `trust_remote_code=True`
    modeling_patchattn.py     what `auto_map` names: imports patchattn, or says how to install it

The tensors have a file of their own because a model's weights may be renamed, cast and fused on their way to the
disk and back; the patch's are not.

A base model that is itself quantized keeps its own `quantization_config`: it opens with `trust_remote_code=True`.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import card, hub
from . import tensors as own
from .description import auto_class, auto_classes, describe
from .folder import CARD, contents, is_weights, keep_foreign_card, replacing
from .living import patch_state
from .opening import METHOD
from .record import record_of

STUB = "modeling_patchattn.py"
_SAVERS = ("save_pretrained", "push_to_hub")


def prepare_saving(root: nn.Module) -> None:
    """Let this one model save itself with its patch; its class is left alone."""
    for name in _SAVERS:
        stock = getattr(type(root), name, None)
        if stock is not None and name not in root.__dict__:
            saver: Any = functools.partial(globals()[name], root)  # which follows the model through copy and pickle
            saver.__doc__, saver.__signature__ = stock.__doc__, inspect.signature(stock.__get__(root))
            root.__dict__[name] = saver


def undo_saving(root: nn.Module) -> None:
    """Take back what `prepare_saving` did, and what a quantizer left."""
    for name in _SAVERS:
        if getattr(root.__dict__.get(name), "func", None) is globals()[name]:
            del root.__dict__[name]
    if type(root.__dict__.get("hf_quantizer")).__module__ == "patchattn._diffusers_plugin":
        del root.__dict__["hf_quantizer"]


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """As the class's own `save_pretrained`, with the patch; what was in the folder stays if the writing fails.

    Args:
        results: what was measured, for the model card, as for `patchattn.save`.
    """
    results = kwargs.pop("results", None)
    stock = type(model).save_pretrained
    options = inspect.signature(stock).bind(model, save_directory, *args, **kwargs).arguments
    options.update(options.pop("kwargs", {}))
    push, repo, hub_options = options.pop("push_to_hub", False), options.pop("repo_id", None), _hub_options(options)
    for name, refused in (("distributed_checkpoint", True), ("use_flashpack", True), ("safe_serialization", False)):
        if options.get(name) is refused:
            raise ValueError(f"save_pretrained: {name}={refused} cannot be used on a patched model, which is saved as "
                             "safetensors")  # fmt: skip
    quantizer = getattr(model, "hf_quantizer", None)
    if _is_diffusers(model) and quantizer is not None and quantizer.quantization_config.quant_method != METHOD:
        raise ValueError(
            f"this {type(model).__name__} is quantized, and diffusers opens a checkpoint either quantized or patched: "
            "save the patch alone with patchattn.save, and put it on the quantized model with patchattn.load"
        )
    names, tensors = set(patch_state(model)), own.state(model)
    if options.get("state_dict") is not None:
        given = options["state_dict"]
        tensors = {name: given.get(name, tensor).detach().cpu() for name, tensor in tensors.items()}
        options["state_dict"] = {name: tensor for name, tensor in given.items() if name not in names}
    where = options["save_directory"]
    stale = functools.partial(is_weights, variant=options.get("variant"))
    with replacing(where, stale) as folder:
        options["save_directory"] = folder
        options.pop("self")
        with _without_patch(model):
            stock(model, **options)
        _complete(model, folder, tensors, options.get("variant"), os.fspath(where), results)
        keep_foreign_card(folder, Path(where, CARD))
        written = contents(folder)
    if push and written:
        _push(model, repo or Path(where).name, where, written, options.get("variant"), **hub_options)


def push_to_hub(model: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """As the class's own `push_to_hub`, with the patch and its model card, in one commit."""
    results = kwargs.pop("results", None)
    options = inspect.signature(type(model).push_to_hub).bind(model, repo_id, *args, **kwargs).arguments
    del options["self"], options["repo_id"]
    tags, hub_options = options.pop("tags", None), _hub_options(options)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **options, results=results)
        if tags:
            _tag(Path(folder, CARD), [tags] if isinstance(tags, str) else tags)
        return _push(model, repo_id, folder, contents(folder), options.get("variant"), **hub_options)


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what concerns the hub out of the arguments of a class's own method."""
    names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "subfolder")
    return {name: options.pop(name) for name in names if name in options}


def _push(
    model: Any, repo: str, folder: Any, names: Sequence[str], variant: str | None, *, commit_message: str | None = None,
    private: bool | None = None, token: Any = None, revision: str | None = None, **options: Any,
) -> Any:  # fmt: skip
    api, repo = hub.repository(repo, private, revision, token)
    message = commit_message or f"Upload {type(model).__name__}"
    stale = functools.partial(is_weights, variant=variant)
    return hub.commit(api, repo, folder, names, message, stale, revision=revision, **options)


def _tag(file: Path, tags: Sequence[str]) -> None:
    from huggingface_hub import ModelCard

    model_card = ModelCard.load(file)
    model_card.data.tags = list(dict.fromkeys([*(model_card.data.tags or []), *tags]))
    model_card.save(file)


@contextmanager
def _without_patch(model: nn.Module) -> Iterator[None]:
    """The model with the patch's modules out of its `state_dict`, while the class's own code writes it."""
    modules = [site.module for site in record_of(model).patched]
    taken = [module._modules.pop("patchattn") for module in modules]
    try:
        yield
    finally:
        for module, patch in zip(modules, taken, strict=True):
            module._modules["patchattn"] = patch


def _complete(
    model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], variant: str | None, where: str, results: Any
) -> None:
    """Add the patch to a checkpoint that was just written."""
    config = folder / "config.json"
    adapters = [file for file in folder.iterdir() if file.name.startswith("adapter_")]
    if adapters:  # transformers' own LoRA integration writes the adapter alone, so we write the patch alone
        hub.write_patch(model, folder, results, where)
        return
    if not config.is_file():  # not the main process
        return
    description, values = describe(model, results), json.loads(config.read_text(encoding="utf-8"))
    quantized = bool(values.get("quantization_config"))
    if values.get("auto_map"):
        description["auto_map"] = values["auto_map"]
    if tensors:
        name = f"patchattn.{variant}.safetensors" if variant else own.TENSORS
        own.write_tensors(tensors, folder / name)
        _add_to_index(folder, name, tensors, variant)
    if _is_diffusers(model):  # which would warn of a field it does not know
        values["quantization_config"] = {"quant_method": METHOD, "patchattn": description}
    else:
        values["patchattn"] = description
        if not quantized:
            values["quantization_config"] = {"quant_method": METHOD}
        others = values.get("auto_map") or {}
        names = ["AutoConfig", *auto_classes(model), *(key for key in others if key.startswith("AutoModel"))]
        names = list(dict.fromkeys(names))
        values["auto_map"] = {**others, **{key: f"{Path(STUB).stem}.{key}" for key in names}}
        (folder / STUB).write_text(_stub(names), encoding="utf-8")
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = card.render(description, where, auto_class(model), whole=True, quantized=quantized)
    (folder / CARD).write_text(text, encoding="utf-8")


def _is_diffusers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__)


def _add_to_index(folder: Path, name: str, tensors: Mapping[str, Tensor], variant: str | None) -> None:
    """List the patch's file among the shards of the weights; a single file becomes the first of them."""
    from safetensors import safe_open

    index = next(folder.glob("*.safetensors.index*.json"), None)
    if index is None:
        weights = next(file for file in folder.glob("*.safetensors") if file.name != name)
        stem = weights.name.split(".")[0]
        shard = weights.with_name(weights.name.replace(".safetensors", "-00001-of-00001.safetensors"))
        weights.rename(shard)
        index = folder / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")
        with safe_open(shard, framework="pt") as file:
            keys = list(file.keys())
        size = shard.stat().st_size - _header_bytes(shard)
        values: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(keys, shard.name)}
    else:
        values = json.loads(index.read_text(encoding="utf-8"))
    values["weight_map"].update(dict.fromkeys(tensors, name))
    for key, amount in (("total_size", lambda tensor: tensor.nbytes), ("total_parameters", Tensor.numel)):
        if key in values["metadata"]:
            values["metadata"][key] += sum(amount(tensor) for tensor in tensors.values())
    index.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _stub(names: Sequence[str]) -> str:
    lines = "\n".join(f'{name} = opener("{name}")' for name in names)
    return f'''"""Opens this checkpoint, whose attention patchattn has patched, with `trust_remote_code=True`."""

try:
    from patchattn.opening import opener
except ImportError as error:
    raise ImportError(
        "this model's attention is patched by the package patchattn, which could not be imported; to install it, "
        "or a newer version, run: pip install patchattn"
    ) from error

{lines}
'''
