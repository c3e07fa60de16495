"""Gated attention: a sigmoid gate on the attention output, computed from the layer's input.

Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free (Qiu et al., 2025),
https://arxiv.org/abs/2505.06708

With x `[B, T, C]` the input of the attention module and o `[B, T, H, D]` the attention output:

    headwise      g = sigmoid(x Wg + bg)   Wg [H, C]       one factor a head and token
    elementwise   g = sigmoid(x Wg + bg)   Wg [H * D, C]   one factor an element
    out = o_proj(o * g)

Differs from the paper: there the gate is trained from scratch; here it is added to a pretrained model, so the
default initialisation leaves the model's function exactly as it was (2 * sigmoid with Wg = 0, bg = 0: the
factor is 1.0 in any dtype). That such a retrofit helps is not shown by the paper, and its authors report that
this initialisation barely moves in continued training: give the gate a 10 to 100 times larger learning rate
than the rest, and look at `patchattn.explain`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..method import Method, MethodConfig, register, runtime

if TYPE_CHECKING:
    from ..context import AttentionContext
    from ..sites import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "2sigmoid": lambda x: 2 * torch.sigmoid(x),
    "ns_sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x),
    "silu": functional.silu,
}
OPEN_BIAS = 5.0  # sigmoid(5) = 0.9933


@register("gated_attention")
class GatedAttention(Method):
    """A learned gate on each head's output, over any inner attention."""

    summary = "sigmoid output gates: fewer attention sinks, more non-linearity"
    paper = "Gated Attention for Large Language Models, arXiv 2505.06708"
    trained = True
    variants = ({"kind": "headwise"}, {"kind": "elementwise"})

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of the gate.

        Args:
            kind: "headwise" (one factor a head) or "elementwise" (one an element of the head).
            init: "identity" (the model unchanged), "open" (a bias that leaves 0.993 of it) or "random" (the
                paper's N(0, 0.02), which halves every head of a pretrained model).
            activation: "sigmoid" (the paper's), "2sigmoid", "ns_sigmoid" (0.5 to 1) or "silu"; "auto" is
                "2sigmoid" for the identity and "sigmoid" otherwise.
            shared: one gate for all heads instead of one each.
            static: a learned gate that does not look at the input, instead of x Wg.
            combine: "multiply" or "add", which adds the gate's value to the head ("auto" activation: "silu").
            bias: whether the gate has a bias.
            gate_penalty: weight, while training, of the mean gate: pushes gates to close.
        """

        kind: str = "headwise"
        init: str = "identity"
        activation: str = "auto"
        shared: bool = False
        static: bool = False
        combine: str = "multiply"
        bias: bool = True
        gate_penalty: float = runtime(0.0)

        INITS: ClassVar[tuple[str, ...]] = ("identity", "open", "random")

        def __post_init__(self) -> None:
            self._require_choice("kind", ("headwise", "elementwise"))
            self._require_choice("init", self.INITS)
            self._require_choice("activation", ("auto", *ACTIVATIONS))
            self._require_choice("combine", ("multiply", "add"))
            if self.init == "identity":
                neutral = "2sigmoid" if self.combine == "multiply" else "silu"
                value = (
                    "1 at 0, which multiplying needs" if self.combine == "multiply" else "0 at 0, which adding needs"
                )
                self._require(self.activation in ("auto", neutral), "activation",
                              f"{neutral!r} with init='identity', since no other is {value}")  # fmt: skip
            if self.init == "open":
                self._require(self.bias, "bias", "True with init='open', which lives in the bias")
                self._require(self.combine == "multiply", "combine", "'multiply' with init='open'")
                self._require(self.activation not in ("2sigmoid", "silu"), "activation",
                              "'sigmoid' or 'ns_sigmoid' with init='open'")  # fmt: skip
            if self.shared:
                self._require(self.kind == "elementwise", "kind", "'elementwise' with shared=True")
            self._require(self.gate_penalty >= 0, "gate_penalty", "0 or more")
            if self.static:
                self._require(self.bias, "bias", "True with static=True, whose gate is the bias alone")

        @property
        def activation_name(self) -> str:
            if self.activation != "auto":
                return self.activation
            if self.combine == "add":
                return "silu"
            return "2sigmoid" if self.init == "identity" else "sigmoid"

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        if not (site.heads and site.head_dim and site.hidden_size):
            return "its number of heads, head size or hidden size could not be read from the module"
        if site.pieces:
            return "one forward calls the attention several times, so its output does not belong to one input"
        return None

    def build(self, site: Site) -> None:
        config = self.config
        self.heads, self.head_dim = site.heads, site.head_dim
        self.rows = (1 if config.shared else self.heads) * (self.head_dim if config.kind == "elementwise" else 1)
        self.weight = None  # [rows, C], float32: steps near 1 are lost in bf16
        if not config.static:
            weight = torch.empty(self.rows, site.hidden_size, device=site.device)
            nn.init.normal_(weight, std=0.02) if config.init == "random" else nn.init.zeros_(weight)
            self.weight = nn.Parameter(weight)
        bias = torch.full((self.rows,), OPEN_BIAS if config.init == "open" else 0.0, device=site.device)
        self.bias = nn.Parameter(bias) if config.bias else None

    def gate(self, hidden_states: Tensor) -> Tensor:
        """The factor on the output: `[B, T, H or 1, D or 1]` in float32."""
        bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
        if self.weight is None:
            assert bias is not None
            logits = bias.expand(*hidden_states.shape[:2], -1)
        else:
            logits = functional.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)
        size = self.head_dim if self.config.kind == "elementwise" else 1
        logits = logits.reshape(*logits.shape[:2], -1, size)  # [B, T, H or 1, D or 1]
        return ACTIVATIONS[self.config.activation_name](logits.float())

    def forward(self, ctx: AttentionContext) -> Tensor:
        out = ctx.attend()  # [B, T, H, D]
        gate = self.gate(ctx.hidden_states)
        if not torch.compiler.is_compiling():
            self._last_gate = gate.detach()
        if self.training and self.config.gate_penalty:
            self.add_loss(gate=self.config.gate_penalty * gate.mean())
        mixed = out.float() * gate if self.config.combine == "multiply" else out.float() + gate
        return mixed.to(out.dtype)

    def report(self) -> dict[str, Any]:
        gate = self.__dict__.get("_last_gate")
        if gate is None:
            return {}
        return {
            "mean gate": round(gate.mean().item(), 4),
            "share below 0.1": round((gate < 0.1).float().mean().item(), 4),
        }


def split_official(
    q_proj: Tensor, heads: int, kv_heads: int, head_dim: int, layout: str = "grouped"
) -> tuple[Tensor, Tensor]:
    """Query rows and gate rows, in head order, of a q_proj that stores both.

    Args:
        q_proj: `[rows, C]` (or a bias `[rows]`).
        layout: "grouped", the paper's code (for each KV group its query rows, then its gate rows), or
            "per_head", transformers' Qwen3-Next (for each head its query rows, then its gate rows).
    """
    if layout not in ("grouped", "per_head"):
        raise ValueError(f"split_official: layout is {layout!r}; it must be 'grouped' or 'per_head'")
    parts = q_proj.unflatten(0, (kv_heads if layout == "grouped" else heads, -1))
    query_rows = head_dim * (heads // kv_heads if layout == "grouped" else 1)
    return parts[:, :query_rows].flatten(0, 1), parts[:, query_rows:].flatten(0, 1)
