"""Attention to the first tokens of a sequence and to a recent window: prefill over new keys and a kept past."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import use_triton
from .reference import sink_window_reference, visible

__all__ = ["sink_window", "visible"]


def sink_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor,
    *,
    sink: int,
    recent: int,
    past: tuple[Tensor, Tensor, Tensor] | None = None,
    chunked: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each query reads the first `sink` tokens of its row and the last `recent` tokens, itself included.

    Args:
        q: `[B, H, T, D]`, the queries of this call.
        k, v: `[B, G, T, D]`, the keys of this call; padding, if any, comes first in a row.
        rank: `[B, T]`, the place of each token among the real tokens of its row; negative for padding.
        past: keys, values `[B, G, P, D]` and ranks `[B, P]` kept from earlier calls (negative: empty).
        chunked: read everything in `past` and every earlier token of this call, however far away: what the
            published DuoAttention code computes when a prompt comes in chunks.

    Returns `[B, H, T, D]`. Cost grows with `T * (sink + recent)`, not with `T * T` (unless `chunked`).
    """
    if sink < 0:
        raise ValueError(f"sink_window: sink is {sink}; it must be 0 or more")
    if recent < 1:
        raise ValueError(f"sink_window: recent is {recent}; it must be at least 1 (the query's own token)")
    use_triton("sink_window", q, unsupported="Triton form")
    return sink_window_reference(
        q,
        k,
        v,
        rank,
        sink=sink,
        recent=recent,
        past=past,
        chunked=chunked,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
    )
