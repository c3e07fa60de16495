"""SeerAttention: a small learned gate says for each block of a prompt which blocks before it are worth reading.

SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (Gao et al., 2024), https://arxiv.org/abs/2410.13276

    Q_i, K_j   pools over the raw queries and keys of block i, j: largest, smallest and mean, feature by feature
    score      rope(Q_i Wq) . rope(K_j Wk) / sqrt(G), for each query head, at the first positions of the blocks
    block i    reads the blocks j whose score is among the highest, or whose softmax is above a threshold

The gate alone is taught, what to foresee is the largest attention weight in each block of the model's own attention.
Tokens that come one at a time read everything: see SeerAttentionDecode.

Differs from the published code: a block reads itself and the first one unless told otherwise, and no row of blocks
stays empty; blocks are counted from each row's first real token; a prompt may come in several calls, and a block that
began in an earlier call goes on; the rotary of the gate has the gate's own width; the loss is a mean over rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..method import register, runtime
from ..seer import Call, Gate, GateConfig, Notes, blocks_for, highest, most_blocks_for, names_of, passing, whole_call

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..sites import Site

# Tokens below which even a tenth of the blocks takes longer than all of them, on one layer with its gate, choice and
# projections: `evals/benchmarks/seer_attention.py`. A device that is not here was not measured.
FASTER_FROM = {"cpu": 4096}


@register("seer_attention")
class SeerAttention(Gate):
    """Each block of a prompt reads the blocks that a learned gate chooses for each head."""

    summary = "long prompts in a fraction of the time: a distilled gate picks the blocks of keys to read"
    paper = "SeerAttention, arXiv 2410.13276"
    example: ClassVar[dict[str, Any]] = {"block": 4, "threshold": 0.0, "dense_below": 0}

    @dataclass(frozen=True)
    class Config(GateConfig):
        """Settings of SeerAttention. Of `threshold`, `density` and `top_k_blocks` give one; without, all is read.

        Args:
            block: tokens in a block.
            q_pool, k_pool: what is known of the queries and keys of a block: some of "max", "min", "avg".
            gate_dim: features of the gate; default: those of a head.
            double: a matrix for queries, too, where one pool and the default `gate_dim` do without.
            rope: the model's rotary in the gate, at the first position of each block.
            init: of new gates. "normal": small random numbers, as published. "mean": the scores are those of mean
                queries and mean keys before training, which teaches the gate in fewer steps.
            threshold: read blocks with a larger softmax score than this.
            density: read this share of all blocks, the same number for each row of blocks.
            top_k_blocks: read so many blocks.
            last_block_dense: the last two blocks of queries of a call read all, as the question in a prompt should.
            keep_diagonal, keep_first: a block always reads itself and the first one; of a number of blocks, they are
                part.
            dense_below: texts of fewer tokens are read whole by the model's own attention; None: what is faster, as
                measured for the device (`FASTER_FROM`).
            untaught: share of the first blocks of queries, which read nearly all, that a gate is not taught on.
        """

        q_pool: str = "avg"
        double: bool = False
        threshold: float | None = runtime(None)
        density: float | None = runtime(None)
        top_k_blocks: int | None = runtime(None)
        last_block_dense: bool = runtime(True)
        keep_diagonal: bool = runtime(True)
        keep_first: bool = runtime(True)
        dense_below: int | None = runtime(None)
        untaught: float = 0.25

        def __post_init__(self) -> None:
            super().__post_init__()
            self._require_bool("double", "rope", "last_block_dense", "keep_diagonal", "keep_first")
            given = [name for name in ("threshold", "density", "top_k_blocks") if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"SeerAttention: {given[0]} is {getattr(self, given[0])} and {given[1]} "
                                 f"{getattr(self, given[1])}; give one of them, and None for the other")  # fmt: skip
            if self.threshold is not None:
                self._require_share("threshold")
            if self.density is not None:
                self._require_share("density", zero=False)
            if self.top_k_blocks is not None:
                self._require_int("top_k_blocks", 1)
            if self.dense_below is not None:
                self._require_int("dense_below", 0)
            self._require_share("untaught")
            self._require(self.untaught < 1, "untaught", "less than 1")

        @property
        def dense(self) -> bool:
            return self.threshold is None and self.density is None and self.top_k_blocks is None

    config: Config

    def build(self, site: Site) -> None:
        queries, keys = names_of(self.config.q_pool), names_of(self.config.k_pool)
        width, size = site.head_dim, self.config.gate_dim or site.head_dim
        single = len(queries) == 1 and size == width and not self.config.double
        self._parameters_of(
            site,
            None if single else (site.heads, len(queries) * width, size),
            (site.heads if single else site.kv_heads, len(keys) * width, size),
        )
        self.groups = site.heads // site.kv_heads
        self.queries: Tensor | None = None  # pools of the queries of the call that goes on
        self.short: tuple[int, int] | None = None  # tokens of the last prompt, where they were too few, and how few

    def active(self, ctx: AttentionContext) -> bool:
        length, past = ctx.q.shape[2], ctx.past_length if isinstance(ctx.past_length, int) else 0
        if length == 1 or self.config.dense:
            return False
        shortest = self.config.dense_below
        if shortest is None:
            shortest = FASTER_FROM.get(ctx.q.device.type, 0)
        short = past + length < shortest
        if not torch.compiler.is_compiling():
            self.short = (past + length, shortest) if short else None
        return not short

    def report(self) -> dict[str, Any]:
        if self.short is None:
            return super().report()
        return {"blocks read": "all, {:,} tokens are fewer than dense_below = {:,}".format(*self.short)}

    # ---- the gate ----------------------------------------------------------------------------------------------

    def query_features(self, pooled: Tensor) -> Tensor:
        """Pools of queries `[B, H, N, pools * D]` to `[B, H, N, G]`."""
        return pooled if self.query_weight is None else pooled @ self.query_weight.float()

    def key_features(self, pooled: Tensor) -> Tensor:
        """Pools of keys `[B, G, M, pools * D]` to `[B, H, M, G]`."""
        if self.query_weight is None:  # a matrix for each query head
            return self.keys_of(pooled.repeat_interleave(self.groups, dim=1))
        return self.keys_of(pooled).repeat_interleave(self.groups, dim=1)

    def note(self, ctx: AttentionContext, call: Call, notes: Notes, blocks: int, static: bool) -> None:
        block, first = self.config.block, call.first_block(self.config.block)
        place = first[:, None] + torch.arange(call.rows(block), device=first.device)
        latest = (call.after // block) - first
        for name, x in (("open_queries", ctx.q), ("open_keys", ctx.k)):
            pools, count = call.pool(x, block, getattr(notes, name))
            notes.carry(name, pools.at(latest), static)
            names = names_of(self.config.q_pool if name == "open_queries" else self.config.k_pool)
            features = pools.features(names, count)[:, :, :-1]
            if name == "open_queries":
                self.queries = features
            else:
                notes.write(self.turned(ctx, self.key_features(features), place * block), first, blocks)
        if not static:
            notes.remember(ctx.q, call, block)

    def choose(self, ctx: AttentionContext, call: Call, notes: Notes, keys: int) -> Tensor:
        assert notes.keys is not None
        block = self.config.block
        known = notes.keys[:, :, : min(-(-keys // block), notes.keys.shape[2] - 1)]
        row = call.first_block(block)[:, None] + torch.arange(call.rows(block), device=known.device)  # [B or 1, N]
        mask, allowed = self.select(self.scores(ctx, known, row), row, -(-call.after // block), self.config)
        self.queries = None
        self._remember(mask, allowed)
        return mask

    def scores(self, ctx: AttentionContext, known: Tensor, row: Tensor) -> Tensor:
        """Of the queries of this call, in the blocks `row`, with the gate keys `known` `[B, H, M, G]`."""
        assert self.queries is not None
        queries = self.turned(ctx, self.query_features(self.queries), row * self.config.block)
        return queries @ known.mT * queries.shape[-1] ** -0.5

    @staticmethod
    def select(scores: Tensor, row: Tensor, blocks: Tensor, config: SeerAttention.Config) -> tuple[Tensor, Tensor]:
        """The blocks to read, and those that might be: `[B, H, N, M]`.

        Args:
            row: `[B or 1, N]`, which blocks the queries are of.
            blocks: `[B or 1]`, how many blocks each row of the batch has.
        """
        place = torch.arange(scores.shape[3], device=scores.device)
        diagonal = (place == row[:, :, None])[:, None]
        allowed = ((place <= row[:, :, None]) & (row < blocks[:, None])[:, :, None])[:, None]
        always = (diagonal & config.keep_diagonal) | ((place == 0) & config.keep_first)
        scores = scores.masked_fill(~allowed, -torch.inf)
        if config.threshold is not None:
            mask = passing(scores, config.threshold)
        elif config.density is not None or config.top_k_blocks is not None:
            most: Any = config.top_k_blocks
            limit = None
            if config.density is not None:
                most = blocks_for(config.density, blocks)[:, None, None, None]
                limit = most_blocks_for(config.density, scores.shape[3])
            mask = highest(scores.masked_fill(always & allowed, torch.inf), most, limit)
        else:
            mask = torch.ones_like(scores, dtype=torch.bool)
        if config.last_block_dense:
            mask = mask | (row >= blocks[:, None] - 2)[:, None, :, None]
        mask = (mask | always) & allowed
        return mask | (diagonal & allowed & ~mask.any(dim=-1, keepdim=True)), allowed

    # ---- training ----------------------------------------------------------------------------------------------

    def block_map(self, ctx: AttentionContext) -> tuple[Tensor, int]:
        call, block = whole_call(ctx), self.config.block
        blocks, pooled = -(-call.length // block), []
        for x, names in ((ctx.q, self.config.q_pool), (ctx.k, self.config.k_pool)):
            pools, count = call.pool(x.detach(), block)
            pooled.append(pools.features(names_of(names), count)[:, :, :blocks])
        row = torch.arange(blocks, device=ctx.q.device)
        queries = self.turned(ctx, self.query_features(pooled[0]), row[None] * block)
        keys = self.turned(ctx, self.key_features(pooled[1]), row[None] * block)
        scores = queries @ keys.mT * queries.shape[-1] ** -0.5
        first = int(blocks * self.config.untaught)
        asked = (row <= row[:, None]) & (row[:, None] >= first)  # [N, N]
        return scores.masked_fill(~asked, -torch.inf), block

    def pooled_scores(self, ctx: AttentionContext, rows: int) -> Tensor:
        call, block = whole_call(ctx), self.config.block
        means = [pools.features(("avg",), count)[:, :, :rows]
                 for pools, count in (call.pool(x, block) for x in (ctx.q, ctx.k))]  # fmt: skip
        return means[0] @ means[1].repeat_interleave(self.groups, dim=1).mT
