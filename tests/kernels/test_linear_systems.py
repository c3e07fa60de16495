"""Systems that are one call of `linear`, beside the few lines that define them; flash-linear-attention's part."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from patchattn_kernels import backend, dispatch
from patchattn_kernels.linear import FeatureMap, flash_linear, linear

BATCH, HEADS, LENGTH, SIZE = 2, 2, 19, 6
primitive = importlib.import_module("patchattn_kernels.linear")  # whose name in the package is the function
IDENTITY = FeatureMap("identity")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv() -> list[Tensor]:
    return [random(BATCH, HEADS, LENGTH, SIZE, seed=seed) for seed in range(3)]


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """`S_t = diag(decay_t) S_(t-1) + k_t v_t`, read by q_t."""
    state, outs = q.new_zeros(BATCH, HEADS, k.shape[-1], v.shape[-1]), []
    for t in range(LENGTH):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(outs, dim=2)


def test_gated_linear_attention():
    q, k, v = qkv()
    gate = functional.logsigmoid(random(BATCH, HEADS, LENGTH, SIZE, seed=5)) / 16
    found, _ = linear(q, k, v, q_map=IDENTITY, gate=gate, feature_scale=SIZE**-0.5, normalise=False)
    torch.testing.assert_close(found, recurrent(q * SIZE**-0.5, k, v, gate.exp()))


def test_retention_and_lightning_attention():
    """A decay that each head has once and for all."""
    q, k, v = qkv()
    decay = 1 - 2.0 ** (-5 - torch.arange(HEADS))
    gate = decay.log()[None, :, None].expand(BATCH, HEADS, LENGTH)
    found, _ = linear(q, k, v, q_map=IDENTITY, gate=gate, normalise=False)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    weights = torch.where(distance >= 0, decay[:, None, None] ** distance.clamp(min=0), torch.zeros(()))
    torch.testing.assert_close(found, (q @ k.mT * weights) @ v)


def test_based_with_its_window():
    """The second order of the exponential everywhere, and softmax over the last tokens."""
    q, k, v = qkv()
    window = 5
    found, _ = linear(q, k, v, q_map=FeatureMap("taylor"), window=window)
    dots, place = q @ k.mT * SIZE**-0.5, torch.arange(LENGTH)
    behind = place[:, None] - place
    scores = dots.masked_fill((behind < 0) | (behind >= window), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights + torch.where(behind >= window, 1 + dots + dots.square() / 2, torch.zeros(()))
    torch.testing.assert_close(found, weights @ v / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", ["elu", "relu"])
def test_fixed_features(kind):
    q, k, v = qkv()
    phi = (lambda x: functional.elu(x) + 1) if kind == "elu" else (lambda x: x.relu().clamp(min=1e-12))
    found, _ = linear(q, k, v, q_map=FeatureMap(kind))
    weights = (phi(q) @ phi(k).mT).tril()
    torch.testing.assert_close(found, weights @ v / (weights.sum(-1, keepdim=True) + 1e-12))


def deltas(gated: bool) -> dict[str, Any]:
    gate = functional.logsigmoid(random(BATCH, HEADS, LENGTH, seed=6)) if gated else None
    return dict(q_map=IDENTITY, normalise=False, gate=gate, delta=random(BATCH, HEADS, LENGTH, seed=7).sigmoid())


@pytest.mark.parametrize("gated", [False, True], ids=["delta rule", "gated delta rule"])
def test_the_delta_rule_replaces_what_a_key_held(gated, monkeypatch):
    monkeypatch.setattr(importlib.import_module("patchattn_kernels.linear.delta"), "CHUNK", 8)
    q, k, v = qkv()
    k = functional.normalize(k, dim=-1)
    options = deltas(gated)
    found, last = linear(q, k, v, **options)
    state, outs = torch.zeros(BATCH, HEADS, SIZE, SIZE), []
    for t in range(LENGTH):
        key, share = k[:, :, t, :, None], options["delta"][:, :, t, None, None]
        if gated:
            state = state * options["gate"][:, :, t, None, None].exp()
        state = state + share * key * (v[:, :, t, None] - key.mT @ state)
        outs.append((q[:, :, t, None] @ state)[:, :, 0])
    torch.testing.assert_close(found, torch.stack(outs, dim=2))
    torch.testing.assert_close(last[..., :-1], state)

    # In two calls, and beside a row of padding, it is the same.
    tokens = {name: options.pop(name) for name in ("gate", "delta") if options[name] is not None}
    options.pop("gate", None)
    carried, outs = None, []
    for part in (slice(0, 11), slice(11, LENGTH)):
        own = {name: x[:, :, part] for name, x in tokens.items()}
        out, carried = linear(q[:, :, part], k[:, :, part], v[:, :, part], state=carried, **options, **own)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), found)
    pads = [functional.pad(x, (0, 0, 3, 0), value=2.0) for x in (q, k, v)]
    own = {name: functional.pad(x, (3, 0), value=0.5) for name, x in tokens.items()}
    rank = (torch.arange(LENGTH + 3)[None] - 3).clamp(min=-1)
    padded, padded_state = linear(*pads, rank=rank, **options, **own)
    torch.testing.assert_close(padded[:, :, 3:], found)
    torch.testing.assert_close(padded_state, last)
    assert not padded[:, :, :3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.ones(2, 2, 3)}, r"delta is \[2, 2, 3\]; it must be \[B, heads, T\] = \[2, 'heads', 19\]"),
        ({"delta": torch.ones(2, 3, LENGTH)}, "2 query heads cannot share 3 heads of delta evenly"),
        ({"normalise": True}, "delta needs normalise=False, window=0 and causal=True"),
        ({"gate": -torch.ones(2, 2, LENGTH, SIZE)}, "gate holds 6 decays a token; with delta it must hold one"),
    ],
    ids=["shape", "heads", "normaliser", "gate"],
)
def test_a_delta_rule_that_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        linear(*qkv(), **(deltas(False) | change))


# ---- flash-linear-attention ------------------------------------------------------------------------------------------


FORMS = {
    "linear_attn": dict(q_map=IDENTITY, normalise=False),
    "simple_gla": dict(q_map=IDENTITY, normalise=False, gate=-random(BATCH, 1, LENGTH, seed=5).abs()),
    "gla": dict(q_map=IDENTITY, normalise=False, gate=-random(BATCH, 1, LENGTH, SIZE, seed=5).abs()),
    "delta_rule": deltas(False),
    "gated_delta_rule": deltas(True),
}


def stand_in(name: str, called: list[str]) -> Any:
    """What flash-linear-attention 0.6 documents of one of its operators, by `linear` itself."""

    def run(q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, normalize=True):
        called.append(name)
        assert output_final_state and (g is None) == (name in ("linear_attn", "delta_rule"))
        assert (beta is None) == ("delta" not in name) and not (name == "linear_attn" and normalize)
        assert q.shape[2] == k.shape[2] == v.shape[2] and all(x.is_contiguous() for x in (q, k, v))
        q, k, v, g, beta = (x if x is None else x.transpose(1, 2) for x in (q, k, v, g, beta))
        state = None if initial_state is None else functional.pad(initial_state, (0, 1))
        with backend("torch"):
            out, state = linear(q, k, v, q_map=IDENTITY, normalise=False, gate=g, delta=beta, feature_scale=scale,
                                state=state)  # fmt: skip
        return out.transpose(1, 2), state[..., :-1]

    return run


@pytest.mark.parametrize("form", FORMS)
def test_flash_linear_attention_is_asked_what_it_can_do(form, monkeypatch):
    """By a stand-in, as it needs a GPU: names of arguments, shapes, padding, factors and states."""
    called: list[str] = []
    module = types.ModuleType(f"fla.ops.{form}")
    setattr(module, f"chunk_{form}", stand_in(form, called))
    monkeypatch.setitem(sys.modules, f"fla.ops.{form}", module)
    monkeypatch.setattr(primitive, "use_fla", lambda *_, unsupported, **__: unsupported is None and not called)
    q, k, v = qkv()
    k, v = functional.normalize(k, dim=-1)[:, :1], v[:, :1]
    options = FORMS[form] | dict(feature_scale=0.4, linear_factor=torch.tensor([0.5, 1.5]))
    state, pads = random(BATCH, HEADS if "delta" in form else 1, SIZE, SIZE + 1, seed=9), torch.tensor([[0], [4]])
    options |= dict(state=state, rank=(torch.arange(LENGTH)[None] - pads).clamp(min=-1))
    found, last = linear(q, k, v, **options)
    assert called == [form]
    monkeypatch.undo()
    with backend("torch"):
        wanted, wanted_last = linear(q, k, v, **options)
    real = options["rank"][:, None, :, None] >= 0
    torch.testing.assert_close(found * real, wanted * real)
    torch.testing.assert_close(last, wanted_last)


def test_flash_linear_attention_raises_where_it_cannot_run(monkeypatch):
    with backend("fla"), pytest.raises(RuntimeError, match="linear: the backend is 'fla', but its tensors are on cpu"):
        linear(*qkv(), **FORMS["gla"])
    monkeypatch.setattr(dispatch, "FLA_INSTALLED", True)
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    for unsupported, taken in ((None, True), ("softmax window", False)):
        assert dispatch.use_fla("linear", on_gpu, unsupported=unsupported) is taken
    with backend("fla"), pytest.raises(RuntimeError, match="flash-linear-attention has no softmax window"):
        dispatch.use_fla("linear", on_gpu, unsupported="softmax window")
    with backend("triton"):
        assert not dispatch.use_fla("linear", on_gpu)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"window": 3, "normalise": True}, "softmax window"),
        ({"normalise": True}, "normaliser"),
        ({"q_map": FeatureMap("elu")}, "feature maps"),
        ({"causal": False}, "form that reads both directions"),
    ],
    ids=["window", "normaliser", "features", "directions"],
)
def test_flash_linear_attention_is_not_asked_for_what_it_has_not(change, what, monkeypatch):
    said = []
    real = flash_linear.unsupported
    monkeypatch.setattr(flash_linear, "unsupported", lambda *given: said.append(real(*given)))
    linear(*qkv(), **({"q_map": IDENTITY, "normalise": False} | change))
    assert said[0].startswith(what)
