"""Attention to the chunks of keys that each token and head picks: a key for each chunk, the choice, the attention.

Tokens are addressed by their place among the real tokens of their row: token r of a row stands at `[:, r]`, whatever
padding there was. Keys and queries come rotated by their place inside their chunk (see `reference`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import use_triton
from .reference import (
    chunk_attention_backward_reference,
    chunk_attention_reference,
    complete_bounds_reference,
    complete_chunks_reference,
    select_chunks_reference,
)

__all__ = ["chunk_attention", "complete_bounds", "complete_chunks", "select_by_bounds", "select_chunks"]

NAME = "chunk_select"
LARGEST_CHUNK = 1 << 16  # bytes of keys that the kernel of chunk keys holds at once


@torch.no_grad()
def complete_chunks(
    chunk_keys: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: Tensor,
    after: Tensor,
    *,
    chunk: int,
    scale: float | None = None,
) -> None:
    """Write into `chunk_keys` the key of every chunk that a call has completed; the others stay as they are.

    Args:
        chunk_keys: `[B, H, chunks, D]`, changed in place.
        q: `[B, H, slots + 1, D]`, rotated queries: that of token r in slot `r % slots`, a multiple of `chunk`. The
            last slot is for what belongs nowhere.
        k, v: `[B, G, slots + 1, D]`, in the same way, each with as many slots as it likes.
        before, after: `[B]`, tokens that each row had before the call and has now.
        scale: on the scores; None means D ** -0.5.
    """
    _require_slots("complete_chunks", chunk, q=q, k=k, v=v)
    if k.shape[3] != v.shape[3]:
        raise ValueError(f"complete_chunks: keys have {k.shape[3]} features and values {v.shape[3]}; they must be as "
                         "many, since what is gathered from the values is matched with the keys")  # fmt: skip
    _complete(chunk_keys, q.detach(), k.detach(), v.detach(), before, after, chunk, _scale(q, scale))


@torch.no_grad()
def complete_bounds(bounds: Tensor, k: Tensor, before: Tensor, after: Tensor, *, chunk: int) -> None:
    """Write into `bounds` `[B, G, chunks, 2 * D]` what no key of a chunk exceeds, for every chunk a call completed.

    For each feature the largest of the chunk, then for each the smallest. `k`, `before` and `after` are as for
    `complete_chunks`.
    """
    _require_slots("complete_bounds", chunk, k=k)
    _bound(bounds, k.detach(), before, after, chunk)


def select_by_bounds(q: Tensor, bounds: Tensor, current: Tensor, *, chunks: int, dense: int | None = None) -> Tensor:
    """As `select_chunks`, by the largest product that a key within a chunk's `bounds` could have with the query."""
    q = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
    return select_chunks(q, bounds, current, chunks=chunks, dense=dense)


@torch.no_grad()
def select_chunks(q: Tensor, chunk_keys: Tensor, current: Tensor, *, chunks: int, dense: int | None = None) -> Tensor:
    """Which chunks each token reads, for each head: `[B, H, T, max(chunks, dense)]`, ascending, then -1; int32.

    The first chunk, the token's own and the one before are always read, and of those between them the `chunks - 3`
    whose keys have the largest product with the query, which is not rotated and not scaled.

    Args:
        q: `[B, H, T, D]`, not rotated.
        chunk_keys: `[B, H or fewer, any number, D]`, shared evenly by the heads of `q`; only those of chunks before
            the last but one are looked at.
        current: `[B, T]`, the chunk each token is in; -1 for padding, which reads nothing.
        dense: tokens of the first `dense` chunks read all there are; default: `chunks`, where no choice is needed.
    """
    dense = chunks if dense is None else dense
    if chunks < 4:
        raise ValueError(f"select_chunks: chunks is {chunks}; it must be at least 4: the first, one of its own "
                         "choice, the last but one and the current")  # fmt: skip
    return _select(q.detach(), chunk_keys, current, chunks, max(dense, chunks - 1))


def chunk_attention(
    q: Tensor,
    turned: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    selected: Tensor,
    opened: Tensor,
    *,
    chunk: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each query to the chunks it picked, laid side by side; its own chunk is the last.

    Args:
        q: `[B, H, T, D]`, rotated by the token's place inside its chunk.
        turned: `[B, H, T, D]`, `q` a quarter turn on: rotating `q` by m chunks gives `q * cos[m] + turned * sin[m]`.
        k, v: `[B, G, S, D]`, chunk c in the places from `c * chunk` on, keys rotated by their place in their chunk.
        cos, sin: `[chunks, D]`, of the angles that lie between chunks.
        selected: `[B, H, T, n]`, ascending, then -1 where a token reads fewer than n chunks.
        opened: `[B, T]`, how many keys of the last chunk it picked a token reads; of the others it reads all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, one extra logit a head that takes weight and gives no value.

    Returns `[B, H, T, D]`; zeros for a token that reads nothing. Gradients flow to q, turned, k, v and sinks.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"chunk_attention: {q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if selected.shape[:3] != q.shape[:3]:
        raise ValueError(f"chunk_attention: selected is {list(selected.shape)}; q, {list(q.shape)}, needs "
                         f"{list(q.shape[:3])} and the chunks of each")  # fmt: skip
    arguments = q, turned, k, v, cos.float(), sin.float(), selected, opened, sinks
    return _attend(*arguments, chunk, _scale(q, scale), softcap)[0]


def _require_slots(who: str, chunk: int, **rings: Tensor) -> None:
    for name, x in rings.items():
        if (x.shape[2] - 1) % chunk:
            raise ValueError(f"{who}: {name} has {x.shape[2] - 1} slots and one more; the slots must be a multiple of "
                             f"chunk, {chunk}")  # fmt: skip


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


# Loops that depend on the choice cannot be traced, so each step is one operator to torch.compile.


@torch.library.custom_op(
    "patchattn::complete_chunks",
    mutates_args=("chunk_keys",),
    schema="(Tensor(a!) chunk_keys, Tensor q, Tensor k, Tensor v, Tensor before, Tensor after, int chunk, float scale)"
    " -> ()",
)
def _complete(
    chunk_keys: Tensor, q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor, chunk: int, scale: float
) -> None:
    large = chunk * k.shape[3] * k.element_size() > LARGEST_CHUNK
    if use_triton(NAME, q, k, v, unsupported="room for such chunks" if large else None):
        from .kernels import complete_chunks as in_triton

        with torch.cuda.device_of(q):
            in_triton(chunk_keys, q, k, v, before, after, chunk, scale)
    else:
        complete_chunks_reference(chunk_keys, q, k, v, before, after, chunk, scale)


@torch.library.custom_op(
    "patchattn::complete_bounds",
    mutates_args=("bounds",),
    schema="(Tensor(a!) bounds, Tensor k, Tensor before, Tensor after, int chunk) -> ()",
)
def _bound(bounds: Tensor, k: Tensor, before: Tensor, after: Tensor, chunk: int) -> None:
    if use_triton(NAME, k):
        from .kernels import complete_bounds as in_triton

        with torch.cuda.device_of(k):
            in_triton(bounds, k, before, after, chunk)
    else:
        complete_bounds_reference(bounds, k, before, after, chunk)


@torch.library.custom_op(
    "patchattn::select_chunks",
    mutates_args=(),
    schema="(Tensor q, Tensor chunk_keys, Tensor current, int chunks, int dense) -> Tensor",
)
def _select(q: Tensor, chunk_keys: Tensor, current: Tensor, chunks: int, dense: int) -> Tensor:
    return select_chunks_reference(q, chunk_keys, current, chunks, dense)


@_select.register_fake
def _(q: Tensor, chunk_keys: Tensor, current: Tensor, chunks: int, dense: int) -> Tensor:
    return q.new_empty(*q.shape[:3], max(chunks, dense), dtype=torch.int32)


@torch.library.custom_op(
    "patchattn::chunk_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor turned, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor selected, Tensor opened,"
    " Tensor? sinks, int chunk, float scale, float? softcap) -> (Tensor, Tensor)",
)
def _attend(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor, opened: Tensor,
    sinks: Tensor | None, chunk: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if use_triton(NAME, q, k, v, unsupported="head sizes that differ" if k.shape[3] != v.shape[3] else None):
        from .kernels import chunk_attention as in_triton

        with torch.cuda.device_of(q):
            return in_triton(q, turned, k, v, cos, sin, selected, opened, sinks, chunk, scale, softcap)
    return chunk_attention_reference(q, turned, k, v, cos, sin, selected, opened, sinks, chunk, scale, softcap)


@_attend.register_fake
def _(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor, opened: Tensor,
    sinks: Tensor | None, chunk: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float)


@torch.library.custom_op(
    "patchattn::chunk_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor turned, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor selected,"
    " Tensor opened, Tensor out, Tensor total, Tensor? sinks, int chunk, float scale, float? softcap) -> Tensor[]",
)
def _gradients(
    grad: Tensor, q: Tensor, turned: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor,
    opened: Tensor, out: Tensor, total: Tensor, sinks: Tensor | None, chunk: int, scale: float, softcap: float | None,
) -> list[Tensor]:  # fmt: skip
    return chunk_attention_backward_reference(
        grad, q, turned, k, v, cos, sin, selected, opened, out, total, sinks, chunk, scale, softcap
    )


@_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, turned: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor,
    opened: Tensor, out: Tensor, total: Tensor, sinks: Tensor | None, chunk: int, scale: float, softcap: float | None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(x) for x in (q, turned, k, v, sinks) if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, sinks, chunk, scale, softcap = inputs
    ctx.save_for_backward(*tensors, *output, sinks)
    ctx.settings = chunk, scale, softcap


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    found = _gradients(grad, *tensors, sinks, *ctx.settings)
    return (*found[:4], None, None, None, None, None if sinks is None else found[4], None, None, None)


_attend.register_autograd(_backward, setup_context=_keep)
