"""`grouped` against the four ordinary attentions it stands for, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchattn_kernels import backend, check, grouped, masked_attention
from patchattn_kernels.dispatch import recording
from patchattn_kernels.grouped import (
    EPSILON,
    IMAGE,
    IMAGE_SINK,
    PADDING,
    REST,
    TEXT_SINK,
    Rule,
    redistribute,
    reference,
)

RULE = Rule(recycle=0.6, non_sink_min=0.5, min_visual=0.32)
# batch, heads, KV heads, queries, keys, head size, rows with padding
SHAPES = ((1, 4, 4, 45, 45, 16, 0), (2, 6, 2, 53, 53, 32, 9), (3, 8, 4, 1, 61, 8, 5), (2, 4, 1, 13, 40, 16, 3))


def inputs(batch, heads, groups, queries, keys, size, padding, dtype=torch.float32):
    """q, k, v, kinds of keys, and image keys of each query: a third of the keys is an image, with two sinks."""
    random = torch.Generator().manual_seed(keys)
    q = torch.randn(batch, heads, queries, size, generator=random).to(dtype)
    k, v = (torch.randn(batch, groups, keys, size, generator=random).to(dtype) for _ in "kv")
    kinds = torch.full((batch, keys), REST, dtype=torch.int8)
    start, stop = keys // 4, keys // 4 + keys // 3
    kinds[:, start:stop] = IMAGE
    kinds[:, [start + 2, start + 4]] = IMAGE_SINK
    kinds[:, [padding, stop + 2]] = TEXT_SINK
    if padding:
        kinds[0, :padding] = PADDING
    place = torch.arange(queries) + keys - queries
    images = torch.where(place >= stop, stop - start, 0).expand(batch, -1)
    return q, k, v, kinds, images


def four_attentions(q, k, v, kinds, images, rule):
    """The paper's rule from one ordinary attention a kind of key and the logarithm of its sum."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    place = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    seen = (torch.arange(k.shape[2]) <= place) & (kinds != PADDING)[:, None, None]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    whole = scores.logsumexp(dim=-1)
    outs, shares = {}, {}
    for kind in (REST, IMAGE, IMAGE_SINK, TEXT_SINK):
        part = scores.masked_fill((kinds != kind)[:, None, None], float("-inf"))
        shares[kind] = (part.logsumexp(dim=-1) - whole).exp().nan_to_num(0.0)[..., None]
        outs[kind] = part.softmax(dim=-1).nan_to_num(0.0) @ v
    visual = shares[IMAGE] + shares[IMAGE_SINK]
    share = shares[IMAGE_SINK] / (visual + EPSILON * images[:, None, :, None])
    moved = (images > 0)[:, None, :, None] & (share <= 1 - rule.non_sink_min) & (visual >= rule.min_visual)
    recycle = moved * rule.recycle
    gain = recycle * (shares[IMAGE_SINK] + shares[TEXT_SINK])
    out = shares[REST] * outs[REST] + (shares[IMAGE] + gain) * outs[IMAGE]
    for kind in (IMAGE_SINK, TEXT_SINK):
        out = out + (1 - recycle) * shares[kind] * outs[kind]
    return out, moved[..., 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [None, 700])
def test_one_pass_gives_what_four_attentions_merge_to(shape, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(reference, "MASK_ELEMENTS", block)
    q, k, v, kinds, images = inputs(*shape)
    out, moved = grouped(q, k, v, kinds, images, RULE, past=k.shape[2] - q.shape[2])
    wanted, rows = four_attentions(q, k, v, kinds, images, RULE)
    assert torch.equal(moved, rows) and rows.any() and not rows.all()
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=0)


def test_weights_keep_their_sum_and_unmoved_rows_their_weights():
    weights = torch.rand(2, 4, 7, 40).softmax(dim=-1)
    kinds = torch.randint(0, 4, (2, 40), dtype=torch.int8)
    images = torch.tensor([[0, 0, 20, 20, 20, 20, 20]] * 2)
    after, moved = redistribute(weights, kinds, images, Rule(1.0, 0.0, 0.0))
    assert torch.equal(moved, (images > 0)[:, None].expand(-1, 4, -1))
    torch.testing.assert_close(after.sum(dim=-1), torch.ones(2, 4, 7))
    assert torch.equal(after[:, :, :2], weights[:, :, :2])
    sinks = (kinds == IMAGE_SINK) | (kinds == TEXT_SINK)
    assert after[:, :, 2:].masked_select(sinks[:, None, None]).abs().max() < 1e-6


def test_where_all_of_the_image_is_sink_nothing_moves():
    weights = torch.rand(1, 2, 3, 10).softmax(dim=-1)
    kinds = torch.tensor([[TEXT_SINK, 0, *[IMAGE_SINK] * 4, 0, 0, 0, 0]], dtype=torch.int8)
    after, moved = redistribute(weights, kinds, torch.full((1, 3), 4), Rule(0.6, 0.0, 0.0))
    assert not moved.any() and torch.equal(after, weights)


def test_without_a_rule_it_is_ordinary_attention_with_a_gate_on_it():
    q, k, v, kinds, _ = inputs(*SHAPES[1])
    gate = torch.rand(2, 6, 53, 1)
    plain, moved = grouped(q, k, v)
    assert moved is None
    torch.testing.assert_close(plain, masked_attention(q, k, v, causal=True))
    torch.testing.assert_close(grouped(q, k, v, gate=gate)[0], plain * gate)
    seen = torch.ones(53, 53, dtype=torch.bool).tril() & (kinds != PADDING)[:, None, None]
    torch.testing.assert_close(grouped(q, k, v, kinds)[0], masked_attention(q, k, v, seen))
    torch.testing.assert_close(grouped(q, k, v, causal=False)[0], masked_attention(q, k, v))


def test_a_drawn_mask_says_everything():
    q, k, v, kinds, images = inputs(*SHAPES[0])
    seen = torch.ones(1, 1, 45, 45, dtype=torch.bool).tril()
    ours, moved = grouped(q, k, v, kinds, images, RULE, keep=lambda first, last: seen[:, :, first:last])
    wanted, rows = grouped(q, k, v, kinds, images, RULE)
    assert torch.equal(moved, rows)
    torch.testing.assert_close(ours, wanted)


def test_capped_scores_and_sink_logits_take_their_part():
    q, k, v, kinds, images = inputs(*SHAPES[0])
    logits = torch.randn(4)
    scores = 2.0 * torch.tanh(q @ k.mT * 0.3 / 2.0)
    scores = scores.masked_fill(~torch.ones(45, 45, dtype=torch.bool).tril(), float("-inf"))
    weights = torch.cat([scores, logits.view(1, 4, 1, 1).expand(1, 4, 45, 1)], -1).softmax(-1)[..., :-1]
    wanted, rows = redistribute(weights, kinds, images, RULE)
    ours, moved = grouped(q, k, v, kinds, images, RULE, scale=0.3, softcap=2.0, sinks=logits)
    assert torch.equal(moved, rows)
    torch.testing.assert_close(ours, wanted @ v)


@pytest.mark.parametrize("rule", [None, RULE], ids=["plain", "rule"])
def test_gradients_reach_everything_and_take_what_was_moved_as_given(rule):
    q, k, v, kinds, images = inputs(*SHAPES[1], dtype=torch.float64)
    gate = torch.rand(2, 6, 53, 1, dtype=torch.float64)
    given = [x.requires_grad_() for x in (q, k, v, gate)]
    out, _ = grouped(q, k, v, kinds, images, rule, gate=gate)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, given, upstream)
    seen = torch.ones(53, 53, dtype=torch.bool).tril() & (kinds != PADDING)[:, None, None]
    weights = (q @ k.repeat_interleave(3, 1).mT * 32**-0.5).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
    factor = 1.0 if rule is None else (redistribute(weights, kinds, images, rule)[0] / weights).nan_to_num(0).detach()
    wanted = torch.autograd.grad((weights * factor) @ v.repeat_interleave(3, 1) * gate, given, upstream)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_query_that_reads_nothing_gives_zeros():
    q, k, v, kinds, images = inputs(*SHAPES[1])
    out, moved = grouped(q, k, v, kinds, images, RULE)
    padding = kinds[0] == PADDING
    assert torch.equal(out[0, :, padding], torch.zeros(6, 9, 32)) and not moved[0, :, padding].any()


def test_long_inputs_hold_no_square_of_their_length():
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.most = max(self.most, tensor.numel())
            return out

    length, heads = 3001, 4
    q, k, v, kinds, images = inputs(1, heads, 2, length, length, 16, 0)
    with Largest() as seen:
        grouped(q, k, v, kinds, images, RULE)
    assert seen.most <= reference.MASK_ELEMENTS < length * length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=None), "it needs both `kinds` and `images`"),
        (
            dict(kinds=torch.zeros(1, 44, dtype=torch.int8)),
            r"kinds has shape \(1, 44\); it must be \[B, S\] = \(1, 45\)",
        ),
        (dict(images=torch.zeros(2, 45)), r"images has shape \(2, 45\); it must be \[B, T\]"),
        (dict(q=torch.zeros(1, 5, 45, 16)), "5 query heads over 4 key/value heads"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    given = dict(zip(("q", "k", "v", "kinds", "images"), inputs(*SHAPES[0]), strict=True), rule=RULE)
    with pytest.raises(ValueError, match=message):
        grouped(**{**given, **change})


# ---- Triton, in its interpreter ------------------------------------------------------------------------------

QUICK = ("prompt B2 H4/2 T67 S67 D32", "gate B2 H2/1", "step B2 H4/2", "step B1 H4/2")  # the check runs all of them


@pytest.mark.parametrize("case", [case for _, case in check.cases(["grouped"])], ids=lambda case: case.label)
def test_both_backends_are_as_exact_as_torchs_own_arithmetic(case):
    backends = ("torch", "triton") if case.label.startswith(QUICK) else ("torch",)
    rows = list(check.check([("grouped", case)], "cpu", (torch.float32,), backends=backends))
    assert {row["backend"] for row in rows} == set(backends)
    assert not [row for row in rows if not row["ok"]]


@pytest.mark.parametrize("queries", [45, 1])
def test_the_kernels_change_the_same_rows(queries):
    q, k, v, kinds, images = inputs(2, 4, 2, queries, 45, 16, 3)
    wanted, rows = grouped(q, k, v, kinds, images, RULE, past=45 - queries)
    ran = {}
    with backend("triton"), recording(ran):
        ours, moved = grouped(q, k, v, kinds, images, RULE, past=45 - queries)
    assert ran == {"grouped": "triton"} and torch.equal(moved, rows)
    torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(softcap=3.0), "its kernel has no softcap"),
        (dict(keep=lambda first, last: torch.ones(1, 1, last - first, 45, dtype=torch.bool)), "no mask drawn by hand"),
        (dict(dropout=0.1), "no dropout"),
    ],
    ids=["softcap", "keep", "dropout"],
)
def test_what_the_kernels_do_not_have_is_computed_by_torch_or_refused(change, message):
    given = (*inputs(*SHAPES[0]), RULE)
    assert grouped(*given, **change)[0].isfinite().all()
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        grouped(*given, **change)


def test_a_compiled_call_keeps_one_graph():
    q, k, v, kinds, images = inputs(1, 2, 1, 20, 20, 16, 0)
    compiled = torch.compile(lambda q: grouped(q, k, v, kinds, images, RULE)[0], fullgraph=True, backend="aot_eager")
    with backend("triton"):
        torch.testing.assert_close(compiled(q), grouped(q, k, v, kinds, images, RULE)[0])
