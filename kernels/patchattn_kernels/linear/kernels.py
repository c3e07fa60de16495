"""Launch the kernels of linear attention, and list them for the static check. Specification: reference.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import interpreted
from ..static import Compile
from . import conv_kernels
from .backward import keys_kernel, queries_kernel, slope_kernel, window_keys_kernel, window_queries_kernel
from .chunks import Tiles
from .forward import forward_kernel

# By bits of a number. A chunk's features, both halves of the state and the products of a tile have to fit side by side:
# with more tokens at a time, or float32 in parts of tf32, they would spill.
FORWARD = {16: Tiles(16, 32, 4, 1), 32: Tiles(16, 16, 16, 1)}
GATED = FORWARD | {16: Tiles(16, 16, 4, 1)}  # with a decay, more columns of values would spill on Ampere
GATES = {16: Tiles(16, 32, 8, 1), 32: Tiles(16, 16, 8, 1)}  # with one for every feature any number would
# Backward, one half of the state and the gradient of the map.
WALK = {16: Tiles(16, 128, 8, 1), 32: Tiles(16, 64, 8, 1)}
PLAIN_FORWARD = {16: Tiles(16, 32, 8, 1)}  # without a map, of up to 128 features
NEAR = {16: Tiles(32, 128, 4, 1), 32: Tiles(16, 64, 8, 1)}  # more rows would spill
PRECISION = "ieee"
KEPT = (torch.float32, torch.float32, torch.float32, torch.int32)


class Given(NamedTuple):
    """The tensors of a call; `near_q` and `near_k` are None where they are q and k."""

    q: Tensor  # [B, H, T, D]
    k: Tensor
    v: Tensor
    near_q: Tensor | None
    near_k: Tensor | None
    q_weight: Tensor | None  # [heads, D, F]
    k_weight: Tensor | None
    q_bias: Tensor | None  # [heads, F]
    k_bias: Tensor | None
    gate: Tensor | None  # [B, heads, S, 1 or K]
    window_factor: Tensor  # [H] or [1]
    linear_factor: Tensor
    state: Tensor | None
    rank: Tensor | None


class Form(NamedTuple):
    """Its settings."""

    kind: str
    window: int
    terraced: bool
    overlap: bool
    causal: bool
    scale: float
    feature_scale: float
    normalise: bool
    eps: float
    state_heads: int

    @property
    def halves(self) -> int:
        return 2 if self.kind in ("softmax", "exp") else 1

    @property
    def reach(self) -> int:
        """How many tokens before its own a query may read by softmax."""
        return (2 * self.window if self.terraced else self.window) - 1


def mapped(given: Given) -> int:
    """Columns of one half of the features."""
    weight = given.q_weight if given.k_weight is None else given.k_weight
    return given.q.shape[-1] if weight is None else weight.shape[-1]


def forward(given: Given, form: Form, keep: bool) -> tuple[Tensor, ...]:
    """`[B, H, T, Dv]`, the state, and what the gradients need of each query, `[B, H, T]` or empty: the sums of all
    of its weights and of the linear ones, and the largest score of its window and whose it is."""
    given = _ready(given)
    (batch, heads, length, _), width = given.q.shape, given.v.shape[3]
    gates = 0 if given.gate is None else given.gate.shape[-1]
    bits = 8 * given.q.element_size()
    tiles = (_table(gates) if mapped(given) <= 64 else PLAIN_FORWARD)[bits]
    out = given.q.new_empty(batch, length, heads, width).transpose(1, 2)
    shape = batch, form.state_heads, form.halves * mapped(given), width + 1
    new_state = torch.empty(shape, dtype=torch.float32, device=out.device)
    kept = [torch.empty((batch, heads, length) if wanted else (0,), dtype=dtype, device=out.device)
            for wanted, dtype in zip((keep, *[keep and form.window] * 3), KEPT, strict=True)]  # fmt: skip
    near_q = given.q if given.near_q is None else given.near_q
    near_k = given.k if given.near_k is None else given.near_k
    given_strides = [x.stride()[:3] for x in (given.q, given.k, given.v, near_q, near_k, out)]
    forward_kernel[(batch * heads, triton.cdiv(width, tiles.values))](
        given.q, given.k, given.v, near_q, near_k, out, given.q_weight, given.k_weight, given.q_bias, given.k_bias,
        given.gate, given.rank, given.window_factor, given.linear_factor, given.state, new_state,
        *(x if x.numel() else None for x in kept), *(stride for strides in given_strides for stride in strides),
        length, given.v.shape[2], given.v.shape[2] - given.k.shape[2], *_at_hand(form, tiles), form.scale,
        form.feature_scale, form.eps, BOTH=form.halves == 2, NEAR_GROUP=heads // near_k.shape[1],
        BLOCK_V=tiles.values, **_shared(given, form, tiles), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, new_state, *kept


def gradients(
    d_out: Tensor, d_state: Tensor, given: Given, form: Form, out: Tensor, new_state: Tensor, total: Tensor,
    far: Tensor, largest: Tensor, top: Tensor,
) -> Given:  # fmt: skip
    """Of every tensor that is given, in its dtype."""
    raw, given = given, _ready(given)
    (batch, heads, length, size), (keys, width) = given.q.shape, given.v.shape[2:]
    gates = 0 if given.gate is None else given.gate.shape[-1]
    bits, features = 8 * given.q.element_size(), mapped(given)
    tiles = WALK[bits]
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_state = _as_read(d_state, torch.float32)
    extra, halves = keys - given.k.shape[2], form.halves

    def fresh(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=d_out.device)

    slope = fresh(batch, heads, length)
    if form.normalise:
        slope_kernel[(batch * heads, triton.cdiv(length, 32))](
            out, d_out, total, slope, *out.stride()[:3], *d_out.stride()[:3], length, H=heads, DV=width,
            BLOCK_V=max(16, triton.next_power_of_2(width)), BLOCK_T=32,
        )  # fmt: skip
    dq, dk = fresh(halves, batch, heads, length, size), fresh(halves, batch, heads, keys - extra, size)
    dv = fresh(halves, batch, heads, keys, width)
    d_weights = [None if weight is None else fresh(halves, batch, heads, size, features)
                 for weight in (given.q_weight, given.k_weight)]  # fmt: skip
    d_biases = [None if bias is None else fresh(halves, batch, heads, features)
                for bias in (given.q_bias, given.k_bias)]  # fmt: skip
    taken = fresh(halves, batch, heads, length)  # of the linear factor, by query
    d_gate, d_given = None, None
    if gates:
        d_gate = fresh(*(() if gates > 1 else (halves,)), batch, heads, keys - extra, gates)
    if given.state is not None:
        d_given = fresh(batch, heads, halves * features, width + 1)
    read = (given.q, given.k, given.v, d_out, given.q_weight, given.k_weight, given.q_bias, given.k_bias, given.gate,
            given.rank, given.linear_factor)  # fmt: skip
    strides = [stride for x in (given.q, given.k, given.v, d_out) for stride in x.stride()[:3]]
    sizes = (*strides, length, keys, extra, _at_hand(form, tiles)[1], form.feature_scale)
    shared = _shared(given, form, tiles) | dict(
        HALVES=halves, BLOCK_V=max(16, triton.next_power_of_2(width)), num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    queries_kernel[(batch * heads, halves)](
        *read, given.state, total, slope, dq, d_weights[0], d_biases[0], d_gate, taken, *sizes, **shared
    )
    keys_kernel[(batch * heads, halves)](
        *read, new_state, total, slope, d_state, dk, dv, d_weights[1], d_biases[1], d_gate, d_given, *sizes, **shared
    )
    near_dq, near_dk, d_window = None, None, None
    d_linear = taken
    if form.window:
        near_q = given.q if given.near_q is None else given.near_q
        near_k = given.k if given.near_k is None else given.near_k
        near_dq = dq[:1] if given.near_q is None else fresh(1, batch, heads, length, size)
        near_dk = dk[:1] if given.near_k is None else fresh(1, batch, heads, keys, size)
        tiles = NEAR[bits]
        at_hand, pieces = _at_hand(form, tiles)[0], triton.cdiv(length, tiles.tokens)
        d_window, d_linear = fresh(1, batch, heads, pieces), fresh(1, batch, heads, pieces)
        shift = fresh(batch, heads, length)
        near = (near_q, near_k, given.v, d_out, given.rank, given.window_factor)
        rows = (total, slope, largest, top, shift)
        strides = [stride for x in (near_q, near_k, given.v, d_out) for stride in x.stride()[:3]]
        shared = {name: value for name, value in shared.items() if name in NEAR_CONSTANTS}
        shared |= dict(K_GROUP=heads // near_k.shape[1], BLOCK_T=tiles.tokens, num_warps=tiles.num_warps,
                       num_stages=tiles.num_stages)  # fmt: skip
        window_queries_kernel[(batch * heads, pieces)](
            *near, given.linear_factor, *rows, far, taken, near_dq, d_window, d_linear, *strides, length, keys,
            at_hand, form.scale, HALVES=halves, ADD=given.near_q is None, **shared,
        )  # fmt: skip
        window_keys_kernel[(batch * heads, triton.cdiv(keys, tiles.tokens))](
            *near, *rows, near_dk, dv, *strides, length, keys, at_hand, form.scale, ADD=given.near_k is None, **shared,
        )  # fmt: skip
    return Given(
        q=_gathered(dq.sum(0), raw.q), k=_gathered(dk.sum(0), raw.k), v=_gathered(dv.sum(0), raw.v),
        near_q=None if raw.near_q is None or near_dq is None else _gathered(near_dq[0], raw.near_q),
        near_k=None if raw.near_k is None or near_dk is None else _gathered(near_dk[0], raw.near_k),
        q_weight=_parameter(d_weights[0], raw.q_weight), k_weight=_parameter(d_weights[1], raw.k_weight),
        q_bias=_parameter(d_biases[0], raw.q_bias), k_bias=_parameter(d_biases[1], raw.k_bias),
        gate=None if raw.gate is None or d_gate is None
        else _gathered(d_gate if gates > 1 else d_gate.sum(0), raw.gate),
        window_factor=_factor(d_window, raw.window_factor), linear_factor=_factor(d_linear, raw.linear_factor),
        state=None if raw.state is None or d_given is None else _gathered(d_given, raw.state), rank=None,
    )  # fmt: skip


NEAR_CONSTANTS = ("H", "V_GROUP", "WINDOW", "TERRACED", "D", "DV", "BLOCK_D", "BLOCK_V", "PRECISION", "UPCAST")


def _gathered(gradient: Tensor, like: Tensor) -> Tensor:
    """Gradients `[B, H, ...]` of what query heads share, added up."""
    if gradient.shape[1] != like.shape[1]:
        gradient = gradient.unflatten(1, (like.shape[1], -1)).sum(2)
    return gradient.to(like.dtype)


def _parameter(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Of what all rows share too: `[halves, B, H, ...]`."""
    return None if gradient is None or like is None else _gathered(gradient.sum((0, 1))[None], like[None])[0]


def _factor(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Of a number that a head has, or all have: `[halves, B, H, parts]`."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.sum((0, 1, 3) if like.shape == gradient.shape[2:3] else None).view(like.shape).to(like.dtype)


def _ready(given: Given) -> Given:
    """As the kernels read it."""
    heads, dtype = given.q.shape[1], given.q.dtype
    tokens: dict[str, Any] = {name: x if x is None or x.stride(-1) == 1 else x.contiguous() for name, x in
              zip(("q", "k", "v", "near_q", "near_k"), given[:5], strict=True)}  # fmt: skip
    floats: dict[str, Any] = {
        name: _as_read(getattr(given, name), torch.float32) for name in ("q_bias", "k_bias", "gate", "state")
    }
    floats |= {name: _as_read(getattr(given, name).expand(heads), torch.float32)
               for name in ("window_factor", "linear_factor")}  # fmt: skip
    weights = {name: _as_read(getattr(given, name), dtype) for name in ("q_weight", "k_weight")}
    rank = None if given.rank is None else _as_read(given.rank.expand(given.q.shape[0], -1), torch.int32)
    return given._replace(**tokens, **floats, **weights, rank=rank)


def _at_hand(form: Form, tiles: Tiles) -> tuple[int, int]:
    """Tiles of keys that a chunk's queries may read by softmax, and those of them that no state holds yet."""
    at_hand = 1 + triton.cdiv(form.reach, tiles.tokens) if form.window else 1
    return at_hand, 1 if form.overlap else at_hand


def _shared(given: Given, form: Form, tiles: Tiles) -> dict[str, Any]:
    """What the walks of both directions are compiled for."""
    (_, heads, _, size), features = given.q.shape, mapped(given)

    def group(x: Tensor | None, dim: int = 1) -> int:
        return 1 if x is None else heads // x.shape[dim]

    return dict(
        H=heads, K_GROUP=group(given.k), V_GROUP=group(given.v), QW_GROUP=group(given.q_weight, 0),
        KW_GROUP=group(given.k_weight, 0), STATE_GROUP=heads // form.state_heads, GATE_GROUP=group(given.gate),
        GATES=0 if given.gate is None else given.gate.shape[-1], KIND=form.kind.partition("_")[0],
        Q_MAPPED=given.q_weight is not None, K_MAPPED=given.k_weight is not None, WINDOW=form.window,
        TERRACED=form.terraced, OVERLAP=form.overlap, CAUSAL=form.causal, NORMALISE=form.normalise, D=size,
        DV=given.v.shape[3], F=features,
        BLOCK_D=max(16, triton.next_power_of_2(size)), BLOCK_F=max(16, triton.next_power_of_2(features)),
        BLOCK_T=tiles.tokens, PRECISION=PRECISION, UPCAST=interpreted() and given.q.element_size() == 2,
    )  # fmt: skip


def _table(gates: int) -> dict[int, Tiles]:
    return GATES if gates > 1 else GATED if gates else FORWARD


def _as_read(x: Any, dtype: torch.dtype) -> Any:
    return None if x is None else x.to(dtype).contiguous()


# ---- what the static check compiles ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    same = ("q", "k", "v", "near_q", "near_k", "out", "d_out", "q_weight", "k_weight")
    floats = ("gate", "window_factor", "linear_factor", "state", "new_state", "d_new_state", "total", "far", "taken",
              "d_window", "d_linear", "largest", "shift", "slope", "factor", "dq", "dk", "dv", "d_weight", "d_gate",
              "d_state")  # fmt: skip
    types = {f"{name}_ptr": "*T:16" for name in same} | {f"{name}_ptr": "*fp32:16" for name in floats}
    types |= {f"{name}_ptr": "*i32:16" for name in ("rank", "top")}
    types |= {f"stride_{tensor}{side}": "i32:16" for tensor in "qkvnmod" for side in "bhts"}
    types |= dict.fromkeys(("T", "S", "extra", "tiles", "late"), "i32")
    types |= dict.fromkeys(("scale", "feature_scale", "eps"), "fp32")
    numbers = dict(
        H=32, K_GROUP=4, V_GROUP=4, NEAR_GROUP=4, QW_GROUP=1, KW_GROUP=1, STATE_GROUP=1, GATE_GROUP=4, TERRACED=False,
        OVERLAP=False, CAUSAL=True, NORMALISE=True, ADD=True, PRECISION=PRECISION, UPCAST=False,
    )  # fmt: skip
    learned = dict(KIND="softmax", BOTH=True, HALVES=2, Q_MAPPED=True, K_MAPPED=True)
    plain = dict(KIND="identity", BOTH=False, HALVES=1, Q_MAPPED=False, K_MAPPED=False)
    every, mixed, few = (80, 90, 100), {"bf16": "both", "fp32": "none"}, {"bf16": "mma", "fp32": "none"}
    near = [("dq near", window_queries_kernel, NEAR, dict(WINDOW=64, HALVES=2), few),
            ("dk dv near", window_keys_kernel, NEAR, dict(WINDOW=64), few)]  # fmt: skip
    walks: list[tuple[Any, ...]] = []
    for label, forms in (
        ("pure", dict(GATES=0, WINDOW=0)), ("window", dict(GATES=0, WINDOW=64)),
        ("both directions", dict(GATES=0, WINDOW=0, CAUSAL=False)), ("scalar gate", dict(GATES=1, WINDOW=0)),
        ("gates", dict(GATES=128, WINDOW=0)),
    ):  # fmt: skip
        walks += [(f"forward {label}", forward_kernel, _table(forms["GATES"]), learned | forms, mixed),
                  (f"dq {label}", queries_kernel, WALK, learned | forms, mixed),
                  (f"dk dv {label}", keys_kernel, WALK, learned | forms, mixed)]  # fmt: skip
        if label in ("scalar gate", "gates"):
            walks.append((f"forward {label}, no map", forward_kernel, PLAIN_FORWARD, plain | forms, mixed))
    for label, kernel, table, constants, products in walks + near:
        for bits, tiles in table.items():
            size = 128
            if bits == 32 and kernel is not forward_kernel:  # see `_unsupported` in __init__.py
                size = 32 if constants.get("GATES") == 1 else 64
            features = size // 2 if constants.get("HALVES") == 2 else size  # of one half
            names = kernel.arg_names
            given = numbers | constants | dict(
                D=size, DV=size, F=features, BLOCK_D=size, BLOCK_V=min(tiles.values, size), BLOCK_F=features,
                BLOCK_T=tiles.tokens,
            )  # fmt: skip
            absent = {"q_bias_ptr", "k_bias_ptr", "d_bias_ptr"}
            absent |= set() if constants.get("GATES") else {"gate_ptr", "d_gate_ptr"}
            absent |= set() if constants.get("Q_MAPPED") else {"q_weight_ptr", "k_weight_ptr", "d_weight_ptr"}
            chips = every if not constants.get("GATES", 0) > 1 or bits == 32 else (90, 100)
            yield Compile(
                f"{label} {tiles.tokens}x{tiles.values}", kernel,
                {name: types[name] for name in names if name in types and name not in absent},
                {name: given.get(name) for name in names if name in given or name in absent}, tiles.num_warps,
                tiles.num_stages, products, ("bf16" if bits == 16 else "fp32",), chips,
            )  # fmt: skip
    yield Compile(
        "slope", slope_kernel, {name: types[name] for name in slope_kernel.arg_names if name in types},
        dict(H=32, DV=128, BLOCK_V=128, BLOCK_T=32), 4, 3, "none", ("bf16",),
    )  # fmt: skip


STATIC = [*_static(), *conv_kernels.STATIC]
