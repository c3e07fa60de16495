"""Whole patched models: `model.save_pretrained`, and `from_pretrained` of what it wrote.

The folder is what transformers or diffusers would have written of the model without its patch, and beside it

    patchattn.safetensors     the patch's own tensors, listed in the index of the weights like any other shard
    config.json               one more field, `patchattn` (as in `hub.describe`), and two that lead to us:
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
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import card, hub
from .attach import patch_state, record_of

METHOD = "patchattn"
STUB = "modeling_patchattn.py"
_SAVERS = ("save_pretrained", "push_to_hub")
_PATCH_FILE = re.compile(r"patchattn(\.[\w-]+)?\.safetensors")


# ---- saving ------------------------------------------------------------------------------------------------


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
    """As the class's own `save_pretrained`, with the patch; what was in the folder stays if the writing fails."""
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
    names, tensors = set(patch_state(model)), hub.state(model)
    if options.get("state_dict") is not None:
        given = options["state_dict"]
        tensors = {name: given.get(name, tensor).detach().cpu() for name, tensor in tensors.items()}
        options["state_dict"] = {name: tensor for name, tensor in given.items() if name not in names}
    where = options["save_directory"]
    stale = functools.partial(hub.is_weights, variant=options.get("variant"))
    with hub.replacing(where, stale) as folder:
        options["save_directory"] = folder
        options.pop("self")
        with _without_patch(model):
            stock(model, **options)
        _complete(model, folder, tensors, options.get("variant"), os.fspath(where))
        hub.keep_foreign_card(folder, Path(where, hub.CARD))
        written = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    if push and written:
        _push(model, repo or Path(where).name, where, written, options.get("variant"), **hub_options)


def push_to_hub(model: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """As the class's own `push_to_hub`, with the patch and its model card, in one commit."""
    options = inspect.signature(type(model).push_to_hub).bind(model, repo_id, *args, **kwargs).arguments
    del options["self"], options["repo_id"]
    tags, hub_options = options.pop("tags", None), _hub_options(options)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **options)
        written = [file.relative_to(folder).as_posix() for file in sorted(Path(folder).rglob("*")) if file.is_file()]
        if tags:
            _tag(Path(folder, hub.CARD), [tags] if isinstance(tags, str) else tags)
        return _push(model, repo_id, folder, written, options.get("variant"), **hub_options)


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what concerns the hub out of the arguments of a class's own method."""
    names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "subfolder")
    return {name: options.pop(name) for name in names if name in options}


def _push(
    model: Any, repo: str, folder: Any, names: Sequence[str], variant: str | None, *, commit_message: str | None = None,
    private: bool | None = None, token: Any = None, revision: str | None = None, **options: Any,
) -> Any:  # fmt: skip
    api, repo = hub.repository(repo, private, revision, token)
    message, stale = (
        commit_message or f"Upload {type(model).__name__}",
        functools.partial(hub.is_weights, variant=variant),
    )
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


def _complete(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], variant: str | None, where: str) -> None:
    """Add the patch to a checkpoint that was just written."""
    from safetensors.torch import save_file

    config = folder / "config.json"
    adapters = [file for file in folder.iterdir() if file.name.startswith("adapter_")]
    if adapters:  # transformers' own LoRA integration writes the adapter alone, so we write the patch alone
        hub.write(folder, hub.patch_files(model, None, where))
        return
    if not config.is_file():  # not the main process
        return
    description, values = hub.describe(model), json.loads(config.read_text(encoding="utf-8"))
    quantized = bool(values.get("quantization_config"))
    if values.get("auto_map"):
        description["auto_map"] = values["auto_map"]
    if tensors:
        name = f"patchattn.{variant}.safetensors" if variant else hub.TENSORS
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / name,
                  metadata={"format": "pt"})  # fmt: skip
        _add_to_index(folder, name, tensors, variant)
    if _is_diffusers(model):  # which would warn of a field it does not know
        values["quantization_config"] = {"quant_method": METHOD, "patchattn": description}
    else:
        values["patchattn"] = description
        if not quantized:
            values["quantization_config"] = {"quant_method": METHOD}
        names = list(dict.fromkeys(["AutoConfig", *hub.auto_classes(model), *(values.get("auto_map") or ())]))
        values["auto_map"] = {key: f"{Path(STUB).stem}.{key}" for key in names}
        (folder / STUB).write_text(_stub(names), encoding="utf-8")
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = card.render(description, where, hub.auto_class(model), whole=True, quantized=quantized)
    (folder / hub.CARD).write_text(text, encoding="utf-8")


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
    from patchattn.checkpoint import opener
except ImportError as error:
    raise ImportError(
        "this model's attention is patched by the package patchattn, which could not be imported; to install it, "
        "or a newer version, run: pip install patchattn"
    ) from error

{lines}
'''


# ---- opening -----------------------------------------------------------------------------------------------


def patch_empty(model: Any, description: Any, check: Any = None) -> None:
    """Patch a model as a checkpoint's config describes it, before or after its weights are loaded."""
    hub.check_format(description, f"the config of this {type(model).__name__}")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # as in a call of `patch`: the loader has set the model's
    try:
        hub.put_on(model, description, check)
    finally:
        torch.set_default_dtype(default)
    record = record_of(model)
    record.base_model, record.base_revision = description["base_model"], description["base_revision"]


def before_weights(model: Any, description: Any, files: Sequence[Any] | None) -> Path | None:
    """Patch a model of transformers; returns the file that its patch's tensors come from, if it has any."""
    file = next((Path(name) for name in files or () if _PATCH_FILE.fullmatch(Path(name).name)), None)
    if files is None:  # the weights were handed over as a `state_dict`, and so are the patch's
        patch_empty(model, description)
        return None
    with hub.open_tensors(file) as tensors:
        source = os.fspath(Path(files[0]).parent) if files else model.config._name_or_path
        patch_empty(model, description, hub.TensorCheck(tensors, source, description, model))
    return file


def after_weights(model: Any, description: Mapping[str, Any], file: Path | None) -> None:
    """Write the patch's tensors bit for bit, whatever the loader made of their names, and forget how we got here."""
    if file is not None:
        rename = hub.fit(description, model)
        with hub.open_tensors(file) as tensors:
            saved = {rename(name): name for name in tensors.keys()}  # noqa: SIM118
            for name, tensor in patch_state(model).items():
                if tensor.device.type != "meta":  # offloaded: the loader has put it where it belongs
                    tensor.data.copy_(tensors.get_tensor(saved[name]))
    config = model.config
    config.__dict__.pop("patchattn", None)
    config.__dict__.pop("auto_map", None)
    if "auto_map" in description:
        config.auto_map = dict(description["auto_map"])


def opener(name: str) -> type:
    """What stands in for transformers' auto class `name` under `trust_remote_code=True`."""
    return type(name, (_Opener,), {"auto_class": name})


class _Opener:
    """Opens a patched checkpoint as if patchattn had been imported, and the code of a remote base with it."""

    auto_class = ""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to remember: what is opened is an ordinary model."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """The patched model, or its config."""
        import transformers

        kwargs.pop("trust_remote_code", None)
        if cls.auto_class == "AutoConfig":
            values, _ = transformers.PreTrainedConfig.get_config_dict(name, **kwargs)
            if (remote := _base_class(values["patchattn"], cls.auto_class, name, kwargs)) is not None:
                return remote.from_pretrained(name, *args, **kwargs)
            return transformers.AutoConfig.from_pretrained(name, *args, trust_remote_code=False, **kwargs)
        config = kwargs["config"]
        description = config.patchattn
        target = cls._target(config, name, kwargs)
        if _method(config) == METHOD:
            return target.from_pretrained(name, *args, **kwargs)
        model = target.from_pretrained(name, *args, **kwargs)
        return _patch_opened(model, description, name, kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._target(config, config._name_or_path, kwargs)._from_config(config, **kwargs)

    @classmethod
    def _target(cls, config: Any, name: Any, options: Mapping[str, Any]) -> Any:
        import transformers

        remote = _base_class(config.patchattn, cls.auto_class, name, options)
        if remote is not None:
            return remote
        known = getattr(transformers, cls.auto_class)._model_mapping[type(config)]
        if not isinstance(known, tuple):
            return known
        return next((item for item in known if item.__name__ in (config.architectures or ())), known[0])


_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def _base_class(description: Mapping[str, Any], auto_class: str, name: Any, options: Mapping[str, Any]) -> Any:
    """The class of a base model that is remote code itself, or None."""
    reference = description.get("auto_map", {}).get(auto_class)
    if reference is None:
        return None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    wanted = {key: options[key] for key in (*_HUB_OPTIONS, "code_revision") if key in options and key != "subfolder"}
    return get_class_from_dynamic_module(reference, name, **wanted)


def _method(config: Any) -> Any:
    value = getattr(config, "quantization_config", None)
    return value.get("quant_method") if isinstance(value, dict) else getattr(value, "quant_method", None)


def _patch_opened(model: Any, description: Mapping[str, Any], name: Any, options: Mapping[str, Any]) -> Any:
    """Patch a model that its own quantizer has loaded."""
    from transformers.utils.hub import cached_file

    wanted = {key: options[key] for key in _HUB_OPTIONS if key in options}
    variant = options.get("variant")
    file = cached_file(name, f"patchattn.{variant}.safetensors" if variant else hub.TENSORS,
                       _raise_exceptions_for_missing_entries=False, **wanted)  # fmt: skip
    whole, rest = (model[0], model[1:]) if isinstance(model, tuple) else (model, ())
    path = before_weights(whole, description, [file] if file else None)
    after_weights(whole, description, path)
    return (whole, *rest) if rest else whole
