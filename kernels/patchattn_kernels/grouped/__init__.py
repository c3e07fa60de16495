"""Dense attention that knows kinds of keys: weight is moved between the kinds after the softmax, in one pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
