"""On a real pretrained chat model: name its folder in PATCHATTN_REAL_MODEL (tried with SmolLM2-135M-Instruct)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import patchattn

FOLDER = os.environ.get("PATCHATTN_REAL_MODEL", "")
TEXT = Path(__file__).parents[2] / "shared" / "assets" / "text" / "book_alice.txt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(FOLDER, "config.json").is_file(), reason="no model folder in PATCHATTN_REAL_MODEL"),
]

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea, and then tell me in your own words what a lighthouse is good for.",
    "2 + 2 = ?",
]


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    made.pad_token = made.pad_token or made.eos_token
    return made


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture
def chats(tokenizer):
    texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    return tokenizer(texts, return_tensors="pt", padding=True)


def answers(model, chats, **options):
    with torch.no_grad():
        out = model.generate(**chats, max_new_tokens=24, do_sample=False, **options)
    return out[:, chats["input_ids"].shape[1] :]


def test_dense_answers_token_for_token_like_the_unpatched_model(model, chats):
    wanted = answers(model, chats)
    patchattn.patch(model, "dense")
    assert torch.equal(answers(model, chats), wanted)
    patchattn.unpatch(model)
    assert torch.equal(answers(model, chats), wanted)


def test_duo_with_all_heads_full_answers_token_for_token_like_the_unpatched_model(model, chats):
    wanted = answers(model, chats)
    patchattn.patch(model, patchattn.DuoAttention(heads=1.0))
    assert torch.equal(answers(model, chats), wanted)


def test_duo_with_half_the_heads_streaming_still_answers(model, chats, tokenizer):
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=16, recent=64))
    text = tokenizer.batch_decode(answers(model, chats), skip_special_tokens=True)
    assert "Paris" in text[0], text
    # A padded row answers as it does alone.
    alone = {key: value[:1, -int(chats["attention_mask"][0].sum()) :] for key, value in chats.items()}
    single = answers(model, alone)[0]
    assert torch.equal(single, answers(model, chats)[0, : len(single)])


def test_cache_bytes_at_4k_tokens_are_as_computed(model, tokenizer):
    text = TEXT.read_text(encoding="utf-8") if TEXT.is_file() else "The quick brown fox jumps over the lazy dog. " * 600
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :4096]
    assert ids.shape[1] == 4096
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=64, recent=256))
    full = [sum(layer.self_attn.patchattn[0].full) for layer in model.model.layers]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(ids, past_key_values=cache)
    c = model.config
    kept = sum(n * 4096 + (c.num_key_value_heads - n) * (64 + 256) for n in full)
    streaming_layers = sum(n < c.num_key_value_heads for n in full)
    assert patchattn.cache_bytes(cache) == 2 * 4 * c.head_dim * kept + 8 * streaming_layers


def test_patch_save_load_unpatch(model, chats, tmp_path):
    wanted = answers(model, chats)
    patchattn.patch(model, ["gated_attention", patchattn.DuoAttention(heads=0.5, sink=16, recent=64)])
    ours = answers(model, chats)
    patchattn.save(model, tmp_path / "patch")
    patchattn.unpatch(model)
    assert torch.equal(answers(model, chats), wanted)
    patchattn.load(model, tmp_path / "patch")
    assert torch.equal(answers(model, chats), ours)
    model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    assert torch.equal(answers(again, chats), ours)
