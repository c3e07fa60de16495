"""LAWCAT: normalised gated linear attention over queries and keys that a short convolution mixes across tokens.

LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution across Tokens for Long Context
Modeling (Liu et al., 2025), https://arxiv.org/abs/2509.18467

From a layer's input x_t, and its queries, keys and values before rotary, keys and values repeated to the query heads:

    phi_q, phi_k = phi(conv_q(q)), phi(conv_k(k))     phi(z) = [softmax(z M), softmax(-z M)], K features
    g_t = logsigmoid(W_up W_down x_t + b) / 16        a decay for each feature of each KV head
    S_t = exp(g_t) S_(t-1) + phi_k,t [v_t, 1]         (the last column is the normaliser)
    out_t = phi_q,t S_t, its columns divided by the last one

Nothing of it knows positions: order comes from the convolution and the decay. A softmax window over rotated queries and
keys may be set beside it; its tokens then count in both parts.

Differs from the published code: padding is left out of convolution, state and normaliser, the number of features is
free, it decodes without a convolution too, and nothing is kept but a state of constant size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchattn_kernels.linear import FeatureMap, causal_conv, linear, window_tokens

from ..method import Method, MethodConfig, register
from ..recurrent import RecurrentLayer, Tokens, rotated, unlike_features

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..sites import Site

GATE_STD = 0.006  # of the gate's weights before training
NEAR_TAP, OWN_TAP = 0.001, 1.0  # a convolution that begins by handing each token on


@register("lawcat")
class LAWCAT(Method):
    """Gated linear attention after a causal convolution over tokens."""

    summary = (
        "memory that does not grow with the context, without positions: gated linear attention after a convolution"
    )
    paper = "LAWCAT, arXiv 2509.18467"
    trained = True
    innermost = True
    rotary = "either"
    example = {"feature_dim": 3}  # noqa: RUF012

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of LAWCAT.

        Args:
            feature_dim: columns of the learned map, which makes twice as many features of them; None is half the head
                size.
            conv_size: tokens that the convolution reads, its own included; 0 for none.
            share_conv: one convolution for queries and keys.
            conv_activation: None or "silu", after the convolution.
            gate_rank: of the gate's weight; None for a whole matrix.
            gate_normalizer: what the logarithm of the decay is divided by: the larger, the longer the memory.
            gate_bias_init: the gate's bias before training; with 0 a memory halves in `gate_normalizer` tokens.
            tie_qk: one map for queries and keys.
            window: tokens read by softmax too, the query's own included; 0 for none.
            window_logit_init: the factor on the window before training.
            rotary: rotate queries and keys before the convolution, as the paper's ablation does.
        """

        feature_dim: int | None = None
        conv_size: int = 4
        share_conv: bool = False
        conv_activation: str | None = None
        gate_rank: int | None = 16
        gate_normalizer: float = 16.0
        gate_bias_init: float = 0.0
        tie_qk: bool = True
        window: int = 0
        window_logit_init: float = 0.5
        rotary: bool = False

        def __post_init__(self) -> None:
            for name in ("feature_dim", "gate_rank"):
                if getattr(self, name) is not None:
                    self._require_int(name, 1)
            self._require_int("conv_size", 0)
            self._require_int("window", 0)
            self._require(self.conv_activation in (None, "silu"), "conv_activation", "None or 'silu'")
            for name in ("share_conv", "tie_qk", "rotary"):
                self._require(isinstance(getattr(self, name), bool), name, "True or False")
            self._require(self.gate_normalizer > 0, "gate_normalizer", "more than 0")
            self._require(0 < self.window_logit_init < 1, "window_logit_init", "between 0 and 1")
            if self.conv_size == 0:
                self._require(not self.share_conv, "share_conv", "False where conv_size is 0")
                self._require(self.conv_activation is None, "conv_activation", "None where conv_size is 0")

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        if not site.causal:
            return "its attention is not causal, so there is no past to decay"
        if not (site.heads and site.kv_heads and site.head_dim and site.hidden_size):
            return "its number of heads, head size or hidden size could not be read from the module"
        if getattr(site.module, "qk_head_dim", site.head_dim) != site.head_dim:
            return "its keys are of another size than its values"
        return unlike_features(site) or site.cache_problem

    def build(self, site: Site) -> None:
        config, device = self.config, site.device
        self.heads, self.kv_heads, size = site.heads, site.kv_heads, site.head_dim
        self.features = 2 * (max(1, size // 2) if config.feature_dim is None else config.feature_dim)  # K

        def learned(*values: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.cat(values).to(device))

        identity = torch.eye(size, self.features // 2).expand(self.heads, -1, -1)  # [H, D, F]
        self.query_map, self.key_map = learned(identity), None if config.tie_qk else learned(identity)
        self.query_conv = self.key_conv = None
        if config.conv_size:
            taps = torch.full((self.heads * size, config.conv_size), NEAR_TAP)  # [H * D, W]
            taps[:, -1] = OWN_TAP
            self.query_conv, self.key_conv = learned(taps), None if config.share_conv else learned(taps)
        rows, rank = self.kv_heads * self.features, config.gate_rank
        self.gate_down = None if rank is None else learned(torch.randn(rank, site.hidden_size) * GATE_STD)  # [R, C]
        self.gate_up = learned(torch.randn(rows, site.hidden_size if rank is None else rank) * GATE_STD)  # [G * K, R]
        self.gate_bias = learned(torch.full((rows,), float(config.gate_bias_init)))  # [G * K]
        self.window_logit = None
        if config.window:
            start = math.log(config.window_logit_init / (1 - config.window_logit_init))
            self.window_logit = learned(torch.full((self.heads,), start))  # [H]

    def cache_layer(self, static_length: int | None) -> RecurrentLayer:
        return RecurrentLayer(window_tokens(self.config.window), static_length)

    def forward(self, ctx: AttentionContext) -> Tensor:
        if ctx.dropout:
            raise ValueError(f"LAWCAT: in training this model drops attention weights (dropout {ctx.dropout}), which "
                             "linear attention does not; call model.eval() or set attention_dropout to 0")  # fmt: skip
        tokens, cache, config = Tokens(ctx, "LAWCAT"), ctx.cache, self.config
        assert cache is None or isinstance(cache, RecurrentLayer)
        rank = tokens.rank()
        turned = rotated(ctx, tokens, cache) if config.rotary or config.window else (ctx.q, ctx.k)
        q, k = turned if config.rotary else (ctx.q, ctx.k)
        q, k, before = self._mixed(tokens.sorted(q), tokens.sorted(k), rank, cache)
        v, gate = tokens.sorted(ctx.v), tokens.sorted(self.log_decay(ctx.hidden_states))
        if rank is not None:
            gate = gate.masked_fill((rank < 0)[:, None, :, None], 0.0)
        options = self._options(ctx)
        window_q, keys = (tokens.sorted(x) for x in turned)  # what a window reads
        if cache is not None:
            options |= dict(state=cache.state, past=None if rank is None else cache.count)
            keys, v, rank = cache.joined(keys, v, tokens)
        if config.window:
            options |= dict(window=config.window, overlap=True, window_q=window_q, window_k=keys)
        out, state = linear(q, k, v, gate=gate, rank=rank, **options)
        if cache is not None:
            cache.keep(state, keys, v, tokens, before)
        return tokens.unsorted(out).transpose(1, 2)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """The logarithm of each token's decay for each feature, `[B, G, T, K]`, in float32."""
        x = hidden_states.float()
        if self.gate_down is not None:
            x = functional.linear(x, self.gate_down.float())
        gate = functional.linear(x, self.gate_up.float(), self.gate_bias.float())
        gate = functional.logsigmoid(gate) / self.config.gate_normalizer
        return gate.unflatten(-1, (self.kv_heads, self.features)).transpose(1, 2)

    def _mixed(
        self, q: Tensor, k: Tensor, rank: Tensor | None, cache: RecurrentLayer | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys after the convolution, `[B, H, T, D]` each, and what the next call's goes on from."""
        if self.query_conv is None:
            return q, k, None
        key_conv = self.query_conv if self.key_conv is None else self.key_conv
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        x = torch.cat([q, k], dim=1).transpose(1, 2).flatten(2)  # [B, T, 2 H * D]
        weight = torch.cat([self.query_conv, key_conv])
        if cache is None or cache.before is None:
            x, before = causal_conv(x, weight, rank=rank)
        else:
            x, earlier = cache.after_earlier(x, rank)
            x, before = causal_conv(x, weight, state=earlier)
        if self.config.conv_activation == "silu":
            x = functional.silu(x)
        q, k = x.unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        return q, k, before

    def _options(self, ctx: AttentionContext) -> dict[str, Any]:
        """What `linear` takes beside the tokens."""
        gamma = None if self.window_logit is None else self.window_logit.float().sigmoid()
        k_map = None if self.key_map is None else FeatureMap("softmax", self.key_map)
        return dict(
            q_map=FeatureMap("softmax", self.query_map), k_map=k_map, window_factor=gamma, scale=ctx.scaling,
            feature_scale=self.features**-0.5, eps=1e-10,
        )  # fmt: skip

    def report(self) -> dict[str, Any]:
        """The mean decay of a token whose input the gate ignores."""
        decay = (functional.logsigmoid(self.gate_bias.detach().float()) / self.config.gate_normalizer).exp()
        return {"decay by the bias": round(decay.mean().item(), 4)}
