"""Hedgehog: linear attention whose learned features mimic softmax, alone or beside a softmax window.

The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (Zhang et al., 2024),
https://arxiv.org/abs/2402.04347, for the feature map; LoLCATs: On Low-Rank Linearizing of Large Language Models
(Zhang et al., 2024), https://arxiv.org/abs/2410.10254, for the window and the training.

With x `[D]` a rotated query or key of a head, W `[D, F]` its learned map, s_tj the scaled scores, W(t) the last
`window` tokens up to t and L(t) all before:

    phi(x) = [softmax(x W), softmax(-x W)]
    weight(t, j) = gamma exp(s_tj - max_W s)   for j in W(t)
                 = phi_q(q_t) . phi_k(k_j)     for j in L(t)
    out_t = sum_j weight(t, j) v_j / sum_j weight(t, j)          gamma = sigmoid(window_logit), one a head

What lies before the window is held by a state of constant size. Bidirectional models get the pure form (`window=0`).

Differs from the published code: padding is left out of state and window, a prompt in several calls gives what one call
gives, blocks of a terraced window are counted from the start of a text and decoded as they were trained, and states are
kept in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchattn_kernels.linear import FeatureMap, linear, linear_weights, window_tokens

from ..method import Method, MethodConfig, register, runtime
from ..recurrent import RecurrentLayer, Tokens, rotated, unlike_features

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..sites import Site

FEATURE_MAPS = ("softmax", "softmax_half", "exp", "exp_half", "relu", "elu", "taylor")
LARGEST_LOGIT = 10.0  # beyond it a window or what lies before it would be lost to rounding


@register("hedgehog")
class Hedgehog(Method):
    """Linear attention with learned features, beside softmax over the most recent tokens."""

    summary = "memory that does not grow with the context: learned linear attention beside a softmax window"
    paper = "The Hedgehog & the Porcupine, arXiv 2402.04347; LoLCATs, arXiv 2410.10254"
    trained = True
    innermost = True
    rotary = "either"
    transfer_kinds = ("output", "map")
    variants = ({"window": 64}, {"window": 0})
    example = {"window": 5, "feature_dim": 6}  # noqa: RUF012

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of Hedgehog.

        Args:
            window: tokens read by softmax, the query's own included; 0 for linear attention alone.
            window_kind: "sliding" (the last `window` tokens) or "terraced" (the query's block of `window` tokens up to
                itself, and the whole block before).
            feature_dim: F, columns of the learned map; None is half the head size. "softmax" and "exp" make 2 F
                features of them, "taylor" 1 + F + F^2.
            feature_map: "softmax", "softmax_half" (without the negated half), "exp", "exp_half", "relu" (T2R's, with a
                bias), "elu" (elu + 1) or "taylor" (Based's).
            skip: the map is added to the query or key itself; needs `feature_dim` to be the head size.
            tie_qk: one map for queries and keys.
            share_kv_map: one map of keys for each KV head instead of each query head, which makes the state smaller by
                as much; not published.
            window_logit_init: the window's factor gamma before training.
            affine: weigh what lies before the window with 1 - gamma instead of 1.
            use_linear: whether what lies before the window is read at all; False shows what the window does alone.
        """

        window: int = 64
        window_kind: str = "sliding"
        feature_dim: int | None = None
        feature_map: str = "softmax"
        skip: bool = False
        tie_qk: bool = False
        share_kv_map: bool = False
        window_logit_init: float = 0.1
        affine: bool = False
        use_linear: bool = runtime(True)

        def __post_init__(self) -> None:
            self._require_int("window", 0)
            self._require_choice("window_kind", ("sliding", "terraced"))
            self._require_choice("feature_map", FEATURE_MAPS)
            if self.feature_dim is not None:
                self._require_int("feature_dim", 1)
            for name in ("skip", "tie_qk", "share_kv_map", "affine", "use_linear"):
                self._require(isinstance(getattr(self, name), bool), name, "True or False")
            self._require(0 < self.window_logit_init < 1, "window_logit_init", "between 0 and 1")
            if self.tie_qk:
                self._require(not self.share_kv_map, "share_kv_map", "False where tie_qk is True: queries have a map "
                              "for each of their heads")  # fmt: skip
            if self.window == 0:
                self._require(self.use_linear, "use_linear", "True where window is 0, which reads nothing else")
                self._require(not self.affine, "affine", "False where window is 0: there is nothing to mix with")

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        assert isinstance(config, Hedgehog.Config)
        if not (site.heads and site.kv_heads and site.head_dim):
            return "its number of heads or its head size could not be read from the module"
        if why := unlike_features(site):
            return why
        if config.skip and (config.feature_dim or _key_size(site) // 2) != _key_size(site):
            return f"with skip=True its feature_dim must be its head size, {_key_size(site)}"
        if not site.causal:
            if config.window:
                return "its attention is not causal, so there is no window of recent tokens; use window=0"
            return None
        return site.cache_problem

    def build(self, site: Site) -> None:
        config, size = self.config, _key_size(site)
        features = max(1, size // 2) if config.feature_dim is None else config.feature_dim
        self.causal = site.causal

        def learned(heads: int) -> nn.Parameter:
            start = torch.zeros(size, features) if config.skip else torch.eye(size, features)
            return nn.Parameter(start.to(site.device).expand(heads, -1, -1).clone())  # [H, D, F]

        def bias(heads: int) -> nn.Parameter | None:
            return (
                nn.Parameter(torch.zeros(heads, features, device=site.device)) if config.feature_map == "relu" else None
            )

        key_heads = site.kv_heads if config.share_kv_map else site.heads
        self.query_map, self.query_bias = learned(site.heads), bias(site.heads)
        self.key_map = None if config.tie_qk else learned(key_heads)
        self.key_bias = None if config.tie_qk else bias(key_heads)
        self.window_logit = None
        if config.window:
            start = math.log(config.window_logit_init / (1 - config.window_logit_init))
            self.window_logit = nn.Parameter(torch.full((site.heads,), start, device=site.device))  # [H]

    def cache_layer(self, static_length: int | None) -> RecurrentLayer | None:
        if not self.causal:
            return None
        window, kind = self.config.window, self.config.window_kind
        return RecurrentLayer(window_tokens(window, kind), static_length, block=window if kind == "terraced" else 0)

    def forward(self, ctx: AttentionContext) -> Tensor:
        if ctx.dropout:
            raise ValueError(f"Hedgehog: in training this model drops attention weights (dropout {ctx.dropout}), which "
                             "linear attention does not; call model.eval() or set attention_dropout to 0")  # fmt: skip
        if not self.causal:
            out, _ = linear(*ctx.scored(), ctx.v, rank=_key_padding(ctx), **self._options(ctx))
            return out.transpose(1, 2)
        tokens, cache = Tokens(ctx, "Hedgehog"), ctx.cache
        assert cache is None or isinstance(cache, RecurrentLayer)
        q, k, v = (tokens.sorted(x) for x in (*rotated(ctx, tokens, cache), ctx.v))
        if cache is None:
            out, _ = linear(q, k, v, rank=tokens.rank(), **self._options(ctx))
        else:
            k, v, rank = cache.joined(k, v, tokens)
            out, state = linear(q, k, v, rank=rank, state=cache.state, **self._options(ctx))
            cache.keep(state, k, v, tokens)
        return tokens.unsorted(out).transpose(1, 2)

    def window_factor(self) -> Tensor | None:
        """gamma, `[H]`; None where there is no window."""
        logit = self.window_logit
        return None if logit is None else logit.float().clamp(-LARGEST_LOGIT, LARGEST_LOGIT).sigmoid()

    def _options(self, ctx: AttentionContext) -> dict[str, Any]:
        """What `linear` takes beside the tokens."""
        config, gamma = self.config, self.window_factor()
        q_map = FeatureMap(config.feature_map, self.query_map, self.query_bias, config.skip)
        k_map = q_map if self.key_map is None else q_map._replace(weight=self.key_map, bias=self.key_bias)
        linear_factor = None
        if gamma is not None and config.affine:
            linear_factor = 1 - gamma
        if gamma is not None and not config.use_linear:
            linear_factor = torch.zeros_like(gamma)
        return dict(
            q_map=q_map, k_map=k_map, window=config.window, window_kind=config.window_kind, window_factor=gamma,
            linear_factor=linear_factor, scale=ctx.scaling, causal=self.causal,
        )  # fmt: skip

    # ---- training --------------------------------------------------------------------------------------------------

    def attention_map(self, ctx: AttentionContext, first: int, last: int) -> Tensor:
        window, behind = self._weights(ctx, last)
        return functional.pad((window + behind)[:, :, first:], (0, ctx.k.shape[2] - window.shape[-1]))

    def diagnostics(self, ctx: AttentionContext) -> dict[str, Tensor]:
        """The share of attention on what lies before the window."""
        share, rank = self.linear_share(ctx), self._rank(ctx)
        return {"linear share": share.mean() if rank is None else share[rank >= 0].mean()}

    def linear_share(self, ctx: AttentionContext) -> Tensor:
        """The share of each token's attention on what lies before the window, `[B, T]`."""
        _, behind = self._weights(ctx, ctx.q.shape[2])
        return behind.sum(dim=-1).mean(dim=1)

    def _weights(self, ctx: AttentionContext, last: int) -> tuple[Tensor, Tensor]:
        """Weights by softmax and by features of the first `last` queries of a whole text, `[B, H, last, S]` each."""
        keys = last if self.causal else ctx.k.shape[2]
        q, k = rotated(ctx, Tokens(ctx, "Hedgehog"), None) if self.causal else ctx.scored()
        rank = self._rank(ctx)
        rank = None if rank is None else rank[:, :keys]
        return linear_weights(q[:, :, :last], k[:, :, :keys], ctx.v[:, :, :keys], rank=rank, **self._options(ctx))

    def _rank(self, ctx: AttentionContext) -> Tensor | None:
        """`[B, S]`, the place of each token of a whole text in its row; negative for padding, None if there is none."""
        if not self.causal:
            return _key_padding(ctx)
        real = Tokens(ctx, "Hedgehog").real
        return None if real is None else torch.where(real, real.long().cumsum(dim=1) - 1, -1)

    def report(self) -> dict[str, Any]:
        gamma = self.window_factor()
        if gamma is None:
            return {"window": "none"}
        return {"window": self.config.window, "mean window factor": round(gamma.mean().item(), 4)}


def _key_size(site: Site) -> int:
    """The size of a key's head, which may differ from a value's (`site.head_dim`)."""
    return getattr(site.module, "qk_head_dim", None) or site.head_dim


def _key_padding(ctx: AttentionContext) -> Tensor | None:
    """For attention that is not causal: `[B, S]`, negative for padding, or None."""
    mask = ctx.mask
    if mask.dense is not None:
        if mask.dense.shape[2] > 1:
            raise ValueError("Hedgehog: the model drew a mask of its own over its tokens, which sums over all of them "
                             "cannot follow; pass a 2-D padding mask or none")  # fmt: skip
        return mask.dense[:, 0, 0].long().expand(ctx.q.shape[0], -1) - 1
    return None if mask.padding is None else mask.key_padding(ctx.k.shape[2], ctx.key_offset).long() - 1
