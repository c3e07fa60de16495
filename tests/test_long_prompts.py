"""Long prompts with padding: whole methods, and what their gates are taught from, hold no square of the length."""

from __future__ import annotations

import subprocess
import sys

import pytest

LENGTH = 32768
SCRIPT = f"""
import resource, sys, torch, patchattn
from transformers import LlamaConfig, LlamaForCausalLM
from patchattn.living import watching

config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, vocab_size=16, max_position_embeddings={LENGTH})
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval().model
patchattn.patch(model, [eval(sys.argv[1])])
kind = sys.argv[2]

def note(ctx):
    target = ctx.base()
    ctx.transfer_loss(target, kind).backward()
    return target

def run(length):
    ids = torch.zeros(1, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, : length // 7] = 0
    if kind == "prompt":
        with torch.no_grad():
            return model(ids, attention_mask=mask).last_hidden_state
    with watching(model, note):
        model(ids, attention_mask=mask, use_cache=False)

run(256)  # what is made on first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run({LENGTH})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
# What it may hold more, as a share of a boolean mask; the map of a gate that decodes is itself a sixteenth of one.
CASES = {
    "SeerAttention": ("patchattn.SeerAttention(density=0.1)", "prompt", 0.25),
    "MoH": ("patchattn.MoH(shared=1, top_k=0, least_keys=0)", "prompt", 0.25),
    "the targets of SeerAttention": ("patchattn.SeerAttention()", "block_map", 0.75),
    "the targets of SeerAttentionDecode": ("patchattn.SeerAttentionDecode()", "block_map", 0.75),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_a_long_padded_prompt_holds_no_square_of_its_length(case):
    method, kind, share = CASES[case]
    command = [sys.executable, "-c", SCRIPT, method, kind]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    square = LENGTH**2  # bytes of a boolean mask; scores of one head in float32 take four times as many
    assert grown < share * square, f"{grown / 2**20:.0f} MiB more; a square mask takes {square / 2**20:.0f}"
