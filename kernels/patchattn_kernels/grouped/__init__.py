"""Dense attention that knows kinds of keys: weight is moved between the kinds after the softmax, in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import use_triton
from . import ops
from .reference import EPSILON, IMAGE, IMAGE_SINK, PADDING, REST, TEXT_SINK, Rule, grouped_reference, redistribute

__all__ = ["EPSILON", "IMAGE", "IMAGE_SINK", "PADDING", "REST", "TEXT_SINK", "Rule", "grouped", "redistribute"]


def grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kinds: Tensor | None = None,
    images: Tensor | None = None,
    rule: Rule | None = None,
    *,
    past: int | Tensor = 0,
    causal: bool = True,
    keep: Callable[[int, int], Tensor] | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `q` `[B, H, T, D]` over `k`, `v` `[B, G, S, D]`, with weight moved between kinds of keys.

    Args:
        kinds: `[B, S]` int8, what each key is: `PADDING` (read by nobody), `REST`, `IMAGE`, `IMAGE_SINK` or
            `TEXT_SINK`. None: all are `REST`.
        images: `[B, T]`, how many keys of an image each query may read; the weights of a query with 0 stay as they
            are. Needed with `rule`.
        rule: how weight is moved, see `redistribute`; None moves none.
        past: the place of the first query among the keys.
        causal: read keys up to the query's own place.
        keep: a mask beyond `causal` and padding, as a function that makes its rows `[first, last)`, broadcastable
            to `[B, 1, T, S]`; it then says everything and the other two nothing.
        gate: a factor on the output, broadcastable to `[B, H, T, D]`.
        softcap, sinks: as for `masked_attention`.

    Returns the output `[B, H, T, D]` and, with a rule, which rows it changed `[B, H, T]`, else None. A query that
    may read nothing gives zeros. No `[T, S]` tensor is held for long inputs. Gradients flow through q, k, v and
    gate; which rows are changed is a constant to them.
    """
    if rule is not None and (kinds is None or images is None):
        raise ValueError("grouped: a rule moves weight between kinds of keys, so it needs both `kinds` and `images`")
    if kinds is not None and kinds.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"grouped: kinds has shape {tuple(kinds.shape)}; it must be [B, S] = "
                         f"{(k.shape[0], k.shape[2])}")  # fmt: skip
    if images is not None and images.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"grouped: images has shape {tuple(images.shape)}; it must be [B, T] = "
                         f"{(q.shape[0], q.shape[2])}")  # fmt: skip
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"grouped: {q.shape[1]} query heads over {k.shape[1]} key/value heads; the first must be a "
                         "multiple of the second")  # fmt: skip
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gate))
    unsupported = _unsupported(q, v, past, keep, softcap, sinks, dropout, trains)
    if use_triton("grouped", q, k, v, kinds, images, gate, unsupported=unsupported):
        return _by_kernel(q, k, v, kinds, images, rule, past, causal, gate, scale, trains)
    return grouped_reference(
        q,
        k,
        v,
        kinds,
        images,
        rule,
        past=past,
        causal=causal,
        keep=keep,
        gate=gate,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
    )


def _by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kinds: Tensor | None,
    images: Tensor | None,
    rule: Rule | None,
    past: int | Tensor,
    causal: bool,
    gate: Tensor | None,
    scale: float | None,
    trains: bool,
) -> tuple[Tensor, Tensor | None]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    numbers = (0.0, 0.0, 0.0) if rule is None else (rule.recycle, 1 - rule.non_sink_min, rule.min_visual)
    where = (past, 0) if isinstance(past, Tensor) else (None, past)
    given = (
        q,
        k,
        v,
        kinds,
        None if rule is None else images,
        None if trains else gate,
        *where,
        causal,
        scale,
        *numbers,
    )
    if q.shape[2] == 1 and not trains:
        out, gain = ops.decode(*given)
    else:
        out, _, gain = ops.forward(*given)
    if trains and gate is not None:
        out = (out * gate).to(q.dtype)
    return out, None if rule is None else gain >= 0


def _unsupported(
    q: Tensor,
    v: Tensor,
    past: int | Tensor,
    keep: object,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    trains: bool,
) -> str | None:
    """What of this call the kernels do not have."""
    for name, given in (("softcap", softcap), ("sink logits", sinks), ("mask drawn by hand", keep)):
        if given is not None:
            return name
    if dropout:
        return "dropout"
    if trains and isinstance(past, Tensor):
        return "gradient over a static cache"
    if trains and q.dtype == torch.float32 and q.shape[-1] > 64:
        return f"gradient in float32 for heads of size {q.shape[-1]}"
    if q.shape[-1] > 128:
        return f"heads of size {q.shape[-1]}"
    return None if v.shape[-1] == q.shape[-1] else "values of another size than the keys"
