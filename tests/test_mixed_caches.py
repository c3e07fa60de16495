"""Streaming and full layers and heads in one generate(), with padding: what stock transformers gets wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.testing import TEXT

STREAMING = {"heads": 0.0, "sink": 2, "recent": 5}
HALF = {"heads": 0.5, "sink": 2, "recent": 5}
NEW = 16


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 4, **changes})).eval()


def batch(lengths, width=None):
    width = width or max(lengths)
    ids = torch.randint(5, 60, (len(lengths), width), generator=torch.Generator().manual_seed(4))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask, mask


def generate(model, ids, mask, **options):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("order", ["".join(o) for o in itertools.product("fsh", repeat=3) if len(set(o)) > 1])
def test_padded_rows_generate_the_tokens_of_unpadded_runs_for_every_order_of_layers(order):
    model = llama(num_hidden_layers=3)
    kinds = {"f": "dense", "s": patchattn.DuoAttention(**STREAMING), "h": patchattn.DuoAttention(**HALF)}
    patchattn.patch(model, {str(index): kinds[kind] for index, kind in enumerate(order)})
    ids, mask = batch([31, 12, 23])
    together = generate(model, ids, mask)[:, ids.shape[1] :]
    for row, length in enumerate([31, 12, 23]):
        alone = generate(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:])[:, length:]
        assert torch.equal(together[row : row + 1], alone)


def test_streaming_heads_keep_only_sinks_and_window_however_long_the_text():
    model = llama()
    patchattn.patch(model, {"even": patchattn.DuoAttention(**STREAMING), "odd": "dense"})
    ids, mask = batch([60, 41])
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    assert [getattr(layer, "ring_keys", layer.keys).shape[2] for layer in cache.layers] == [
        7,
        60,
    ] * 2
    assert cache.get_seq_length() == 60


def test_sinks_are_the_first_real_tokens_of_a_row_not_its_padding():
    model = llama(num_hidden_layers=1)
    patchattn.patch(model, patchattn.DuoAttention(**STREAMING))
    ids, mask = batch([40, 20])
    padded, alone = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=padded)
    model(ids[1:, 20:], past_key_values=alone)
    ours, wanted = padded.layers[0], alone.layers[0]
    assert torch.equal(ours.ranks()[1], wanted.ranks()[0])
    # Values are not rotated, so they are the same whatever the absolute position.
    torch.testing.assert_close(ours.ring_values[1], wanted.ring_values[0])


def test_unpatched_layers_beside_a_patched_one_keep_their_own_attention():
    model = llama()
    ids, mask = batch([30, 18])
    patchattn.patch(model, patchattn.DuoAttention(**HALF), layers="1")
    together = generate(model, ids, mask)[1, 30:]
    alone = generate(model, ids[1:, 12:], mask[1:, 12:])[0, 18:]
    assert torch.equal(together, alone)


def test_streaming_heads_beside_the_models_own_sliding_layers():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**{**TEXT, "num_hidden_layers": 4}, sliding_window=6,
                              layer_types=["sliding_attention", "full_attention"] * 2)  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    ids, mask = batch([30, 18])
    patchattn.patch(model, patchattn.DuoAttention(**HALF))
    assert [len(m) for m in (layer.self_attn._modules.get("patchattn", ()) for layer in model.model.layers)] == [
        0,
        1,
        0,
        1,
    ]
    together = generate(model, ids, mask)[1, 30:]
    assert torch.equal(together, generate(model, ids[1:, 12:], mask[1:, 12:])[0, 18:])


def test_a_returned_cache_goes_on_where_it_stopped():
    model = llama()
    patchattn.patch(model, patchattn.DuoAttention(**HALF))
    ids, mask = batch([25, 14])
    wanted = generate(model, ids, mask, max_new_tokens=20, min_new_tokens=20)
    first = generate(model, ids, mask, max_new_tokens=9, min_new_tokens=9, return_dict_in_generate=True)
    longer = torch.cat([mask, mask.new_ones(2, 9)], dim=1)
    again = generate(model, first.sequences, longer, max_new_tokens=11, min_new_tokens=11,
                     past_key_values=first.past_key_values)  # fmt: skip
    assert torch.equal(again, wanted)


def test_a_prompt_in_chunks_generates_the_same():
    model = llama()
    patchattn.patch(model, {"0-1": patchattn.DuoAttention(**HALF), "2-3": ["gated_attention", "dense"]})
    ids, mask = batch([37, 21])
    assert torch.equal(generate(model, ids, mask, prefill_chunk_size=8), generate(model, ids, mask))


def test_assisted_decoding_works_until_streaming_heads_have_dropped_tokens():
    model, assistant = llama(), llama(num_hidden_layers=1)
    ids, mask = batch([12])
    with torch.no_grad():
        wanted = patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=4, recent=60)) and generate(
            model, ids, mask
        )
        assert torch.equal(generate(model, ids, mask, assistant_model=assistant), wanted)
        patchattn.unpatch(model)
        patchattn.patch(model, patchattn.DuoAttention(**HALF))
        with pytest.raises(RuntimeError, match="already dropped tokens beyond sink \\+ recent \\+ slack = 7"):
            generate(model, ids, mask, assistant_model=assistant)


def test_a_cache_of_the_unpatched_model_is_refused():
    model = llama()
    ids, _ = batch([10])
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    patchattn.patch(model, patchattn.DuoAttention(**HALF))
    with pytest.raises(ValueError, match="already holds 10 tokens of the unpatched model"):
        model(ids[:, :1], past_key_values=cache)


def test_a_cache_of_the_patched_model_is_refused_by_the_unpatched_one():
    model = llama()
    ids, _ = batch([10])
    patchattn.patch(model, patchattn.DuoAttention(**HALF))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with patchattn.disabled(model), pytest.raises(RuntimeError, match="belongs to a patched model"):
        model(ids[:, :1], past_key_values=cache)
    patchattn.unpatch(model)
    with pytest.raises(RuntimeError, match="start with a new cache"):
        model(ids[:, :1], past_key_values=cache)


def test_a_quantized_cache_is_refused_by_name():
    from patchattn.record import attachment_of
    from patchattn.running import _own_layer

    class QuantizedLayer:
        def get_seq_length(self):
            return 0

    model = llama()
    patchattn.patch(model, patchattn.DuoAttention(**HALF))
    with pytest.raises(ValueError, match="cannot replace a QuantizedLayer"):
        _own_layer(attachment_of(model.model.layers[0].self_attn), QuantizedLayer())


@pytest.mark.parametrize("full", [1, 0])
def test_bytes_of_the_two_tiers_are_as_computed(full):
    model = llama()
    patchattn.patch(model, patchattn.DuoAttention(heads=full / 2, sink=4, recent=12))
    ids, _ = batch([100, 100])
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    layers, rows, size, head_dim, streaming = 4, 2, 4, 8, 2 - full
    keys_and_values = 2 * layers * rows * size * head_dim * (full * 100 + streaming * (4 + 12))
    counters = layers * rows * 8
    assert patchattn.cache_bytes(cache) == keys_and_values + counters
