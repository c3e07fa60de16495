"""LongHeads: every head of every token picks the chunks it reads, laid side by side within the trained length.

LongHeads: Multi-Head Attention is Secretly a Long Context Processor (Lu et al., 2024),
https://arxiv.org/abs/2402.10685

Keys are cut into chunks. Each complete chunk gets one key of its own for each head, gathered from the chunk by
attention inside it. A token reads the first chunk, its own and the one before, and those between whose chunk keys match
its query best; their keys take the places just before it, so that no distance exceeds `window`, however long the text.
Nothing is trained.

Differs from the published code: a token of the prompt reads its own key (`include_self`), prompt and decoding follow
one rule (`compat="reference"` is the published decoding), so that the result does not depend on how a prompt is cut;
chunks are counted from each row's first real token; chunks of the future are never read, whatever `begin` is; KV heads
are shared; only the queries of the last two chunks are kept. `chunk_key="bounds"` chooses by Quest's bounds on the keys
of a chunk (Tang et al., 2024, https://arxiv.org/abs/2406.10774) instead.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchattn_kernels.chunk_select import (
    chunk_attention,
    complete_bounds,
    complete_chunks,
    select_by_bounds,
    select_chunks,
)

from ..cache import PatchCacheLayer
from ..method import Method, MethodConfig, register

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..sites import Site


@register("longheads")
class LongHeads(Method):
    """Each head reads the chunks of the past that match its query, at distances the model was trained on."""

    summary = "texts far beyond the trained length: each head picks the chunks it reads"
    paper = "LongHeads, arXiv 2402.10685"
    rotary = "raw"
    innermost = True
    example = {"chunk": 2, "window": 8}  # noqa: RUF012

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of LongHeads.

        Args:
            chunk: tokens in a chunk.
            window: keys that a token reads at most, and the largest distance: a multiple of `chunk`, at least four
                of them, and no longer than the model was trained on.
            begin: from this many tokens on chunks are chosen, before it all are read; a multiple of `chunk`.
                Default: `window`.
            chunk_key: what a query is compared with to choose chunks. "attention": one key for each head, gathered
                from the chunk by attention inside it. "bounds": what no key of the chunk exceeds, feature by feature;
                no chunk is missed for its other tokens, which tells small chunks apart best.
            include_self: a token reads its own key, too. The published code leaves it out where it chooses chunks in
                a prompt, and reads it in decoding.
            compat: "reference" decodes as the published code does: a token that completes its chunk reads one chosen
                chunk less. Then decoding differs a little from what the prompt gives.
            offload: keep keys and values in the main memory, and fetch the chunks that are read.
        """

        chunk: int = 256
        window: int = 4096
        begin: int | None = None
        chunk_key: str = "attention"
        include_self: bool = True
        compat: str | None = None
        offload: bool = False

        def __post_init__(self) -> None:
            self._require_int("chunk", 1)
            self._require_int("window", 1)
            self._require(
                self.window % self.chunk == 0 and self.window >= 4 * self.chunk, "window",
                f"a multiple of chunk = {self.chunk}, at least four of them: the first, one of its own choice, the "
                "last but one and the current",
            )  # fmt: skip
            if self.begin is not None:
                self._require_int("begin", 1)
                self._require(self.begin % self.chunk == 0, "begin", f"a multiple of chunk = {self.chunk}")
            self._require_choice("chunk_key", ("attention", "bounds"))
            self._require(self.compat in (None, "reference"), "compat", 'None or "reference"')
            self._require(isinstance(self.include_self, bool), "include_self", "True or False")
            self._require(isinstance(self.offload, bool), "offload", "True or False")

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        if not site.causal:
            return "its attention is not causal, so there is no past to choose from"
        if site.window is not None:
            return f"this layer already has a sliding window of {site.window} tokens"
        if not site.kv_heads:
            return "its number of KV heads could not be read from the module"
        if site.position_bias:
            return "it adds a position bias to the scores, which knows the keys by their true distance"
        return site.cache_problem

    def build(self, site: Site) -> None:
        trained = getattr(site.config, "max_position_embeddings", None)
        inspected = site.device.type == "meta"
        if isinstance(trained, int) and self.config.window > trained and site.order == 0 and not inspected:
            warnings.warn(
                f"LongHeads: window is {self.config.window}, but {site.name} has max_position_embeddings = {trained}; "
                "distances the model was not trained on are what LongHeads avoids, so choose a window within it",
                stacklevel=2,
            )
        self.chunks = self.config.window // self.config.chunk
        self.begin = self.config.window if self.config.begin is None else self.config.begin
        self.selected: Tensor | None = None  # [B, H, n], the chunks that the last token of the last call read

    def cache_layer(self, static_length: int | None) -> ChunkLayer:
        bounds = self.config.chunk_key == "bounds"
        return ChunkLayer(self.config.chunk, self.config.offload, bounds, static_length)

    def forward(self, ctx: AttentionContext) -> Tensor:
        if ctx.dropout:
            raise ValueError(f"LongHeads: in training this model drops attention weights (dropout {ctx.dropout}), "
                             "which is not done with chosen chunks; call model.eval() or set attention_dropout "
                             "to 0")  # fmt: skip
        chunk, length = self.config.chunk, ctx.q.shape[2]
        all_read = ctx.past_length is not None and not ctx.static and ctx.past_length == 0 and length <= self.begin
        self.selected = None
        if all_read and ctx.cache is None:
            return ctx.attend()
        if ctx.mask.dense is not None and length > 1 and not all_read:
            raise ValueError(f"LongHeads: the model drew a mask of its own over {length} tokens (packed sequences, a "
                             f"bidirectional prefix), which only prompts of up to begin = {self.begin} tokens may "
                             "have")  # fmt: skip
        cache = self.cache_layer(None) if ctx.cache is None else ctx.cache
        assert isinstance(cache, ChunkLayer)
        place = cache.places(ctx.q, ctx.real)  # [B, T], -1 for padding
        inside = place % chunk
        q, k = ctx.rotate(ctx.q, inside), ctx.rotate(ctx.k, inside)
        cache.write(q, k, ctx.v, place, ctx.scaling)
        if all_read:
            return ctx.attend()
        shift = int(self.config.compat == "reference" and length == 1)  # decoding, as published
        current = torch.where(place >= 0, (place + shift) // chunk, -1)
        if shift:
            q = ctx.rotate(ctx.q, place - current * chunk)
        last = place if self.config.include_self or length == 1 else torch.where(place >= self.begin, place - 1, place)
        opened = (last - current * chunk + 1).clamp(min=0)
        cos, sin = ctx.turns(torch.arange(max(self.chunks, self.begin // chunk), device=q.device) * chunk)
        cos, sin = cos / cos[:1], sin / cos[:1]  # the rotary's own scale (YaRN) is in q already
        select = select_by_bounds if cache.bounds else select_chunks
        chosen = select(ctx.q, cache.chunk_keys, current, chunks=self.chunks, dense=self.begin // chunk)
        self.selected = chosen[:, :, -1].clone()
        keys, values, chosen = cache.fetch(chosen)
        out = chunk_attention(
            q, ctx.turned(q), keys, values, cos, sin, chosen, opened,
            chunk=chunk, scale=ctx.scaling, softcap=ctx.softcap, sinks=ctx.sinks,
        )  # fmt: skip
        return out.transpose(1, 2)

    def report(self) -> dict[str, Any]:
        if self.selected is None:
            return {"read by the last token": "all tokens"}
        counts = (self.selected >= 0).sum(dim=-1)
        return {"read by the last token": f"{int(counts.max())} chunks of {self.config.chunk} tokens a head"}


class ChunkLayer(PatchCacheLayer):
    """Keys rotated by their place in their chunk, values, a key for each complete chunk, and the latest queries.

    Every row holds its real tokens from the first slot on, so that a chunk has the same place in each row. One slot
    more, the last, takes what is padding. Of the latest two chunks the queries are kept as a ring, unless keys are
    chosen by bounds: a chunk needs them when it is complete, and tokens may be given back.

    Attributes:
        kept_keys, kept_values: `[B, G, slots + 1, D]`, in the main memory if offloaded.
        chunk_keys: `[B, H, slots / chunk, D]`, or the bounds `[B, G, slots / chunk, 2 * D]`.
        recent_queries: `[B, H, 2 * chunk + 1, D]`; recent_keys and recent_values likewise, only if offloaded.
        count: `[B]`, real tokens of each row; reached: `[B]`, the most there ever were.
    """

    tensors = ("kept_keys", "kept_values", "chunk_keys", "recent_queries", "recent_keys", "recent_values", "count",
               "reached")  # fmt: skip
    kept_keys: Any
    kept_values: Any
    chunk_keys: Any
    recent_queries: Any
    recent_keys: Any
    recent_values: Any
    count: Any
    reached: Any

    def __init__(self, chunk: int, offload: bool, bounds: bool, static_length: int | None = None) -> None:
        super().__init__(static_length)
        self.chunk, self.offloaded, self.bounds = chunk, offload, bounds
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.written = 0  # tokens a row, padding counted; a static cache counts in tensors alone
        self.aligned = self.static_length is None  # every row holds `written` real tokens

    def places(self, q: Tensor, real: Tensor | None) -> Tensor:
        """The place of each new token among the real tokens of its row, `[B, T]`; -1 for padding."""
        rows, length = q.shape[0], q.shape[2]
        if self.count is None:
            self.count = torch.zeros(rows, dtype=torch.long, device=q.device)
            self.reached = torch.zeros_like(self.count)
        if real is None:
            return self.count[:, None] + torch.arange(length, device=q.device)
        self.aligned = False
        return torch.where(real, self.count[:, None] + real.long().cumsum(dim=1) - 1, -1)

    def write(self, q: Tensor, k: Tensor, v: Tensor, place: Tensor, scale: float | None) -> None:
        """Take up new tokens, rotated by their place in their chunk, and make keys for the chunks they complete."""
        after = torch.maximum(self.count, place.amax(dim=1) + 1)
        self._reserve(q, k, v)
        for kept, x in ((self.kept_keys, k), (self.kept_values, v)):
            if self.aligned:
                kept[:, :, self.written : self.written + x.shape[2]] = x
            else:
                _put(kept, x, _slots(place, kept))
        keys = self._recent("recent_keys", k, place, after) if self.offloaded else self.kept_keys
        if self.bounds:
            complete_bounds(self.chunk_keys, keys, self.count, after, chunk=self.chunk)
        else:
            queries = self._recent("recent_queries", q, place, after)
            values = self._recent("recent_values", v, place, after) if self.offloaded else self.kept_values
            complete_chunks(self.chunk_keys, queries, keys, values, self.count, after, chunk=self.chunk, scale=scale)
        self.written += k.shape[2]
        self._put("count", after)
        self._put("reached", torch.maximum(self.reached, after))

    def _reserve(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Room for the new tokens, in whole chunks; a cache that grows gets some more, so that it is seldom copied."""
        needed = self.written + k.shape[2] if self.static_length is None else self.static_length
        slots = 0 if self.kept_keys is None else self.kept_keys.shape[2] - 1
        if needed <= slots:
            return
        chunks = -(-(needed + (needed // 128 if slots else 0)) // self.chunk)
        for name, x in (("kept_keys", k), ("kept_values", v)):
            where = "cpu" if self.offloaded else x.device
            new = torch.zeros(*x.shape[:2], chunks * self.chunk + 1, x.shape[3], dtype=x.dtype, device=where,
                              pin_memory=self.offloaded and x.is_cuda)  # fmt: skip
            if slots:
                new[:, :, :slots] = getattr(self, name)[:, :, :slots]
            setattr(self, name, new)
        like, size = (k, 2 * k.shape[3]) if self.bounds else (q, q.shape[3])
        new = like.new_zeros(*like.shape[:2], chunks, size)
        if slots:
            new[:, :, : slots // self.chunk] = self.chunk_keys
        self.chunk_keys = new

    def _recent(self, name: str, x: Tensor, place: Tensor, after: Tensor) -> Tensor:
        """Keep the latest of a tensor in its ring; gives a ring that holds them and all new ones."""
        x, ring = x.detach(), getattr(self, name)
        if ring is None:
            ring = x.new_zeros(*x.shape[:2], 2 * self.chunk + 1, x.shape[3])
            setattr(self, name, ring)
        if x.shape[2] == 1:
            _put(ring, x, _slots(place, ring))
            return ring
        slots = -(-x.shape[2] // self.chunk) * self.chunk + 2 * self.chunk
        longer = x.new_zeros(*x.shape[:2], slots + 1, x.shape[3])
        _put(longer, ring[:, :, :-1], _slots(self._held(self.count), longer))
        _put(longer, x, _slots(place, longer))
        index = _slots(self._held(after), longer)[:, None, :, None]
        ring[:, :, :-1] = longer.gather(2, index.expand(*x.shape[:2], -1, x.shape[3]))
        return longer

    def _held(self, count: Tensor) -> Tensor:
        """Which token each slot of a ring holds after `count` tokens: `[B, 2 * chunk]`, negative for none."""
        last = count[:, None] - 1
        return last - (last - torch.arange(2 * self.chunk, device=count.device)) % (2 * self.chunk)

    def fetch(self, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and where among them the selected chunks are: all that is kept, or what is read of it."""
        if not self.offloaded:
            return self.kept_keys[:, :, :-1], self.kept_values[:, :, :-1], selected
        (rows, groups), stored = self.kept_keys.shape[:2], self.kept_keys.shape[2] // self.chunk
        chosen = selected.long().where(selected >= 0, stored).clamp(max=stored).reshape(rows, groups, -1)
        read = torch.zeros(rows, groups, stored + 1, dtype=torch.bool, device=selected.device).scatter_(2, chosen, True)
        read[..., stored] = False
        most = int(read.sum(dim=-1).max())
        new = torch.where(read, read.cumsum(dim=-1) - 1, most).gather(2, chosen).view_as(selected)
        order = (~read).byte().argsort(dim=-1, stable=True)[..., :most].to(self.kept_keys.device)
        row, group = torch.arange(rows)[:, None, None], torch.arange(groups)[:, None]
        keys, values = (
            x[:, :, :-1].unflatten(2, (stored, self.chunk))[row, group, order].flatten(2, 3).to(selected.device)
            for x in (self.kept_keys, self.kept_values)
        )
        return keys, values, new.where(selected >= 0, -1).int()

    def prefetch(self) -> None:
        keys, values = self.kept_keys, self.kept_values
        super().prefetch()
        if self.offloaded:
            self.kept_keys, self.kept_values = keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Give tokens back: at least a chunk, and any number where all that chunk keys are made of is at hand."""
        removed = self._given_back(tokens_to_remove)
        if removed == 0:
            return
        if self.count is not None:
            count = (self.count - removed).clamp(min=0)
            opened = count // self.chunk * self.chunk  # from here on chunk keys are made again
            latest = self.offloaded or not self.bounds
            if latest and bool((opened < self.reached - 2 * self.chunk).any()):
                raise RuntimeError(
                    f"cannot give back {removed} tokens: LongHeads keeps what chunk keys are made of for the latest "
                    f"two chunks, so it can give back {self.chunk} tokens, one chunk; use a larger chunk, or decode "
                    "without an assistant"
                )
            self.count = count
        self.seen -= removed
        self.written -= removed


def _slots(place: Tensor, ring: Tensor) -> Tensor:
    """The slot of each token in `[B, heads, slots + 1, D]`; the last one for what has no place."""
    slots = ring.shape[2] - 1
    return torch.where(place >= 0, place % slots, slots)


def _put(ring: Tensor, x: Tensor, slots: Tensor) -> None:
    index = slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    ring.scatter_(2, index.to(ring.device), x.to(ring.device))
