"""Whole patched models, as `checkpoint.py` writes them, on their way through `from_pretrained`.

With patchattn imported, transformers and diffusers call the readers in `_transformers_plugin.py` and
`_diffusers_plugin.py`. With `trust_remote_code=True`, the checkpoint's own file calls `opener`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import tensors as own
from .description import check_format, fit
from .living import patch_state
from .record import record_of

METHOD = "patchattn"
_PATCH_FILE = re.compile(r"patchattn(\.[\w-]+)?\.safetensors")
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def patch_empty(model: Any, description: Any, check: Any = None) -> None:
    """Patch a model as a checkpoint's config describes it, before or after its weights are loaded."""
    check_format(description, f"the config of this {type(model).__name__}")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # as in a call of `patch`: the loader has set the model's
    try:
        own.put_on(model, description, check)
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
    with own.open_tensors(file) as tensors:
        source = os.fspath(Path(files[0]).parent) if files else model.config._name_or_path
        patch_empty(model, description, own.TensorCheck(tensors, source, description, model))
    return file


def after_weights(model: Any, description: Mapping[str, Any], file: Path | None) -> None:
    """Write the patch's tensors bit for bit, whatever the loader made of their names, and forget how we got here."""
    if file is not None:
        rename = fit(description, model)
        with own.open_tensors(file) as tensors:
            saved = {rename(name): name for name in tensors.keys()}  # noqa: SIM118
            for name, tensor in patch_state(model).items():
                if tensor.device.type != "meta":  # offloaded: the loader has put it where it belongs
                    tensor.data.copy_(tensors.get_tensor(saved[name]))
    forget(model, "patchattn", "auto_map")
    if "auto_map" in description:
        model.config.auto_map = dict(description["auto_map"])


def forget(model: Any, *fields: str) -> None:
    """Take fields out of a model's config, and out of the one that comes back when it is unpatched."""
    for config in (model.config, *(made.old for made in record_of(model).configs)):
        for field in fields:
            config.__dict__.pop(field, None)


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
        target = cls._target(config, name, kwargs)
        if _method(config) == METHOD:
            return target.from_pretrained(name, *args, **kwargs)
        return _open_quantized(target, config.patchattn, name, args, kwargs)

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


def _base_class(description: Mapping[str, Any], auto_class: str, name: Any, options: Mapping[str, Any]) -> Any:
    """The class of a base model that is remote code itself, or None."""
    reference = description.get("auto_map", {}).get(auto_class)
    if reference is None or (auto_class != "AutoConfig" and reference.split(".")[-1] != description["architecture"]):
        return None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    wanted = {key: options[key] for key in (*_HUB_OPTIONS, "code_revision") if key in options and key != "subfolder"}
    return get_class_from_dynamic_module(reference, name, **wanted)


def _method(config: Any) -> Any:
    value = getattr(config, "quantization_config", None)
    return value.get("quant_method") if isinstance(value, dict) else getattr(value, "quant_method", None)


def _open_quantized(
    kind: Any, description: Mapping[str, Any], name: Any, args: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """A model that its own quantizer loads, patched after that."""
    from transformers.utils.hub import cached_file

    known = [*(kind._keys_to_ignore_on_load_unexpected or ()), r"\.patchattn\."]
    namesake = type(
        kind.__name__, (kind,), {"__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": known}
    )
    opened = namesake.from_pretrained(name, *args, **options)  # type: ignore[attr-defined]
    model = opened[0] if isinstance(opened, tuple) else opened
    model.__class__ = kind
    wanted = {key: options[key] for key in _HUB_OPTIONS if key in options}
    variant = options.get("variant")
    file = cached_file(name, f"patchattn.{variant}.safetensors" if variant else own.TENSORS,
                       _raise_exceptions_for_missing_entries=False, **wanted)  # fmt: skip
    after_weights(model, description, before_weights(model, description, [file] if file else []))
    return opened
