"""Whole models say the same with the Triton kernels, in Triton's interpreter, as with torch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn_kernels import backend, dispatch

pytestmark = pytest.mark.skipif(not dispatch.INSTALLED, reason="triton is not installed")

METHODS = {
    "both kinds of heads": (patchattn.DuoAttention(heads=0.5, sink=2, recent=5), {"sink_window", "sink_window_decode"}),
    "all heads stream": (patchattn.DuoAttention(heads=0.0, sink=0, recent=6), {"sink_window", "sink_window_decode"}),
    "the published chunks": (
        patchattn.DuoAttention(heads=0.5, sink=2, recent=5, prefill="chunked"), {"sink_window"},
    ),
    "chosen heads": (patchattn.MoH(shared=1, top_k=2, least_keys=0), {"routed"}),
}  # fmt: skip
OPTIONS = {"at once": {}, "in parts": {"prefill_chunk_size": 7}, "static": {"cache_implementation": "static"}}
CASES = [(name, way) for name in METHODS for way in OPTIONS]
CASES.remove(("chosen heads", "static"))  # there every pair is computed, by the model's own attention


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
                         intermediate_size=64, vocab_size=61)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("name", "way"), CASES, ids=[f"{name} {way}" for name, way in CASES])
def test_generation_from_a_padded_batch(name, way):
    method, primitives = METHODS[name]
    model = patchattn.patch(llama(), method)
    ids = torch.randint(1, 61, (2, 18))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    found, ran = {}, set()
    for choice in ("torch", "triton"):
        with backend(choice):
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0, disable_compile=True,
                output_logits=True, return_dict_in_generate=True, **OPTIONS[way],
            )  # fmt: skip
        found[choice] = torch.stack(out.logits)
        if choice == "triton":
            ran = set(patchattn.explain(model).layers[0].kernels.items())
    torch.testing.assert_close(found["triton"], found["torch"], atol=1e-5, rtol=1e-4)
    assert ran and ran <= {(primitive, "triton") for primitive in primitives}
