"""Hedgehog: what its window and its state hold, however a text comes in."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import patchattn
from patchattn.living import patch_parameters, watching
from patchattn.testing import TEXT

from .tiny import close, in_parts, llama, shaken, tokens

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
SETTINGS = {
    "sliding": {"window": 7},
    "terraced": {"window": 4, "window_kind": "terraced"},
    "pure": {"window": 0},
    "shared": {"window": 3, "share_kv_map": True, "feature_map": "exp"},
    "based": {"window": 5, "feature_map": "taylor", "feature_dim": 3},
    "skip": {"window": 2, "skip": True, "feature_dim": 8, "feature_map": "elu"},
}


def patched(model=None, **settings):
    return shaken(patchattn.patch(llama() if model is None else model, patchattn.Hedgehog(**settings)))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_at_once_in_parts_and_token_by_token_are_the_same(settings):
    model, ids = patched(**settings), tokens(length=151)
    wanted = model(ids, use_cache=False).logits
    for parts in ([151], [3, 60, 1, 1, 29, 57], [130] + [1] * 21, [1] * 151):
        close(in_parts(model, ids, parts), wanted)


@pytest.mark.parametrize("name", ["sliding", "terraced", "pure"])
@pytest.mark.parametrize("rotary", ["plain", "yarn"])
@torch.no_grad()
def test_padding_before_a_text_changes_nothing_at_any_positions(name, rotary):
    model = patched(llama(**({"rope_parameters": YARN} if rotary == "yarn" else {})), **SETTINGS[name])
    ids, pads = tokens(length=41), 9
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    alone = model(ids[1:, pads:]).logits
    for given in ({}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        close(model(ids, attention_mask=mask, **given).logits[1:, pads:], alone)
    for parts in ([41], [5, 2, 20, 1, 1, 12], [1] * 41):
        close(in_parts(model, ids, parts, mask=mask)[1:, pads:], alone)


@pytest.mark.parametrize("name", ["sliding", "terraced", "pure"])
@torch.no_grad()
def test_padding_between_the_turns_of_a_conversation_leaves_no_trace_in_the_state(name):
    model, ids = patched(GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=64)).eval(),
                         **SETTINGS[name]), tokens(1, 40)  # fmt: skip
    kept = torch.tensor([*range(11), *range(17, 31), *range(33, 40)])
    positions = torch.arange(40)[None]
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
def test_a_window_over_the_whole_text_is_dense_attention():
    model, ids = llama(), tokens(length=30)
    wanted = model(ids).logits
    close(patched(model, window=30, affine=True)(ids).logits, wanted)


@torch.no_grad()
def test_without_its_linear_part_it_is_a_sliding_window():
    torch.manual_seed(0)
    sizes = {**TEXT, "num_hidden_layers": 2}
    local = MistralForCausalLM(MistralConfig(**sizes, sliding_window=6)).eval()
    model = patched(llama(), window=6)
    model.load_state_dict(local.state_dict(), strict=False)
    ids = tokens()
    with patchattn.settings(model, use_linear=False):
        close(model(ids).logits, local(ids).logits)
    assert not torch.allclose(model(ids).logits, local(ids).logits, atol=1e-3)


@torch.no_grad()
def test_a_cache_takes_as_many_bytes_after_a_long_text_as_after_a_short_one():
    for settings, heads in (({"window": 5}, 4), ({"window": 0}, 4), ({"window": 5, "share_kv_map": True}, 2)):
        model = patched(**settings, feature_dim=6)
        sizes = set()
        for length in (1, 9, 70):
            cache = DynamicCache(config=model.config)
            in_parts(model, tokens(length=length), [length], cache)
            sizes.add(patchattn.cache_bytes(cache))
            assert cache.layers[0].state.shape == (2, heads, 12, 9) and cache.get_seq_length() == length
        assert len(sizes) == 1


@torch.no_grad()
def test_states_stay_in_float32_in_a_bfloat16_model():
    model = patched(llama().bfloat16(), window=4)
    cache = DynamicCache(config=model.config)
    in_parts(model, tokens(), [30, *[1] * 40], cache)
    assert cache.layers[0].state.dtype == torch.float32 and cache.layers[0].recent_keys.dtype == torch.bfloat16
    assert {p.dtype for p in patch_parameters(model).values()} == {torch.bfloat16, torch.float32} - {torch.bfloat16}


def test_attention_maps_are_what_it_computes_and_sum_to_one():
    model, ids = patched(window=4), tokens(length=21)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    shares = []

    def around(ctx):
        method, out = ctx.attachment.methods[0], ctx.attend()
        weights = torch.cat([method.attention_map(ctx, 0, 8), method.attention_map(ctx, 8, 21)], dim=2)
        values = ctx.v.repeat_interleave(2, dim=1)
        real = mask.bool()
        close((weights @ values).transpose(1, 2)[real], out[real])
        close(weights.sum(dim=-1).transpose(1, 2)[real], torch.ones_like(out[real][..., 0]))
        shares.append(method.diagnostics(ctx)["linear share"].item())
        return out

    with watching(model, around), torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)


def test_layers_may_stay_softmax_or_stream_beside_it():
    ids = tokens(length=20)
    model = patchattn.patch(
        llama(num_hidden_layers=3),
        {"0": patchattn.Hedgehog(window=4), "1": patchattn.DuoAttention(heads=0.5, sink=1, recent=4)},
    )
    options = dict(max_new_tokens=15, min_new_tokens=15, do_sample=False)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@torch.no_grad()
def test_an_encoder_takes_the_pure_form_and_leaves_padding_out():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, vocab_size=64)
    model = patched(BertForMaskedLM(BertConfig(**sizes)).eval(), window=0)
    ids = tokens(length=12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    close(model(ids, attention_mask=mask).logits[1:, :7], model(ids[1:, :7]).logits)


def test_what_it_cannot_compute_is_refused_before_anything_changes():
    vit = ViTForImageClassification(ViTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1,
                                              intermediate_size=48, image_size=16, patch_size=4))  # fmt: skip
    gemma = Gemma2ForCausalLM(Gemma2Config(**{**TEXT, "num_hidden_layers": 2}))
    oss = GptOssForCausalLM(GptOssConfig(**{**TEXT, "num_hidden_layers": 2}, num_local_experts=2, layer_types=
                                         ["full_attention"] * 2, num_experts_per_tok=1))  # fmt: skip
    cases = (
        (vit, {}, "not causal, so there is no window of recent tokens; use window=0"),
        (gemma, {}, "it caps its scores|sliding window"),
        (oss, {}, "a learned extra score in its softmax"),
        (MistralForCausalLM(MistralConfig(**TEXT, sliding_window=7)), {}, "has a sliding window of 7 tokens"),
        (llama(), {"skip": True}, "with skip=True its feature_dim must be its head size, 8"),
    )
    for model, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            patchattn.patch(model, patchattn.Hedgehog(**settings))
        assert not any("patchattn" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": -1}, "window is -1; it must be an integer of at least 0"),
        ({"window_kind": "block"}, "window_kind is 'block'; it must be one of 'sliding', 'terraced'"),
        ({"feature_map": "identity"}, "feature_map is 'identity'; it must be one of 'softmax'"),
        ({"window_logit_init": 1.0}, "window_logit_init is 1.0; it must be between 0 and 1"),
        ({"tie_qk": True, "share_kv_map": True}, "share_kv_map is True; it must be False where tie_qk is True"),
        ({"window": 0, "use_linear": False}, "use_linear is False; it must be True where window is 0"),
        ({"window": 0, "affine": True}, "affine is True; it must be False where window is 0"),
    ],
    ids=["window", "kind", "map", "factor", "tied", "nothing", "affine"],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        patchattn.Hedgehog(**settings)


def test_masks_drawn_by_hand_and_dropout_are_refused_when_met():
    model, ids = patched(window=4), tokens(1, 8)
    drawn = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    drawn[..., 4:, :4] = False
    with pytest.raises(ValueError, match="drew a mask of its own over 8 tokens"):
        model(ids, attention_mask=drawn)
    with pytest.raises(ValueError, match="drops attention weights"):
        patched(llama(attention_dropout=0.5), window=4).train()(ids)


def test_the_report_says_how_much_the_window_weighs():
    model = patchattn.patch(llama(), patchattn.Hedgehog(window=4))
    assert model.model.layers[0].self_attn.patchattn[0].report() == {"window": 4, "mean window factor": 0.1}
    patchattn.unpatch(model)
    patchattn.patch(model, patchattn.Hedgehog(window=0))
    assert model.model.layers[0].self_attn.patchattn[0].report() == {"window": "none"}
