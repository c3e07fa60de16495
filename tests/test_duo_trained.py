"""DuoAttention on models that have learned something: streams past the trained length, and the heads that recall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchattn
from patchattn import duo, lab
from patchattn.lab.text import recall
from patchattn.loading import load_tokenizer
from patchattn.train.synthetic import make

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
STORIES, TEXT = ASSETS / "stories15M", ASSETS / "text" / "tinystories_valid_sample.txt"
TRAINED = 256  # tokens that stories15M saw at once

pytestmark = pytest.mark.slow


def perplexity(model, ids, chunk=128):
    """Of each stretch of the trained length, in one stream."""
    cache, losses = None, []
    with torch.no_grad():
        for part, targets in zip(ids[:, :-1].split(chunk, dim=1), ids[:, 1:].split(chunk, dim=1), strict=True):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            losses.append(torch.nn.functional.cross_entropy(out.logits.transpose(1, 2), targets, reduction="none"))
    return [part.mean().exp().item() for part in torch.cat(losses, dim=1).split(TRAINED, dim=1)]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")
def test_with_cache_positions_a_stream_of_four_times_the_trained_length_stays_as_likely():
    model, tokenizer = (kind.from_pretrained(STORIES) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    ids = ids[:, : 2 * 4 * TRAINED].view(2, -1)  # two streams
    unpatched = perplexity(model, ids)
    patchattn.patch(model, patchattn.DuoAttention(heads=0, sink=4, recent=188, positions="cache"))
    streaming = perplexity(model, ids)
    assert max(unpatched[1:]) > 10 * unpatched[0], unpatched
    assert max(streaming[1:]) < 1.5 * unpatched[0], streaming


def test_the_heads_that_identification_finds_recall_and_the_others_do_not():
    model, tokenizer = lab.load("lab-llama"), load_tokenizer("lab-llama")
    task = make("multi_passkey", tokenizer, seed=0, passkeys=3, words_each=6, length=[320, 400])
    samples = (task.sample(index) for index in range(60))
    batches = ((torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])) for sample in samples)
    gates = duo.identify(model, batches, steps=60, rate=0.04, sink=4, recent=32)
    learned = duo.binarise(gates, 0.5)
    others = [[1 - value for value in row] for row in learned]
    right = []
    for heads in (1.0, learned, others):
        patchattn.patch(model, patchattn.DuoAttention(heads=heads, sink=4, recent=32))
        right.append(recall(model, make("passkey", tokenizer, 1_000_003), length=512, samples=16).generated)
        patchattn.unpatch(model)
    dense, kept, lost = right
    assert kept >= 0.95 * dense and lost <= dense - 0.3, (right, learned)
