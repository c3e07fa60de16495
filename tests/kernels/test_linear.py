"""Linear attention: its forms are one function, whatever the calls a sequence comes in."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from patchattn_kernels import backend, check
from patchattn_kernels.linear import FeatureMap, causal_conv, features, linear, linear_weights, window_tokens
from tests.golden import loader

BATCH, HEADS, GROUPS, LENGTH, SIZE, FEATURES = 2, 4, 2, 53, 8, 6
reference = importlib.import_module("patchattn_kernels.linear.reference")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((1, HEADS), (2, GROUPS), (3, GROUPS))
    return tuple(random(BATCH, heads, LENGTH, SIZE, seed=seed) for seed, heads in sizes)  # type: ignore[return-value]


def softmax_maps() -> dict[str, FeatureMap]:
    return {
        name: FeatureMap("softmax", random(HEADS, SIZE, FEATURES, seed=seed))
        for name, seed in (("q_map", 4), ("k_map", 5))
    }


def decays(many: int) -> Tensor:
    return -random(BATCH, GROUPS, LENGTH, many, seed=6).abs()


def ranks(*padding: int) -> Tensor:
    return (torch.arange(LENGTH)[None] - torch.tensor(padding)[:, None]).clamp(min=-1)


def in_calls(sizes: list[int], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The sequence in calls of these sizes, with no more of the past than a cache would keep."""
    q, k, v = tensors()
    options = dict(options)
    gate, rank = options.pop("gate", None), options.pop("rank", None)
    window = options.get("window", 0)
    kept = window_tokens(window, options.get("window_kind", "sliding")) if window else 0
    outs, state, start = [], None, 0
    for size in sizes:
        stop, low = start + size, max(0, start - kept)
        out, state = linear(
            q[:, :, start:stop], k[:, :, low:stop], v[:, :, low:stop], state=state,
            gate=None if gate is None else gate[:, :, low:stop], rank=None if rank is None else rank[:, low:stop],
            **options,
        )  # fmt: skip
        outs.append(out)
        start = stop
    assert start == LENGTH
    return torch.cat(outs, dim=2), state


FORMS = {
    "pure": {},
    "sliding": dict(window=7, window_factor=torch.tensor([0.1, 0.5, 0.9, 1.0])),
    "terraced": dict(window=7, window_kind="terraced", linear_factor=torch.tensor([0.1, 0.5, 0.9, 1.0])),
    "scalar gate": dict(gate=decays(1)),
    "vector gate": dict(gate=decays(2 * FEATURES)),
    "mild vector gate": dict(gate=decays(2 * FEATURES) / 20),
    "gate behind a window": dict(gate=decays(2 * FEATURES), window=7),
    "mild gate behind a window": dict(gate=decays(2 * FEATURES) / 20, window=7),
    "gate over a window": dict(gate=decays(2 * FEATURES), window=7, overlap=True, feature_scale=0.3, eps=1e-10),
}
CALLS = {
    "at once": [LENGTH],
    "prompt and tokens": [40, *[1] * 13],
    "tokens": [1] * LENGTH,
    "uneven parts": [3, 1, 20, 8, 21],
}


@pytest.mark.parametrize("padding", [None, (0, 5)], ids=["no padding", "left padding"])
@pytest.mark.parametrize("form", FORMS)
def test_parallel_chunked_and_recurrent_forms_are_equal(form, padding, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 16)
    monkeypatch.setattr(reference, "MILD_CHUNK", 24)
    options = FORMS[form] | softmax_maps() | {"rank": ranks(*(padding or (0, 0)))}
    q, k, v = tensors()
    parts = linear_weights(q, k, v, **options)
    wanted = sum(parts) @ v.repeat_interleave(HEADS // GROUPS, dim=1)  # type: ignore[operator]
    for name, sizes in CALLS.items():
        if padding is None and options.get("window_kind") != "terraced":
            options["rank"] = None
        found, _ = in_calls(sizes, options)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_row_and_its_state_equal_those_without_padding(form):
    options = FORMS[form] | softmax_maps()
    gate = options.pop("gate", None)
    q, k, v = tensors()
    padded, state = linear(q, k, v, gate=gate, rank=ranks(0, 9), **options)
    row = [x[1:, :, 9:] for x in (q, k, v)]
    alone, alone_state = linear(*row, gate=None if gate is None else gate[1:, :, 9:], **options)
    torch.testing.assert_close(padded[1:, :, 9:], alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state[1:], alone_state, atol=1e-5, rtol=1e-5)
    assert not padded[1, :, :9].any()


def test_a_window_over_everything_is_softmax_attention():
    q, k, v = tensors()
    wanted = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for kind in ("sliding", "terraced"):
        found, state = linear(q, k, v, **softmax_maps(), window=LENGTH + 1, window_kind=kind)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
        assert not state.any()


def test_the_weights_of_both_branches_sum_to_one_and_do_not_overlap():
    q, k, v = tensors()
    window, far = linear_weights(q, k, v, **softmax_maps(), window=7)
    torch.testing.assert_close((window + far).sum(-1), torch.ones(BATCH, HEADS, LENGTH))
    assert not (window * far).any() and (far[:, :, 8:].sum(-1) > 0).all() and not far[:, :, :7].any()


def test_with_a_reset_the_past_is_forgotten_and_nothing_overflows():
    q, k, v = tensors()
    gate = decays(2 * FEATURES) * 10
    gate[:, :, 30] = -500.0
    found, _ = linear(q, k, v, **softmax_maps(), gate=gate)
    alone, _ = linear(*(x[:, :, 30:] for x in (q, k, v)), **softmax_maps(), gate=gate[:, :, 30:])
    # Sums of gates lose some of their digits to the -500.
    torch.testing.assert_close(found[:, :, 30:], alone, atol=1e-4, rtol=1e-4)


def test_the_state_is_float32_and_keeps_counting_in_bfloat16():
    """A sum in bfloat16 stops at 256."""
    q, k, v = (torch.ones(1, 1, 600, 4, dtype=torch.bfloat16) for _ in range(3))
    _, state = linear(q, k, v, q_map=FeatureMap("identity"))
    assert state.dtype == torch.float32 and state.flatten()[-1] == 600


def test_heads_that_share_everything_share_a_state():
    q, k, v = tensors()
    shared, state = linear(q, k, v, q_map=FeatureMap("elu"))
    assert list(state.shape) == [BATCH, GROUPS, SIZE, SIZE + 1]
    repeated = [x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v)]
    torch.testing.assert_close(shared, linear(q, *repeated, q_map=FeatureMap("elu"))[0])


def test_taylor_features_multiply_to_the_second_order_expansion():
    x, y = random(1, 1, 5, 16, seed=1), random(1, 1, 5, 16, seed=2)
    taylor = FeatureMap("taylor")
    dots = x @ y.mT * 16**-0.5
    torch.testing.assert_close(features(x, taylor) @ features(y, taylor).mT, 1 + dots + dots.square() / 2)


def test_both_directions_read_all_that_is_not_padding():
    q, k, v = tensors()
    found, state = linear(q, k, v, **softmax_maps(), causal=False, rank=ranks(0, 9))
    alone, alone_state = linear(q[1:], k[1:, :, 9:], v[1:, :, 9:], **softmax_maps(), causal=False)
    torch.testing.assert_close(found[1:], alone)
    torch.testing.assert_close(state[1:], alone_state)


def test_a_sequence_may_be_as_long_as_memory_allows():
    """The weights of all pairs would take 8 TiB."""
    q = k = v = torch.ones(1, 1, 1, 2).expand(1, 1, 1 << 20, 2)
    out, _ = linear(q, k, v, q_map=FeatureMap("elu"))
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("implementation", check.available("cpu"))
@pytest.mark.parametrize("pads", [0, 6])
def test_the_convolution_is_torchs_and_goes_on_from_its_state(pads, implementation):
    x, weight, bias = random(2, 30, 5), random(5, 4, seed=1), random(5, seed=2)
    rank = (torch.arange(30) - pads).clamp(min=-1).expand(2, -1)
    real = x * (rank >= 0)[..., None]
    wanted = functional.conv1d(functional.pad(real.mT, (3, 0)), weight[:, None], bias, groups=5).mT
    for sizes in ([30], [1] * 30, [2, 17, 1, 10]):
        outs, state, start = [], None, 0
        for size in sizes:
            part = slice(start, start + size)
            with backend(implementation):
                out, state = causal_conv(x[:, part], weight, bias, state=state, rank=rank[:, part] if pads else None)
            outs.append(out)
            start += size
        torch.testing.assert_close(torch.cat(outs, dim=1), wanted)
        assert torch.equal(state, real[:, 27:])


@pytest.mark.skipif("triton" not in check.available("cpu"), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("pads", [0, 6])
def test_triton_differentiates_the_convolution(pads):
    given = random(2, 40, 70), random(70, 4, seed=1), random(70, seed=2), random(2, 3, 70, seed=3)
    rank = (torch.arange(40) - pads).clamp(min=-1).expand(2, -1) if pads else None
    found = {}
    for name in ("torch", "triton"):
        x, weight, bias, state = (tensor.clone().requires_grad_() for tensor in given)
        with backend(name):
            out, last = causal_conv(x, weight, bias, state=state, rank=rank)
        loss = (out * random(*out.shape, seed=7)).sum() + (last * random(*last.shape, seed=8)).sum()
        found[name] = torch.autograd.grad(loss, (x, weight, bias, state))
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_gradients_hold_in_double_precision():
    maps = {name: found.weight.double() for name, found in softmax_maps().items()}
    given = [x[:1, :, :9].double().requires_grad_() for x in tensors()]
    extra = [decays(2 * FEATURES)[:1, :, :9].double(), torch.tensor([0.3, 0.5, 0.6, 1.0]).double(), *maps.values()]

    def run(q, k, v, gate, factor, q_weight, k_weight):
        found = FeatureMap(weight=q_weight), FeatureMap(weight=k_weight)
        return linear(q, k, v, q_map=found[0], k_map=found[1], gate=gate, window=3, window_factor=factor)

    assert torch.autograd.gradcheck(run, (*given, *(x.requires_grad_() for x in extra)), fast_mode=True)


@pytest.mark.parametrize("form", ["pure", "sliding", "vector gate"])
def test_compiled_it_stays_one_graph(form):
    given, maps = tensors(), softmax_maps()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear(q * 2, k, v, **maps, **FORMS[form])[0] + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), run(*given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_map": FeatureMap("cosine")}, "q_map.kind is 'cosine'; it must be one of softmax, softmax_half"),
        ({"window": -1}, "window is -1; it must be 0"),
        ({"window": 4, "window_kind": "round"}, "window_kind is 'round'; it must be one of sliding, terraced"),
        ({"window": 4, "causal": False}, "a window of 4 needs normalise=True and causal=True"),
        ({"window": 4, "window_factor": torch.ones(2)}, r"window_factor is \[2\]; it must be \[H\] = \[4\]"),
        ({"gate": decays(1), "causal": False}, "it needs causal=True"),
        ({"v": random(2, 3, LENGTH, 8)}, "4 query heads cannot share 3 heads of v evenly"),
        ({"k": random(2, 2, 20, 8)}, "k holds 20 tokens; it must hold the 53 of v"),
        ({"rank": torch.zeros(2, 3)}, r"rank is \[2, 3\]; it must be \[B, S\] = \[2, 53\]"),
        ({"q": random(2, 4, 20, 8)}, "without a window, earlier keys are in the state"),
        ({"window": 4, "window_kind": "terraced", "state": random(2, 4, 8, 9)}, "needs rank"),
    ],
    ids=[
        "map",
        "window",
        "kind",
        "bidirectional window",
        "factor",
        "gate",
        "heads",
        "keys",
        "rank",
        "queries",
        "terraced",
    ],
)
def test_what_cannot_be_is_refused_by_name(change, message):
    given: dict[str, Any] = dict(zip("qkv", tensors(), strict=True)) | {"q_map": FeatureMap("elu")} | change
    with pytest.raises(ValueError, match=message):
        linear(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4, 4)}, r"weight is \[4, 4\]; it must be \[C, W\] with C = 5"),
        ({"state": torch.ones(1, 2, 5)}, r"state is \[1, 2, 5\]; it must be \[B, W - 1, C\] = \[1, 3, 5\]"),
        ({"rank": torch.ones(1, 2)}, r"rank is \[1, 2\]; it must be \[B, T\] = \[1, 7\]"),
    ],
    ids=["weight", "state", "rank"],
)
def test_a_convolution_that_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv(**({"x": torch.ones(1, 7, 5), "weight": torch.ones(5, 4)} | change))


@pytest.mark.parametrize("case", [case for _, case in check.cases(["linear"])], ids=lambda case: case.label)
def test_the_formula_is_met_as_exactly_as_by_torchs_own_arithmetic(case):
    rows = list(check.check([("linear", case)], "cpu", (torch.float32, torch.bfloat16)))
    assert {row["backend"] for row in rows} == {name for name in check.available("cpu") if name in case.backends}
    assert not [row for row in rows if not row["ok"]]


@pytest.mark.skipif("triton" not in check.available("cpu"), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("form", ["pure", "sliding", "terraced", "scalar gate", "gate over a window"])
def test_triton_goes_on_from_its_own_state(form):
    options = FORMS[form] | softmax_maps() | {"rank": ranks(0, 5)}
    wanted, wanted_state = in_calls([LENGTH], options)
    with backend("triton"), torch.no_grad():
        found, state = in_calls([40, 1, 12], options)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(state, wanted_state, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("triton" not in check.available("cpu"), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("form", ["sliding", "terraced", "vector gate"])
def test_triton_hands_gradients_back_through_a_state(form):
    """A first call whose state and last tokens the second one reads."""
    kind = FORMS[form].get("window_kind", "sliding")
    options = FORMS[form] | softmax_maps()
    gate = options.pop("gate", None)
    size, first = (24, 13) if kind == "sliding" else (33, 23)
    kept = window_tokens(options["window"], kind) if "window" in options else 0

    def run() -> list[Tensor]:
        given = [x[:1, :, :size].clone().requires_grad_() for x in (*tensors(), *([] if gate is None else [gate]))]
        q, k, v, *gates = given
        outs, state = [], None
        for low, start, stop in ((0, 0, first), (first - kept, first, size)):
            part = slice(max(0, low), stop)
            out, state = linear(
                q[:, :, start:stop], k[:, :, part], v[:, :, part], state=state, rank=torch.arange(size)[None, part],
                **options, **({"gate": gates[0][:, :, part]} if gates else {}),
            )  # fmt: skip
            outs.append(out)
        out = torch.cat(outs, dim=2)
        loss = (out * random(*out.shape, seed=7)).sum() + (state * random(*state.shape, seed=8)).sum()
        return list(torch.autograd.grad(loss, given))

    wanted = run()
    with backend("triton"):
        found = run()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("triton" not in check.available("cpu"), reason="needs TRITON_INTERPRET=1")
def test_the_operator_is_registered_as_torch_wants_it():
    q, k, v = (x[:1, :, :9].clone().requires_grad_() for x in tensors())
    maps = [found.weight for found in softmax_maps().values()]
    given = q, k, v, None, None, *maps, None, None, None, torch.full((HEADS,), 0.3), torch.ones(1), None, None
    settings = "softmax", 3, False, False, True, 0.4, 1.0, True, 1e-12, HEADS, True
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.patchattn.linear, (*given, *settings), test_utils=checks)


@pytest.mark.skipif("triton" not in check.available("cpu"), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_map": FeatureMap("taylor")}, "its kernel has no features of kind 'taylor'"),
        ({"k_map": FeatureMap("relu")}, "its kernel has no features of different kinds for queries and keys"),
        ({"window": 3, "gate": decays(1)}, "its kernel has no gates for keys behind a window"),
        ({"q_map": FeatureMap("relu", random(4, 8, 6), skip=True)}, "its kernel has no skip connection around a map"),
        ({"q": random(2, 4, LENGTH, 256), "k": random(2, 2, LENGTH, 256)}, "its kernel has no heads of size 256"),
    ],
    ids=["taylor", "kinds", "gates", "skip", "size"],
)
def test_triton_says_what_it_cannot_do(change, message):
    given: dict[str, Any] = dict(zip("qkv", tensors(), strict=True)) | {"q_map": FeatureMap("elu")} | change
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        linear(**given)


def golden(method: str, name: str) -> loader.Case:
    path = loader.folder() / method / f"{name}.json"
    if not path.exists():
        pytest.skip(f"needs the golden case {path}")
    return loader.load(path)


def test_golden_feature_maps():
    case = golden("hedgehog", "case1")
    square, bias = case["W_square"], case["t2r_bias"].reshape(-1, 1)
    kinds = {"softmax_full": "softmax", "softmax_half": "softmax_half", "exp_full": "exp", "exp_half": "exp_half"}
    maps = {name: FeatureMap(kind, case["W"]) for name, kind in kinds.items()}
    maps["t2r_relu"] = FeatureMap("relu", square, bias)
    maps["softmax_full_skip"] = FeatureMap("softmax", square, skip=True)
    for name, found in maps.items():
        torch.testing.assert_close(features(case["x"], found), case[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["case3", "case4", "case5"])
def test_golden_hybrids_with_their_gradients(name):
    case = golden("hedgehog", name)
    given = {key: case[key].clone().requires_grad_() for key in ("q", "k", "v", "W_fq", "W_fk", "window_logit")}
    gamma = given["window_logit"].flatten().sigmoid()
    options = dict(
        q_map=FeatureMap(weight=given["W_fq"]), k_map=FeatureMap(weight=given["W_fk"]), window=case.config["window"],
        window_kind="terraced" if "mask_window" in case else "sliding", window_factor=gamma,
        linear_factor=1 - gamma if case.config["affine_attention_factors"] else None,
    )  # fmt: skip
    qkv = [given[key] for key in "qkv"]
    out, _ = linear(*qkv, **options)
    torch.testing.assert_close(out, case["y"], atol=2e-5, rtol=0)
    for found, wanted in zip(linear_weights(*qkv, **options), ("window_mass", "linear_mass"), strict=True):
        torch.testing.assert_close(found.sum(-1), case[wanted], atol=2e-5, rtol=0)
    found = torch.autograd.grad((out * case["cotangent"]).sum(), list(given.values()))
    for key, gradient in zip(given, found, strict=True):
        wanted = case[f"grad_{key}"]
        assert (gradient - wanted).abs().max() <= 2e-4 * wanted.abs().max(), key


def test_golden_gated_recurrence_from_a_state_with_its_gradients():
    case = golden("lawcat", "case6")
    names = ("phi_q", "phi_k", "v", "log_decay", "S0")
    given = {key: case[key].clone().requires_grad_() for key in names}
    q, k, v, gate = (given[key].transpose(1, 2) for key in names[:4])
    out, state = linear(q, k, v, q_map=FeatureMap("identity"), gate=gate, feature_scale=16**-0.5, eps=1e-10,
                        state=given["S0"])  # fmt: skip
    torch.testing.assert_close(out.transpose(1, 2), case["y"], atol=2e-5, rtol=0)
    torch.testing.assert_close(state, case["S_final"], atol=2e-5, rtol=0)
    found = torch.autograd.grad((out.transpose(1, 2) * case["cotangent"]).sum(), list(given.values()))
    for key, gradient in zip(given, found, strict=True):
        wanted = case[f"grad_{key}"]
        assert (gradient - wanted).abs().max() <= 2e-4 * wanted.abs().max(), key
