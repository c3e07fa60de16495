"""Log-n scaling: attention that stays as sharp over a long text as over the lengths it was trained on.

Overcoming a Theoretical Limitation of Self-Attention (Chiang and Cholak, 2022), https://arxiv.org/abs/2202.12172

Softmax over n keys flattens as n grows. Scaling the scores with log n keeps it from doing so. For a model trained
on texts of `train_length` tokens, a query that reads n keys has its scores multiplied by

    s * max(1, log n / log train_length)          s [H], one learned factor a head, 1 at the start

so that up to `train_length` keys nothing changes. (Qwen's first models shipped this factor without s.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchattn import Method, MethodConfig, register


@register("log_n_scaling")
class LogNScaling(Method):
    """The scores of a query grow with the logarithm of the number of keys it reads."""

    summary = "longer texts than trained on: scores grow with the logarithm of the text"
    paper = "Overcoming a Theoretical Limitation of Self-Attention, arXiv 2202.12172"

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """`train_length`: how many tokens the model saw at once in training."""

        train_length: int = 4096

        def __post_init__(self) -> None:
            self._require_int("train_length", 2)

    config: Config

    @classmethod
    def unfit(cls, site, config: MethodConfig) -> str | None:
        return None if site.heads else "its number of heads could not be read from the module"

    def build(self, site) -> None:
        self.scale = nn.Parameter(torch.ones(site.heads, device=site.device))  # [H]

    def forward(self, ctx) -> Tensor:
        keys = readable_keys(ctx).float()  # [B or 1, T]
        growth = (keys.log() / math.log(self.config.train_length)).clamp(min=1)
        factor = self.scale[None, :, None, None] * growth[:, None, :, None]  # [B or 1, H, T, 1]
        return ctx.attend(q=(ctx.q * factor).to(ctx.q.dtype))  # scaling q scales the scores


def readable_keys(ctx) -> Tensor:
    """How many keys each query of this call may read, padding left out: `[B or 1, T]`, at least 1."""
    mask, queries = ctx.mask, ctx.q.shape[2]
    if mask.dense is not None:  # the model drew the mask itself
        return mask.dense[:, 0].sum(dim=-1).expand(-1, queries).clamp(min=1)
    if not mask.causal:
        return torch.full((1, queries), ctx.k.shape[2], device=ctx.q.device)
    if mask.padding is None:
        count = ctx.positions[None] + 1
    else:
        count = mask.padding.long().cumsum(dim=1).index_select(1, ctx.positions)
    return count.clamp(min=1, max=mask.window)
