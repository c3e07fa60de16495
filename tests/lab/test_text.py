"""Measures of language models, on models whose behaviour is known: uniform, copying, and heads with one habit each."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

import patchattn
from patchattn.lab.text import bits_per_byte, head_facts, read_texts, recall, windows
from patchattn.train.synthetic import make

SIZES = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


class Copying(LlamaForCausalLM):
    """Expects after each token what followed it the last time, and attends: to the first token, to itself, there."""

    def forward(self, input_ids, **_):
        batch, length = input_ids.shape
        before = torch.ones(length, length).tril(-1).bool()
        same = (input_ids[:, :, None] == input_ids[:, None, :]) & before  # [B, T, S]
        place = torch.where(same, torch.arange(length), -1).amax(dim=-1)  # [B, T], -1 for none
        following = input_ids.gather(1, (place + 1).clamp_max(length - 1))
        logits = torch.nn.functional.one_hot(following, self.config.vocab_size).float()
        first, own = torch.zeros(length).long(), torch.arange(length)
        heads = torch.stack([first.expand(batch, -1), own.expand(batch, -1), place + 1], dim=1)  # [B, H, T]
        weights = torch.nn.functional.one_hot(heads, length).float()
        return CausalLMOutputWithPast(logits=logits, attentions=(weights,))


@pytest.fixture(scope="module")
def copying():
    model = Copying(LlamaConfig(**SIZES))
    model.generation_config.use_cache = False
    return model


def test_a_uniform_model_needs_all_bits(tokenizer):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    torch.nn.init.zeros_(model.lm_head.weight)
    score = bits_per_byte(model, tokenizer, ["The sea was grey.", "Größe"], length=8)
    assert score.bytes == score.tokens == 17 + 7
    assert score.bits_per_byte == pytest.approx(math.log2(257), rel=1e-5)


def test_a_text_that_fits_a_window_is_scored_in_one_pass(tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    text = "A cart stood in the yard."
    ids = torch.tensor([[256, *tokenizer(text)["input_ids"]]])
    expected = model(input_ids=ids, labels=ids).loss.item()
    score = bits_per_byte(model, tokenizer, [text, text], length=64, batch=1)
    assert score.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_a_longer_window_changes_only_the_context(tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    text = ["The river runs past the mill and under the old bridge. " * 3]
    scores = [
        bits_per_byte(model, tokenizer, text, length=length, stride=stride) for length, stride in ((16, 4), (64, 64))
    ]
    assert scores[0].tokens == scores[1].tokens
    assert scores[0].nats_per_token == pytest.approx(scores[1].nats_per_token, rel=0.05)


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (77, 16, 5), (130, 32, 32)])
def test_windows_count_every_token_once_and_keep_context(tokens, length, stride):
    counted = []
    for start, first, end in windows(tokens, length, stride):
        assert 0 <= start < first < end <= tokens and end - start <= length
        assert start == 0 or first - start >= max(length - stride, 1)
        counted += range(first, end)
    assert counted == list(range(1, tokens))


def test_no_text_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="there is no text"):
        bits_per_byte(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer, [])


@pytest.mark.parametrize("length", [60, 61])
def test_a_model_that_copies_recalls_everything(tokenizer, copying, length):
    score = recall(copying, make("mqar", tokenizer, pairs=3), length=length, samples=10, batch=4)
    assert (score.exact, score.tokens, score.generated) == (1.0, 1.0, 1.0)
    assert (score.samples, score.length) == (10, length)


def test_a_random_model_recalls_nothing(tokenizer):
    torch.manual_seed(0)
    score = recall(LlamaForCausalLM(LlamaConfig(**SIZES)), make("passkey", tokenizer), length=300, samples=4)
    assert score.exact == score.generated == 0.0
    assert score.tokens < 0.5


def test_heads_are_told_apart_by_what_they_attend_to(tokenizer, copying):
    facts = head_facts(
        copying, tokenizer, ["Two boats came in late, with little to sell. " * 10], length=101, samples=2
    )
    assert facts.first == [pytest.approx([1, 0, facts.first[0][2]])] and facts.first[0][2] < 0.1
    assert facts.local == [pytest.approx([0, 1, facts.local[0][2]])]
    assert facts.retrieval == [pytest.approx([0, 0, 1])]


def test_a_patched_model_must_give_its_weights(tokenizer):
    text = ["Snow lay on the hills until the end of April. " * 3]
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    plain = head_facts(model, tokenizer, text, length=64, samples=2)
    patched = head_facts(patchattn.patch(model, "dense"), tokenizer, text, length=64, samples=2)
    assert patched.first[0] == pytest.approx(plain.first[0], abs=1e-5)
    other = patchattn.patch(LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="sdpa"), "dense")
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        head_facts(other, tokenizer, text, length=64, samples=2)


def test_measuring_heads_leaves_the_attention_as_it_was(tokenizer):
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="sdpa")
    head_facts(model, tokenizer, ["It rained for three days. " * 4], length=64, samples=1)
    assert model.config._attn_implementation == "sdpa"


def test_texts_are_read_from_files_folders_and_globs(tmp_path):
    for name in ("one.txt", "two.txt", "three.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read_texts(tmp_path) == ["one.txt", "two.txt"]
    assert read_texts([tmp_path / "two.txt", f"{tmp_path}/*.md"]) == ["two.txt", "three.md"]
    with pytest.raises(FileNotFoundError, match="no text at"):
        read_texts(tmp_path / "four.txt")
