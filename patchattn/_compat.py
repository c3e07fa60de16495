"""Every difference between the releases of transformers (5.0 and later) that patchattn has to know."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")  # the first since 5.24

_SIZES_TAKE_POSITIONS = "cache_position" in inspect.signature(CacheLayerMixin.get_mask_sizes).parameters  # before 5.4


def key_offset(layer: Any, queries: int) -> Any:
    """The position of the first key that a cache layer holds in a call of so many queries."""
    return layer.get_mask_sizes(torch.arange(queries) if _SIZES_TAKE_POSITIONS else queries)[1]


def registered_mask(
    base: str, like: Tensor, queries: int, keys: int, past: Any, key_offset: Any, window: int | None,
    padding: Tensor | None, config: Any,
) -> Any:  # fmt: skip
    """The mask that the attention implementation `base` expects, from its own registered mask function."""
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        causal_mask_function,
        sliding_window_causal_mask_function,
    )

    make = ALL_MASK_ATTENTION_FUNCTIONS[base]
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    arguments: dict[str, Any] = dict(batch_size=like.shape[0], kv_length=keys, kv_offset=key_offset, dtype=like.dtype,
                                     mask_function=pattern, attention_mask=padding, config=config)  # fmt: skip
    parameters = inspect.signature(make).parameters
    if "q_length" in parameters:  # since 5.4
        arguments.update(q_length=queries, q_offset=past, device=like.device)
    else:
        arguments.update(cache_position=torch.arange(queries, device=like.device) + past)
    return make(**arguments)


def tokens_to_remove(argument: int, seen: int) -> int:
    """What `Cache.crop` asks: negative is a number to remove; positive, before 5.22, the length to keep."""
    return -argument if argument <= 0 else max(0, seen - argument)


def forget_static_cache(model: Any) -> None:
    """In 5.0 `generate` keeps a static cache on the model, which after unpatch has layers of the patch."""
    layers = getattr(vars(model).get("_cache"), "layers", ())
    if any(hasattr(layer, "expect") for layer in layers):
        del model._cache
