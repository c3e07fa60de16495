"""LAWCAT: what its convolution and its state hold, however a text comes in."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

import patchattn

from .tiny import close, in_parts, llama, shaken, tokens

SETTINGS = {
    "default": {},
    "window": {"window": 6, "tie_qk": False},
    "no-convolution": {"conv_size": 0, "gate_rank": None},
    "wide": {"conv_size": 7, "share_conv": True, "conv_activation": "silu", "feature_dim": 9},
    "rotated": {"rotary": True, "window": 3},
}


def patched(model=None, **settings):
    return shaken(patchattn.patch(llama() if model is None else model, patchattn.LAWCAT(**settings)))


def method_of(model):
    return model.model.layers[0].self_attn.patchattn[0]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_at_once_in_parts_and_token_by_token_are_the_same(settings):
    model, ids = patched(**settings), tokens(length=67)
    wanted = model(ids, use_cache=False).logits
    for parts in ([67], [2, 30, 1, 1, 33], [50] + [1] * 17, [1] * 67):
        close(in_parts(model, ids, parts), wanted)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_padding_before_a_text_changes_nothing(settings):
    model, ids, pads = patched(**settings), tokens(length=41), 9
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    alone = model(ids[1:, pads:]).logits
    for parts in ([41], [5, 2, 20, 1, 1, 12], [1] * 41):
        close(in_parts(model, ids, parts, mask=mask)[1:, pads:], alone)


@pytest.mark.parametrize("name", ["default", "window", "no-convolution", "wide"])
@torch.no_grad()
def test_padding_between_the_turns_of_a_conversation_leaves_no_trace(name):
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=64)).eval()
    model, ids, positions = patched(model, **SETTINGS[name]), tokens(1, 40), torch.arange(40)[None]
    kept = torch.tensor([*range(11), *range(17, 31), *range(33, 40)])
    mask = torch.zeros_like(ids)
    mask[:, kept] = 1
    wanted = model(ids[:, kept], position_ids=positions[:, kept]).logits
    for parts in ([40], [15, 17, 8], [14, 1, 1, 1, 1, 22]):
        cache, done, logits = DynamicCache(config=model.config), 0, []
        for part in parts:
            now = slice(done, done + part)
            done += part
            given = dict(position_ids=positions[:, now], attention_mask=mask[:, :done], past_key_values=cache)
            logits.append(model(ids[:, now], **given).logits)
        close(torch.cat(logits, dim=1)[:, kept], wanted)


@torch.no_grad()
def test_a_cache_takes_as_many_bytes_after_a_long_text_as_after_a_short_one():
    for settings in ({}, {"window": 5}, {"conv_size": 0}):
        model, sizes = patched(**settings, feature_dim=6), set()
        for length in (1, 9, 70):
            cache = DynamicCache(config=model.config)
            in_parts(model, tokens(length=length), [length], cache)
            sizes.add(patchattn.cache_bytes(cache))
            assert cache.layers[0].state.shape == (2, 4, 12, 9) and cache.layers[0].state.dtype == torch.float32
        assert len(sizes) == 1


@torch.no_grad()
def test_positions_play_no_part_but_where_the_ablation_rotates():
    ids, far = tokens(length=20), torch.arange(20)[None] * 7 + 11
    plain, turned = patched(), patched(rotary=True)
    close(plain(ids, position_ids=far).logits, plain(ids).logits)
    assert not torch.allclose(turned(ids, position_ids=far).logits, turned(ids).logits, atol=1e-3)


@torch.no_grad()
def test_it_begins_near_the_identity_with_memories_that_halve_in_as_many_tokens_as_the_normalizer():
    method = method_of(patchattn.patch(llama(), patchattn.LAWCAT(gate_normalizer=10)))
    decay = method.log_decay(torch.randn(1, 5, 32)).exp()
    assert decay.shape == (1, 2, 5, 8)
    close(decay, torch.full_like(decay, 0.5**0.1), 1e-3)
    assert method.report() == {"decay by the bias": 0.933}
    assert torch.equal(method.query_conv[:, -1], torch.ones(32)) and (method.query_conv[:, :-1] == 0.001).all()
    slower = method_of(patchattn.patch(llama(), patchattn.LAWCAT(gate_normalizer=10, gate_bias_init=4.0)))
    assert slower.report() == {"decay by the bias": 0.9982}


@torch.no_grad()
def test_a_decay_that_forgets_all_but_the_token_itself_copies_its_value():
    model = patchattn.patch(llama(num_hidden_layers=1), patchattn.LAWCAT())
    method, seen = method_of(model), {}
    method.gate_bias.fill_(-1e4)
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    attention.v_proj.register_forward_hook(lambda module, args, out: seen.update(v=out))
    model(tokens())
    values = seen["v"].unflatten(-1, (2, 8)).repeat_interleave(2, dim=2).flatten(2)
    close(seen["out"], values)


def test_what_it_cannot_compute_is_refused_before_anything_changes():
    model = ViTForImageClassification(ViTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1,
                                                intermediate_size=48, image_size=16, patch_size=4))  # fmt: skip
    with pytest.raises(ValueError, match="not causal, so there is no past to decay"):
        patchattn.patch(model, patchattn.LAWCAT())
    assert not any("patchattn" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="drops attention weights"):
        patched(llama(attention_dropout=0.5)).train()(tokens(1, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv_size": -1}, "conv_size is -1; it must be an integer of at least 0"),
        ({"conv_size": 0, "share_conv": True}, "share_conv is True; it must be False where conv_size is 0"),
        (
            {"conv_size": 0, "conv_activation": "silu"},
            "conv_activation is 'silu'; it must be None where conv_size is 0",
        ),
        ({"conv_activation": "relu"}, "conv_activation is 'relu'; it must be None or 'silu'"),
        ({"gate_rank": 0}, "gate_rank is 0; it must be an integer of at least 1"),
        ({"gate_normalizer": 0.0}, "gate_normalizer is 0.0; it must be more than 0"),
        ({"window_logit_init": 1.0}, "window_logit_init is 1.0; it must be between 0 and 1"),
    ],
    ids=["size", "shared", "activation-of-none", "activation", "rank", "normalizer", "factor"],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        patchattn.LAWCAT(**settings)
