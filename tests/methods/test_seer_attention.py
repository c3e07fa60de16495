"""SeerAttention's gates where they leave blocks out: batches, calls, caches, what is never read, and how they learn."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn import losses, seer, testing
from patchattn.living import freeze_base, patch_parameters, watching
from patchattn.record import attachment_of, record_of

SPARSE = {"block": 4, "top_k_blocks": 2, "last_block_dense": False, "dense_below": 0}
SPARSE_DECODE = {"block": 4, "token_budget": 8}


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, vocab_size=64)  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def patched(*methods: Any, **changes: Any) -> Any:
    model = patchattn.patch(tiny(**changes), list(methods))
    torch.manual_seed(1)
    for parameter in patch_parameters(model).values():  # else gates hardly tell blocks apart
        parameter.data.normal_()
    return model


def tokens(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_calls(model: Any, ids: Tensor, lengths: list[int], cache: Any = None, **options: Any) -> Tensor:
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts, at = [], cache.get_seq_length()
    for length in lengths:
        part = {name: tensor[:, : at + length] for name, tensor in options.items()}
        parts.append(model(ids[:, at : at + length], past_key_values=cache, **part).logits)
        at += length
    return torch.cat(parts, dim=1)


def gates(model: Any) -> Iterator[Any]:
    for site in record_of(model).patched:
        yield from attachment_of(site.module).methods


SETUPS = {
    "prompt": patchattn.SeerAttention(**SPARSE),
    "decode": patchattn.SeerAttentionDecode(**SPARSE_DECODE),
    "both": [patchattn.SeerAttention(**SPARSE), patchattn.SeerAttentionDecode(**SPARSE_DECODE)],
}
CHECKS = (testing.check_padding_does_not_matter, testing.check_static_cache, testing.check_caches_follow_the_batch,
          testing.check_rows_do_not_mix, testing.check_cache_bytes, testing.check_unpatch_restores_everything,
          testing.check_save_and_load_keep_the_outputs, testing.check_only_the_patch_takes_gradients)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("kind", ["prompt", "decode"])
def test_what_holds_for_every_method_holds_where_blocks_are_left_out(kind, check):
    check(testing.Setup(SETUPS[kind], testing.FAMILIES["qwen3"]))


@pytest.mark.parametrize("kind", list(SETUPS))
def test_blocks_are_left_out(kind):
    model, ids = patchattn.patch(tiny(), SETUPS[kind]), tokens(40)
    out = in_calls(model, ids, [30] + [1] * 10)
    patchattn.unpatch(model)
    difference = (in_calls(model, ids, [30] + [1] * 10) - out).abs().amax(dim=2)[0]
    assert (difference[16:30].max() > 1e-4) == (kind != "decode")
    assert difference[30:].max() > 1e-4


@pytest.mark.parametrize("lengths", [[24, 12], [8, 4, 24], [12] * 3], ids=str)
def test_a_prompt_in_calls_that_end_with_blocks_is_the_prompt(lengths):
    model, ids = patched(patchattn.SeerAttention(**SPARSE)), tokens(36, rows=2)
    torch.testing.assert_close(in_calls(model, ids, lengths), in_calls(model, ids, [36]), rtol=0, atol=1e-5)


def test_a_block_that_began_in_an_earlier_call_goes_on():
    """All but the block that was cut read as in one call: the later call knows the queries before it."""
    model, ids = patched(patchattn.SeerAttention(**SPARSE), num_hidden_layers=1), tokens(36)
    cut, whole = in_calls(model, ids, [18, 18]), in_calls(model, ids, [36])
    torch.testing.assert_close(cut[:, :16], whole[:, :16], rtol=0, atol=1e-5)
    torch.testing.assert_close(cut[:, 18:], whole[:, 18:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(SETUPS))
def test_padded_rows_decode_as_they_do_alone(kind):
    model = patched(*(SETUPS[kind] if isinstance(SETUPS[kind], list) else [SETUPS[kind]]))
    ids, mask = tokens(40, rows=3), torch.ones(3, 40, dtype=torch.long)
    for row, pads in enumerate((0, 3, 9)):
        mask[row, :pads] = 0
    together = in_calls(model, ids, [26, 1, 1, 1, 5] + [1] * 6, attention_mask=mask)
    for row, pads in enumerate((0, 3, 9)):
        alone = in_calls(model, ids[row : row + 1, pads:], [26 - pads, 1, 1, 1, 5] + [1] * 6)
        torch.testing.assert_close(together[row : row + 1, pads:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1] * 40, [3] + [1] * 37, [17, 5, 1, 1, 16]], ids=["ones", "three", "mixed"])
def test_keys_of_blocks_do_not_depend_on_how_they_were_filled(lengths):
    kept = []
    for cut in ([40], lengths):
        model = patched(*SETUPS["both"], num_hidden_layers=1)
        cache = DynamicCache(config=model.config)
        in_calls(model, tokens(40, rows=2), cut, cache)
        kept.append([notes.keys[:, :, :10] for notes in cache.layers[0].notes.values()])
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=1e-5)


def test_the_published_position_of_a_block_filled_while_decoding_is_that_of_its_last_token():
    found = []
    for position in ("block_start", "block_end"):
        model = patched(patchattn.SeerAttentionDecode(**SPARSE_DECODE, gate_key_position=position), num_hidden_layers=1)
        cache = DynamicCache(config=model.config)
        in_calls(model, tokens(16), [8] + [1] * 8, cache)
        found.append(cache.layers[0].notes["seer_attention_decode"].keys[:, :, :4])
    torch.testing.assert_close(found[0][:, :, :2], found[1][:, :, :2])
    torch.testing.assert_close(found[0].norm(dim=-1), found[1].norm(dim=-1))
    assert (found[0] - found[1])[:, :, 2:].abs().amax() > 1e-2


@pytest.mark.parametrize("kind", list(SETUPS))
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 4)], ids=["one KV head", "a KV head each"])
def test_any_number_of_kv_heads_and_short_prompts(kind, heads, groups):
    methods = SETUPS[kind] if isinstance(SETUPS[kind], list) else [SETUPS[kind]]
    model = patched(*methods, num_attention_heads=heads, num_key_value_heads=groups)
    for first in (1, 2, 3, 13):
        out = in_calls(model, tokens(first + 6), [first] + [1] * 6)
        assert out.isfinite().all()
    short = in_calls(model, tokens(3), [3])  # less than a block
    patchattn.unpatch(model)
    torch.testing.assert_close(short, in_calls(model, tokens(3), [3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "decode"])
def test_what_is_not_chosen_is_never_read(kind):
    model = patched(SETUPS[kind], num_hidden_layers=1)
    ids, lengths = tokens(41), [40, 1] if kind == "decode" else [40]
    with patchattn.settings(model, keep_first=False):
        wanted = in_calls(model, ids, lengths)
    chosen: list[Tensor] = []
    (gate,) = gates(model)
    choose = gate.choose
    gate.__dict__["choose"] = lambda *given: chosen.append(choose(*given)) or chosen[-1]
    spoiled = torch.zeros(1, 1, 41, 1, dtype=torch.bool)

    def around(ctx: Any) -> Tensor:
        new = slice(ctx.past_length, ctx.past_length + ctx.q.shape[2])
        ctx.v = ctx.v.masked_fill(spoiled[:, :, new], torch.nan)
        return ctx.attend()

    unread = 0
    for block in range(9):
        spoiled.zero_()[:, :, 4 * block : 4 * block + 4] = True
        with watching(model, around), patchattn.settings(model, keep_first=False):
            out = in_calls(model, ids, lengths)
        read = chosen[-1][0, :, :, block].any(dim=0)  # by blocks of queries, or by the one token
        queries = read.repeat_interleave(4) if kind == "prompt" else read
        ours = out[0, -len(queries) :]
        assert ours[queries].isnan().any(dim=1).all()
        torch.testing.assert_close(ours[~queries], wanted[0, -len(queries) :][~queries])
        unread += int((~queries).sum())
    assert unread


# With a block more than the first and its own, which are always read.
CHOOSING = {"both": [patchattn.SeerAttention(**{**SPARSE, "top_k_blocks": 3}), SETUPS["decode"]],
            "decode": [SETUPS["decode"]]}  # fmt: skip


@pytest.mark.parametrize(
    "kind, kept, removed", [("both", 22, 1), ("both", 22, 3), ("both", 22, 6), ("both", 20, 17), ("decode", 22, 17)]
)
@pytest.mark.parametrize("after", [[1] * 18, [13, 1, 4]], ids=["one at a time", "as a prompt"])
def test_tokens_may_be_given_back(kind, kept, removed, after):
    model, ids = patched(*CHOOSING[kind]), tokens(40)
    straight, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    in_calls(model, ids, [20] + [1] * (kept - 20), straight)
    wrong = torch.cat([ids[:, :kept], tokens(removed, seed=9)], dim=1)
    in_calls(model, wrong, [20] + [1] * (kept - 20 + removed), cache)
    cache.crop(kept)
    ours, wanted = (in_calls(model, ids, after, made) for made in (cache, straight))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_tokens_may_be_given_back_again_and_again_of_padded_rows():
    model, ids = patched(*CHOOSING["both"]), tokens(40, rows=2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = 0
    straight, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    in_calls(model, ids, [21], straight, attention_mask=mask)
    in_calls(model, ids, [21], cache, attention_mask=mask)
    for removed in (2, 4, 1):
        in_calls(model, torch.cat([ids[:, :21], tokens(removed, rows=2, seed=9)], dim=1), [removed], cache,
                 attention_mask=mask)  # fmt: skip
        cache.crop(21)
    ours, wanted = (in_calls(model, ids, [12, 1], kept, attention_mask=mask) for kept in (cache, straight))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_more_than_the_queries_that_are_kept_cannot_be_given_back():
    model, ids = patched(*CHOOSING["both"]), tokens(40)
    cache = DynamicCache(config=model.config)
    before = in_calls(model, ids, [40], cache)
    with pytest.raises(RuntimeError, match=r"cannot give back 11 tokens: .* can give back 4 tokens, one block"):
        cache.crop(-11)
    cache.crop(-12)  # where a block ends
    torch.testing.assert_close(in_calls(model, ids, [12], cache), before[:, 28:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(SETUPS))
def test_beams_carry_their_gates_along(kind):
    model = patched(*(SETUPS[kind] if isinstance(SETUPS[kind], list) else [SETUPS[kind]]))
    ids = tokens(22, rows=2)
    options = dict(max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = model.generate(ids, **options)
    for row in range(2):
        assert torch.equal(model.generate(ids[row : row + 1], **options)[0], together[row])


def test_a_layer_without_its_cache_falls_back_to_reading_all_and_so_does_a_short_prompt():
    model, ids = patched(patchattn.SeerAttention(**{**SPARSE, "dense_below": 41})), tokens(40)
    ours = in_calls(model, ids, [40])
    with patchattn.settings(model, dense_below=40):
        sparse = in_calls(model, ids, [40])
    patchattn.unpatch(model)
    wanted = in_calls(model, ids, [40])
    assert torch.equal(ours, wanted)
    assert not torch.allclose(sparse, wanted, atol=1e-4)


def test_how_short_is_too_short_follows_from_the_device_and_is_told():
    from patchattn.methods.seer_attention import FASTER_FROM

    model = patched(patchattn.SeerAttention(**{**SPARSE, "dense_below": None}), num_hidden_layers=1)
    in_calls(model, tokens(40), [40])
    said = patchattn.explain(model).layers[0].report["seer_attention"]
    assert said == {"blocks read": f"all, 40 tokens are fewer than dense_below = {FASTER_FROM['cpu']:,}"}
    with patchattn.settings(model, dense_below=0):
        in_calls(model, tokens(40), [40])
    assert patchattn.explain(model).layers[0].report["seer_attention"]["blocks read"].partition(" ")[0] != "all,"


@pytest.mark.parametrize("density", [0.1, 0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [16, 128])
def test_a_density_is_the_share_that_is_read(density, blocks):
    scores = torch.rand(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(0))
    config = patchattn.SeerAttention.Config(density=density, last_block_dense=False, keep_diagonal=False,
                                            keep_first=False)  # fmt: skip
    row = torch.arange(blocks)[None]
    mask, allowed = patchattn.SeerAttention.select(scores, row, torch.tensor([blocks]), config)
    assert abs(mask.sum() / allowed.expand_as(mask).sum() - density) <= 1 / blocks
    forced, _ = patchattn.SeerAttention.select(scores, row, torch.tensor([blocks]),
                                               config.replace(keep_diagonal=True, keep_first=True))  # fmt: skip
    assert forced.diagonal(dim1=2, dim2=3).all() and forced[..., 0].all()


def test_equal_scores_take_the_earlier_block_and_an_empty_row_reads_itself():
    config = patchattn.SeerAttention.Config(top_k_blocks=2, last_block_dense=False, keep_diagonal=False,
                                            keep_first=False)  # fmt: skip
    equal, row, blocks = torch.zeros(1, 1, 5, 5), torch.arange(5)[None], torch.tensor([5])
    mask, _ = patchattn.SeerAttention.select(equal, row, blocks, config)
    assert mask[0, 0].sum(dim=0).tolist() == [5, 4, 0, 0, 0]
    nothing = config.replace(top_k_blocks=None, threshold=1.0)
    mask, _ = patchattn.SeerAttention.select(equal, row, blocks, nothing)
    assert torch.equal(mask[0, 0], torch.eye(5, dtype=torch.bool))


def test_a_report_says_how_much_is_read():
    model = patched(patchattn.SeerAttention(**SPARSE, keep_first=False), num_hidden_layers=1)
    in_calls(model, tokens(40), [40])
    (gate,) = gates(model)
    # Two of up to ten blocks in each of ten rows; where its own block is not among them, it is read in place of one.
    assert gate.report()["blocks read"].startswith(f"{19 / 55:.1%}")


# ---- training -----------------------------------------------------------------------------------------------------


def transferred(model: Any, **inputs: Any) -> Tensor:
    found: list[Tensor] = []

    def around(ctx: Any) -> Tensor:
        target = ctx.base()
        found.append(ctx.transfer_loss(target, "block_map"))
        return target

    with watching(model, around):
        model(**inputs)
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["prompt", "decode"])
def test_the_loss_is_the_divergence_from_block_maxima(kind):
    model = patched(SETUPS[kind], num_hidden_layers=1)
    ids, (gate,) = tokens(22), gates(model)
    seen = []

    def look(ctx: Any) -> Tensor:
        weights = torch.nn.functional.pad(ctx.base_weights(0, 22), (0, 2)).unflatten(-1, (6, 4))  # [1, H, T, 6, 4]
        seen.append((weights.amax(dim=-1), gate.block_map(ctx)[0]))
        return ctx.base()

    with watching(model, look):
        model(ids)
    rows, scores = seen[0]
    if kind == "prompt":
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 2)).unflatten(2, (6, 4)).amax(dim=3)
        first, known = 1, torch.ones(6, 6).tril().bool()  # a quarter of six blocks is not taught
    else:
        rows = rows.unflatten(1, (2, 2)).amax(dim=2)[:, :, 11:]
        first, known = 0, torch.arange(6) < torch.arange(11, 22)[:, None] // 4
    rows = (rows * known)[:, :, first:]
    target = rows / rows.sum(dim=-1, keepdim=True)
    logged = scores[:, :, first:].log_softmax(dim=-1)
    wanted = torch.where(target > 0, target * (target.log() - logged), 0.0).sum(dim=-1).mean()
    torch.testing.assert_close(transferred(model, input_ids=ids)[0], wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", list(SETUPS))
def test_padding_is_not_taught(kind, side):
    methods = SETUPS[kind] if isinstance(SETUPS[kind], list) else [SETUPS[kind]]
    model = patched(*[type(m)(m.config.replace(untaught=0.0)) for m in methods])
    ids = tokens(22)
    alone = transferred(model, input_ids=ids)
    batch = torch.nn.functional.pad(ids, (9, 0) if side == "left" else (0, 9))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (9, 0) if side == "left" else (0, 9))
    torch.testing.assert_close(transferred(model, input_ids=batch, attention_mask=mask), alone, rtol=1e-4, atol=1e-5)


def test_both_gates_learn_at_once_and_catch_more_than_before():
    model = freeze_base(patched(*SETUPS["both"], num_hidden_layers=1))
    model.model.layers[0].self_attn.q_proj.weight.data *= 8  # else all blocks weigh alike
    model.model.layers[0].self_attn.k_proj.weight.data *= 8
    optimizer = torch.optim.AdamW(patch_parameters(model).values(), lr=2e-2)
    before, noted = transferred(model, input_ids=tokens(64, rows=4)).sum().item(), []
    for step in range(40):
        loss = transferred(model, input_ids=tokens(64, rows=4, seed=step % 4)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with watching(model, lambda ctx: noted.append(ctx.attachment.methods[0].diagnostics(ctx)) or ctx.base()):
        after = transferred(model, input_ids=tokens(64, rows=4)).sum().item()
        model(tokens(64, rows=4))
    assert after < before / 2
    for gate in ("seer_attention", "seer_attention_decode"):
        caught = {name: noted[0][f"{gate}_{name}_0.3"].item() for name in ("gate", "best", "random")}
        assert caught["random"] < caught["gate"] <= caught["best"] <= 1


def test_packed_documents_are_refused_with_the_setting_to_change():
    model = patched(SETUPS["prompt"])
    positions = torch.cat([torch.arange(10), torch.arange(12)])[None]
    with pytest.raises(ValueError, match="packing: false"):
        transferred(model, input_ids=tokens(22), position_ids=positions, use_cache=False)


def test_gates_that_begin_with_means_score_as_means_do():
    model = patchattn.patch(tiny(num_hidden_layers=1), patchattn.SeerAttention(block=4, init="mean", rope=False))
    (gate,) = gates(model)
    with watching(model, lambda ctx: found.append((gate.block_map(ctx)[0], gate.pooled_scores(ctx, 9))) or ctx.base()):
        found: list[Any] = []
        model(tokens(36))
    scores, means = found[0]
    seen = scores > -torch.inf
    torch.testing.assert_close(scores[seen], (means * 8**-0.5)[seen])


def test_the_share_of_mass_caught_is_that_of_the_highest_scores():
    target = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert seer.mass_caught(target, scores, 0.5) == pytest.approx(0.5)
    assert seer.mass_caught(target, target, 0.5) == pytest.approx(0.8)
    assert seer.mass_caught(target, scores.masked_fill(scores == 3, -torch.inf), 0.4) == pytest.approx(0.2 / 0.7)


def test_the_published_mean_is_over_every_entry():
    model = patched(SETUPS["prompt"], num_hidden_layers=1)
    (gate,) = gates(model)
    found = []

    def look(ctx: Any) -> Tensor:
        scores, block = gate.block_map(ctx)
        used = scores[:, :, 2:]
        found.extend(losses.block_map_divergence(ctx, used, block, reduction=how) for how in ("rows", "reference"))
        return ctx.base()

    with watching(model, look):
        model(tokens(36))
    assert found[1].item() == pytest.approx(found[0].item() / 9)


# ---- settings -----------------------------------------------------------------------------------------------------

WRONG = {
    "two ways": (patchattn.SeerAttention, {"threshold": 0.1, "density": 0.5}, "give one of them"),
    "density 0": (patchattn.SeerAttention, {"density": 0.0}, "density is 0.0"),
    "no blocks": (patchattn.SeerAttention, {"top_k_blocks": 0}, "top_k_blocks is 0"),
    "unknown pool": (patchattn.SeerAttention, {"q_pool": "median"}, "q_pool is 'median'"),
    "no mean to begin with": (patchattn.SeerAttention, {"k_pool": "max", "init": "mean"}, "init is 'mean'"),
    "odd rotary": (patchattn.SeerAttention, {"gate_dim": 7}, "gate_dim is 7"),
    "budget and threshold": (patchattn.SeerAttentionDecode, {"threshold": 0.1}, "token_budget is 4096"),
    "group": (patchattn.SeerAttentionDecode, {"q_heads": "max"}, "q_heads is 'max'"),
}


@pytest.mark.parametrize(("method", "fields", "said"), WRONG.values(), ids=list(WRONG))
def test_wrong_settings_are_named(method, fields, said):
    with pytest.raises(ValueError, match=said):
        method(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"q_pool": "max,min", "k_pool": "avg", "gate_dim": 6},
        {"double": True},
        {"k_pool": "min", "rope": False, "gate_dim": 5},
    ],
    ids=["two pools and another width", "double", "without rotary"],
)
def test_gates_of_other_shapes_choose_and_learn(fields):
    model = patched(patchattn.SeerAttention(**SPARSE, **fields))
    assert in_calls(model, tokens(30), [22] + [1] * 2 + [6]).isfinite().all()
    transferred(model, input_ids=tokens(30)).sum().backward()
    assert all(p.grad.any() for p in patch_parameters(model).values())


@pytest.mark.parametrize("fields", [{"q_heads": "avg"}, {"q_heads": "avgproj", "gate_dim": 6}, {"qk_norm": False}],
                         ids=["mean of the group", "mean through a matrix", "without norms"])  # fmt: skip
def test_decode_gates_of_other_shapes_choose_and_learn(fields):
    model = patched(patchattn.SeerAttentionDecode(**SPARSE_DECODE, **fields))
    assert in_calls(model, tokens(30), [22] + [1] * 8).isfinite().all()
    transferred(model, input_ids=tokens(30)).sum().backward()
    assert all(p.grad.any() for p in patch_parameters(model).values())


def test_the_first_layers_may_stay_as_they_are():
    model = patchattn.patch(tiny(), patchattn.SeerAttentionDecode(start_layer=1))
    assert [site.layer_idx for site in record_of(model).patched] == [1]


def test_sparsity_is_a_setting_of_the_running_model():
    method = patchattn.SeerAttention(block=4, threshold=0.0, last_block_dense=False, dense_below=0)
    model, ids = patched(method, num_hidden_layers=1), tokens(40)
    (gate,) = gates(model)
    shares = []
    for threshold in (0.0, 0.12, 0.3):
        with patchattn.settings(model, threshold=threshold):
            in_calls(model, ids, [40])
            shares.append(float(gate.kept[0].sum() / gate.kept[1].sum()))
    assert shares[0] == 1 > shares[1] > shares[2]
    with patchattn.settings(model, threshold=None):  # the model's own attention
        ours = in_calls(model, ids, [40])
    patchattn.unpatch(model)
    assert torch.equal(ours, in_calls(model, ids, [40]))


# ---- published gates ----------------------------------------------------------------------------------------------

PUBLISHED = {
    "single": (
        patchattn.SeerAttention(block=4, threshold=0.2),
        {"seerattn_gate_type": "Qavg_Kmaxminavg", "seerattn_sparsity_method": "threshold", "seerattn_threshold": 0.2},
        {"key_weight": "mask_linear_k"},
    ),
    "double": (
        patchattn.SeerAttention(block=4, q_pool="max,min", k_pool="avg", gate_dim=6, density=0.4),
        {"seerattn_gate_type": "Qmaxmin_Kavg", "seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.4},
        {"query_weight": "mask_linear_q", "key_weight": "mask_linear_k"},
    ),
    "decode": (
        patchattn.SeerAttentionDecode(block=4, token_budget=8, q_heads="avgproj", k_pool="max,min"),
        {"seerattn_q_head_pooling_type": "Qavgproj", "seerattn_k_seq_pooling_type": "Kmaxmin",
         "seerattn_token_budget": 8, "seerattn_use_qk_norm": True},
        {"query_weight": "attngate_linear_q", "key_weight": "attngate_linear_k", "query_norm": "attngate_qnorm",
         "key_norm": "attngate_knorm"},
    ),
}  # fmt: skip


def publish(folder: Any, model: Any, config: dict[str, Any], names: dict[str, str]) -> None:
    """Write a model's gates as the authors write theirs."""
    weights = {}
    for name, tensor in patch_parameters(model).items():
        layer, _, own = name.partition(".patchattn.0.")
        weights[f"{layer}.attn_gate.{names[own]}.weight"] = tensor.detach().clone()
    torch.save(weights, folder / "attn_gate_weights.pth")
    common = {"architectures": ["LlamaForCausalLM"], "base_model": "someone/tiny", "seerattn_gate_block_size": 4}
    (folder / "config.json").write_text(json.dumps({**common, **config}))


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_published_gates_load_and_are_saved_as_any_patch(kind, tmp_path):
    method, config, names = PUBLISHED[kind]
    model, ids, lengths = patched(method), tokens(40), [30] + [1] * 10
    publish(tmp_path, model, config, names)
    wanted = in_calls(model, ids, lengths)
    loaded = patchattn.load(tiny(), tmp_path)
    assert torch.equal(in_calls(loaded, ids, lengths), wanted)
    patchattn.save(loaded, tmp_path / "saved")
    assert torch.equal(in_calls(patchattn.load(tiny(), tmp_path / "saved"), ids, lengths), wanted)


def test_published_gates_for_other_models_or_with_other_things_in_them_are_refused(tmp_path):
    model = patched(PUBLISHED["single"][0])
    publish(tmp_path, model, *PUBLISHED["single"][1:])
    other = tiny(num_attention_heads=8)
    with pytest.raises(ValueError, match="key_weight in shape"):
        patchattn.load(other, tmp_path)
    torch.save({"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(ValueError, match=r"q_proj\.weight.*no part of a gate"):
        patchattn.load(other, tmp_path)
    torch.save({"model.layers.0": Spoiled()}, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights.only"):
        patchattn.load(other, tmp_path)


class Spoiled:
    """What no file of tensors may hold."""
