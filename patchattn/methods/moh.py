"""MoH: each token uses some of the heads; a router says which, and how much each of them counts.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024), https://arxiv.org/abs/2410.11842

The output of attention is a sum over heads of o_i Wo_i. MoH gives each head a weight that depends on the token and is
zero for most of the routed heads. The first `shared` heads are always on, of the other E the best `top_k`:

    router="linear"      p   = softmax(x Wr)                                 x [B, T, C], the layer's input
                         r_i = k p_i / sum of p over the chosen k            0 where not chosen
                         u   = s softmax(x Ws)                               s shared heads; 1 for a single one
                         a   = 2 softmax(x Wt)                               a factor for each of the two kinds
                         g   = [a_0 u, a_1 r]                                without either kind: no a

    router="query_norm"  p   = softmax(|q_i| / std over the routed heads)    no parameters, for pretrained models
                         g   = 1 for shared and chosen heads, else 0         p carries the gradient, and the balance

    out = o_proj(o * g)

A router that knows nothing (Wr = Ws = Wt = 0) gives every head that is on the weight 1, so a pretrained model keeps its
scale. Keys and values of all heads are computed and cached for every token.

Differs from the published code: only chosen pairs of a token and a head are computed, where nothing but the model's own
attention is below; |q| is taken before a norm of the queries, which would level it; the router computes in float32;
ties of an untrained router are decided by |q|; padding does not count in the load balance; training is there for the
parameter-free router, too (`ste`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchattn_kernels.routed import routed

from ..method import Method, MethodConfig, register, runtime

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..masks import Mask
    from ..sites import Site

QUERY_PROJECTIONS = ("q_proj", "query", "to_q", "q_b_proj", "q_lin")
EPSILON = 1e-12
FEW = 16  # tokens of a call


@register("moh")
class MoH(Method):
    """A router picks the heads of each token, over any inner attention."""

    summary = "each token uses some of the heads: less attention to compute"
    paper = "MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842"
    trained = True
    chooses = True
    variants = ({"router": "query_norm"}, {"router": "linear"})

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of MoH.

        Args:
            shared: heads that are always on, the first of each layer: a share of the heads (0.5), a number of them (8),
                or a list with an entry for each layer patched.
            active: share of the heads that are on, shared ones included; rounded to whole heads. Default: 0.75.
            top_k: instead of `active`: how many routed heads are on, a number or a list as for `shared`.
            router: "query_norm" (no parameters) or "linear" (learned).
            route: "head", or "kv_group": the heads that share a KV head are on or off together, so that decoding does
                not read the keys of the others.
            init: of the learned router: "zero", which leaves the weights of a pretrained model's heads at 1, or
                "random" (the paper's for training from scratch, a truncated normal of 0.02).
            ste: which routed heads the parameter-free router learns from: "full" (all, as published, so that training
                computes all of them), "selected" (the chosen) or "none".
            balance: weight, while training, of the load-balance loss.
            least_keys: with fewer keys than this, or eight times as many for fewer than 16 tokens at a time, every head
                is computed and weighted after, which is faster there.
            extra: share of the other routed heads that are on as well, chosen next; a training that ramps it from 1 to
                0 begins with all heads.
        """

        shared: Any = 0.5
        active: float | None = None
        top_k: Any = None
        router: str = "query_norm"
        route: str = "head"
        init: str = "zero"
        ste: str = "full"
        balance: float = runtime(0.01)
        least_keys: int = runtime(512)
        extra: float = runtime(0.0)

        SHARE: ClassVar[float] = 0.75

        def __post_init__(self) -> None:
            self._require_choice("router", ("query_norm", "linear"))
            self._require_choice("route", ("head", "kv_group"))
            self._require_choice("init", ("zero", "random"))
            self._require_choice("ste", ("full", "selected", "none"))
            for name in ("shared", "top_k"):
                value = getattr(self, name)
                if isinstance(value, (list, tuple)):
                    object.__setattr__(self, name, list(value))
                shares = "a share of the heads from 0 to 1, " if name == "shared" else ""
                good = value is None and name == "top_k"
                good = good or (isinstance(value, float) and name == "shared" and 0 <= value <= 1)
                counts = value if isinstance(value, (list, tuple)) else [value]
                good = good or (bool(counts) and all(_count(count) for count in counts))
                self._require(good, name, f"{shares}a number of heads, or a list of such numbers, one a layer")
            if self.active is not None:
                self._require(self.top_k is None, "active", "left out where top_k is given")
                self._require(_number(self.active) and 0 < self.active <= 1, "active", "more than 0 and at most 1")
            self._require(_number(self.balance) and self.balance >= 0, "balance", "0 or more")
            self._require_int("least_keys", 0)
            self._require(_number(self.extra) and 0 <= self.extra <= 1, "extra", "from 0 to 1")

        def resolve(self, sites: Sequence[Site], total_layers: int) -> MethodConfig:
            for name in ("shared", "top_k"):
                value = getattr(self, name)
                if isinstance(value, list) and len(value) != len(sites):
                    raise ValueError(f"MoH: {name} has {len(value)} entries; it must have {len(sites)}, one for each "
                                     "layer patched")  # fmt: skip
            for order, site in enumerate(sites):
                self.counts(site, order)
            return self

        def part(self, places: Sequence[int]) -> MethodConfig:
            lists = {name: value for name in ("shared", "top_k") if isinstance(value := getattr(self, name), list)}
            return self.replace(**{name: [value[place] for place in places] for name, value in lists.items()})

        def counts(self, site: Site, order: int) -> tuple[int, int]:
            """How many heads of the `order`-th layer patched are shared, and how many routed ones are on."""
            heads, unit = site.heads, site.heads // site.kv_heads if self.route == "kv_group" else 1
            if isinstance(self.shared, float):
                shared = _rounded(self.shared, heads, unit)
            else:
                shared = self.shared[order] if isinstance(self.shared, list) else self.shared
            if self.top_k is None:
                active = self.SHARE if self.active is None else self.active
                on = _rounded(active, heads, unit)
                top_k = on - shared
                if shared < heads and top_k < 1:
                    raise ValueError(
                        f"MoH: active is {active}, which is {on} of the {heads} heads of {site.name}; with {shared} "
                        "shared ones that leaves no routed head; raise active, lower shared, or give top_k"
                    )
            else:
                top_k = self.top_k[order] if isinstance(self.top_k, list) else self.top_k
            if shared + max(top_k, 0) > heads:
                raise ValueError(
                    f"MoH: shared is {shared} and top_k is {top_k} for {site.name}; it has {heads} heads, so together "
                    f"they must be at most {heads}"
                )
            if shared % unit or top_k % unit:
                raise ValueError(
                    f"MoH: shared is {shared} and top_k is {top_k} for {site.name}; with route='kv_group' both must be "
                    f"multiples of {unit}, the heads that share a KV head there"
                )
            return shared, max(top_k, 0)

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        assert isinstance(config, cls.Config)
        if not (site.heads and site.head_dim):
            return "its number of heads or its head size could not be read from the module"
        if site.pieces:
            return "one forward calls the attention several times, so its output does not belong to one input"
        if config.route == "kv_group" and not site.kv_heads:
            return "its number of KV heads could not be read from the module"
        if config.router == "linear":
            return None if site.hidden_size else "its hidden size could not be read from the module"
        if _normalises_queries(site) and _query_projection(site) is None:
            return ("it normalises its queries, and no projection gives the queries alone, so router='query_norm' "
                    "cannot see their norms; use router='linear'")  # fmt: skip
        return None

    def build(self, site: Site) -> None:
        self.heads, self.group = site.heads, site.heads // max(1, site.kv_heads)
        self.shared, self.top_k = self.config.counts(site, site.order)
        self.routed = self.heads - self.shared
        # Rotation keeps norms, so q will do where the module does not normalise it.
        self.projection = _query_projection(site) if _normalises_queries(site) else None
        self.needs = frozenset() if self.projection is None else frozenset({self.projection})
        self.sees_norms = self.projection is not None or not _normalises_queries(site)
        learned = self.config.router == "linear"
        routes = learned and self.top_k > 0
        self.routed_weight = self._weight(self.routed if routes else 0, site)  # Wr [E, C]
        self.shared_weight = self._weight(self.shared if learned and self.shared > 1 else 0, site)  # Ws [s, C]
        self.kind_weight = self._weight(2 if routes and self.shared else 0, site)  # Wt [2, C]

    def _weight(self, rows: int, site: Site) -> nn.Parameter | None:
        if not rows:
            return None
        weight = torch.zeros(rows, site.hidden_size, device=site.device)  # float32: top-k of bf16 scores ties often
        if self.config.init == "random":
            nn.init.trunc_normal_(weight, std=0.02)
        return nn.Parameter(weight)

    # ---- the router ----------------------------------------------------------------------------------------

    def forward(self, ctx: AttentionContext) -> Tensor:
        gates = self.gates(ctx)  # [B, T, H]
        # Where the router learns from heads that were not chosen, their outputs are needed.
        all_learn = gates.requires_grad and self.config.router == "query_norm" and self.config.ste == "full"
        reason = "for the gradient of the router" if all_learn else self._dense_because(ctx)
        if not torch.compiler.is_compiling():
            self._dense_reason = reason
        if reason is None:
            return self._chosen_pairs(ctx, gates)
        out = ctx.attend()  # [B, T, H, D]
        mixed = (out.float() * gates[..., None]).to(out.dtype)
        return mixed if all_learn else mixed.masked_fill((gates == 0)[..., None], 0)  # whatever stands there

    def _chosen_pairs(self, ctx: AttentionContext, gates: Tensor) -> Tensor:
        mask = ctx.mask
        starts = None if mask.padding is None else mask.padding.int().argmax(dim=-1)
        out = routed(ctx.q, ctx.k, ctx.v, gates.transpose(1, 2), causal=mask.causal, starts=starts, scale=ctx.scaling,
                     softcap=ctx.softcap, sinks=ctx.sinks)  # fmt: skip
        return out.transpose(1, 2)

    def _dense_because(self, ctx: AttentionContext) -> str | None:
        """Why every pair is computed in this call, or None if the chosen ones are."""
        if self.on == self.routed:
            return "all heads are on"
        queries, keys, mask = ctx.q.shape[2], ctx.k.shape[2], ctx.mask
        least = self.config.least_keys * (8 if queries < FEW else 1)
        if keys < least:
            return f"fewer than {least} keys"
        if not ctx.innermost:
            return "another method is below"
        if ctx.attachment.base == "eager":
            return "eager attention was asked for"
        if ctx.attachment.raw or ctx.dropout or ctx.kwargs.get("position_bias") is not None:
            return "rotary, dropout or a position bias is applied below"
        if ctx.v.shape[-1] != ctx.q.shape[-1]:
            return "values have another size than keys"
        if ctx.static or mask.dense is not None or (mask.window is not None and keys >= mask.window):
            return "a static cache, a window or a mask that the model draws"
        return None if mask.padding is None else _unlike_left_padding(mask)

    def gates(self, ctx: AttentionContext) -> Tensor:
        """The weight of each head's output, 0 where it is off: `[B, T, H]`, float32."""
        with torch.autocast(ctx.q.device.type, enabled=False):
            gates = self._linear(ctx) if self.config.router == "linear" else self._by_norms(ctx)
        if not torch.compiler.is_compiling():
            self._load = _mean((gates.detach() != 0).float(), _real_tokens(ctx))
        return gates

    @property
    def on(self) -> int:
        """How many routed heads are on, `extra` included."""
        if not self.top_k:
            return 0
        unit = self.group if self.config.route == "kv_group" else 1
        return self.top_k + unit * round(self.config.extra * (self.routed - self.top_k) / unit)

    def norms(self, ctx: AttentionContext) -> Tensor:
        """|q| of the routed heads, before any norm of the queries: `[B, T, E]`, float32."""
        if self.projection is None:
            q = ctx.q[:, self.shared :].transpose(1, 2)
        else:
            q = ctx.projected(self.projection).unflatten(-1, (self.heads, -1))[:, :, self.shared :]
        return torch.linalg.vector_norm(q.float(), dim=-1)

    @staticmethod
    def probabilities(norms: Tensor) -> Tensor:
        """The softmax over the routed heads of their norms, divided by the standard deviation: `[B, T, E]`."""
        if norms.shape[-1] == 1:  # one value has no deviation, and equal ones have none either
            return torch.ones_like(norms)
        return (norms / norms.var(dim=-1, keepdim=True).clamp_min(EPSILON).sqrt()).softmax(dim=-1)

    def _by_norms(self, ctx: AttentionContext) -> Tensor:
        norms = self.norms(ctx)
        shared = norms.new_ones(*norms.shape[:2], self.shared)
        if not (self.top_k and self.routed):
            return torch.cat([shared, torch.zeros_like(norms)], dim=-1)
        p = self.probabilities(norms)
        chosen = self._chosen(norms.detach())
        self._note_balance(ctx, p, chosen)
        routed = chosen.to(p.dtype)
        if p.requires_grad and self.config.ste != "none":
            passed = p - p.detach()  # 0, with the gradient of p
            routed = routed + (passed if self.config.ste == "full" else passed * routed)
        return torch.cat([shared, routed], dim=-1)

    def _linear(self, ctx: AttentionContext) -> Tensor:
        x = ctx.hidden_states.float()
        if self.shared_weight is None:
            shared = x.new_ones(*x.shape[:2], self.shared)
        else:
            shared = self.shared * functional.linear(x, self.shared_weight.float()).softmax(dim=-1)
        if self.routed_weight is None:
            return torch.cat([shared, x.new_zeros(*x.shape[:2], self.routed)], dim=-1)
        p = functional.linear(x, self.routed_weight.float()).softmax(dim=-1)
        chosen = self._chosen(p.detach(), self.norms(ctx).detach() if self.sees_norms else None)
        self._note_balance(ctx, p, chosen)
        kept = p.masked_fill(~chosen, 0)
        routed = self.on * kept / kept.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).eps)
        if self.kind_weight is None:
            return routed
        kinds = 2 * functional.linear(x, self.kind_weight.float()).softmax(dim=-1)
        return torch.cat([kinds[..., :1] * shared, kinds[..., 1:] * routed], dim=-1)

    def _chosen(self, scores: Tensor, ties: Tensor | None = None) -> Tensor:
        """The routed heads that are on, by score, then by `ties`, then the first: boolean `[B, T, E]`."""
        unit = self.group if self.config.route == "kv_group" else 1
        order = None
        for values in (ties, scores):  # the last to be sorted by comes first in the order
            if values is None:
                continue
            values = values.unflatten(-1, (-1, unit)).sum(dim=-1)
            if order is None:
                order = values.argsort(dim=-1, descending=True, stable=True)
            else:
                order = order.gather(-1, values.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        assert order is not None
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., : self.on // unit], True)
        return chosen.repeat_interleave(unit, dim=-1)

    def _note_balance(self, ctx: AttentionContext, p: Tensor, chosen: Tensor) -> None:
        if self.training and self.config.balance and p.requires_grad:
            self.add_loss(balance=self.config.balance * load_balance(p, chosen, _real_tokens(ctx)))

    def report(self) -> dict[str, Any]:
        load = self.__dict__.get("_load")
        if load is None:
            return {}
        on = f"{load.mean().item():.1%}"
        computed = on if self._dense_reason is None else f"100%, {self._dense_reason}"
        return {"heads on": on, "pairs computed": computed, "load": [round(share, 3) for share in load.tolist()]}


def load_balance(p: Tensor, chosen: Tensor, real: Tensor | None = None) -> Tensor:
    """E sum_i P_i f_i: P mean probability, f share of the tokens that chose i. At perfect balance it is top_k.

    Args:
        p, chosen: `[B, T, E]`.
        real: `[B, T]`, False for padding.
    """
    return p.shape[-1] * (_mean(p, real) * _mean(chosen.to(p.dtype), real)).sum()


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of `[B, T, E]` over the real tokens: `[E]`."""
    if real is None:
        return values.mean(dim=(0, 1))
    kept = real[..., None].to(values.dtype)
    return (values * kept).sum(dim=(0, 1)) / kept.sum().clamp_min(1)


def _real_tokens(ctx: AttentionContext) -> Tensor | None:
    """`[B, T]`, False for padding; None where all tokens of this call count."""
    mask = ctx.mask
    if mask.dense is not None or mask.padding is None or ctx.past_length is None:
        return None
    return mask.key_padding(ctx.q.shape[2], ctx.past_length)


def _unlike_left_padding(mask: Mask) -> str | None:
    """Why the padding cannot be said by the place of each row's first real token, or None."""
    assert mask.padding is not None
    if not mask.causal:
        return "padding in attention that is not causal"
    if torch.compiler.is_compiling():
        return "padding in a compiled graph, which cannot look at it"
    ends = mask.padding[:, :-1] & ~mask.padding[:, 1:]  # after the last real token keys may be missing: none reads them
    return "padding between the tokens of a row" if bool((ends.sum(dim=-1) + mask.padding[:, -1] > 1).any()) else None


def _query_projection(site: Site) -> str | None:
    """The projection whose output is q of all heads and nothing else, or None."""
    if hasattr(site.module, "add_q_proj"):  # q of the text is projected elsewhere
        return None
    width = site.heads * getattr(site.module, "qk_head_dim", site.head_dim)
    for name in QUERY_PROJECTIONS:
        if getattr(getattr(site.module, name, None), "out_features", None) == width:
            return name
    return None


def _normalises_queries(site: Site) -> bool:
    return any("norm" in name or name in ("q_ln", "ln_q") for name, _ in site.module.named_children())


def _rounded(share: float, heads: int, unit: int) -> int:
    """A share of the heads as whole units of heads."""
    return unit * math.floor(share * heads / unit + 0.5)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
