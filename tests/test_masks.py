"""What the mask function hands to a layer, and what the layer reads from it."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

import patchattn
from patchattn.attach import register
from patchattn.masks import unpack

PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


def config(**values):
    made = MistralConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **{"sliding_window": 3, **values})
    made._attn_implementation_internal = "patchattn"
    return made


def made_by(create, mask=None, cache=None, length=6, **values):
    register()
    embeds = torch.zeros(2, length, 16)
    return create(config=config(**values), inputs_embeds=embeds, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("mask", [None, torch.ones_like(PADDING), PADDING], ids=["none", "ones", "padding"])
@pytest.mark.parametrize(("create", "window"), [(create_causal_mask, None), (create_sliding_window_causal_mask, 3)])
def test_a_causal_mask_says_causality_window_and_padding(create, window, mask):
    given = unpack(made_by(create, mask))
    assert (given.causal, given.window, given.length) == (True, window, 6)
    if mask is PADDING:
        assert torch.equal(given.mask, mask.bool())
    else:
        assert given.mask is None


def test_a_causal_mask_takes_no_more_memory_than_its_padding():
    assert made_by(create_sliding_window_causal_mask, PADDING).untyped_storage().nbytes() == PADDING.numel()


@pytest.mark.parametrize("mask", [None, PADDING], ids=["none", "padding"])
def test_a_mask_keeps_its_meaning_when_it_is_copied_or_cut_for_the_last_queries(mask):
    made = made_by(create_sliding_window_causal_mask, mask)
    for changed in (made.clone(memory_format=torch.contiguous_format), made[:, :, -1:], made[:, :, :, :6]):
        given, wanted = unpack(changed), unpack(made)
        assert given[1:] == wanted[1:]
        assert given.mask is wanted.mask is None or torch.equal(given.mask, wanted.mask)


def test_two_windows_in_one_process_are_told_apart():
    first, second = (made_by(create_sliding_window_causal_mask, sliding_window=size) for size in (3, 5))
    assert (unpack(first).window, unpack(second).window) == (3, 5)


def test_a_mask_counts_the_cached_positions_too():
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
    cache.update(torch.zeros(2, 1, 7, 4), torch.zeros(2, 1, 7, 4), 0)
    assert unpack(made_by(create_causal_mask, cache=cache, length=2)).length == 9


def test_a_chunk_longer_than_the_text_is_only_causal_and_a_shorter_one_is_drawn():
    values = dict(sliding_window=None, attention_chunk_size=8)
    assert unpack(made_by(create_chunked_causal_mask, **values)).causal
    drawn = unpack(made_by(create_chunked_causal_mask, **{**values, "attention_chunk_size": 4}))
    assert not drawn.causal
    assert drawn.mask[0, 0].tolist() == [
        [key <= query and key // 4 == query // 4 for key in range(6)] for query in range(6)
    ]


def test_a_bidirectional_mask_is_its_padding():
    assert made_by(create_bidirectional_mask) is None
    given = unpack(made_by(create_bidirectional_mask, PADDING))
    assert not given.causal
    assert torch.equal(given.mask[:, 0, 0], PADDING.bool())


@pytest.mark.parametrize("mask", [torch.zeros(2, 1, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool), None])
def test_a_mask_made_by_hand_is_left_as_it_is(mask):
    assert unpack(mask) == (mask, False, None, 0)


def test_a_mask_made_by_hand_reaches_the_attention():
    from transformers import LlamaForCausalLM

    made = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    model, ids = LlamaForCausalLM(made).eval(), torch.arange(12)[None]
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 6:, 2:5] = False
    wanted = model(ids, attention_mask=mask).logits
    assert not torch.equal(wanted, model(ids).logits)
    patchattn.patch(model, "dense")
    assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
