"""DuoAttention: full attention for retrieval heads, sinks and a recent window for the rest.

DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (Xiao et al., 2024),
https://arxiv.org/abs/2410.10819

A streaming KV head lets the query at place i read the key at place j if `j < sink or i - j < recent`, and keeps
only those keys: `sink + recent` of them, however long the text. Nothing is trained here; which heads stream
comes from a pattern that `patchattn.duo` reads, writes and identifies.

Differs from the published code: heads are not permuted (LoRA, quantised and tensor-parallel weights stay
valid), padding of any kind is right, ties between gates are broken by order (lower layer, then lower head stays
full) and not by noise, and by default (`prefill="exact"`) the window holds in the prompt too, so that the
result does not depend on how a prompt is cut. `prefill="chunked"` is what the published code computes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchattn_kernels import masked_attention, sink_window
from patchattn_kernels.sink_window import visible

from ..cache import TwoTierLayer
from ..duo import as_rows, binarise, load_pattern, spread
from ..method import Method, MethodConfig, register, runtime

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..sites import Site


@register("duo_attention")
class DuoAttention(Method):
    """Retrieval heads keep everything, streaming heads only sinks and a recent window."""

    summary = "long context in less memory: some KV heads keep only sinks and a recent window"
    paper = "DuoAttention, arXiv 2410.10819"
    example = {"heads": 0.5, "sink": 2, "recent": 5}  # noqa: RUF012

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of DuoAttention.

        Args:
            heads: which KV heads stay full. An array `[layers, KV heads]` of 0 and 1, or of gate values to be
                cut at `share`; a file or folder with such a pattern (the published TSV or JSON); or a number,
                the share of heads that stay full, spread evenly (a placeholder: find the pattern of your model).
            share: with gate values, the share of all KV heads that stay full.
            sink: tokens at the start that streaming heads keep.
            recent: latest tokens that streaming heads keep, the query's own included.
            prefill: "exact" (the window holds in the prompt too, however it is cut) or "chunked" (each call sees
                all its own tokens, as in the published code).
        """

        heads: Any = 0.5
        share: float | None = None
        sink: int = 64
        recent: int = 256
        prefill: str = runtime("exact")

        def __post_init__(self) -> None:
            self._require_int("sink", 0)
            self._require_int("recent", 1)
            self._require_choice("prefill", ("exact", "chunked"))
            if self.share is not None:
                self._require(isinstance(self.share, (int, float)) and 0 <= self.share <= 1, "share", "from 0 to 1")
            if isinstance(self.heads, (int, float)) and not isinstance(self.heads, bool):
                self._require(0 <= self.heads <= 1, "heads", "a share from 0 to 1, an array, or a file")
                self._require(self.share is None, "share", "left out when heads is a number, which is the share")
            elif isinstance(self.heads, (str, os.PathLike)):
                object.__setattr__(self, "heads", os.fspath(self.heads))
            else:
                object.__setattr__(self, "heads", as_rows(self.heads))

        def resolve(self, sites: Sequence[Site], total_layers: int) -> MethodConfig:
            heads = load_pattern(self.heads) if isinstance(self.heads, str) else self.heads
            counts = [site.kv_heads for site in sites]
            rows: list[Any]
            if isinstance(heads, (int, float)):
                rows = spread(heads, counts)
            else:
                rows = list(heads)
                if len(rows) == total_layers and all(site.layer_idx is not None for site in sites):
                    rows = [rows[site.layer_idx] for site in sites]  # type: ignore[index]
                if len(rows) != len(sites):
                    raise ValueError(
                        f"DuoAttention: heads has {len(rows)} rows; it must have {total_layers}, one for each layer "
                        f"of the model, or {len(sites)}, one for each layer patched"
                    )
                for site, row in zip(sites, rows, strict=True):
                    if len(row) != site.kv_heads:
                        raise ValueError(f"DuoAttention: heads has {len(row)} values for {site.name}, which has "
                                         f"{site.kv_heads} KV heads")  # fmt: skip
                rows = binarise(rows, self.share)
            return type(self)(heads=rows, sink=self.sink, recent=self.recent, prefill=self.prefill)

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        if not site.causal:
            return "its attention is not causal, so there are no recent tokens to keep"
        if site.window is not None:
            return f"this layer already has a sliding window of {site.window} tokens"
        if not site.kv_heads:
            return "its number of KV heads could not be read from the module"
        if getattr(site.module, "is_kv_shared_layer", False) or getattr(site.module, "store_full_length_kv", False):
            return "this layer shares its keys and values with another"
        if site.position_bias:
            return "it adds a position bias to the scores, which a shortened cache cannot"
        if site.cache_problem is not None:
            return site.cache_problem
        return None

    def build(self, site: Site) -> None:
        self.group = site.heads // site.kv_heads
        self.full = tuple(bool(value) for value in self.config.heads[site.order])  # by KV head
        self._indices: dict[torch.device, _Heads] = {}

    def cache_layer(self, static_length: int | None) -> TwoTierLayer | None:
        if all(self.full):
            return None
        return TwoTierLayer(any(self.full), self.config.sink, self.config.recent, static_length)

    def forward(self, ctx: AttentionContext) -> Tensor:
        if all(self.full):
            return ctx.attend()
        heads = self._indices.get(ctx.q.device)
        if heads is None:
            heads = self._indices[ctx.q.device] = _Heads(self.full, self.group, ctx.q.device)
        parts = []
        if any(self.full):
            parts.append(self._full(ctx, heads))
        parts.append(self._streaming(ctx, heads))
        out = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # [B, H, T, D]: full heads, then streaming
        return out.index_select(1, heads.back).transpose(1, 2)

    def _full(self, ctx: AttentionContext, heads: _Heads) -> Tensor:
        q, k, v = (x.index_select(1, index) for x, index in
                   ((ctx.q, heads.full_q), (ctx.k, heads.full_kv), (ctx.v, heads.full_kv)))  # fmt: skip
        if ctx.cache is not None:
            # Before 5.4 a static layer has to be told where to write; later ones count by themselves.
            place = [{"cache_position": ctx.positions}] if ctx.static else []
            k, v = ctx.cache.full.update(k, v, *place)
        options = _options(ctx, heads.full_q)
        queries, keys, mask = q.shape[2], k.shape[2], ctx.mask
        if mask.padding is None and mask.dense is None and not ctx.static and (queries == 1 or queries == keys):
            return masked_attention(q, k, v, causal=queries > 1, **options)
        past = ctx.past_length
        return masked_attention(q, k, v, lambda a, b: mask.keep(a, b, keys, past, 0, q.device), **options)

    def _streaming(self, ctx: AttentionContext, heads: _Heads) -> Tensor:
        q, k, v = (x.index_select(1, index) for x, index in
                   ((ctx.q, heads.stream_q), (ctx.k, heads.stream_kv), (ctx.v, heads.stream_kv)))  # fmt: skip
        cache, length, options = ctx.cache, q.shape[2], _options(ctx, heads.stream_q)
        sizes: dict[str, Any] = dict(sink=self.config.sink, recent=self.config.recent)
        chunked = self.config.prefill == "chunked"
        if ctx.mask.dense is not None and length > 1:
            return self._drawn(ctx, q, k, v, options)
        real = _real_tokens(ctx, length)  # [B, T], or None when all are
        if real is None:
            order, new = None, torch.full((q.shape[0],), length, device=q.device)
        else:
            order, new = real.int().argsort(dim=1, stable=True), real.sum(dim=1)  # padding first
            q, k, v = (_take(x, order) for x in (q, k, v))
        step = torch.arange(length, device=q.device) - (length - new[:, None])  # [B, T], negative for padding
        rank = step if cache is None else torch.where(step >= 0, step + cache.count[:, None], -1)
        if cache is not None and length == 1 and not chunked:
            cache.write(k, v, new)
            keys, values, key_rank = cache.past()
            return masked_attention(q, keys, values, visible(rank, key_rank, **sizes), **options)
        out = sink_window(
            q, k, v, rank, past=None if cache is None else cache.past(), chunked=chunked, **sizes, **options
        )
        if cache is not None:
            cache.write(k, v, new)
        return out if order is None else _take(out, order.argsort(dim=1))

    def _drawn(self, ctx: AttentionContext, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """The model drew the mask itself (packed sequences, a bidirectional prefix): narrow it further."""
        dense = ctx.mask.dense
        assert dense is not None
        if dense.shape[2] != dense.shape[3]:
            raise ValueError("DuoAttention: a hand-made 4-D mask over cached tokens says nothing of the tokens that "
                             "streaming heads have dropped; pass the 2-D padding mask instead")  # fmt: skip
        rank = dense[:, 0].tril().sum(dim=-1) - 1  # [B, T], the place in the token's own sequence
        rank = rank.expand(q.shape[0], -1)
        i, j = rank[:, None, :, None], rank[:, None, None, :]
        keep = dense & ((j < self.config.sink) | (i - j < self.config.recent))
        if ctx.cache is not None:
            real = dense[:, 0].diagonal(dim1=1, dim2=2).expand(q.shape[0], -1)
            order = real.int().argsort(dim=1, stable=True)
            ctx.cache.write(_take(k, order), _take(v, order), real.sum(dim=1))
        return masked_attention(q, k, v, keep, **options)

    def report(self) -> dict[str, Any]:
        return {"full heads": f"{sum(self.full)} of {len(self.full)}"}


class _Heads:
    """Which heads go where, as index tensors on one device."""

    def __init__(self, full: Sequence[bool], group: int, device: torch.device) -> None:
        def indices(wanted: bool, width: int) -> Tensor:
            kept = [i * width + j for i, value in enumerate(full) if value == wanted for j in range(width)]
            return torch.tensor(kept, dtype=torch.long, device=device)

        self.full_kv, self.stream_kv = indices(True, 1), indices(False, 1)
        self.full_q, self.stream_q = indices(True, group), indices(False, group)
        self.back = torch.cat([self.full_q, self.stream_q]).argsort()  # from [full, streaming] to the model's order


def _options(ctx: AttentionContext, heads: Tensor) -> dict[str, Any]:
    sinks = None if ctx.sinks is None else ctx.sinks.index_select(0, heads)
    return dict(scale=ctx.scaling, softcap=ctx.softcap, sinks=sinks, dropout=ctx.dropout)


def _real_tokens(ctx: AttentionContext, length: int) -> Tensor | None:
    mask = ctx.mask
    if mask.dense is not None:  # one query: its row says which tokens are real
        return mask.dense[:, 0, -1, -length:].expand(ctx.q.shape[0], -1) if not ctx.static else None
    return None if mask.padding is None else mask.key_padding(length, ctx.past_length)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of `[B, heads, T, D]` row by row."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
