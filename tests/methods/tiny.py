"""A tiny model, tokens for it, and prompts in parts: what tests of several methods ask alike."""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from patchattn.living import patch_parameters
from patchattn.testing import TEXT


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 2, **changes})).eval()


def shaken(model):
    """The model with a patch that has learned something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in patch_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(rows=2, length=70):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def in_parts(model, ids, parts, cache=None, mask=None):
    """The logits of a text that comes in parts of so many tokens."""
    cache, done, logits = DynamicCache(config=model.config) if cache is None else cache, 0, []
    for part in parts:
        given = {} if mask is None else {"attention_mask": mask[:, : done + part]}
        logits.append(model(ids[:, done : done + part], past_key_values=cache, **given).logits)
        done += part
    return torch.cat(logits, dim=1)


def close(ours, wanted, tolerance=1e-5):
    torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=0)
