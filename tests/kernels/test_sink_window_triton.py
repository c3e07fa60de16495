"""The Triton kernels of `sink_window` in Triton's interpreter, against the formula of each case in float64."""

from __future__ import annotations

import pytest
import torch

from patchattn_kernels import backend, check, dispatch, launch, sink_window, sink_window_decode
from patchattn_kernels.sink_window import cases, ops

pytestmark = pytest.mark.skipif(not dispatch.INSTALLED, reason="triton is not installed")


def wrong(chosen, dtype):
    rows = list(check.check([("sink_window", case) for case in chosen], "cpu", [dtype], backends=["triton"]))
    assert rows
    return [row for row in rows if not row["ok"]]


def with_gradients():
    return [case for case in cases.CASES if case.gradients]


def without_gradients():
    return [case for case in cases.CASES if not case.gradients]


def test_every_case_is_right_in_both_directions():
    assert not wrong(cases.CASES, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_right(dtype):
    assert not wrong([*without_gradients(), with_gradients()[0]], dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that small inputs have many tiles, far programs and splits."""
    from patchattn_kernels.sink_window import kernels

    small = kernels.Tiles(16, 16, 4, 1)
    for name in ("PREFILL", "DECODE", "QUERIES", "KEYS"):
        monkeypatch.setattr(kernels, name, dict.fromkeys(getattr(kernels, name), small))
    monkeypatch.setattr(kernels, "FAR_QUERIES", 8)
    return kernels


def test_many_tiles_in_a_row_are_right(small_tiles):
    chosen = [cases.CASES[0], cases.CASES[1], *without_gradients()]
    assert not wrong(chosen, torch.float32)


def test_keys_of_a_full_head_are_split_and_merged(small_tiles, monkeypatch):
    asked = []
    split = launch.splits
    monkeypatch.setattr(launch, "processors", lambda device: 16)
    monkeypatch.setattr(launch, "splits", lambda *args: asked.append(split(*args)) or asked[-1])
    assert not wrong([case for case in cases.CASES if case.label.startswith("step")], torch.float32)
    assert max(asked) == 5 and 1 in asked


def test_the_operators_keep_their_contracts():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    rank = torch.arange(9)[None] - 2
    arguments = (q, k, v, rank, *(None,) * 6, [True, False], 1, 3, 0.25, None, torch.randn(4, requires_grad=True))
    torch.library.opcheck(ops.prefill, arguments)
    q, k, v = q.detach()[:, :, -1:], k.detach(), v.detach()
    kept, full = (k[:, :1], v[:, :1], rank), (k[:, 1:], v[:, 1:], rank)
    torch.library.opcheck(ops.decode, (q, rank[:, -1:], *kept, *full, [True, False], 1, 3, 0.25, None, None))


def test_compiled_there_is_one_graph_and_the_same_result():
    torch.compiler.reset()
    q, k, v = (torch.randn(1, heads, 20, 16, requires_grad=True) for heads in (4, 2, 2))

    def attend(q, k, v):
        out = sink_window(q * 2, k, v, sink=2, recent=5, full_heads=[True, False])
        step = sink_window_decode(out[:, :, -1:].detach(), sink=2, recent=5, full=(k.detach(), v.detach()),
                                  full_heads=[True, True])  # fmt: skip
        return out, step

    with backend("triton"):
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        wanted, found = attend(q, k, v), compiled(q, k, v)
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(out[0].square().sum(), (q, k, v)) for out in (wanted, found)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "its kernel has no dropout"),
        ({"full": "trained", "full_heads": [True, True]}, "its kernel has no gradient over a cache"),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_torch_or_refused(options, message):
    q, k, v = (torch.randn(1, heads, 6, 16, requires_grad=True) for heads in (4, 2, 2))
    options = {name: (k, v) if value == "trained" else value for name, value in options.items()}
    assert sink_window(q, k, v, sink=1, recent=2, **options).requires_grad
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        sink_window(q, k, v, sink=1, recent=2, **options)


@pytest.mark.parametrize(
    ("size", "dtype", "trains", "message"),
    [
        (136, torch.float32, False, "no heads of size 136 in float32"),
        (264, torch.bfloat16, False, "no heads of size 264 in bfloat16"),
        (136, torch.bfloat16, True, "no gradient for heads of size 136"),
    ],
)
def test_heads_too_large_for_the_registers_are_left_to_torch(size, dtype, trains, message):
    q, k, v = (torch.randn(1, 1, 4, size, dtype=dtype, requires_grad=trains) for _ in range(3))
    assert sink_window(q, k, v, sink=1, recent=2).requires_grad == trains
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        sink_window(q, k, v, sink=1, recent=2)


def test_values_of_another_size_are_left_to_torch():
    q, k, v = (torch.randn(1, 2, 6, size) for size in (16, 16, 8))
    assert sink_window(q, k, v, sink=1, recent=2).shape == (1, 2, 6, 8)
    with backend("triton"), pytest.raises(RuntimeError, match="values of another size"):
        sink_window(q, k, v, sink=1, recent=2)
