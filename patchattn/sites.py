"""Find the attention modules of a model by their structure, never by a list of model names."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .reading import Reading, forward_function, read_forward

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
    pieces: bool = False  # one forward calls the attention several times, each on a part of q, k, v
    cache_index: int | None = None  # where its keys are in a cache; None if that is not known beforehand
    base_masks: bool = False  # it needs the masks of its base attention: it computes with them, or has no cache_index
    cache_problem: str | None = None  # why no method can keep a cache layer of its own here
    order: int = 0  # its place among the modules patched together
    problem: str | None = None  # why no method can sit here
    model_config: Any = None  # of the whole model, of which `config` may be a part

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


def speaks_interface(module: nn.Module) -> bool:
    """Whether this module hands q, k, v to transformers' attention table."""
    code = getattr(forward_function(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def find_sites(model: nn.Module) -> list[Site]:
    """Every attention module of `model` that speaks a known family, in the order of the model."""
    from .families import diffusers

    sites, reached = [], 0
    caches: dict[int, list[Any]] = {}
    for name, module in model.named_modules():
        if speaks_interface(module) and getattr(module, "config", None) is not None:
            site = _interface_site(name, module, caches)
            sites.append(replace(site, model_config=getattr(model, "config", None)))
        elif (found := diffusers.site(name, module, getattr(model, "config", None), reached)) is not None:
            sites.append(found)
            reached += found.problem is None
    return _with_shared_caches(sites)


def _with_shared_caches(sites: list[Site]) -> list[Site]:
    """Note where two modules keep their keys at the same place, so that neither may keep something else there."""
    owners: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        if site.cache_index is not None:
            owners.setdefault((id(site.config), site.cache_index), []).append(site)
    shared = {id(a): b for same in owners.values() if len(same) > 1 for a, b in zip(same, same[1:] + same[:1])}
    return [
        replace(site, cache_problem=f"it shares its place in the cache with {shared[id(site)].name}")
        if id(site) in shared and site.cache_problem is None
        else site
        for site in sites
    ]


def default_sites(sites: Sequence[Site]) -> list[Site]:
    """What `patch` takes when no layers are named: a decoder's causal self-attention, else all there is."""
    usable = [site for site in sites if site.problem is None]
    return [site for site in usable if site.causal] or usable


def _interface_site(name: str, module: nn.Module, caches: dict[int, list[Any]]) -> Site:
    layer_idx = getattr(module, "layer_idx", None)
    config = _layer_config(module.config, layer_idx)
    heads, kv_heads, head_dim, hidden_size = _shapes(module, config)
    reading = read_forward(forward_function(module))
    layer = _cache_layer(module.config, layer_idx, caches)
    cross = _is_cross(name, module)
    return Site(
        name=name,
        module=module,
        family="interface",
        config=module.config,
        layer_idx=layer_idx,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        causal=_causal(module),
        window=_window(module, config, layer),
        position_bias="position_bias" in forward_function(module).__code__.co_varnames,
        pieces=reading.calls > 1,
        cache_index=layer_idx if reading.own_index and not cross and isinstance(layer_idx, int) else None,
        base_masks=reading.draws_mask or not reading.own_index,
        cache_problem=_cache_problem(module, reading, layer),
        problem="cross-attention: its keys come from another sequence" if cross else _problem(module, reading),
    )


def _layer_config(config: Any, layer_idx: Any) -> Any:
    """The config of one layer, where a model's layers differ in more than their type."""
    if not getattr(config, "is_heterogeneous", False) or not isinstance(layer_idx, int):
        return config
    return config.per_layer_config[min(layer_idx, config.num_hidden_layers - 1)]


def _shapes(module: nn.Module, config: Any) -> tuple[int, int, int, int]:
    """Query heads, key/value heads, size of a value head, and hidden size; 0 for what cannot be told.

    The output projection is asked first: its input is what the heads give together, also where the query
    projection holds gates besides or where keys and values differ in size.
    """
    heads = _first_int(module, "num_heads", "num_attention_heads", "n_heads", "n_head")
    head_dim = _first_int(module, "v_head_dim", "head_dim", "attention_head_size", "head_size")
    width = _width(module, *OUTPUT_PROJECTIONS)
    if not heads and head_dim and width and width % head_dim == 0:
        heads = width // head_dim
    heads = heads or _first_int(config, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads") or 0
    hidden = _width(module, "q_proj", "query", "q", "qkv_proj", "c_attn")
    hidden = hidden or _first_int(module, "hidden_size", "embed_dim")
    hidden = hidden or _first_int(config, "hidden_size", "n_embd", "d_model") or 0
    if heads and width and width % heads == 0:
        head_dim = width // heads
    elif not head_dim:
        head_dim = _first_int(config, "head_dim") or (hidden // heads if heads else 0)
    return heads, heads // (_first_int(module, "num_key_value_groups") or 1), head_dim, hidden


def _width(module: nn.Module, *names: str) -> int | None:
    """How many features the first of these projections takes, also wrapped by PEFT or a quantizer."""
    for projection in (getattr(module, name) for name in names if hasattr(module, name)):
        if hasattr(projection, "nf"):  # GPT-2's, stored transposed
            return int(projection.weight.shape[0])
        if (size := _first_int(projection, "in_features")) is not None:
            return size
    return None


def _causal(module: nn.Module) -> bool:
    causal = getattr(module, "is_causal", None)
    if causal is None:  # what transformers assumes, but for encoders that never say so
        return getattr(module, "layer_idx", None) is not None
    return bool(causal or getattr(module, "is_decoder", False))


def _cache_layer(config: Any, layer_idx: Any, caches: dict[int, list[Any]]) -> Any:
    """The layer that transformers' own cache has for this module, or None."""
    if not isinstance(layer_idx, int):
        return None
    if id(config) not in caches:
        from transformers import DynamicCache

        try:
            caches[id(config)] = DynamicCache(config=config).layers
        except Exception:  # configs without a decoder say so in as many ways as there are
            caches[id(config)] = []
    layers = caches[id(config)]
    return layers[layer_idx] if layer_idx < len(layers) else None


def _window(module: nn.Module, config: Any, layer: Any) -> int | None:
    window = getattr(module, "sliding_window", None)
    if window is None and "sliding_window" in forward_function(module).__code__.co_consts:
        window = None if _layer_type(module, config) == "full_attention" else getattr(config, "sliding_window", None)
    cached = getattr(layer, "sliding_window", None)  # for modules that are not told: a window, or the size of a chunk
    if window is None and cached != getattr(config, "attention_chunk_size", None):
        window = cached
    return window if isinstance(window, int) and not isinstance(window, bool) and window > 0 else None


def _cache_problem(module: nn.Module, reading: Reading, layer: Any) -> str | None:
    if reading.draws_mask:
        return "it draws its mask from all keys, so none of them can be dropped"
    if reading.calls > 1:
        return "one forward calls the attention several times"
    if not reading.own_index:
        return "it keeps its keys at another place in the cache than its layer_idx"
    kind = type(layer).__name__
    shares = getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False)
    if shares or kind == "DummyLayer":
        return "this layer shares its keys and values with another"
    if layer is None or kind == "DynamicLayer":
        return None
    if kind == "DynamicSlidingWindowLayer":
        return f"this layer sees a window or chunk of {layer.sliding_window} tokens only"
    return f"its layer of the cache is a {kind}, which holds more than keys and values"


def _layer_type(module: nn.Module, config: Any) -> str | None:
    own = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if own is None and types and isinstance(index, int) and index < len(types):
        own = types[index]
    return own


def _is_cross(name: str, module: nn.Module) -> bool:
    place = name.rpartition(".")[2].lower()
    return bool(
        getattr(module, "is_cross_attention", False)
        or "cross" in type(module).__name__.lower()
        or re.search(r"cross|^enc(oder)?_(attn|attention)$|encdec", place)
    )


def _problem(module: nn.Module, reading: Reading) -> str | None:
    parameters = inspect.signature(forward_function(module)).parameters
    if "hidden_states" not in parameters and "x" not in parameters and len(parameters) < 2:
        return "its forward takes no hidden states"
    if "block_indices" in reading.keywords:
        return "it picks blocks of keys by an indexer of its own and hands them to the attention"
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
        raise TypeError(
            f"layers: {selector!r} is no selector; give an index, a list, or a text such as '0-11' or 'even'"
        )
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
