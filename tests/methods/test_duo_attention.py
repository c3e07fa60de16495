"""DuoAttention: patterns, identification, what the two prefill rules compute."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import patchattn
import patchattn_kernels
from patchattn import duo
from patchattn.testing import TEXT, snapshot


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **changes})).eval()


def tokens(rows=2, length=30):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(7))


def test_everything_in_the_window_is_dense_attention():
    model, ids = llama(), tokens()
    wanted = model(ids).logits
    for heads, sink, recent in ((0.5, 0, 30), (0.0, 30, 1), (0.0, 12, 18), (1.0, 0, 1)):
        patchattn.patch(model, patchattn.DuoAttention(heads=heads, sink=sink, recent=recent))
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)
        patchattn.unpatch(model)


def test_a_pattern_is_read_row_by_row_for_the_layers_patched():
    pattern = [[1, 0], [0, 1], [1, 1]]
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=pattern, sink=2, recent=5), layers="1-2")
    rows = [list(map(int, layer.self_attn.patchattn[0].full)) for layer in model.model.layers[1:]]
    assert rows == pattern[1:]
    short = patchattn.patch(llama(), patchattn.DuoAttention(heads=pattern[1:], sink=2, recent=5), layers="1-2")
    assert [list(map(int, layer.self_attn.patchattn[0].full)) for layer in short.model.layers[1:]] == pattern[1:]


@pytest.mark.parametrize("kind", ["folder", "tsv", "json", "tensor", "numpy"])
def test_published_patterns_are_read_in_every_form(kind, tmp_path):
    gates = torch.tensor([[0.9, 0.1], [-0.2, 1.3], [0.7, 0.4]])
    folder = duo.save_pattern(tmp_path / "pattern", gates, sink=128, recent=256)
    assert duo.load_settings(folder) == {"sink": 128, "recent": 256}
    (tmp_path / "p.json").write_text(json.dumps({"heads": gates.tolist()}))
    heads = {
        "folder": folder,
        "tsv": folder / duo.PATTERN_FILE,
        "json": tmp_path / "p.json",
        "tensor": gates,
        "numpy": gates.numpy(),
    }[kind]
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=heads, share=0.5, sink=2, recent=5))
    assert [list(map(int, layer.self_attn.patchattn[0].full)) for layer in model.model.layers] == [
        [1, 0],
        [0, 1],
        [1, 0],
    ]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("0.1\t0.2\n0.3", "a.tsv", "its 2 lines must be equally long"),
        ("0.1\tx", "a.tsv", "could not convert string to float: 'x'"),
        ("", "a.tsv", "equally long and not empty"),
        ('{"gates": 1}', "a.json", "is no pattern: 'heads'"),
    ],
)
def test_a_broken_pattern_file_is_refused_by_name(text, name, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        duo.load_pattern(tmp_path / name)


def test_ties_go_to_the_lower_layer_and_head():
    assert duo.binarise([[0.5, 0.5], [0.5, 0.5]], 0.5) == [[1, 1], [0, 0]]
    assert duo.binarise([[0.1, 0.9], [0.9, 0.1]], 0.25) == [[0, 1], [0, 0]]
    assert duo.binarise([[0.1, 0.9]], 0.0) == [[0, 0]] and duo.binarise([[0.1, 0.9]], 1.0) == [[1, 1]]


def test_a_share_is_spread_over_the_layers():
    assert duo.spread(0.5, [4, 4]) == [[1, 1, 0, 0]] * 2
    assert duo.spread(0.25, [2, 2, 2, 2]) == [[1, 0], [0, 0], [1, 0], [0, 0]]
    assert sum(map(sum, duo.spread(1 / 3, [8] * 32))) == round(8 * 32 / 3)
    assert duo.spread(0.0, [3]) == [[0, 0, 0]] and duo.spread(1.0, [3]) == [[1, 1, 1]]


def test_the_published_prefill_depends_on_how_the_prompt_is_cut_and_ours_does_not():
    model, ids = llama(), tokens()

    def last(prefill, chunks):
        patchattn.patch(model, patchattn.DuoAttention(heads=0.0, sink=2, recent=5, prefill=prefill))
        cache, done = DynamicCache(config=model.config), 0
        for chunk in chunks:
            logits = model(ids[:, done : done + chunk], past_key_values=cache).logits[:, -1]
            done += chunk
        patchattn.unpatch(model)
        return logits

    torch.testing.assert_close(last("exact", [30]), last("exact", [10, 10, 10]), atol=1e-5, rtol=0)
    assert (last("chunked", [30]) - last("chunked", [10, 10, 10])).abs().max() > 1e-3


def test_sliding_layers_keep_their_own_window():
    with pytest.raises(ValueError, match="already has a sliding window of 7 tokens"):
        patchattn.patch(MistralForCausalLM(MistralConfig(**TEXT, sliding_window=7)), patchattn.DuoAttention())


# ---- streaming heads: where keys stand, and what is left of those dropped -----------------------------------


def spelled_out(ctx, method):
    """Streaming heads by the papers' words, one query after the other: `[B, T, H, D]`."""
    config, group = method.config, ctx.q.shape[1] // ctx.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (ctx.k, ctx.v))
    rows = []
    for i in range(ctx.q.shape[2]):
        kept = [j for j in range(i + 1) if j < config.sink or i - j < config.recent]
        dropped = [j for j in range(i + 1) if j not in kept]
        q, keys, values = ctx.q[:, :, i : i + 1], k[:, :, kept], v[:, :, kept]
        if config.positions == "cache":
            places = torch.arange(len(kept))[None]
            q, keys = ctx.rotate(q, places[:, -1:]), ctx.rotate(keys, places)
        weights = (q @ keys.mT * q.shape[-1] ** -0.5).exp()
        total, out = weights.sum(-1, keepdim=True), weights @ values
        if config.compensation and dropped:
            mean_k, mean_v = (x[:, :, dropped].mean(dim=2, keepdim=True) for x in (k, v))
            weight = len(dropped) * (q @ mean_k.mT * q.shape[-1] ** -0.5).exp()
            total, out = total + weight, out + weight * mean_v
        rows.append(out / total)
    return torch.cat(rows, dim=2).transpose(1, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "cache"},
        {"positions": "cache", "sink": 0},
        {"compensation": True},
        {"compensation": True, "slack": 4},
        {"compensation": True, "sink": 0},
    ],
)
def test_streaming_heads_compute_what_the_papers_say_in_a_prompt_and_token_by_token(fields):
    model = patchattn.patch(llama(), patchattn.DuoAttention(**{"heads": 0, "sink": 2, "recent": 5, **fields}))
    ids, seen = tokens(), []

    def compare(ctx):
        out = ctx.attend()
        torch.testing.assert_close(out, spelled_out(ctx, ctx.attachment.methods[0]), atol=1e-5, rtol=1e-5)
        seen.append(ctx.layer_idx)
        return out

    with torch.no_grad():
        with patchattn.living.watching(model, compare):
            full = model(ids).logits
        assert seen == [0, 1, 2]
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([11, *[1] * 12, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)


def test_with_cache_positions_no_place_exceeds_what_is_kept():
    places = []
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=0, sink=2, recent=5, positions="cache"))
    original = model.model.rotary_emb.forward

    def noting(x, position_ids):
        places.append(int(position_ids.max()))
        return original(x, position_ids)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in tokens().split(1, dim=1):
            model(part, past_key_values=cache)
            places.clear()
        model.model.rotary_emb.forward = noting
        model(part, past_key_values=cache)
    assert places[0] == 30 and max(places[1:]) == 6  # the first is the model's own, which nothing uses


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "relative"}, "positions is 'relative'; it must be one of 'absolute', 'cache'"),
        ({"positions": "cache", "prefill": "chunked"}, "prefill is 'chunked'; it must be 'exact' where positions"),
        ({"positions": "cache", "compensation": True}, "compensation is True; it must be False where positions"),
        ({"compensation": True, "prefill": "chunked"}, "prefill is 'chunked'; it must be 'exact' where compensation"),
        ({"compensation": 0.5}, "compensation is 0.5; it must be True or False"),
        ({"slack": -1}, "slack is -1; it must be an integer of at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        patchattn.DuoAttention(**fields)


def test_a_compensation_token_refuses_packed_sequences():
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=0, sink=2, recent=5, compensation=True))
    places = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    with pytest.raises(ValueError, match="does not say which tokens a compensation token is to stand for"):
        model(tokens(), position_ids=places, use_cache=False)


@pytest.mark.parametrize("positions", ["absolute", "cache"])
def test_packed_sequences_are_as_each_alone(positions):
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=0.5, sink=2, recent=5, positions=positions))
    ids = tokens(1)
    places = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split([12, 18], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


INTERPRETED = [
    {},
    *(pytest.param(fields, marks=pytest.mark.slow) for fields in ({"prefill": "chunked"}, {"positions": "cache"})),
]


@pytest.mark.parametrize("fields", INTERPRETED)
def test_the_triton_kernels_give_what_torch_gives(fields):
    model = llama(num_hidden_layers=1, head_dim=16)
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=2, recent=5, slack=1, **fields))
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :4] = 0
    found = {}
    for backend in ("torch", "triton"):
        cache, done, parts = DynamicCache(config=model.config), 0, []
        with torch.no_grad(), patchattn_kernels.backend(backend):
            for length in (13, 7, 1):
                done += length
                part = dict(input_ids=ids[:, done - length : done], attention_mask=mask[:, :done])
                parts.append(model(**part, past_key_values=cache).logits)
        found[backend] = torch.cat(parts, dim=1)[mask.bool()]
    torch.testing.assert_close(found["triton"], found["torch"], atol=1e-5, rtol=0)


def test_a_compensation_token_says_that_it_has_no_kernel():
    model = patchattn.patch(llama(num_hidden_layers=1), patchattn.DuoAttention(sink=1, recent=2, compensation=True))
    with patchattn_kernels.backend("triton"), pytest.raises(RuntimeError, match="its kernel has no compensation token"):
        model(tokens())


# ---- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"positions": "cache"}, {"compensation": True}, {"prefill": "chunked"}])
def test_up_to_slack_tokens_are_given_back_exactly_and_no_more(fields):
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=0.5, sink=2, recent=5, slack=4, **fields))
    ids = tokens()
    wrong = (ids + 1) % 50 + 5
    plain, cropped = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in (plain, cropped):
            model(ids[:, :17], past_key_values=cache)
        for _ in range(2):  # a second time before what was given back has been written over
            model(wrong[:, 17:21], past_key_values=cropped)
            cropped.crop(-3)
            model(wrong[:, 18:20], past_key_values=cropped)
            cropped.crop(-3)
        assert cropped.get_seq_length() == 17
        for at in (17, 18, 19, 24):
            part = ids[:, at : 30 if at == 24 else 24 if at == 19 else at + 1]
            wanted, ours = (model(part, past_key_values=cache).logits for cache in (plain, cropped))
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match=r"cannot give back 5 tokens: .* no more than slack = 4 may be given back"):
        cropped.crop(-5)


@pytest.mark.parametrize("fields", [{}, {"positions": "cache"}, {"compensation": True}])
def test_assisted_decoding_with_slack_writes_what_the_model_writes_alone(fields):
    model, assistant = llama(), llama(num_hidden_layers=1)
    ids = tokens(1, 20)
    options = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=2, recent=5, slack=24, **fields))
    wanted = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), wanted)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), wanted)


@pytest.mark.parametrize(("slack", "compensation"), [(0, False), (4, False), (4, True)])
def test_the_cache_holds_as_many_bytes_as_the_formula_says(slack, compensation):
    pattern = [[1, 0], [0, 0], [1, 1]]
    model = llama().bfloat16()
    patchattn.patch(
        model, patchattn.DuoAttention(heads=pattern, sink=2, recent=5, slack=slack, compensation=compensation)
    )
    cache, rows, length = DynamicCache(config=model.config), 2, 30
    with torch.no_grad():
        model(tokens(rows, length), past_key_values=cache)
    full, streaming, size = 3, 3, model.config.head_dim
    numbers = 2 * size * rows * (full * length + streaming * (2 + 5 + slack))
    sums = 2 * size * rows * streaming * compensation
    streaming_layers = 2
    assert patchattn.cache_bytes(cache) == 2 * numbers + 4 * sums + 8 * rows * streaming_layers


# ---- identification ---------------------------------------------------------------------------------------


def test_identification_keeps_the_heads_that_matter_and_leaves_the_model_as_it_was():
    model = llama(num_hidden_layers=2)
    for layer in model.model.layers:  # the second KV head (query heads 2 and 3) reaches nobody
        layer.self_attn.o_proj.weight.data[:, 16:] = 0
        layer.self_attn.o_proj.weight.data[:, :16] *= 40
    before, requires = snapshot(model), [p.requires_grad for p in model.parameters()]
    ids = tokens(1, 40)
    labels = ids.clone()
    labels[:, :20] = -100
    steps = []
    gates = duo.identify(model, [(ids, labels)] * 25, steps=25, rate=0.1, sink=1, recent=2, on_step=steps.append)
    assert gates.shape == (2, 2)
    assert (gates[:, 0] > gates[:, 1] + 0.3).all(), gates
    assert len(steps) == 25 and steps[-1].penalty < steps[0].penalty
    assert snapshot(model) == before and [p.requires_grad for p in model.parameters()] == requires
    assert all(p.grad is None for p in model.parameters())


def test_identification_unpatches_also_when_a_step_fails():
    model = llama(num_hidden_layers=1)
    before = snapshot(model)

    def stop(step):
        raise KeyboardInterrupt

    ids = tokens(1, 10)
    with pytest.raises(KeyboardInterrupt):
        duo.identify(model, [(ids, ids)], steps=5, on_step=stop)
    assert snapshot(model) == before


def test_a_student_without_its_teacher_and_padded_batches_are_refused():
    model, ids = patchattn.patch(llama(), duo.HeadGates(sink=1, recent=2)), tokens()
    with pytest.raises(RuntimeError, match="the student runs before its teacher"):
        model(ids)
    with duo.teaching(model), pytest.raises(ValueError, match="the batch must be without padding"):
        model(ids, attention_mask=(torch.arange(30) > 3).expand(2, -1))


def test_a_search_with_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = patchattn.patch(llama(), duo.HeadGates(sink=1, recent=2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        patchattn.living.freeze_base(model)
        with duo.teaching(model):
            teacher = model.model(tokens(), use_cache=False).last_hidden_state
        assert not teacher.requires_grad
        student = model.model(tokens(), use_cache=False).last_hidden_state
        with torch.no_grad():
            teacher = teacher + 1  # with every gate at 1 the student equals its teacher, and nothing would be learned
        duo.distill_loss(teacher, student, tokens()).backward()
        gradients.append(torch.stack([gate.grad for gate in patchattn.living.patch_parameters(model).values()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_a_pattern_is_drawn_with_the_heads_kept_framed(tmp_path):
    gates = [[0.9, 0.1], [0.2, 0.7], [0.4, 0.3]]
    plain = duo.draw_pattern(tmp_path / "plain.png", gates).read_bytes()
    framed = duo.draw_pattern(tmp_path / "framed.png", torch.tensor(gates), share=0.5).read_bytes()
    assert plain[:4] == framed[:4] == b"\x89PNG" and plain != framed


def test_the_students_own_branch_gives_other_gradients():
    model, ids = llama(num_hidden_layers=2), tokens(1, 20)
    gradients = []
    for teacher_branch in (True, False):
        duo.identify(model, [(ids, ids)], steps=1, sink=1, recent=2, start=0.5, teacher_branch=teacher_branch,
                     on_step=lambda step: gradients.append(step.gradient))  # fmt: skip
    # The first layer's student sees what its teacher sees; the second layer's does not.
    assert not torch.allclose(gradients[0], gradients[1])


class Words:
    """One token a word."""

    bos_token_id = 1

    def __init__(self):
        self.known = {}

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return [self.known.setdefault(word, len(self.known) + 2) for word in text.replace("\n\n", " <p> ").split()]


def test_passkey_batches_hide_passkeys_in_the_text_and_ask_for_them():
    words = Words()
    batches = duo.passkey_batches(
        words, "lorem ipsum dolor " * 50, shortest=60, longest=120, lengths=3, passkeys=2, words=4
    )
    lengths = []
    for _ in range(4):
        ids, labels = next(batches)
        assert ids.shape == labels.shape and ids.shape[1] % 16 == 0 and ids[0, 0] == 1
        answered = labels[0] != -100
        assert torch.equal(labels[0][answered], ids[0][answered]) and answered.tolist() == sorted(answered.tolist())
        text, tail = ids[0][~answered].tolist(), ids[0][answered].tolist()
        names = {index: word for word, index in words.known.items()}
        keys = [word for word in (names[t] for t in tail) if word in duo.ALPHABET]
        hidden = [word for word in (names.get(t) for t in text) if word in duo.ALPHABET]
        assert len(keys) == 8 and hidden == keys
        lengths.append(ids.shape[1])
    assert lengths[0] < lengths[1] < lengths[2] and lengths[3] == lengths[0]
    again = duo.passkey_batches(
        words, "lorem ipsum dolor " * 50, shortest=60, longest=120, lengths=3, passkeys=2, words=4
    )
    first = duo.passkey_batches(
        words, "lorem ipsum dolor " * 50, shortest=60, longest=120, lengths=3, passkeys=2, words=4
    )
    assert torch.equal(next(again)[0], next(first)[0])


def test_impossible_passkeys_are_refused():
    with pytest.raises(ValueError, match="passkeys is 11; it must be 1 to 10"):
        next(duo.passkey_batches(Words(), "text", passkeys=11))
    with pytest.raises(ValueError, match="the text has no tokens"):
        next(duo.passkey_batches(Words(), " "))
