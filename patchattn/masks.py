"""Masks, owned: what transformers hands our layers is the padding, never a `T x T` mask.

transformers makes one mask for each layer *type*, sized after one layer's cache. Once caches differ in length
that mask is wrong for the others. So the mask function registered here passes the padding mask through, and
every layer makes what it needs from positions and padding. Only where the model itself draws a pattern that
padding, causality and a window cannot say (packed sequences, bidirectional prefixes) does it stay 4-D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

WINDOWS: list[int] = []  # the sizes of sliding windows met in this process


def mask_function(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask side of the "patchattn" attention implementation.

    What a causal layer gets is `[B, 2, 1, S]`, the padding over all S positions so far, expanded; `[0, ...]` if
    there is none. With a sliding window it is `[B, 3 + n, 1, S]`, for the n-th of `WINDOWS`. So the pattern is said
    by the shape, which survives compiling and other devices, and models that cut masks for their last queries or
    first keys may do so. `[B, 1, 1, S]` is the padding of a bidirectional layer, which gets None if there is none.
    Any other pattern is a boolean `[B, 1, T, S]`. `unpack` reads it.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    given = {"mask_function": mask_function or causal_mask_function, "attention_mask": attention_mask, **kwargs}
    if q_length is not None:
        given["q_length"] = q_length
    queries = q_length if q_length is not None else kwargs["cache_position"].shape[0]
    config, local = kwargs.get("config"), kwargs.get("local_size")
    # One token and a static cache (whose sliding layers count in integers): transformers forbids to skip the mask
    # only so that it compiles.
    static = "cache_position" in kwargs or isinstance(kwargs.get("q_offset"), Tensor) or local is not None
    may_skip = kwargs.get("allow_is_causal_skip", True) or (queries == 1 and static)
    kv_offset = kwargs.get("kv_offset", 0)
    length: Any = kv_offset + kv_length

    plain = mask_function is causal_mask_function or mask_function is None
    if local is not None:
        plain = local == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None)
    if plain and may_skip and not kwargs.get("use_vmap", False):
        return _packed(_padding(attention_mask, length), length, local, kwargs)
    if mask_function is bidirectional_mask_function and not kwargs.get("use_vmap", False):
        padding = _padding(attention_mask, length)
        if padding is None:
            if kwargs.get("allow_is_bidirectional_skip", False):
                return None
            padding = torch.ones(batch_size, length - kv_offset, dtype=torch.bool, device=kwargs.get("device", "cpu"))
            return padding[:, None, None, :]
        return padding[:, None, None, kv_offset:length]
    given.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    drawn = sdpa_mask(batch_size, *args, kv_length=kv_length, **given)
    if drawn is not None and not torch.compiler.is_compiling():
        # A chunk longer than the text, a prompt without an image: nothing was drawn that is not causal.
        given.update(mask_function=causal_mask_function, use_vmap=False)
        if torch.equal(drawn, sdpa_mask(batch_size, *args, kv_length=kv_length, **given)):
            return _packed(_padding(attention_mask, length), length, None, kwargs)
    return drawn


def know_window(window: int | None) -> None:
    """Give a window its place among `WINDOWS`; done before compiling, so that nothing grows in a graph."""
    if window is not None and window not in WINDOWS:
        WINDOWS.append(window)


def _packed(padding: Tensor | None, length: Any, window: int | None, kwargs: dict[str, Any]) -> Tensor:
    know_window(window)
    if padding is None:
        where = kwargs.get("device")
        if where is None and "cache_position" in kwargs:
            where = kwargs["cache_position"].device
        padding = torch.ones(0, length, dtype=torch.bool, device=where)
    return padding[:, None, None, :].expand(-1, 2 if window is None else 3 + WINDOWS.index(window), -1, -1)


class Given(NamedTuple):
    """A mask as a layer was given it, unpacked.

    Attributes:
        mask: padding `[B, S]`, a 4-D mask, or None.
        causal: the mask function said so; else only the layer itself can tell.
        window: the sliding window that goes with a causal mask.
        length: S, the positions seen so far, this call's included; 0 if unknown.
    """

    mask: Tensor | None
    causal: bool = False
    window: int | None = None
    length: int = 0


def unpack(mask: Tensor | None) -> Given:
    """Read what `mask_function` wrote; a mask that the model or the user made is left as it is."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.bool:
        return Given(mask)
    place = mask.shape[1] - 3
    if mask.shape[2] != 1 or not -1 <= place < len(WINDOWS):
        return Given(mask)
    return Given(mask[:, 0, 0] if mask.shape[0] else None, True, WINDOWS[place] if place >= 0 else None, mask.shape[3])


def _padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    if attention_mask is None:
        return None
    attention_mask = attention_mask.to(torch.bool)
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    missing = length - attention_mask.shape[-1]
    return torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask[:, :length]


@dataclass(frozen=True)
class Mask:
    """Which keys a layer's queries may read, said compactly.

    Attributes:
        padding: `[B, positions]`, True for real tokens, over every position seen so far; None: all are real.
        causal: whether a query reads only up to its own position.
        window: the model's own sliding window on this layer, or None.
        dense: boolean `[B, 1, T, S]` or `[B, 1, 1, S]`, only where the model draws its own pattern; it then
            says everything and the other fields nothing.
    """

    padding: Tensor | None = None
    causal: bool = True
    window: int | None = None
    dense: Tensor | None = None

    def keep(
        self, first: int, last: int, keys: int, past: int | Tensor, key_offset: int | Tensor, device: torch.device
    ) -> Tensor:
        """Rows `[first, last)` of the boolean mask over `keys` keys: `[B or 1, 1, last - first, keys]`."""
        if self.dense is not None:
            return self.dense if self.dense.shape[2] == 1 else self.dense[:, :, first:last]
        key = torch.arange(keys, device=device) + key_offset  # [S]
        query = torch.arange(first, last, device=device)[:, None] + past  # [t, 1]
        keep = key <= query if self.causal else torch.ones(last - first, keys, dtype=torch.bool, device=device)
        if self.window is not None:
            keep = keep & (key > query - self.window)
        if self.padding is None:
            return keep[None, None]
        return keep[None, None] & self.key_padding(keys, key_offset)[:, None, None, :]

    def key_padding(self, keys: int, key_offset: int | Tensor) -> Tensor:
        """`[B, keys]`: the padding of the keys that start at `key_offset`."""
        assert self.padding is not None
        if isinstance(key_offset, int):
            return self.padding[:, key_offset : key_offset + keys]
        index = torch.arange(keys, device=self.padding.device) + key_offset
        return self.padding.index_select(1, index.clamp(max=self.padding.shape[1] - 1))


def boolean(mask: Tensor) -> Tensor:
    """A 4-D mask as booleans, whether it came so or as numbers to be added to the scores."""
    return mask if mask.dtype == torch.bool else mask >= 0


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers to be added to the scores, as eager attention wants it."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)
