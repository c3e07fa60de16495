"""Attention of chosen (token, head) pairs in torch: the specification.

For each row and KV head the pairs are listed by token and taken some at a time, over the keys up to the last of them.
Nothing here holds `[B, H, T, S]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

PAIRS = 64  # that are computed at once


def routed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    (rows, heads, length, _), group = q.shape, q.shape[1] // k.shape[1]
    out = q.new_zeros(rows, length, heads, v.shape[3]).transpose(1, 2)  # as models go on with it
    left = weights
    if starts is None and sinks is None and softcap is None and length > 1 and (length == k.shape[2] or not causal):
        whole = (weights != 0).all(dim=2)
        left = weights.masked_fill(whole[..., None], 0)
        for b, h in whole.nonzero().tolist():
            query, key, value = (x[None, None] for x in (q[b, h], k[b, h // group], v[b, h // group]))
            found = functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
            out[b, h] = found[0, 0] * weights[b, h, :, None].to(_wide(q))
    for b, g, first, head, token in _lists(left, starts, k):
        keys, values = (x[b, g, first:].to(_wide(q)) for x in (k, v))
        queries = q[b, head, token].to(_wide(q)) * scale
        place = token + (k.shape[2] - length - first)
        parts = [
            _shares(queries[some], keys[:end], place[some], sinks, head[some], causal, softcap)[0] @ values[:end]
            for some, end in _blocks(place, len(keys), causal)
        ]
        found = torch.cat(parts[::-1]) * weights[b, head, token, None].to(_wide(q))
        out[b, head, token] = found.to(q.dtype)
    return out


def _lists(weights: Tensor, starts: Tensor | None, k: Tensor) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """For each row and KV head that is read: its first key, and the heads and tokens of its pairs, by token."""
    length, (groups, keys) = weights.shape[2], k.shape[1:3]
    chosen = (weights != 0).unflatten(1, (groups, -1)).mT  # [B, G, T, H / G]
    first = [0] * len(weights)
    if starts is not None:
        first = starts.clamp(min=0).tolist()
        place = torch.arange(keys - length, keys, device=k.device)
        chosen = chosen & (place >= starts[:, None])[:, None, :, None]
    sizes = chosen.sum(dim=(2, 3)).flatten().tolist()
    _, group, tokens, member = chosen.nonzero(as_tuple=True)
    heads = group * chosen.shape[3] + member
    for index, (head, token) in enumerate(zip(heads.split(sizes), tokens.split(sizes), strict=True)):
        if len(token):
            yield index // groups, index % groups, first[index // groups], head, token


def _blocks(place: Tensor, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Pairs that are computed at once, and how many keys they read.

    The last come first: those that read the most, so that the memory of each will do for the next.
    """
    for start in reversed(range(0, len(place), PAIRS)):
        some = slice(start, start + PAIRS)
        yield some, int(place[some][-1]) + 1 if causal else keys


def _shares(
    q: Tensor, k: Tensor, place: Tensor, sinks: Tensor | None, head: Tensor, causal: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What of each query's attention each key gets, `[n, keys]`, and the scores, of queries that are scaled."""
    scores = q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    first = int(place[0])
    if causal and first + 1 < len(k):  # the others are read by all
        hidden = torch.arange(first, len(k), device=k.device) > place[:, None]
        scores[:, first:].masked_fill_(hidden, float("-inf"))
    if sinks is None:
        return scores.softmax(dim=-1), scores
    return torch.cat([scores, sinks[head, None].to(scores)], dim=-1).softmax(dim=-1)[:, :-1], scores


def routed_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of q, k, v, weights, and of sinks if there are any."""
    wide = _wide(q)
    tensors = q, k, v, weights
    grad_q, grad_k, grad_v, grad_weights = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in tensors)
    grad_sinks = torch.zeros(q.shape[1], dtype=wide, device=q.device)
    for b, g, first, head, token in _lists(weights, starts, k):
        keys, values = (x[b, g, first:].to(wide) for x in (k, v))
        place = token + (k.shape[2] - q.shape[2] - first)
        for some, end in _blocks(place, len(keys), causal):
            pairs = b, head[some], token[some]
            queries, upstream, weight = q[pairs].to(wide) * scale, grad[pairs].to(wide), weights[pairs].to(wide)
            shares, scores = _shares(queries, keys[:end], place[some], sinks, head[some], causal, softcap)
            product = (upstream * (shares @ values[:end])).sum(dim=-1)
            grad_weights[pairs] = product
            upstream, product = upstream * weight[:, None], product * weight
            change = shares * (upstream @ values[:end].mT - product[:, None])
            if softcap is not None:
                change = change * (1 - (scores / softcap).square()).masked_fill(shares == 0, 0)
            grad_q[pairs] = change @ keys[:end] * scale
            grad_k[b, g, first : first + end] += change.mT @ queries
            grad_v[b, g, first : first + end] += shares.mT @ upstream
            grad_sinks.index_add_(0, head[some], (shares.sum(dim=-1) - 1) * product)
    given = tensors if sinks is None else (*tensors, sinks)
    gradients = grad_q, grad_k, grad_v, grad_weights, grad_sinks
    return [gradient.to(x.dtype) for gradient, x in zip(gradients, given, strict=False)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float)
