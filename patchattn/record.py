"""What a patch leaves on a model, and how to find it again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from .context import Attachment
from .method import Method

if TYPE_CHECKING:
    from .sites import Site


class ConfigCopy:
    """A config that only one model sees, in place of one that others may share."""

    def __init__(self, old: Any, inner: dict[str, Any]) -> None:
        self.old, self.new = old, copy.copy(old)
        self.new.__dict__.update(inner)
        self.at_first = dict(vars(self.new))
        self.places: list[tuple[nn.Module, str]] = []  # modules, and the attribute that names the config

    def put_back(self) -> None:
        """The shared config again, with what the user has changed on the copy meanwhile."""
        for module, key in self.places:
            if module.__dict__.get(key) is self.new:
                module.__dict__[key] = self.old
        for key, value in vars(self.new).items():
            if key != "_attn_implementation_internal" and (key not in self.at_first or self.at_first[key] is not value):
                self.old.__dict__[key] = value


class Patch:
    """What `patch` did to a model; kept on the model as `_patchattn_patch`."""

    def __init__(self) -> None:
        self.plan: list[tuple[str, list[str], list[Method]]] = []  # selector, layer names, methods as given
        self.configs: list[ConfigCopy] = []
        self.implementations: list[tuple[Any, str]] = []  # configs that say "patchattn", and what stood there
        self.sites: list[Site] = []  # every attention module of the touched configs
        self.base_model: str | None = None
        self.base_revision: str | None = None

    @property
    def patched(self) -> list[Site]:
        return [site for site in self.sites if attachment_of(site.module).methods]


def root_of(model: nn.Module) -> nn.Module:
    """The transformers or diffusers model inside PEFT, DDP or torch.compile wrappers."""
    seen: set[int] = set()
    inner: Any = model
    while id(inner) not in seen:
        seen.add(id(inner))
        if hasattr(inner, "get_base_model"):  # PeftModel
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "config"):  # DDP
            inner = inner.module
    return inner


def patch_of(model: nn.Module) -> Patch | None:
    """The record that `patch` left on this model, or None."""
    return root_of(model).__dict__.get("_patchattn_patch")


def attachment_of(module: nn.Module) -> Attachment:
    return module.__dict__["_patchattn"]


def record_of(model: nn.Module) -> Patch:
    patch = patch_of(model)
    if patch is None:
        raise ValueError(f"this {type(root_of(model)).__name__} is not patched; call patchattn.patch first")
    return patch
