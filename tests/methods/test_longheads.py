"""LongHeads: what it reads, at which distances, and that nothing else matters."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    GlmConfig,
    GlmForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import patchattn
from patchattn.methods.longheads import ChunkLayer
from patchattn.testing import TEXT

from .tiny import close, in_parts, llama, tokens

SMALL = dict(chunk=4, window=20)


def patched(model=None, **settings):
    return patchattn.patch(llama() if model is None else model, patchattn.LongHeads(**{**SMALL, **settings}))


@torch.no_grad()
def test_up_to_the_window_it_is_dense_attention():
    model, ids = llama(), tokens()
    wanted = model(ids).logits
    patched(model)
    for parts in ([20], [13, 7], [1] * 20):
        close(in_parts(model, ids, parts), wanted[:, :20])
    ours = model(ids).logits
    close(ours[:, :20], wanted[:, :20])
    assert ((ours - wanted)[:, 20:].abs().amax(dim=(0, 2)) > 1e-4).all(), "past the window something has to be left out"


@torch.no_grad()
def test_a_window_that_holds_everything_is_dense_attention_and_bit_for_bit_so_in_one_call():
    model, ids = llama(), tokens()
    wanted = model(ids).logits
    patched(model, window=72)
    assert torch.equal(model(ids).logits, wanted)
    close(in_parts(model, ids, [9, 30, 1, 30]), wanted)


@torch.no_grad()
def test_from_the_last_but_one_chunk_on_it_does_not_matter_where_choosing_begins():
    ids = tokens()
    close(patched(begin=16)(ids).logits, patched()(ids).logits)
    close(patched(begin=4)(ids).logits, patched()(ids).logits)  # nothing to choose from yet: all is read


@torch.no_grad()
@pytest.mark.parametrize("begin", [4, 16, 20, 32])
def test_no_token_sees_the_future(begin):
    model, ids = patched(begin=begin), tokens(1)
    before = model(ids).logits
    for place in (3, 19, 33, 47, 68):
        changed = ids.clone()
        changed[0, place] = 61
        after = model(changed).logits
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"begin": 32}, {"chunk": 5, "window": 25}, {"chunk_key": "bounds"}])
def test_however_a_prompt_is_cut_the_result_is_the_same(settings):
    model, ids = patched(**settings), tokens()
    wanted = model(ids, use_cache=False).logits
    for parts in ([70], [1] * 70, [3, 25, 1, 1, 1, 1, 1, 37]):
        close(in_parts(model, ids, parts), wanted, 2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("side", "chunk_key"), [("left", "attention"), ("right", "attention"), ("left", "bounds")])
def test_chunks_are_counted_from_the_first_real_token_of_each_row(side, chunk_key):
    model, rows = patched(chunk_key=chunk_key), [tokens(1, length) for length in (61, 70, 33)]
    pad = [(70 - row.shape[1], 0) if side == "left" else (0, 70 - row.shape[1]) for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, width) for row, width in zip(rows, pad, strict=True)])
    mask = (ids != 0).long()
    for parts in ([70], [40, 1, 1, 28], [60] + [1] * 10):
        out = in_parts(model, ids, parts, mask=mask)
        for index, row in enumerate(rows):
            close(out[index][mask[index].bool()], model(row).logits[0], 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunk_key", ["attention", "bounds"])
def test_grouped_heads_are_heads_with_repeated_keys(chunk_key):
    grouped = llama()
    single = llama(num_key_value_heads=4)
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    single.load_state_dict(state)
    ids = tokens()
    close(patched(grouped, chunk_key=chunk_key)(ids).logits, patched(single, chunk_key=chunk_key)(ids).logits)


@torch.no_grad()
def test_the_chunks_of_the_last_token_can_be_looked_at():
    model = patched()
    model(tokens(1, 20))
    assert model.model.layers[0].self_attn.patchattn[0].selected is None, "all was read"
    model(tokens(1))
    chosen = model.model.layers[0].self_attn.patchattn[0].selected
    assert chosen.shape == (1, 4, 5) and (chosen.diff(dim=-1) > 0).all()
    assert (chosen[..., 0] == 0).all() and (chosen[..., -2:] == torch.tensor([16, 17])).all()
    told = patchattn.explain(model).layers[0].report["longheads"]
    assert told == {"read by the last token": "5 chunks of 4 tokens a head"}


@torch.no_grad()
def test_the_published_decoding_differs_only_where_a_chunk_is_completed():
    ids = tokens(1, 41)
    ours, theirs = (in_parts(patched(llama(num_hidden_layers=1), compat=compat), ids, [25] + [1] * 16)
                    for compat in (None, "reference"))  # fmt: skip
    differs = (ours - theirs).abs().amax(dim=(0, 2)) > 1e-5
    assert differs.nonzero().flatten().tolist() == [27, 31, 35, 39]


@torch.no_grad()
def test_the_published_prompt_leaves_out_the_own_key_once_chunks_are_chosen():
    ids = tokens(1)
    model = llama(num_hidden_layers=1)
    ours = patched(model)(ids).logits
    patchattn.unpatch(model)
    theirs = patched(model, include_self=False)(ids).logits
    close(theirs[:, :20], ours[:, :20])
    assert ((ours - theirs)[:, 20:].abs().amax(dim=(0, 2)) > 1e-5).all()


@torch.no_grad()
def test_bounds_choose_the_chunks_whose_keys_could_match_best():
    model, ids = patched(llama(num_hidden_layers=1), chunk_key="bounds"), tokens(1)
    cache = DynamicCache(config=model.config)
    in_parts(model, ids, [50] + [1] * 20, cache)
    layer, method = cache.layers[0], model.model.layers[0].self_attn.patchattn[0]
    keys = layer.kept_keys[0, :, :-1].unflatten(1, (-1, 4))[:, :17]  # of the chunks that are complete
    found = []
    hook = method.register_forward_pre_hook(lambda _, args: found.append(args[0].q))
    model(torch.tensor([[9]]), past_key_values=cache)
    hook.remove()
    for head, q in enumerate(found[0][0, :, 0]):
        best = torch.maximum(q * keys[head // 2].amax(dim=1), q * keys[head // 2].amin(dim=1)).sum(dim=-1)
        assert (best[:, None] >= keys[head // 2] @ q - 1e-5).all()
        free = best[1:16].topk(2).indices + 1
        assert method.selected[0, head].tolist() == sorted([0, *free.tolist(), 16, 17])


@torch.no_grad()
@pytest.mark.parametrize("chunk_key", ["attention", "bounds"])
def test_offloaded_keys_give_the_same(chunk_key):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for given in (None, mask):
        plain, away = (
            in_parts(patched(offload=offload, chunk_key=chunk_key), ids, [30, 1, 20, 1, 18], mask=given)
            for offload in (False, True)
        )
        close(away[given.bool()] if given is not None else away, plain[given.bool()] if given is not None else plain)


def test_offloaded_keys_are_fetched_by_the_chunks_that_are_read():
    cache = ChunkLayer(2, offload=True, bounds=False)
    k = torch.arange(10.0)[None, None, :, None].expand(1, 2, 10, 3)
    place = cache.places(k, None)
    cache.write(k, k, k, place, None)
    keys, values, where = cache.fetch(torch.tensor([[[[0, 3, 4]], [[0, 1, -1]]]], dtype=torch.int32))
    assert keys[0, 0, :, 0].tolist() == [0, 1, 6, 7, 8, 9] and values[0, 1, :4, 0].tolist() == [0, 1, 2, 3]
    assert where.tolist() == [[[[0, 1, 2]], [[0, 1, -1]]]]


@torch.no_grad()
def test_tokens_can_be_given_back_up_to_a_chunk_and_then_not():
    model, ids = patched(), tokens(1)
    wanted = in_parts(model, ids, [70])
    cache = DynamicCache(config=model.config)
    in_parts(model, ids, [50], cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 47
    again = in_parts(model, ids[:, 47:], [1, 1, 21], cache)
    close(again, wanted[:, 47:])
    with pytest.raises(RuntimeError, match="cannot give back 9 tokens: LongHeads keeps what chunk keys are made of"):
        cache.crop(-9)


@torch.no_grad()
def test_with_bounds_any_number_of_tokens_can_be_given_back():
    model, ids = patched(chunk_key="bounds"), tokens(1)
    wanted, cache = in_parts(model, ids, [70]), DynamicCache(config=model.config)
    in_parts(model, ids.flip(1), [70], cache)
    cache.crop(-70)
    in_parts(model, ids, [60], cache)
    cache.crop(-33)
    close(in_parts(model, ids[:, 27:], [1, 1, 41], cache), wanted[:, 27:])


@torch.no_grad()
def test_assisted_decoding_gives_the_tokens_of_greedy_decoding():
    model, assistant, ids = patched(), llama(num_hidden_layers=1), tokens(1, 40)
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, assistant_model=assistant, **options))


@torch.no_grad()
def test_generation_from_one_token_runs_past_the_window():
    model = patched()
    options = dict(max_new_tokens=34, do_sample=False, pad_token_id=0, eos_token_id=None)
    written = model.generate(torch.tensor([[9]]), **options)
    again = model.generate(torch.tensor([[9]]), **options, use_cache=False)
    assert written.shape == (1, 35) and torch.equal(written, again)


@torch.no_grad()
def test_caches_are_copied_reset_and_counted():
    model, ids = patched(), tokens()
    cache = DynamicCache(config=model.config)
    first = in_parts(model, ids, [70], cache)
    layer = cache.layers[0]
    chunks, size = 18, 8
    floats = (
        2 * 2 * (chunks * 4 + 1) * size + 4 * chunks * size + 4 * (2 * 4 + 1) * size
    )  # keys and values, chunk keys, queries
    assert patchattn.cache_bytes(cache) == 2 * 2 * (4 * floats + 2 * 8)
    kept = copy.deepcopy(cache)
    cache.reset()
    assert layer.kept_keys is None and cache.get_seq_length() == 0
    close(in_parts(model, ids, [70], cache), first)
    close(in_parts(model, ids[:, :5], [5], kept), in_parts(model, ids[:, :5], [5], cache))


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        lambda: GlmForCausalLM(GlmConfig(**{**TEXT, "num_hidden_layers": 2}, partial_rotary_factor=0.5)),
        lambda: llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 64}),
        lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    ],
    ids=["interleaved and partial", "yarn", "linear scaling"],
)  # fmt: skip
def test_every_kind_of_rotary_keeps_dense_attention_within_the_window(build):
    torch.manual_seed(0)
    model, ids = build().eval(), tokens(2, 60)
    wanted = model(ids).logits
    patched(model, chunk=4, window=60)
    close(in_parts(model, ids, [50, 1, 9]), wanted)


@torch.no_grad()
def test_sinks_of_a_model_stay():
    torch.manual_seed(0)
    config = GptOssConfig(**{**TEXT, "num_hidden_layers": 2}, num_local_experts=2, num_experts_per_tok=1,
                          layer_types=["full_attention"] * 2)  # fmt: skip
    model, ids = GptOssForCausalLM(config).eval(), tokens(2, 40)
    wanted = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_()
    assert not torch.allclose(model(ids).logits, wanted, atol=1e-4)
    wanted = model(ids).logits
    patched(model, window=40)
    close(in_parts(model, ids, [30, 1, 9]), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 30, "chunk": 8}, "window is 30; it must be a multiple of chunk = 8"),
        ({"window": 24, "chunk": 8}, "window is 24; it must be a multiple of chunk = 8, at least four of them"),
        ({"begin": 30, "chunk": 8}, "begin is 30; it must be a multiple of chunk = 8"),
        ({"chunk": 0}, "chunk is 0; it must be an integer of at least 1"),
        ({"chunk_key": "mean"}, "chunk_key is 'mean'; it must be one of 'attention', 'bounds'"),
        ({"compat": "official"}, "compat is 'official'; it must be None or \"reference\""),
        ({"offload": 1}, "offload is 1; it must be True or False"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        patchattn.LongHeads(**settings)


def test_a_window_beyond_the_trained_length_is_warned_of_once():
    with pytest.warns(
        UserWarning, match="window is 512, but model.layers.0.self_attn has max_position_embeddings = 256"
    ) as told:
        patched(window=512)
    assert len(told) == 1


def test_what_does_not_fit_says_why():
    with pytest.raises(ValueError, match="already has a sliding window of 7 tokens"):
        patched(MistralForCausalLM(MistralConfig(**TEXT, sliding_window=7)))
    model = patched(llama(attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"drops attention weights \(dropout 0.1\)"):
        model(tokens())
    packed = torch.arange(70)[None] % 35
    with pytest.raises(ValueError, match="the model drew a mask of its own over 70 tokens"):
        patched()(tokens(1), position_ids=packed, use_cache=False)


@torch.no_grad()
def test_packed_sequences_within_the_window_are_the_models_own():
    model, ids, packed = llama(), tokens(1, 18), torch.arange(18)[None] % 9
    wanted = model(ids, position_ids=packed, use_cache=False).logits
    assert torch.equal(patched(model)(ids, position_ids=packed, use_cache=False).logits, wanted)
