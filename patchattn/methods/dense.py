"""Dense: softmax attention itself, through patchattn's path.

Computes what the unpatched model computes, with the attention implementation the model was loaded with
(SDPA, FlexAttention, FlashAttention, eager). It is what every other method is compared with, and it makes
long padded batches affordable: no mask larger than a block of queries is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..method import Method, MethodConfig, register

if TYPE_CHECKING:
    from ..context import AttentionContext


@register("dense")
class Dense(Method):
    """The model's own attention, unchanged."""

    summary = "the model's own attention, for comparison"
    paper = "Attention Is All You Need, arXiv 1706.03762"
    exact = True

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    def forward(self, ctx: AttentionContext) -> Tensor:
        return ctx.attend()
