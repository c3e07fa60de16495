"""What the check asks of `complete_chunks` and `chunk_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..check import Case
from . import chunk_attention, complete_bounds, complete_chunks, select_chunks

CHUNK, CHUNKS = 5, 4


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _attention(queries: int, sinks: bool = False, softcap: float | None = None) -> Case:
    """The last `queries` of 33 tokens, in two rows, the second with three tokens of padding."""
    heads, groups, length, size = 4, 2, 33, 24

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        shape: dict[str, Any] = dict(generator=generator, device=generator.device)
        q = torch.randn(2, heads, queries, size, **shape)
        k, v = (torch.randn(2, groups, length, size, **shape) for _ in "kv")
        pads = torch.tensor([[0], [3]], device=generator.device)
        place = (torch.arange(length - queries, length, device=generator.device) - pads).clamp(min=-1)
        current = torch.where(place >= 0, place // CHUNK, -1)
        chunk_keys = torch.randn(2, heads, length // CHUNK, size, **shape)
        angles = torch.rand(CHUNKS, size // 2, **shape).repeat(1, 2)
        return {
            "q": q, "k": k, "v": v, "cos": angles.cos(), "sin": angles.sin(),
            "selected": select_chunks(q, chunk_keys, current, chunks=CHUNKS), "opened": place % CHUNK + 1,
            "sinks": torch.randn(heads, **shape) if sinks else None,
        }  # fmt: skip

    def run(q: Tensor, **given: Any) -> Tensor:
        return chunk_attention(q, half_turned(q), chunk=CHUNK, softcap=softcap, **given)

    def formula(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor, opened: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        chunk = torch.arange(length, device=q.device) // CHUNK
        picked = selected[..., None] == chunk  # [B, H, T, n, S]
        own = (selected >= 0).sum(dim=-1) - 1
        step = (own[..., None] - torch.arange(selected.shape[3], device=q.device)).clamp(min=0)
        turned = q[..., None, :] * cos[step] + half_turned(q)[..., None, :] * sin[step]  # [B, H, T, n, D]
        scores = torch.einsum("bhtnd,bhsd->bhtns", turned.to(q.dtype), k) * size**-0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        inside = torch.arange(length, device=q.device) % CHUNK < opened[:, None, :, None]
        keep = picked & (inside[..., None, :] | (step > 0)[..., None])
        scores = scores.masked_fill(~keep, float("-inf")).amax(dim=-2)  # a key belongs to one chunk
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
        return scores.softmax(dim=-1).nan_to_num(0.0)[..., :length].to(v.dtype) @ v

    special = " sinks" * sinks + (f" softcap={softcap}" if softcap else "")
    return Case(f"attention of {queries} of {length} tokens{special}", inputs, run, formula, ("q", "k", "v"))


def _keys(chunk: int) -> Case:
    """Keys of the chunks that a call completes, in two rows."""
    heads, groups, slots, size = 4, 2, 4 * chunk, 24

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        shape: dict[str, Any] = dict(generator=generator, device=generator.device)
        q = torch.randn(2, heads, slots + 1, size, **shape)
        k, v = (torch.randn(2, groups, slots + 1, size, **shape) for _ in "kv")
        before, after = (torch.tensor(x, device=generator.device) for x in ([chunk + 1, 0], [4 * chunk, chunk]))
        return {"q": q, "k": k, "v": v, "before": before, "after": after}

    def run(q: Tensor, **given: Any) -> Tensor:
        chunk_keys = torch.zeros(2, heads, 4, size, dtype=q.dtype, device=q.device)
        complete_chunks(chunk_keys, q, chunk=chunk, **given)
        return chunk_keys

    def formula(q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor) -> Tensor:
        q, k, v = (x[:, :, :-1].unflatten(2, (4, chunk)) for x in (q, k, v))
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        weights = (q @ k.mT * size**-0.5).softmax(dim=-1).mean(dim=-2, keepdim=True)
        found = ((weights @ v @ k.mT * size**-0.5).softmax(dim=-1) @ k).squeeze(-2)
        index = torch.arange(4, device=q.device)
        done = (index >= before[:, None] // chunk) & (index < after[:, None] // chunk)
        return found * done[:, None, :, None]

    return Case(f"keys of chunks of {chunk}", inputs, run, formula)


def _bounds(chunk: int) -> Case:
    """Bounds of the keys of the chunks that a call completes, in two rows."""
    groups, size = 2, 24

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        k = torch.randn(2, groups, 4 * chunk + 1, size, generator=generator, device=generator.device)
        before, after = (torch.tensor(x, device=k.device) for x in ([chunk + 1, 0], [4 * chunk, chunk]))
        return {"k": k, "before": before, "after": after}

    def run(k: Tensor, **given: Any) -> Tensor:
        bounds = torch.zeros(2, groups, 4, 2 * size, dtype=k.dtype, device=k.device)
        complete_bounds(bounds, k, chunk=chunk, **given)
        return bounds

    def formula(k: Tensor, before: Tensor, after: Tensor) -> Tensor:
        keys = k[:, :, :-1].unflatten(2, (4, chunk))
        index = torch.arange(4, device=k.device)
        done = (index >= before[:, None] // chunk) & (index < after[:, None] // chunk)
        return torch.cat([keys.amax(dim=3), keys.amin(dim=3)], dim=-1) * done[:, None, :, None]

    return Case(f"bounds of chunks of {chunk}", inputs, run, formula)


CASES = (
    _attention(9, sinks=True),
    _attention(33, softcap=2.0),
    _attention(1, sinks=True),
    _attention(1),
    _keys(5),
    _keys(16),
    _bounds(5),
    _bounds(40),
)
