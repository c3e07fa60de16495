"""What the gates of GatedAttention do: how far they are closed, and what is left of the attention sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .context import first_token_mass
from .living import watching

if TYPE_CHECKING:
    from .context import AttentionContext


@dataclass(frozen=True)
class GateStats:
    """Means over the tokens of a batch, each `[layers, H]`.

    Attributes:
        gate: the factor on the output (headwise), or its mean over the head's elements.
        closed: share of gate values below 0.1.
        sink: softmax weight on the first token.
        gated_sink: the same times the gate: what reaches the output.
    """

    gate: Tensor
    closed: Tensor
    sink: Tensor
    gated_sink: Tensor


@torch.no_grad()
def gate_stats(model: nn.Module, **inputs: Any) -> GateStats:
    """Run a gated model once on `inputs` and measure its gates, and the attention on the first token with and without.

    The first token itself, which can read nothing else, is left out.
    """
    noted: list[tuple[Tensor, ...]] = []

    def watch(ctx: AttentionContext) -> Tensor:
        gated: list[Any] = [method for method in ctx.attachment.methods if method.name == "gated_attention"]
        if not gated:
            return ctx.attend()
        (method,) = gated
        gate = method.gate(ctx.hidden_states).expand(-1, -1, ctx.q.shape[1], -1)[:, 1:]  # [B, T - 1, H, 1 or D]
        sink = first_token_mass(ctx)[:, :, 1:].transpose(1, 2)  # [B, T - 1, H]
        mean = gate.mean(dim=-1)
        closed = (gate < 0.1).float().mean(dim=-1)
        noted.append(tuple(value.mean(dim=(0, 1)) for value in (mean, closed, sink, sink * mean)))
        return ctx.attend()

    with watching(model, watch):
        model(**inputs)
    if not noted:
        raise ValueError("gate_stats: no layer of this model has GatedAttention on it; patch it first")
    return GateStats(*(torch.stack(values) for values in zip(*noted)))
