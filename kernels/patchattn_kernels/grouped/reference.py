"""Attention over keys of several kinds in torch: the specification, and the path every device can run.

See What You Are Told: Visual Attention Sink in Large Multimodal Models (Kang et al., 2025),
https://arxiv.org/abs/2503.03321

The weights of one block of queries are held at a time, whole rows of them, so that the rule can be read as the
paper states it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import MASK_ELEMENTS, masked_attention

PADDING, REST, IMAGE, IMAGE_SINK, TEXT_SINK = -1, 0, 1, 2, 3
EPSILON = 1e-6  # the published code adds it to the weight of every image key, in the share of the sinks only


class Rule(NamedTuple):
    """When and how much weight moves from sinks to the image.

    Attributes:
        recycle: the share of every sink's weight that is moved.
        non_sink_min: the least share of a row's weight on images that must lie on keys that are no sinks.
        min_visual: the least weight on images.
    """

    recycle: float
    non_sink_min: float
    min_visual: float


def redistribute(weights: Tensor, kinds: Tensor, images: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Move weight from sinks, of image and text, to the rest of the image, in proportion to what is there.

    Args:
        weights: `[B, H, T, S]`, rows of a softmax.
        kinds: `[B, S]`; images: `[B, T]`, see `grouped`.

    Returns the new weights, whose rows sum to what they did, and which rows changed `[B, H, T]`.
    """
    groups = torch.stack([kinds == kind for kind in (IMAGE, IMAGE_SINK, TEXT_SINK)], dim=-1)  # [B, S, 3]
    groups = groups[:, None].to(weights.dtype)  # [B, 1, S, 3]
    with torch.no_grad():
        image, image_sink, text_sink = (weights @ groups).unbind(-1)  # [B, H, T] each
        visual = image + image_sink
        share = image_sink / (visual + EPSILON * images[:, None])
        moved = (images[:, None] > 0) & (share <= 1 - rule.non_sink_min) & (visual >= rule.min_visual) & (image > 0)
        gain = rule.recycle * (image_sink + text_sink) / image.where(moved, 1.0)
        loss = torch.full_like(gain, -rule.recycle)
        change = torch.stack([gain, loss, loss], dim=-1).where(moved[..., None], 0.0)  # [B, H, T, 3]
    return weights * (1 + change @ groups.mT), moved


def grouped_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kinds: Tensor | None,
    images: Tensor | None,
    rule: Rule | None,
    *,
    past: int | Tensor,
    causal: bool,
    keep: Callable[[int, int], Tensor] | None,
    gate: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    moved = None
    rows = keep
    if keep is None and (kinds is not None or not _square(q, k, past, causal)):
        rows = functools.partial(_readable, kinds=kinds, keys=k.shape[2], past=past, causal=causal, device=q.device)
    if rule is None:
        square = rows is None and causal
        out = masked_attention(q, k, v, rows, causal=square, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
    else:
        assert kinds is not None and images is not None and rows is not None
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.to(wide), v.to(wide)
        outs, changed = [], []
        for first, last, stop in _blocks(q, k, past, causal and keep is None):
            scores = _scores(q[:, :, first:last].to(wide), keys[:, :, :stop], scale, softcap)  # [B, H, t, stop]
            scores = scores.masked_fill(~rows(first, last)[..., :stop], float("-inf"))
            weights, there = redistribute(_softmax(scores, sinks), kinds[:, :stop], images[:, first:last], rule)
            outs.append(_weighted(functional.dropout(weights, dropout, training=dropout > 0), values[:, :, :stop]))
            changed.append(there)
        out, moved = torch.cat(outs, dim=2), torch.cat(changed, dim=2)
    if gate is not None:
        out = out * gate
    return out.to(q.dtype), moved


def _square(q: Tensor, k: Tensor, past: int | Tensor, causal: bool) -> bool:
    """Whether nothing needs a mask, or only plain causality."""
    return not causal or (isinstance(past, int) and past == 0 and q.shape[2] == k.shape[2])


def _readable(
    first: int, last: int, kinds: Tensor | None, keys: int, past: int | Tensor, causal: bool, device: torch.device
) -> Tensor:
    """What causality and padding leave to the queries `[first, last)`: `[B or 1, 1, t or 1, S]`."""
    readable = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)
    if causal:
        place = torch.arange(first, last, device=device)[:, None] + past
        readable = (torch.arange(keys, device=device) <= place)[None, None]
    return readable if kinds is None else readable & (kinds[:, None, None, :] != PADDING)


def _blocks(q: Tensor, k: Tensor, past: int | Tensor, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Blocks of queries whose weights, of all heads, stay below `MASK_ELEMENTS`, and the keys that each can reach."""
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if batch * heads * queries * keys <= MASK_ELEMENTS:  # tested first, so that a compiled step fits every length
        yield 0, queries, keys
        return
    size = max(1, MASK_ELEMENTS // (batch * heads * keys))
    for first in range(0, queries, size):
        last = min(first + size, queries)
        yield first, last, min(keys, past + last) if causal and isinstance(past, int) else keys


def _scores(q: Tensor, k: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """`[B, H, t, S]`; the query heads of a group become rows, so that no key is repeated."""
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, G, H / G * t, D]
    scores = rows @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return scores.softmax(dim=-1).nan_to_num(0.0)  # a row that reads nothing
    logits = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, logits], dim=-1).softmax(dim=-1)[..., :-1]


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    rows = weights.unflatten(1, (v.shape[1], -1)).flatten(2, 3)
    return (rows @ v).unflatten(2, (-1, weights.shape[2])).flatten(1, 2)
