"""SeerAttentionDecode: while text is generated, a small learned gate says for each token which blocks to read.

SeerAttention-R: Sparse Attention Adaptation for Long Reasoning (Gao et al., 2025), https://arxiv.org/abs/2506.08889

    Q_t        the raw query of token t: the sum over the heads of a group, each through a matrix of its own
    K_j        pools over the raw keys of block j, largest, smallest and mean, through a matrix
    score      rope(norm(Q_t)) . rope(norm(K_j)) / sqrt(G), for each KV head, at t and at the first position of j
    token t    reads the blocks within a budget of tokens, or whose softmax is above a threshold, and its own

All heads of a group read the same blocks. Prompts, and whatever comes several tokens at a time, read everything: see
SeerAttention, which may stand beside this on one model.

Differs from the published code: a block has the position of its first token, also if it was filled while decoding
(`gate_key_position="block_end"` is the published way); a block that is still growing takes no part in the choice, as in
training (`compat="reference"` lets it); the pools of the growing block are kept, not its keys; several rows with
padding, several turns and prompts shorter than a block work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..method import register, runtime
from ..seer import Call, Gate, GateConfig, Notes, group_mean, highest, names_of, normed, passing, whole_call

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..method import MethodConfig
    from ..sites import Site


@register("seer_attention_decode")
class SeerAttentionDecode(Gate):
    """Each generated token reads the blocks that a learned gate chooses for each group of heads."""

    summary = "generation over long texts: a distilled gate picks the blocks of the cache that each token reads"
    paper = "SeerAttention-R, arXiv 2506.08889"
    example: ClassVar[dict[str, Any]] = {"block": 4, "token_budget": None, "threshold": 0.0}

    @dataclass(frozen=True)
    class Config(GateConfig):
        """Settings of SeerAttentionDecode. Of `token_budget` and `threshold` give one; without, all is read.

        Args:
            block: tokens in a block.
            q_heads: how the queries of a group become one. "proj": through a matrix each, summed; "avg": their
                mean; "avgproj": the mean through a matrix.
            k_pool: what is known of the keys of a block: some of "max", "min", "avg".
            gate_dim: features of the gate; default: those of a head.
            qk_norm: norm queries and keys of the gate.
            rope: the model's rotary in the gate.
            init: of new gates. "normal": small random numbers, as published. "mean": the scores are those of mean
                queries and mean keys before training.
            token_budget: tokens that a token reads beside its own block, in whole blocks.
            threshold: read blocks with a larger softmax score than this.
            keep_first: the first block is always read; of a budget, it is part.
            gate_key_position: "block_start", or "block_end" for blocks that were filled while decoding, as published.
            start_layer: the layers before this one stay as they are.
            compat: "reference" lets the growing block take part in the choice, with a score of 0.
            untaught: share of the first tokens of a text that a gate is not taught on.
        """

        q_heads: str = "proj"
        qk_norm: bool = True
        token_budget: int | None = runtime(4096)
        threshold: float | None = runtime(None)
        keep_first: bool = runtime(True)
        gate_key_position: str = "block_start"
        start_layer: int = 0
        compat: str | None = None
        untaught: float = 0.5

        def __post_init__(self) -> None:
            super().__post_init__()
            self._require_choice("q_heads", ("proj", "avg", "avgproj"))
            self._require_bool("qk_norm", "rope", "keep_first")
            if self.q_heads == "avg":
                self._require(self.gate_dim is None, "gate_dim", 'None where q_heads is "avg"')
            if self.token_budget is not None:
                self._require_int("token_budget", 0)
                self._require(self.threshold is None, "token_budget", "None where threshold is given")
            if self.threshold is not None:
                self._require_share("threshold")
            self._require_choice("gate_key_position", ("block_start", "block_end"))
            self._require_int("start_layer", 0)
            self._require(self.compat in (None, "reference"), "compat", 'None or "reference"')
            self._require_share("untaught")
            self._require(self.untaught < 1, "untaught", "less than 1")

    config: Config
    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        assert isinstance(config, cls.Config)
        if site.layer_idx is not None and site.layer_idx < config.start_layer:
            return f"it is before start_layer = {config.start_layer}"
        return super().unfit(site, config)

    def build(self, site: Site) -> None:
        pools = names_of(self.config.k_pool)
        width, size, groups = site.head_dim, self.config.gate_dim or site.head_dim, site.kv_heads
        shapes = {"proj": (groups, site.heads // groups, width, size), "avg": None, "avgproj": (groups, width, size)}
        self._parameters_of(site, shapes[self.config.q_heads], (groups, len(pools) * width, size))
        for name in ("query_norm", "key_norm"):
            weight = nn.Parameter(torch.ones_like(self.key_weight[0, 0])) if self.config.qk_norm else None
            self.register_parameter(name, weight)
        self.groups = groups

    def active(self, ctx: AttentionContext) -> bool:
        chosen = self.config.token_budget is not None or self.config.threshold is not None
        return ctx.q.shape[2] == 1 and chosen and ctx.cache is not None

    # ---- the gate ----------------------------------------------------------------------------------------------

    def query_features(self, q: Tensor) -> Tensor:
        """Raw queries `[B, H, T, D]` to `[B, G, T, gate_dim]`, before the rotary."""
        if self.config.q_heads == "proj":
            grouped = q.float().unflatten(1, (self.groups, -1))
            assert self.query_weight is not None
            made = torch.einsum("bghtd,ghde->bgte", grouped, self.query_weight.float())
        else:
            made = group_mean(q, self.groups)
            made = made if self.query_weight is None else made @ self.query_weight.float()
        return normed(made, self.query_norm)

    def key_features(self, pooled: Tensor) -> Tensor:
        """Pools of keys `[B, G, M, pools * D]` to `[B, G, M, gate_dim]`, before the rotary."""
        return normed(self.keys_of(pooled), self.key_norm)

    def note(self, ctx: AttentionContext, call: Call, notes: Notes, blocks: int, static: bool) -> None:
        block, first = self.config.block, call.first_block(self.config.block)
        pools, count = call.pool(ctx.k, block, notes.open_keys)
        notes.carry("open_keys", pools.at(call.after // block - first), static)
        place = (first[:, None] + torch.arange(call.rows(block), device=first.device)) * block
        if self.config.gate_key_position == "block_end" and call.length == 1:
            place = call.before[:, None]  # of the token that fills the block
        features = pools.features(names_of(self.config.k_pool), count)[:, :, :-1]
        notes.write(self.turned(ctx, self.key_features(features), place), first, blocks)

    def choose(self, ctx: AttentionContext, call: Call, notes: Notes, keys: int) -> Tensor:
        assert notes.keys is not None
        block, at = self.config.block, call.place.clamp(min=0)  # [B or 1, 1]
        known = notes.keys[:, :, : min(-(-keys // block), notes.keys.shape[2] - 1)]
        mask, allowed = self.select(self.scores(ctx, known, at), at, self.config)
        self._remember(mask, allowed)
        return mask

    def scores(self, ctx: AttentionContext, known: Tensor, at: Tensor) -> Tensor:
        """Of tokens of rank `at`, in the blocks whose gate keys are `known` `[B, G, M, gate_dim]`."""
        queries = self.turned(ctx, self.query_features(ctx.q), at)
        return queries @ known.mT * queries.shape[-1] ** -0.5

    @staticmethod
    def select(scores: Tensor, at: Tensor, config: SeerAttentionDecode.Config) -> tuple[Tensor, Tensor]:
        """The blocks that tokens of rank `at` `[B or 1, T]` read, and those they might: `[B, G, T, M]`, as scores."""
        place, own = torch.arange(scores.shape[3], device=scores.device), (at // config.block)[:, None, :, None]
        always = (place == own) | ((place == 0) & config.keep_first)
        allowed = place <= own
        if config.compat == "reference":
            growing = (place == own) & ((at + 1) % config.block != 0)[:, None, :, None]
            candidates = scores.masked_fill(growing, 0.0).masked_fill(~allowed, -torch.inf)
        else:
            candidates = scores.masked_fill(place >= own, -torch.inf)
        if config.threshold is not None:
            mask = passing(candidates, config.threshold)
        elif config.token_budget is not None:
            if config.keep_first and config.compat is None:
                candidates = candidates.masked_fill((place == 0) & (own > 0), torch.inf)
            mask = highest(candidates, config.token_budget // config.block)
        else:
            mask = torch.ones_like(candidates, dtype=torch.bool)
        return (mask | always) & allowed, allowed

    # ---- training ----------------------------------------------------------------------------------------------

    def block_map(self, ctx: AttentionContext) -> tuple[Tensor, tuple[int, int]]:
        call, block = whole_call(ctx), self.config.block
        queries, rank = self._taught(ctx, call)
        pools, count = call.pool(ctx.k.detach(), block)
        features = pools.features(names_of(self.config.k_pool), count)[:, :, : -(-ctx.k.shape[2] // block)]
        place = torch.arange(features.shape[2], device=rank.device)
        keys = self.turned(ctx, self.key_features(features), place[None] * block)
        scores = self.turned(ctx, self.query_features(queries), rank[None]) @ keys.mT * keys.shape[-1] ** -0.5
        first = int(ctx.q.shape[2] * self.config.untaught)
        asked = (place < rank[:, None] // block) & (rank[:, None] >= first)  # a token knows its own block
        return scores.masked_fill(~asked, -torch.inf), (1, block)

    def _taught(self, ctx: AttentionContext, call: Call) -> tuple[Tensor, Tensor]:
        """The raw queries that are taught, by rank, and their ranks: without padding, only the later ones."""
        length = ctx.q.shape[2]
        if call.order is None:
            first = int(length * self.config.untaught)
            return ctx.q[:, :, first:].detach(), torch.arange(first, length, device=ctx.q.device)
        tokens, _ = call.cut(ctx.q.detach(), 1, length)
        return tokens.flatten(2, 3), torch.arange(length, device=ctx.q.device)

    def pooled_scores(self, ctx: AttentionContext, rows: int) -> Tensor:
        call = whole_call(ctx)
        pools, count = call.pool(ctx.k, self.config.block)
        keys = pools.features(("avg",), count)[:, :, : -(-ctx.k.shape[2] // self.config.block)]
        return group_mean(self._taught(ctx, call)[0], self.groups) @ keys.mT
