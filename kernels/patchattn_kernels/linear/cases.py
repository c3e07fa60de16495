"""What the check asks of `linear`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..check import Case
from . import FeatureMap, features, linear


@dataclass(frozen=True)
class Sizes:
    """One call; `padding` of each row, how the sequence is cut into calls, and what else is special."""

    batch: int
    heads: int
    groups: int
    length: int
    size: int
    feature_map: str = "softmax"
    features: int | None = None  # columns of the maps' weights; None: no weights
    window: int = 0
    window_kind: str = "sliding"
    overlap: bool = False
    gate: int | None = None  # how many decays a token has; 1 is a scalar
    padding: tuple[int, ...] = ()
    normalise: bool = True
    causal: bool = True
    shared: bool = False  # a map for keys that the query heads of a group share
    skip: bool = False  # with a bias

    @property
    def label(self) -> str:
        said = {name: value for name, value in asdict(self).items() if value not in ((), None, False, 0)}
        said |= {name: False for name in ("normalise", "causal") if not getattr(self, name)}
        defaults = {"window_kind": "sliding", "normalise": True, "causal": True}
        return " ".join(f"{name}={value}" for name, value in said.items() if defaults.get(name) != value)

    def tensors(self, generator: torch.Generator) -> dict[str, Any]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        made: dict[str, Any] = {
            name: randn(self.batch, heads, self.length, self.size)
            for name, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups))
        }
        for name, heads in (("q_weight", self.heads), ("k_weight", self.groups if self.shared else self.heads)):
            mapped = self.features is not None
            made[name] = randn(heads, self.size, self.features or 0) * self.size**-0.5 if mapped else None
        made["bias"] = randn(self.heads, self.features or 0) if self.skip else None
        pads = torch.tensor(self.padding or (0,) * self.batch, device=generator.device)
        made["rank"] = (torch.arange(self.length, device=generator.device)[None] - pads[:, None]).clamp(min=-1)
        made["factor"] = torch.rand(self.heads, generator=generator, device=generator.device) if self.window else None
        gate = None
        if self.gate is not None:
            gate = -randn(self.batch, self.groups, self.length, self.gate).abs() / 4
            gate[:, :, self.length // 2] = -12.0  # nearly a reset, whose inverse overflows after a few
        made["gate"] = gate
        return made

    def formula(
        self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, bias: Tensor | None,
        rank: Tensor, factor: Tensor | None, gate: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """All pairs at once, spelled out; in 16 bits features and weights are rounded before they are multiplied."""
        k, v = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        q_map, k_map = self.maps(q_weight, k_weight, bias)
        phi_q, phi_k = features(q, q_map).to(q.dtype).to(wide), features(k, k_map).to(q.dtype).to(wide)
        phi_k = phi_k * (rank >= 0)[:, None, :, None]
        query, key = rank[:, None, :, None], rank[:, None, None]
        real = (key >= 0) & ((query >= 0) | (not self.causal))
        start = query - self.window + 1
        if self.window_kind == "terraced":
            start = self.window * (query.div(self.window, rounding_mode="floor") - 1)
        near = real & (key <= query) & (key >= start) if self.window else torch.zeros_like(real)
        far = real & ((key <= query) | (not self.causal))
        if not self.overlap:
            far = far & ~near
        products = phi_q[:, :, :, None] * phi_k[:, :, None]  # [B, H, T, S, K]
        late = phi_k
        if gate is not None:
            gate = gate.to(wide).masked_fill((rank < 0)[:, None, :, None], 0.0)
            gate = gate.repeat_interleave(self.heads // self.groups, dim=1)
            between = gate.cumsum(2)[:, :, :, None] - gate.cumsum(2)[:, :, None]
            products = products * between.masked_fill(~far[..., None], -torch.inf).exp()
            late = phi_k * (gate.sum(2, keepdim=True) - gate.cumsum(2)).exp()
        weights = products.sum(-1).masked_fill(~far, 0.0)
        if factor is not None:
            scores = (q.to(wide) @ k.to(wide).mT * self.size**-0.5).masked_fill(~near, -torch.inf)
            shift = scores.amax(-1, keepdim=True)
            shift = shift.masked_fill(shift == -torch.inf, 0.0)
            weights = weights + (scores - shift).exp() * factor.to(wide)[:, None, None]
        total = weights.sum(-1, keepdim=True) + 1e-12 if self.normalise else 1.0
        out = weights.to(q.dtype).to(wide) @ v.to(wide) / total
        # What a later token reads linearly: all but the window that it would have.
        following = rank[:, -1:] + 1
        first = following - self.window + 1
        if self.window_kind == "terraced":
            first = self.window * (following.div(self.window, rounding_mode="floor") - 1)
        gone = rank < first if self.window and not self.overlap else rank >= 0
        late = late * gone[:, None, :, None]
        state = late.mT @ torch.cat([v.to(wide), torch.ones_like(v[..., :1], dtype=wide)], dim=-1)
        shared = self.features is None or self.shared  # the query heads of a group have one state
        return out.to(q.dtype), state[:, :: self.heads // self.groups] if shared else state

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, bias: Tensor | None,
        rank: Tensor, factor: Tensor | None, gate: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q_map, k_map = self.maps(q_weight, k_weight, bias)
        return linear(
            q, k, v, q_map=q_map, k_map=k_map, rank=rank if self.padding else None, window=self.window,
            window_kind=self.window_kind, window_factor=factor, overlap=self.overlap, gate=gate,
            normalise=self.normalise, causal=self.causal,
        )  # fmt: skip

    def maps(
        self, q_weight: Tensor | None, k_weight: Tensor | None, bias: Tensor | None
    ) -> tuple[FeatureMap, FeatureMap]:
        return FeatureMap(self.feature_map, q_weight, bias, self.skip), FeatureMap(self.feature_map, k_weight)

    @property
    def backends(self) -> tuple[str, ...]:
        behind = self.window and self.gate and not self.overlap
        in_triton = not behind and self.feature_map != "taylor"
        return ("torch", "triton") if in_triton else ("torch",)

    def case(self) -> Case:
        given = {"q_weight": self.features, "k_weight": self.features, "bias": self.skip or None,
                 "factor": self.window or None, "gate": self.gate}  # fmt: skip
        trained = ("q", "k", "v", *(name for name, there in given.items() if there is not None))
        return Case(self.label, self.tensors, self.run, self.formula, trained, self.backends)


SIZES = (
    Sizes(1, 4, 2, 37, 16, features=8),
    Sizes(1, 2, 1, 37, 16, features=8, padding=(4,), window=9),
    Sizes(1, 3, 3, 20, 8, features=12, window=5),
    Sizes(1, 2, 1, 37, 16, features=8, padding=(3,), window=7, window_kind="terraced"),
    Sizes(2, 2, 1, 20, 16, features=8, padding=(0, 3), gate=16),
    Sizes(1, 2, 2, 20, 16, features=8, gate=16, window=6, overlap=True),
    Sizes(1, 2, 1, 50, 16, "identity", gate=1, normalise=False),
    Sizes(1, 2, 2, 45, 16, "exp", 8, window=16, gate=1),
    Sizes(1, 2, 1, 33, 8, "taylor"),
    Sizes(1, 2, 2, 20, 16, "exp", 8),
    Sizes(1, 2, 1, 33, 16, "exp_half", 8, window=9),
    Sizes(1, 2, 2, 20, 16, "softmax_half", 12, padding=(4,)),
    Sizes(1, 2, 2, 20, 16, "elu"),
    Sizes(1, 2, 2, 20, 16, "relu", 16, skip=True),
    Sizes(1, 4, 2, 20, 16, features=8, shared=True, gate=1),
    Sizes(1, 4, 2, 20, 16, features=8, padding=(5,), causal=False),
)
CASES = tuple(sizes.case() for sizes in SIZES)
