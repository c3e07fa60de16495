"""Attention to the first tokens of a sequence and to a recent window, beside heads that read everything.

`sink_window` computes a prompt or a part of one, `sink_window_decode` one token over a cache with two tiers. Both
take heads of both kinds in one call: `full_heads` says which KV heads read everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import use_triton
from . import ops
from .reference import EVERYTHING, Tier, decode_reference, sink_window_reference, visible

__all__ = ["Tier", "sink_window", "sink_window_decode", "visible"]


def sink_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor | None = None,
    *,
    sink: int,
    recent: int,
    past: Tier | tuple[Tensor, Tensor, Tensor] | None = None,
    full_heads: Sequence[bool] | None = None,
    full: Tier | None = None,
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
        rank: `[B, T]`, the place of each token among the real tokens of its row; negative for padding. None: there
            is neither padding nor `past`, and the queries are the last T of the keys.
        past: what the streaming heads kept from earlier calls: keys, values `[B, G_streaming, P, D]` and ranks
            `[B, P]`, in any order.
        full_heads: G booleans, True for a KV head that reads every token up to the query. None: all heads stream.
        full: what the full heads read, `[B, G_full, S, D]`, this call's tokens included, in order: what a cache
            returns from its update. None: there is no cache, and they read `k` and `v`.
        chunked: streaming heads read everything in `past` and every earlier token of this call, however far away:
            what the published DuoAttention code computes when a prompt comes in chunks.
        scale: on the scores; None is `D ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, one extra logit a head that takes weight and gives no value.

    Returns `[B, H, T, D]`, zeros for padding. For streaming heads the cost grows with `T * (sink + recent)`, not with
    `T * T` (unless `chunked`).
    """
    _check("sink_window", q, k.shape[1], sink, recent, full_heads)
    if rank is None and past is not None:
        raise ValueError("sink_window: past was given without rank; give the rank of this call's tokens too")
    past, full = (tier if tier is None else Tier(*tier) for tier in (past, full))
    options: dict[str, Any] = dict(sink=sink, recent=recent, past=past, full_heads=_flags(full_heads, k), full=full,
                                   chunked=chunked, scale=scale, softcap=softcap, sinks=sinks)  # fmt: skip
    given = [q, k, v, sinks, *(past or ()), *(full or ())]
    unsupported = _unsupported(q, [v, *(tier.values for tier in (past, full) if tier)], dropout)
    if _trains(given) and not (past is None and full is None):
        unsupported = "gradient over a cache"
    elif _trains(given) and q.shape[-1] > 128:
        unsupported = f"gradient for heads of size {q.shape[-1]}"
    if use_triton("sink_window", *given, unsupported=unsupported):
        if chunked:
            sink, recent = 0, EVERYTHING
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        tiers = (*(past or (None,) * 3), *(full or (None,) * 3))
        return ops.prefill(q, k, v, rank, *tiers, options["full_heads"], sink, recent, scale, softcap, sinks)[0]
    return sink_window_reference(q, k, v, rank, dropout=dropout, **options)


def sink_window_decode(
    q: Tensor,
    rank: Tensor | None = None,
    *,
    sink: int,
    recent: int,
    kept: Tier | None = None,
    full_heads: Sequence[bool] | None = None,
    full: Tier | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One query a row over the two tiers of a cache, which hold the query's own token already.

    Args:
        q: `[B, H, 1, D]`.
        rank: `[B, 1]`, the query's place among the real tokens of its row, which the streaming heads need; negative
            for padding. None is allowed where no head streams and nothing is padded.
        kept: what the streaming heads keep, `[B, G_streaming, P, D]` with ranks `[B, P]`, in any order (a ring).
        full_heads: G booleans, True for a KV head that reads everything. None: all heads stream.
        full: what the full heads keep, `[B, G_full, S, D]`; without ranks all S are read.

    The rest is as in `sink_window`. Returns `[B, H, 1, D]`, zeros where a row reads nothing.
    """
    groups = sum(0 if tier is None else tier[0].shape[1] for tier in (kept, full))
    _check("sink_window_decode", q, groups, sink, recent, full_heads)
    kept, full = (tier if tier is None else Tier(*tier) for tier in (kept, full))
    flags = [False] * groups if full_heads is None else [bool(flag) for flag in full_heads]
    for name, tier, count in (("full", full, sum(flags)), ("kept", kept, groups - sum(flags))):
        held = 0 if tier is None else tier.keys.shape[1]
        if held != count:
            raise ValueError(f"sink_window_decode: {name} holds {held} KV heads, but full_heads asks for {count} there")
    if kept is not None and (rank is None or kept.rank is None):
        raise ValueError("sink_window_decode: streaming heads need the rank of the query and of the tokens kept")
    if q.shape[2] != 1:
        raise ValueError(f"sink_window_decode: q has {q.shape[2]} tokens a row; it takes 1, sink_window takes more")
    options: dict[str, Any] = dict(sink=sink, recent=recent, kept=kept, full_heads=flags, full=full,
                                   scale=scale, softcap=softcap, sinks=sinks)  # fmt: skip
    given = [q, sinks, *(kept or ()), *(full or ())]
    unsupported = _unsupported(q, [tier.values for tier in (kept, full) if tier], dropout)
    if _trains(given):
        unsupported = "gradient"
    if use_triton("sink_window_decode", *given, unsupported=unsupported):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        tiers = (*(kept or (None,) * 3), *(full or (None,) * 3))
        return ops.decode(q, rank, *tiers, flags, sink, recent, scale, softcap, sinks)
    return decode_reference(q, rank, dropout=dropout, **options)


def _trains(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _unsupported(q: Tensor, values: Sequence[Tensor], dropout: float) -> str | None:
    if dropout:
        return "dropout"
    if q.shape[-1] > (128 if q.dtype == torch.float32 else 256):
        return f"heads of size {q.shape[-1]} in {str(q.dtype).removeprefix('torch.')}"
    if any(tensor.shape[-1] != q.shape[-1] for tensor in values):
        return "values of another size than the keys"
    return None


def _flags(full_heads: Sequence[bool] | None, k: Tensor) -> list[bool]:
    return [False] * k.shape[1] if full_heads is None else [bool(flag) for flag in full_heads]


def _check(name: str, q: Tensor, groups: int, sink: int, recent: int, full_heads: Sequence[bool] | None) -> None:
    if sink < 0:
        raise ValueError(f"{name}: sink is {sink}; it must be 0 or more")
    if recent < 1:
        raise ValueError(f"{name}: recent is {recent}; it must be at least 1 (the query's own token)")
    if full_heads is not None and len(full_heads) != groups:
        raise ValueError(f"{name}: full_heads says something of {len(full_heads)} KV heads; there are {groups}")
    if groups == 0 or q.shape[1] % groups:
        raise ValueError(f"{name}: q has {q.shape[1]} heads; that must be a multiple of the {groups} KV heads")
