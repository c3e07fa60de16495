"""VAR: what is a sink, what is moved, and that nothing else changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import patchattn
from patchattn import testing, var
from patchattn.methods.var import sink_value
from patchattn.testing import FAMILIES, IMAGE_TOKEN, TEXT
from patchattn_kernels.grouped import IMAGE, IMAGE_SINK, TEXT_SINK

SETTINGS = {**patchattn.VAR.example, "generated_sinks": False}
LLAVA = testing.Setup(patchattn.VAR(**SETTINGS), FAMILIES["llava"])


def llava(**changes):
    return patchattn.patch(LLAVA.base(), patchattn.VAR(**{**SETTINGS, **changes}))


def llama(visual_mask, **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "hidden_size": 32})).eval()
    return patchattn.patch(model, patchattn.VAR(**{**SETTINGS, "visual_mask": visual_mask, **changes}))


def image_rows(length, *spans, rows=1):
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for start, stop in spans:
        mask[:, start:stop] = True
    return mask


def ids(length, rows=1, seed=7):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def marks(model, inputs):
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    return [getattr(layer, "marks", None) for layer in cache.layers]


# ---- families ------------------------------------------------------------------------------------------------

VISION = dict(num_heads=2, depth=1, in_channels=3, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
QWEN = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
TOKENS = dict(image_token_id=IMAGE_TOKEN, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60)


def qwen2_vl():
    vision = dict(**VISION, embed_dim=16, hidden_size=32, mlp_ratio=2)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=QWEN, vision_config=vision, **TOKENS))


def qwen2_5_vl():
    vision = dict(**VISION, hidden_size=16, out_hidden_size=32, intermediate_size=24, window_size=16,
                  fullatt_block_indexes=[0])  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=QWEN, vision_config=vision, **TOKENS))


def qwen_inputs(rows, length):
    inputs = testing._text_inputs(rows, length)
    inputs["input_ids"][:, :6] = torch.tensor([61, *[IMAGE_TOKEN] * 4, 60])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    random = torch.Generator().manual_seed(1)
    return {**inputs, "pixel_values": torch.randn(rows * 16, 96, generator=random),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}  # fmt: skip


def gemma3():
    text = {**TEXT, "layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 8}
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                  patch_size=2)  # fmt: skip
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                                       image_token_id=IMAGE_TOKEN))  # fmt: skip


def gemma_inputs(rows, length):
    inputs = testing._llava_inputs(rows, length)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


# The rest of the contract slices the inputs row by row and token by token, which these models' images do not allow.
CHECKS = ("disabled_is_the_base_model", "bf16_is_close", "save_and_load_keep_the_outputs", "generate", "static_cache",
          "training_mode_and_checkpointing", "padded_decoding_equals_unpadded", "cache_bytes")  # fmt: skip
OTHERS = {
    family.name: family
    for family in (
        testing.Family("qwen2-vl", qwen2_vl, qwen_inputs, testing._logits, decoder=True),
        testing.Family("qwen2.5-vl", qwen2_5_vl, qwen_inputs, testing._logits, decoder=True),
        testing.Family("gemma3", gemma3, gemma_inputs, testing._logits, decoder=True),
    )
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_vision_language_models_keep_the_contract(name, check):
    getattr(testing, f"check_{check}")(testing.Setup(patchattn.VAR(**patchattn.VAR.example), OTHERS[name]))


@pytest.mark.parametrize("name", OTHERS)
def test_their_images_are_found_and_their_vision_tower_is_left_alone(name):
    setup = testing.Setup(patchattn.VAR(**SETTINGS), OTHERS[name])
    model, base, inputs = setup.patched(), setup.base(), setup.inputs
    kinds = marks(model, inputs)
    for layer in kinds:
        assert torch.equal((layer == IMAGE) | (layer == IMAGE_SINK), inputs["input_ids"] == IMAGE_TOKEN)
    assert not any("vision" in site.name or "visual" in site.name for site in var._sites(model) for site in site[:1])
    assert (model(**inputs).logits - base(**inputs).logits).abs().max() > 1e-3
    text = testing._text_inputs(2, 20)
    assert torch.equal(model(**text).logits, base(**text).logits)


# ---- what does not change ------------------------------------------------------------------------------------


def test_text_alone_gives_the_bits_of_the_unpatched_model():
    text = testing._text_inputs(2, 20)
    batch = testing.padded(text, 3, "left")
    wanted = [model(**given).logits for model in [LLAVA.base()] for given in (text, batch)]
    tokens = LLAVA.base().generate(**batch, max_new_tokens=8, do_sample=False)
    model = llava()
    assert all(torch.equal(model(**given).logits, w) for given, w in zip((text, batch), wanted, strict=True))
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), tokens)
    assert "nothing was moved" in str(var.report(model))


@pytest.mark.parametrize(
    "changes",
    [{"recycle": 0.0}, {"non_sink_min": 1.5}, {"tau": 5.6}, {"skip_first": 3}, {"skip_first": 1, "skip_last": 2}],
)
def test_where_nothing_is_to_be_moved_the_bits_stay(changes):
    wanted = LLAVA.base()(**LLAVA.inputs).logits
    assert torch.equal(llava(**changes)(**LLAVA.inputs).logits, wanted)
    assert not torch.equal(llava()(**LLAVA.inputs).logits, wanted)


def test_no_image_sink_no_change_whatever_the_text_has():
    model = llama(image_rows(20, (4, 9)), skip_last=2)
    embeddings = torch.nn.functional.one_hot(torch.arange(20) + 2, 32).float()[None]  # dimensions 0 and 1 are small
    embeddings[:, 12, 0] = 50.0
    assert marks(model, {"inputs_embeds": embeddings})[0].nonzero()[:, 1].tolist() == [4, 5, 6, 7, 8, 12]
    ours = model(inputs_embeds=embeddings).logits
    embeddings[:, 6, 0] = 50.0
    moved = model(inputs_embeds=embeddings).logits
    patchattn.unpatch(model)
    assert not torch.equal(moved, model(inputs_embeds=embeddings).logits)
    embeddings[:, 6, 0] = 0.0
    assert torch.equal(ours, model(inputs_embeds=embeddings).logits)


def test_image_tokens_and_text_before_the_image_stay_as_they_are():
    visual = image_rows(20, (4, 9))
    model, tokens = llama(visual), ids(20)
    ours = model(tokens).logits
    wanted = patchattn.unpatch(model)(tokens).logits
    torch.testing.assert_close(ours[:, :9], wanted[:, :9], atol=1e-6, rtol=0)
    assert ((ours - wanted)[:, 9:].abs().amax(dim=-1) > 1e-5).all()


# ---- several images, batches, chunks, caches -----------------------------------------------------------------


def test_a_query_sees_the_images_before_it():
    tokens = ids(26)
    both = llama(image_rows(26, (3, 8), (14, 19)))(tokens).logits
    first = llama(image_rows(26, (3, 8)))(tokens[:, :14]).logits
    torch.testing.assert_close(both[:, :14], first, atol=1e-6, rtol=0)
    assert (both[:, 19:] - llama(image_rows(26, (3, 8)))(tokens).logits[:, 19:]).abs().max() > 1e-4


def test_a_padded_batch_of_different_images_equals_each_alone():
    lengths, width = (17, 24), 24
    visual, tokens = torch.zeros(2, width, dtype=torch.bool), torch.zeros(2, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        visual[row, width - length + 3 + row : width - length + 8] = True
        tokens[row, width - length :] = ids(length, seed=row)[0]
    padding = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    model = llama(visual)
    cache = DynamicCache(config=model.config)
    together = [model(tokens[:, :width], attention_mask=padding, past_key_values=cache).logits]
    for step in range(3):
        padding = torch.cat([padding, torch.ones(2, 1, dtype=torch.long)], dim=1)
        together.append(model(ids(1, 2, step), attention_mask=padding, past_key_values=cache).logits)
    out = torch.cat(together, dim=1)
    for row, length in enumerate(lengths):
        alone, kept = llama(visual[row : row + 1, width - length :]), DynamicCache(config=model.config)
        wanted = [alone(tokens[row : row + 1, width - length :], past_key_values=kept).logits]
        wanted += [alone(ids(1, 2, step)[row : row + 1], past_key_values=kept).logits for step in range(3)]
        torch.testing.assert_close(out[row : row + 1, width - length :], torch.cat(wanted, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cuts", [(5, 20), (2, 3, 5, 15), (9, 9, 7)])
def test_a_prompt_in_chunks_finds_the_sinks_of_the_whole(cuts):
    model, tokens = llama(image_rows(25, (4, 11))), ids(25)
    whole, cache = model(tokens).logits, DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)
    plain = DynamicCache(config=model.config)
    model(tokens, past_key_values=plain)
    assert all(torch.equal(a.marks, b.marks) for a, b in zip(cache.layers, plain.layers, strict=True))


def test_generated_tokens_are_no_sinks_unless_they_may_be():
    tokens = ids(25)
    outs = {}
    for allowed in (False, True):
        model, cache = llama(image_rows(15, (4, 11)), generated_sinks=allowed), DynamicCache(config=LlamaConfig(**TEXT))
        steps = [model(tokens[:, :15], past_key_values=cache).logits]
        steps += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(15, 25)]
        outs[allowed] = torch.cat(steps, dim=1)
        kinds = torch.stack([layer.marked(25)[0] for layer in cache.layers])
        assert bool((kinds[:, 15:] == TEXT_SINK).any()) is allowed
    torch.testing.assert_close(outs[True], llama(image_rows(15, (4, 11)))(tokens).logits, atol=1e-5, rtol=0)
    assert (outs[True] - outs[False])[:, 16:].abs().max() > 1e-4


def test_tokens_given_back_leave_no_trace():
    model, tokens = llama(image_rows(20, (4, 11)), generated_sinks=True), ids(20)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :16], past_key_values=cache)
    wanted = model(tokens[:, 16:], past_key_values=cache).logits
    cache.crop(-4)
    for token in (7, 9):
        model(torch.tensor([[token]]), past_key_values=cache)
    cache.crop(-2)
    torch.testing.assert_close(model(tokens[:, 16:], past_key_values=cache).logits, wanted, atol=1e-5, rtol=0)


SCRIPT = """
import sys, torch
from patchattn import testing
import patchattn
setup = testing.Setup(patchattn.VAR(**{settings}), testing.FAMILIES["llava"])
model = patchattn.patch(setup.base(), setup.method)
for seed in map(int, sys.argv[1:]):
    random = torch.Generator().manual_seed(seed)
    inputs = setup.family.inputs(1, 20 + seed)
    inputs["pixel_values"] = torch.randn(1, 3, 8, 8, generator=random)
    out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True,
                         suppress_tokens=[testing.IMAGE_TOKEN], return_dict_in_generate=True)
    print(seed, out.sequences.tolist(), [step.double().sum().item() for step in out.logits])
"""


def test_two_prompts_in_one_process_give_what_two_processes_give():
    def run(*seeds):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT.replace("{settings}", repr(SETTINGS)), *map(str, seeds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        return done.stdout.splitlines()

    together = run(1, 2)
    assert len(together) == 2 and together == run(1) + run(2)


def test_a_cache_of_the_patch_is_refused_elsewhere():
    model = llava()
    cache = DynamicCache(config=model.config)
    model(**LLAVA.inputs, past_key_values=cache)
    step = {"input_ids": torch.ones(2, 1, dtype=torch.long), "past_key_values": cache}
    with patchattn.disabled(model), pytest.raises(RuntimeError, match="start with a new cache"):
        model(**step)


# ---- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sink_dims": "all"}, "sink_dims is 'all'; it must be \"auto\" or dimensions"),
        ({"sink_dims": ()}, 'it must be "auto" or dimensions'),
        ({"sink_dims": (-1,)}, 'it must be "auto" or dimensions'),
        ({"tau": 0}, "tau is 0; it must be more than 0"),
        ({"recycle": 1.2}, "recycle is 1.2; it must be from 0 to 1"),
        ({"preset": "best"}, "preset is 'best'; it must be one of 'general', 'hallucination', 'vision'"),
        ({"non_sink_min": -0.1}, "non_sink_min is -0.1; it must be None or 0 or more"),
        ({"min_visual": 2}, "min_visual is 2; it must be from 0 to 1"),
        ({"skip_first": -1}, "skip_first is -1; it must be an integer of at least 0"),
        ({"visual_mask": [1, 0]}, r"visual_mask is \[1, 0\]; it must be None or an array \[rows, tokens\]"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        patchattn.VAR(**fields)


def test_presets_are_the_papers_and_an_own_number_goes_before_them():
    least = {
        name: patchattn.VAR(preset=name).config.rule.non_sink_min for name in ("general", "hallucination", "vision")
    }
    assert least == {"general": 0.8, "hallucination": 0.5, "vision": 0.9}
    assert patchattn.VAR(preset="vision", non_sink_min=0.3).config.rule == (0.6, 0.3, 0.2)
    model = llava()
    before = model(**LLAVA.inputs).logits
    with patchattn.settings(model, recycle=1.0, min_visual=0.0):
        assert not torch.equal(model(**LLAVA.inputs).logits, before)
    assert torch.equal(model(**LLAVA.inputs).logits, before)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**TEXT)), {}, "names no image token; say with visual_mask"),
        (LLAVA.base, {"tau": 5.7}, r"no value of 32 can be 5.657 times their root mean square"),
        (LLAVA.base, {"sink_dims": (3, 32)}, "sink_dims names 32, but its hidden states have 32 dimensions"),
        (lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=7)), {"visual_mask": [[True]]},
         "this layer sees a window of 7 tokens only"),
    ],
)  # fmt: skip
def test_what_it_does_not_fit_is_said_before_anything_changes(build, fields, message):
    model = build()
    before = testing.snapshot(model)
    with pytest.raises(ValueError, match=message):
        patchattn.patch(model, patchattn.VAR(**{**SETTINGS, **fields}))
    assert testing.snapshot(model) == before


def test_nothing_may_come_after_it_that_would_not_run():
    with pytest.raises(ValueError, match="var computes attention itself, so duo_attention after it"):
        patchattn.patch(LLAVA.base(), [patchattn.VAR(**SETTINGS), patchattn.DuoAttention(sink=1, recent=2)])


def test_a_gate_goes_over_it():
    model = patchattn.patch(LLAVA.base(), [patchattn.GatedAttention(), patchattn.VAR(**SETTINGS)])
    torch.testing.assert_close(model(**LLAVA.inputs).logits, llava()(**LLAVA.inputs).logits)


def test_a_part_of_the_model_alone_is_refused():
    model = llava()
    with pytest.raises(RuntimeError, match="it is unknown which tokens are of an image"):
        model.model(**LLAVA.inputs)
    with pytest.raises(ValueError, match="visual_mask has 2 rows, the batch 3"):
        llama(image_rows(8, (2, 4), rows=2))(ids(8, 3))


# ---- sink dimensions -----------------------------------------------------------------------------------------

WIDE = dict(hidden_size=128, head_dim=32)


def planted(*dims):
    """A model whose first token stands out in these dimensions, the last of them most."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, **WIDE})).eval()
    for place, dim in enumerate(dims):
        model.model.embed_tokens.weight.data[1, dim] = (20.0 + 5 * place) * (-1) ** place
    return model


def test_planted_sink_dimensions_are_found_largest_first():
    model = planted(17, 80)
    assert var.find_sink_dims(model, threshold=5.0) == (80, 17)
    assert var.find_sink_dims(model, [torch.tensor([1, 9, 8, 7])], threshold=5.0) == (80, 17)
    patchattn.patch(model, patchattn.VAR(**{**SETTINGS, "sink_dims": "auto", "tau": 5.0, "visual_mask": [[True]]}))
    assert var._sites(model)[0][1].config.sink_dims == (80, 17)
    assert var.find_sink_dims(model, threshold=5.0) == (80, 17)
    hidden = model.model.embed_tokens(torch.tensor([[1, 9]]))
    assert sink_value(hidden, (80, 17))[0, 0] > 5 > sink_value(hidden, (80, 17))[0, 1]


def test_where_nothing_stands_out_automatic_dimensions_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="no dimension of the first token exceeds 5.0 times"):
        assert var.find_sink_dims(planted(), threshold=5.0) == ()
    model = planted()
    before = testing.snapshot(model)
    settings = {**SETTINGS, "sink_dims": "auto", "tau": 5.0, "visual_mask": [[True]]}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="sink_dims is 'auto', but in no dimension"):
        patchattn.patch(model, patchattn.VAR(**settings))
    assert testing.snapshot(model) == before
    patchattn.patch(found := planted(5), patchattn.VAR(**settings))
    patchattn.save(found, tmp_path)
    loaded = patchattn.load(planted(), tmp_path)  # where a search would find nothing
    assert var._sites(loaded)[0][1].config.sink_dims == (5,)


# ---- report and picture --------------------------------------------------------------------------------------


def test_the_report_says_where_the_sinks_are_and_how_many_rows_were_moved():
    model = llava()
    kinds = marks(model, LLAVA.inputs)
    report = var.report(model)
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    for layer, found in zip(report.layers, kinds, strict=True):
        assert layer.image_sinks == [row.nonzero()[:, 0].tolist() for row in found == IMAGE_SINK]
        assert 0 < layer.moved < 1 and layer.moved_step is None
    model.generate(**LLAVA.inputs, max_new_tokens=3, min_new_tokens=3, suppress_tokens=[IMAGE_TOKEN])
    assert all(0 <= layer.moved_step <= 1 for layer in var.report(model).layers)
    assert "rows moved" in str(report) and "rows moved" in str(patchattn.explain(model))
    with pytest.raises(ValueError, match="no layer of this LlavaForConditionalGeneration has VAR on it"):
        var.report(patchattn.patch(LLAVA.base(), "dense"))


def test_the_picture_shows_weight_leaving_the_sinks_for_the_rest_of_the_image(tmp_path):
    model = llava()
    for layer in var.image_weights(model, **LLAVA.inputs):
        heads = layer.moved
        assert (layer.after[heads][:, layer.sinks] < layer.before[heads][:, layer.sinks]).all()
        assert (layer.after[heads][:, ~layer.sinks] > layer.before[heads][:, ~layer.sinks]).all()
        assert torch.equal(layer.after[~heads], layer.before[~heads])
    file = var.picture(model, tmp_path / "image.png", row=1, **LLAVA.inputs)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"the image has 4 tokens, which is not 3 x 2; give grid"):
        var.picture(model, tmp_path / "image.png", grid=(3, 2), **LLAVA.inputs)
    with pytest.raises(ValueError, match="VAR moved nothing on any layer"):
        var.image_weights(model, **testing._text_inputs(1, 9))
