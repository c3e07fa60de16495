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

Two settings come from related papers. `positions="cache"` is Efficient Streaming Language Models with Attention
Sinks (Xiao et al., 2023, https://arxiv.org/abs/2309.17453): streaming heads count positions inside of what they
keep, so that with `heads=0` a model runs on past the length it was trained at. `compensation=True` is the token by
which RazorAttention (Tang et al., 2024, https://arxiv.org/abs/2407.15891) stands for all that was dropped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchattn_kernels import masked_attention, sink_window, sink_window_decode
from patchattn_kernels.sink_window import Tier
from patchattn_kernels.sink_window.compensated import compensated_sink_window

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
    innermost = True
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
            positions: what streaming heads rotate their keys by: "absolute", the place in the text, or "cache", the
                place among the tokens kept, which never exceeds `sink + recent`.
            compensation: streaming heads read one more key, the mean of all they have dropped, counted as often.
            slack: tokens kept beyond `recent` but not read, so that as many can be given back: what an assistant
                proposes at once in assisted decoding.
        """

        heads: Any = 0.5
        share: float | None = None
        sink: int = 64
        recent: int = 256
        prefill: str = runtime("exact")
        positions: str = "absolute"
        compensation: bool = False
        slack: int = 0

        def __post_init__(self) -> None:
            self._require_int("sink", 0)
            self._require_int("recent", 1)
            self._require_int("slack", 0)
            self._require_choice("prefill", ("exact", "chunked"))
            self._require_choice("positions", ("absolute", "cache"))
            self._require(isinstance(self.compensation, bool), "compensation", "True or False")
            if self.positions == "cache":
                self._require(self.prefill == "exact", "prefill", "'exact' where positions is 'cache'")
                self._require(not self.compensation, "compensation", "False where positions is 'cache': "
                              "a mean of keys has no place in the cache to be rotated by")  # fmt: skip
            if self.compensation:
                self._require(self.prefill == "exact", "prefill", "'exact' where compensation is True")
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
            return self.replace(heads=rows, share=None)

        def part(self, places: Sequence[int]) -> MethodConfig:
            return self.replace(heads=[self.heads[place] for place in places])

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        if not site.causal:
            return "its attention is not causal, so there are no recent tokens to keep"
        if site.window is not None:
            return f"this layer already has a sliding window of {site.window} tokens"
        if not site.kv_heads:
            return "its number of KV heads could not be read from the module"
        if site.position_bias:
            return "it adds a position bias to the scores, which a shortened cache cannot"
        return site.cache_problem

    def __init__(self, config: MethodConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        if self.config.positions == "cache":
            self.rotary = "raw"

    def build(self, site: Site) -> None:
        self.group = site.heads // site.kv_heads
        self.full = tuple(bool(value) for value in self.config.heads[site.order])  # by KV head
        self._indices: dict[torch.device, _Heads] = {}

    def cache_layer(self, static_length: int | None) -> TwoTierLayer | None:
        if all(self.full) and self.rotary == "applied":
            return None
        config = self.config
        return TwoTierLayer(
            any(self.full), config.sink, config.recent, static_length, config.slack, sums=config.compensation
        )

    def forward(self, ctx: AttentionContext) -> Tensor:
        if all(self.full) and self.rotary == "applied":
            return ctx.attend()
        heads = self._indices.get(ctx.q.device)
        if heads is None:
            heads = self._indices[ctx.q.device] = _Heads(self.full, self.group, ctx.q.device)
        apart = ctx.mask.dense is not None or self.config.compensation or self.rotary == "raw"
        return (self._apart(ctx, heads) if apart else self._together(ctx, heads)).transpose(1, 2)

    # ---- both kinds of heads in one call -------------------------------------------------------------------

    def _together(self, ctx: AttentionContext, heads: _Heads) -> Tensor:
        tokens = _Tokens(ctx)
        options: dict[str, Any] = dict(
            sink=self.config.sink, recent=self.config.recent, full_heads=self.full, scale=ctx.scaling,
            softcap=ctx.softcap, sinks=ctx.sinks, dropout=ctx.dropout,
        )  # fmt: skip
        chunked, full, past, cache = self.config.prefill == "chunked", None, None, _cache(ctx)
        if cache is None and tokens.order is None:
            return sink_window(ctx.q, ctx.k, ctx.v, chunked=chunked, **options)
        if cache is not None and any(self.full):
            kept = _keep(ctx, ctx.k.index_select(1, heads.full_kv), ctx.v.index_select(1, heads.full_kv))
            full = Tier(*kept, _key_ranks(ctx, kept[0].shape[2]))
        q, k, v = tokens.sorted(ctx.q), tokens.sorted(ctx.k), tokens.sorted(ctx.v)
        if cache is not None:
            past = cache.past()
            new = k.index_select(1, heads.stream_kv), v.index_select(1, heads.stream_kv), tokens.new
            if ctx.q.shape[2] == 1 and not chunked:
                cache.write(*new)
                return sink_window_decode(q, tokens.rank, kept=cache.past(), full=full, **options)
        out = sink_window(q, k, v, tokens.rank, past=past, full=full, chunked=chunked, **options)
        if cache is not None:
            cache.write(*new)
        return tokens.unsorted(out)

    # ---- each kind by itself, where they differ in more than their window -----------------------------------

    def _apart(self, ctx: AttentionContext, heads: _Heads) -> Tensor:
        parts = []
        if any(self.full):
            parts.append(self._full(ctx, heads))
        if not all(self.full):
            parts.append(self._streaming(ctx, heads))
        out = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # [B, H, T, D]: full heads, then streaming
        return out.index_select(1, heads.back)

    def _full(self, ctx: AttentionContext, heads: _Heads) -> Tensor:
        q, k, v = (x.index_select(1, index) for x, index in
                   ((ctx.q, heads.full_q), (ctx.k, heads.full_kv), (ctx.v, heads.full_kv)))  # fmt: skip
        if self.rotary == "raw":
            q, k = ctx.rotate(q), ctx.rotate(k)
        if ctx.cache is not None:
            k, v = _keep(ctx, k, v)
        options = _options(ctx, heads.full_q)
        queries, keys, mask = q.shape[2], k.shape[2], ctx.mask
        if mask.padding is None and mask.dense is None and not ctx.static and (queries == 1 or queries == keys):
            return masked_attention(q, k, v, causal=queries > 1, **options)
        past = ctx.past_length
        return masked_attention(q, k, v, lambda a, b: mask.keep(a, b, keys, past, 0, q.device), **options)

    def _streaming(self, ctx: AttentionContext, heads: _Heads) -> Tensor:
        q, k, v = (x.index_select(1, index) for x, index in
                   ((ctx.q, heads.stream_q), (ctx.k, heads.stream_kv), (ctx.v, heads.stream_kv)))  # fmt: skip
        if ctx.mask.dense is not None and q.shape[2] > 1:
            return self._drawn(ctx, q, k, v, _options(ctx, heads.stream_q))
        tokens, cache, options = _Tokens(ctx), _cache(ctx), _options(ctx, heads.stream_q)
        options |= dict(sink=self.config.sink, recent=self.config.recent)
        q, k, v, rank = tokens.sorted(q), tokens.sorted(k), tokens.sorted(v), tokens.rank
        past = None if cache is None else cache.past()
        if self.config.compensation:
            lost = None
            if cache is not None and past is not None:
                past, lost = past._replace(rank=cache.ranks()), cache.lost  # with the tokens that only slack keeps
            out = compensated_sink_window(q, k, v, rank, past=past, lost=lost, **options)
        elif cache is not None and q.shape[2] == 1 and self.config.prefill == "exact":
            cache.write(k, v, tokens.new)
            return self._decode(ctx, q, rank, cache.past(), options)
        elif self.rotary == "raw":
            out = self._by_place(ctx, q, k, v, rank, past, options)
        else:
            out = sink_window(q, k, v, rank, past=past, chunked=self.config.prefill == "chunked", **options)
        if cache is not None:
            cache.write(k, v, tokens.new)
        return tokens.unsorted(out)

    def _drawn(self, ctx: AttentionContext, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """The model drew the mask itself (packed sequences, a bidirectional prefix): narrow it further."""
        dense = ctx.mask.dense
        assert dense is not None
        if dense.shape[2] != dense.shape[3]:
            raise ValueError("DuoAttention: a hand-made 4-D mask over cached tokens says nothing of the tokens that "
                             "streaming heads have dropped; pass the 2-D padding mask instead")  # fmt: skip
        if self.config.compensation:
            raise ValueError("DuoAttention: a hand-made 4-D mask does not say which tokens a compensation token is to "
                             "stand for; pass the 2-D padding mask, or patch with compensation=False")  # fmt: skip
        rank = dense[:, 0].tril().sum(dim=-1) - 1  # [B, T], the place in the token's own sequence
        rank = rank.expand(q.shape[0], -1)
        i, j = rank[:, None, :, None], rank[:, None, None, :]
        keep = dense & ((j < self.config.sink) | (i - j < self.config.recent))
        if (cache := _cache(ctx)) is not None:
            real = dense[:, 0].diagonal(dim1=1, dim2=2).expand(q.shape[0], -1)
            order = real.int().argsort(dim=1, stable=True)
            cache.write(_take(k, order), _take(v, order), real.sum(dim=1))
        if self.rotary == "raw":
            options["scale"] = q.shape[3] ** -0.5 if ctx.scaling is None else ctx.scaling
            start = torch.zeros_like(rank[:, :1])
            q, k = self._queries_by_place(ctx, q, rank, start), self._keys_by_place(ctx, k, rank, start)
        return masked_attention(q, k, v, keep, **options)

    # ---- positions="cache" ---------------------------------------------------------------------------------

    def _decode(self, ctx: AttentionContext, q: Tensor, rank: Tensor, kept: Any, options: dict[str, Any]) -> Tensor:
        """One query: the last place in the cache is its own."""
        if self.rotary == "raw":
            shift = self._shift(rank)
            place = torch.where(kept.rank < self.config.sink, kept.rank, kept.rank - shift).clamp(min=0)
            q, kept = ctx.rotate(q, (rank - shift).clamp(min=0)), kept._replace(keys=ctx.rotate(kept.keys, place))
        return sink_window_decode(q, rank, kept=kept, **options)

    def _by_place(
        self, ctx: AttentionContext, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, past: Tier | None,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Several queries: each reads the window at its own distance, the sinks at the distance they have in a cache.

        So a query is rotated twice, and a key is read by one of the two: heads are twice as wide, half of a key zero.
        """
        start = self._shift(torch.where(rank >= 0, rank, torch.iinfo(rank.dtype).max).amin(dim=1, keepdim=True))
        options["scale"] = q.shape[3] ** -0.5 if ctx.scaling is None else ctx.scaling
        size, pad = v.shape[3], torch.nn.functional.pad
        q, k = self._queries_by_place(ctx, q, rank, start), self._keys_by_place(ctx, k, rank, start)
        if past is not None:
            assert past.rank is not None
            keys = self._keys_by_place(ctx, past.keys, past.rank, start)
            past = Tier(keys, pad(past.values, (0, k.shape[3] - size)), past.rank)
        return sink_window(q, k, pad(v, (0, k.shape[3] - size)), rank, past=past, **options)[..., :size]

    def _shift(self, rank: Tensor) -> Tensor:
        """How many places nearer to the start a token stands in the cache of a query than in the text."""
        return (rank - (self.config.sink + self.config.recent - 1)).clamp(min=0)

    def _queries_by_place(self, ctx: AttentionContext, q: Tensor, rank: Tensor, start: Tensor) -> Tensor:
        near, far = (rank - start).clamp(min=0), (rank - self._shift(rank)).clamp(min=0)
        return torch.cat([ctx.rotate(q, near), ctx.rotate(q, far)], dim=-1)  # [B, H, T, 2 D]

    def _keys_by_place(self, ctx: AttentionContext, k: Tensor, rank: Tensor, start: Tensor) -> Tensor:
        sink = (rank < self.config.sink)[:, None, :, None]
        near, far = ctx.rotate(k, (rank - start).clamp(min=0)), ctx.rotate(k, rank.clamp(min=0, max=self.config.sink))
        return torch.cat([near.masked_fill(sink, 0), far.masked_fill(~sink, 0)], dim=-1)

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


class _Tokens:
    """The tokens of a call, row by row: which are real, and their places among the real tokens of the row.

    Attributes:
        order: `[B, T]`, padding first and then the real tokens; None where all are real.
        new: `[B]`, how many are real.
        rank: `[B, T]` in that order, negative for padding.
    """

    def __init__(self, ctx: AttentionContext) -> None:
        rows, length, device = ctx.q.shape[0], ctx.q.shape[2], ctx.q.device
        real = ctx.real
        if real is None:
            self.order, self.new = None, torch.full((rows,), length, device=device)
        else:
            self.order, self.new = real.int().argsort(dim=1, stable=True), real.sum(dim=1)
        step = torch.arange(length, device=device) - (length - self.new[:, None])
        cache: Any = ctx.cache
        self.rank = step if cache is None else torch.where(step >= 0, step + cache.count[:, None], -1)

    def sorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else _take(x, self.order)

    def unsorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else _take(x, self.order.argsort(dim=1))


def _cache(ctx: AttentionContext) -> TwoTierLayer | None:
    assert ctx.cache is None or isinstance(ctx.cache, TwoTierLayer)
    return ctx.cache


def _keep(ctx: AttentionContext, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give the full tier of the cache its new keys and values, and take all it holds."""
    # Before 5.4 a static layer has to be told where to write; later ones count by themselves.
    place = [{"cache_position": ctx.positions}] if ctx.static else []
    cache: Any = ctx.cache
    keys, values = cache.full.update(k, v, *place)
    return keys, values


def _key_ranks(ctx: AttentionContext, keys: int) -> Tensor | None:
    """`[B, S]`: the place of each cached token among the real ones of its row; None where all are real and in order."""
    if ctx.mask.padding is not None:
        real = ctx.mask.key_padding(keys, 0)
        return (real.cumsum(dim=1) - 1).where(real, -1)
    if ctx.static:  # slots not written yet come after every query
        return torch.arange(keys, device=ctx.q.device).expand(ctx.q.shape[0], -1)
    return None


def _options(ctx: AttentionContext, heads: Tensor) -> dict[str, Any]:
    sinks = None if ctx.sinks is None else ctx.sinks.index_select(0, heads)
    return dict(scale=ctx.scaling, softcap=ctx.softcap, sinks=sinks, dropout=ctx.dropout)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of `[B, heads, T, D]` row by row."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
