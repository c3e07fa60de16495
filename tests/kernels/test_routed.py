"""Attention of chosen pairs against attention of all pairs, and what must not be looked at."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from patchattn_kernels import backend, check, routed


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(length: int = 37, past: int = 0, groups: int = 2) -> dict[str, Tensor]:
    chosen = random(2, 4, length, seed=3) > 0
    return {
        "q": random(2, 4, length, 8),
        "k": random(2, groups, past + length, 8, seed=1),
        "v": random(2, groups, past + length, 8, seed=2),
        "weights": (random(2, 4, length, seed=4).abs() + 0.5) * chosen,
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("past", [0, 11])
@pytest.mark.parametrize("name", check.available("cpu"))
def test_nothing_of_a_pair_that_is_left_out_is_looked_at(name, causal, past):
    given = call(length=13, past=past)
    off = given["weights"] == 0
    clean = {name: x.clone().requires_grad_() for name, x in given.items()}
    planted = {name: x.clone() for name, x in given.items()}
    planted["q"][off] = float("nan")
    for x in planted.values():
        x.requires_grad_()
    upstream = random(2, 4, 13, 8, seed=9)
    results = []
    for inputs, grad in ((clean, upstream), (planted, upstream.masked_fill(off[..., None], float("nan")))):
        with backend(name):
            out = routed(**inputs, causal=causal)
            results.append([out, *torch.autograd.grad(out, list(inputs.values()), grad)])
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(wanted, found)
    assert not results[0][0][off].any() and not results[0][1][off].any() and not results[0][4][off].any()


@pytest.mark.parametrize("name", check.available("cpu"))
def test_one_token_looks_at_nothing_of_heads_that_are_left_out(name):
    given = call(length=1, past=30)
    given["weights"][:] = torch.tensor([0.0, 2.0, 0.0, 0.0])[None, :, None]
    with backend(name):
        wanted = routed(**given, causal=True)
        given["q"][:, [0, 2, 3]] = given["k"][:, 1] = given["v"][:, 1] = float("nan")
        assert torch.equal(routed(**given, causal=True), wanted)
    assert wanted[:, 1].all() and not wanted[:, [0, 2, 3]].any()


def test_keys_that_no_chosen_query_may_read_are_not_looked_at():
    given = call()
    given["weights"][:, 2:] = 0  # the second KV head
    given["k"][:, 1] = given["v"][:, 1] = float("nan")
    assert routed(**given, causal=True).isfinite().all()


def test_all_pairs_with_weight_one_is_ordinary_attention():
    given = call(groups=4)
    q, k, v = given["q"], given["k"], given["v"]
    wanted = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(routed(q, k, v, torch.ones(2, 4, 37), causal=True), wanted, atol=1e-6, rtol=0)


def test_however_a_prompt_is_cut_the_result_is_the_same():
    given = call(length=50)
    starts = torch.tensor([0, 13])
    whole = routed(**given, starts=starts, causal=True)
    parts = [
        routed(
            given["q"][:, :, a:b], given["k"][:, :, :b], given["v"][:, :, :b], given["weights"][:, :, a:b],
            starts=starts, causal=True,
        )
        for a, b in ((0, 7), (7, 40), (40, 49), (49, 50))
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-6, rtol=0)


def test_padding_changes_nothing():
    given, starts = call(), torch.tensor([0, 9])
    padded = {name: functional.pad(x, (0,) * (2 * (x.dim() - 3)) + (9, 0), value=7.0) for name, x in given.items()}
    alone = routed(**given, causal=True)
    found = routed(**padded, starts=torch.tensor([9, 9]), causal=True)
    torch.testing.assert_close(found[:, :, 9:], alone, atol=1e-6, rtol=0)
    assert not found[:, :, :9].any()
    half = routed(**given, starts=starts, causal=True)
    assert torch.equal(half[0], alone[0]) and not half[1, :, :9].any()


def test_blocks_of_pairs_change_nothing(monkeypatch):
    given = {name: x.requires_grad_() for name, x in call().items()}
    whole = routed(**given, causal=True)
    wanted = torch.autograd.grad(whole.sum(), list(given.values()))
    monkeypatch.setattr(importlib.import_module("patchattn_kernels.routed.reference"), "PAIRS", 5)
    again = routed(**given, causal=True)
    found = torch.autograd.grad(again.sum(), list(given.values()))
    for a, b in zip((again, *found), (whole, *wanted), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_gradients_hold_in_double_precision():
    given = [x.double().requires_grad_() for x in call(length=9, past=3).values()]
    sinks = random(4, seed=7).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: routed(*x[:4], sinks=x[4], causal=True, softcap=2.0, starts=torch.tensor([0, 5])),
        (*given[:3], given[3].detach(), sinks), fast_mode=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(2, 4, 5)}, r"weights is \[2, 4, 5\]; it must be \[B, H, T\] = \[2, 4, 37\]"),
        ({"k": torch.ones(2, 3, 37, 8)}, "4 query heads cannot share 3 key heads"),
        ({"k": torch.ones(2, 2, 20, 8)}, "37 queries over 20 keys"),
        ({"starts": torch.zeros(3)}, r"starts is \[3\]; it must be \[B\] = \[2\]"),
    ],
    ids=["weights", "heads", "queries", "starts"],
)
def test_what_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        routed(**(call() | change), causal=True)


def test_the_operators_are_registered_as_torch_wants_them():
    given = [x.requires_grad_() for x in call(length=9).values()]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*given, None, random(4), True, 0.3, None)
    torch.library.opcheck(torch.ops.patchattn.routed_in_torch, arguments, test_utils=checks)
    if "triton" in check.available("cpu"):
        torch.library.opcheck(torch.ops.patchattn.routed, arguments, test_utils=checks)
        step = [x.detach()[:, :, -1:] for x in given]
        step[1:3] = [x.detach() for x in given[1:3]]
        torch.library.opcheck(torch.ops.patchattn.routed_decode, (*step, None, None, 0.3, None), test_utils=checks)


@pytest.mark.parametrize("name", check.available("cpu"))
def test_compiled_it_stays_one_graph_with_the_same_gradients(name):
    given = [x.requires_grad_() for x in call(length=5).values()]

    def run(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return routed(q * 2, k, v, weights, causal=True) + 1

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        with backend(name):
            out = function(*given)
            results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", [case for _, case in check.cases(["routed"])], ids=lambda case: case.label)
def test_both_backends_are_as_exact_as_torchs_own_arithmetic(case):
    rows = list(check.check([("routed", case)], "cpu", (torch.float32,)))
    assert {row["backend"] for row in rows} == {name for name in check.available("cpu") if name in case.backends}
    assert not [row for row in rows if not row["ok"]]
