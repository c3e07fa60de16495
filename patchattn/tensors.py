"""The tensors of a patch on their way to a file and back; safetensors only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attach import apply_plan
from .description import fit
from .living import patch_state
from .record import root_of

TENSORS = "patchattn.safetensors"
Model = TypeVar("Model", bound=nn.Module)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The patch's own tensors on the CPU, also those that accelerate keeps elsewhere."""
    tensors = patch_state(model)
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        from accelerate.utils import align_module_device

        root = root_of(model)
        for name in tensors:
            module_name, _, leaf = name.rpartition(".")
            module = root.get_submodule(module_name)
            with align_module_device(module):
                tensors[name] = getattr(module, leaf).detach().clone()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def open_tensors(file: Path | None) -> contextlib.AbstractContextManager[Any]:
    """A safetensors file open for reading, or None where there is no file."""
    from safetensors import safe_open

    return contextlib.nullcontext() if file is None else safe_open(file, framework="pt")


def put_on(
    model: Model, description: Mapping[str, Any], check: Callable[[dict[str, Tensor]], None] | None = None
) -> Model:
    """Patch a model as described; all or nothing. For `check` see `apply_plan`."""
    rename = fit(description, root_of(model))
    plan = [{**entry, "layers": [rename(name) for name in entry["layers"]]} for entry in description["plan"]]
    return apply_plan(model, plan, check)


def saved_dtype(saved: torch.dtype, built: torch.dtype, model: nn.Module) -> torch.dtype:
    """The dtype of a tensor that comes back.

    A patch that was cast together with its model comes back as it was; on a model of another dtype, the method's
    own choice stands.
    """
    return saved if saved == getattr(model, "dtype", None) and built.is_floating_point else built


class TensorCheck:
    """Compares the tensors of a file with those that a patch needs, then fills the latter.

    Tensors on the meta device only get their dtype: the model's loader fills them.
    """

    def __init__(self, tensors: Any, source: str, description: Mapping[str, Any], model: nn.Module) -> None:
        self.tensors, self.source, self.model, self.rename = tensors, source, model, fit(description, model)

    def __call__(self, needed: dict[str, Tensor]) -> None:
        found = {self.rename(name): name for name in (self.tensors.keys() if self.tensors is not None else ())}
        where = f"the patch in {self.source}" + (f", which has no {TENSORS}," if self.tensors is None else "")
        for what, names in (("lacks", needed.keys() - found.keys()), ("has", found.keys() - needed.keys())):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                kind = "the tensor" if what == "lacks" else "an unexpected tensor"
                raise ValueError(f"{where} {what} {kind} {min(names)}{more}")
        for name, tensor in needed.items():
            shape = tuple(self.tensors.get_slice(found[name]).get_shape())
            if shape != tuple(tensor.shape):
                raise ValueError(f"{where} has {name} in shape {list(shape)}; this model needs {list(tensor.shape)}")
        for name, tensor in needed.items():
            value = self.tensors.get_tensor(found[name])
            tensor.data = tensor.data.to(saved_dtype(value.dtype, tensor.dtype, self.model))
            if tensor.device.type != "meta":
                tensor.data.copy_(value)
