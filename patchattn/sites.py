"""Find the attention modules of a model by their structure, never by a list of model names."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "proj", "wo", "projection_layer", "linear_out")


@dataclass(frozen=True)
class Site:
    """One attention module and what a method may need to know of it before the first call."""

    name: str
    module: nn.Module
    family: str  # "interface" (transformers' AttentionInterface) or the name of a file in families/
    config: Any
    layer_idx: int | None
    heads: int
    kv_heads: int
    head_dim: int  # of the values, and so of the attention output
    hidden_size: int
    causal: bool
    window: int | None  # the model's own sliding window on this layer
    position_bias: bool = False  # the module adds a bias of its own to the scores
    order: int = 0  # its place among the modules patched together
    problem: str | None = None  # why no method can sit here

    @property
    def weight(self) -> torch.Tensor | None:
        """A weight of the module, for the device and dtype of new parameters."""
        return next((p for p in self.module.parameters() if p.is_floating_point()), None)

    @property
    def device(self) -> torch.device:
        """Where the module computes, also when accelerate keeps its weights elsewhere."""
        hook = getattr(self.module, "_hf_hook", None)
        if hook is None and self.weight is not None and self.weight.device.type == "meta":
            hook = next((child._hf_hook for child in self.module.modules() if hasattr(child, "_hf_hook")), None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
        return self.weight.device if self.weight is not None else torch.device("cpu")


def forward_function(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, without decorators, hooks or accelerate's wrapper."""
    return inspect.unwrap(type(module).forward)


def speaks_interface(module: nn.Module) -> bool:
    """Whether this module hands q, k, v to transformers' attention table."""
    code = getattr(forward_function(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def find_sites(model: nn.Module) -> list[Site]:
    """Every attention module of `model` that speaks a known family, in the order of the model."""
    from .families import diffusers

    sites, reached = [], 0
    for name, module in model.named_modules():
        if speaks_interface(module) and getattr(module, "config", None) is not None:
            sites.append(_interface_site(name, module))
        elif (site := diffusers.site(name, module, getattr(model, "config", None), reached)) is not None:
            sites.append(site)
            reached += site.problem is None
    return sites


def default_sites(sites: Sequence[Site]) -> list[Site]:
    """What `patch` takes when no layers are named: a decoder's causal self-attention, else all there is."""
    usable = [site for site in sites if site.problem is None]
    return [site for site in usable if site.causal] or usable


def _interface_site(name: str, module: nn.Module) -> Site:
    config = module.config
    head_dim = _first_int(module, "head_dim", "attention_head_size", "head_size", "v_head_dim") or _first_int(config, "head_dim")
    heads = _first_int(module, "num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads_total")
    heads = heads or _first_int(config, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    hidden = _first_int(module, "hidden_size", "embed_dim") or _first_int(config, "hidden_size", "n_embd", "d_model")
    query = next((getattr(module, key) for key in ("q_proj", "query", "q") if hasattr(module, key)), None)
    query_weight = getattr(query, "weight", None)
    if head_dim and isinstance(query, nn.Linear) and query.out_features % head_dim == 0:
        heads = query.out_features // head_dim
    if isinstance(query, nn.Linear) and query_weight is not None:
        hidden = query.in_features
    if not head_dim and heads and hidden:
        head_dim = hidden // heads
    groups = _first_int(module, "num_key_value_groups") or 1
    kv_heads = (heads // groups) if heads else 0
    causal = bool(getattr(module, "is_causal", False))
    layer_idx = getattr(module, "layer_idx", None)
    window = getattr(module, "sliding_window", None)
    if window is None and "sliding_window" in forward_function(module).__code__.co_consts:
        window = None if _layer_type(module, config) == "full_attention" else getattr(config, "sliding_window", None)
    return Site(
        name=name,
        module=module,
        family="interface",
        config=config,
        layer_idx=layer_idx,
        heads=heads or 0,
        kv_heads=kv_heads,
        head_dim=_first_int(module, "v_head_dim") or head_dim or 0,
        hidden_size=hidden or 0,
        causal=causal,
        window=window if isinstance(window, int) and not isinstance(window, bool) and window > 0 else None,
        position_bias="position_bias" in forward_function(module).__code__.co_varnames,
        problem=_problem(module),
    )


def _layer_type(module: nn.Module, config: Any) -> str | None:
    own = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if own is None and types and isinstance(index, int) and index < len(types):
        own = types[index]
    return own


def _problem(module: nn.Module) -> str | None:
    if getattr(module, "is_cross_attention", False):
        return "cross-attention: its keys come from another sequence"
    parameters = inspect.signature(forward_function(module)).parameters
    if "hidden_states" not in parameters and "x" not in parameters and len(parameters) < 2:
        return "its forward takes no hidden states"
    if "cross" in type(module).__name__.lower():
        return "cross-attention: its keys come from another sequence"
    return None


def _first_int(owner: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def select(sites: Sequence[Site], selector: Any) -> list[Site]:
    """The sites a selector names.

    A selector is an index, a list of them, a text such as `"0-11"`, `"0,3,8-"`, `"even"`, `"odd"`, `"all"`,
    `"-1"` for the last, or a glob over module names such as `"*.self_attn"` or `"model.layers.3.*"`.
    """
    if isinstance(selector, (list, tuple, set, range)):
        chosen = [site for item in selector for site in select(sites, item)]
        return [site for site in sites if site in chosen]
    layers = default_sites(sites)
    if isinstance(selector, int) and not isinstance(selector, bool):
        return [_at(layers, selector)]
    if not isinstance(selector, str):
        raise TypeError(f"layers: {selector!r} is no selector; give an index, a list, or a text such as '0-11' or 'even'")
    text = selector.strip()
    if text in ("all", "default"):
        return list(layers)
    if text in ("even", "odd"):
        return [site for index, site in enumerate(layers) if index % 2 == (text == "odd")]
    if re.fullmatch(r"[-\d,\s]+", text):
        return [site for site in layers if site in list(_ranges(layers, text))]
    found = [site for site in sites if fnmatch.fnmatchcase(site.name, text)]
    if not found:
        names = ", ".join(site.name for site in sites[:3])
        raise ValueError(f"layers: {selector!r} matches no attention module; there are {len(sites)}: {names}, ...")
    return found


def _ranges(layers: Sequence[Site], text: str) -> Iterator[Site]:
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d*))?\s*", part)
        if match is None:
            raise ValueError(f"layers: {part!r} in {text!r} is no range; write '3', '0-11' or '8-'")
        first, last = match.group(1), match.group(2)
        if last is None:
            yield _at(layers, int(first))
        else:
            stop = len(layers) - 1 if last == "" else int(last)
            if stop < int(first):
                raise ValueError(f"layers: the range {part.strip()!r} runs backwards")
            _at(layers, stop)
            yield from layers[int(first) : stop + 1]


def _at(layers: Sequence[Site], index: int) -> Site:
    if not -len(layers) <= index < len(layers):
        raise ValueError(f"layers: there is no layer {index}; the model has {len(layers)} (0 to {len(layers) - 1})")
    return layers[index]
