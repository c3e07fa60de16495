"""The Triton kernels of `block_sparse` in Triton's interpreter, against the formula of each case in float64."""

from __future__ import annotations

import pytest
import torch

from patchattn_kernels import (
    BlockLists,
    backend,
    block_maxima,
    block_sparse,
    block_sparse_decode,
    check,
    dispatch,
    launch,
)
from patchattn_kernels.block_sparse import cases, ops

pytestmark = pytest.mark.skipif(not dispatch.INSTALLED, reason="triton is not installed")


def wrong(chosen, dtype):
    rows = list(check.check([("block_sparse", case) for case in chosen], "cpu", [dtype], backends=["triton"]))
    assert rows
    return [row for row in rows if not row["ok"]]


def of(kind):
    return [case for case in cases.CASES if case.label.startswith(kind)]


def test_every_case_is_right_in_both_directions():
    assert not wrong(cases.CASES, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_right(dtype):
    assert not wrong([of("prompt")[0], *of("step")[1:3], *of("maxima")[1:3]], dtype)


def test_lists_that_are_not_divided_are_right(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "splits", lambda *args: asked.append(args) or 1)
    assert not wrong([of("prompt")[3], *of("step")[1:3]], torch.float32) and asked


def test_lists_are_divided_among_programs(monkeypatch):
    asked, split = [], launch.splits
    monkeypatch.setattr(launch, "processors", lambda device: 16)
    monkeypatch.setattr(launch, "splits", lambda *args: asked.append(split(*args)) or asked[-1])
    assert not wrong(of("step"), torch.float32) and max(asked) >= 3


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a block has several tiles of queries and of keys, and a tile several heads."""
    from patchattn_kernels.block_sparse import kernels

    for name in ("FORWARD", "QUERIES", "KEYS"):
        small = (kernels.Tiles(32, 16, 4, 1), kernels.Tiles(16, 16, 4, 1))
        monkeypatch.setattr(kernels, name, dict.fromkeys(getattr(kernels, name), small))
    return kernels


def test_blocks_of_several_tiles_and_tiles_of_several_heads_are_right(small_tiles):
    assert not wrong([*of("prompt")[1:3], of("prompt")[8]], torch.float32)


def test_lists_are_those_of_torch():
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 5, 40, generator=random) < 0.4
    mask[0, 1, 2] = False
    for given, most in ((mask, None), (mask, 9), (mask.mT, None), (mask[:, :1, 2:3].expand(-1, 4, -1, -1), 30)):
        wanted = BlockLists.from_mask(given, most)
        with backend("triton"):
            found = BlockLists.from_mask(given, most)
        assert torch.equal(found.counts, wanted.counts) and found.indices.shape == wanted.indices.shape
        assert torch.equal(found.mask(40), wanted.mask(40))


def test_nothing_of_a_block_that_is_not_listed_is_seen():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 48, 16, generator=random) for heads in (4, 2, 2))
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[..., 1] = False
    listed = BlockLists.from_mask(mask)

    def run(k, v):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        out = block_sparse(*given, listed, block=16)
        last = block_sparse_decode(q[:, :, -1:], k, v, BlockLists(*(x[:, :, 2:] for x in listed)), block=16)
        return out.detach(), last, *torch.autograd.grad(out.square().sum(), given)

    with backend("triton"):
        wanted = run(k, v)
        k[:, :, 16:32] = v[:, :, 16:32] = float("nan")
        torch.testing.assert_close(run(k, v), wanted)


def test_the_operators_keep_their_contracts():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 16, generator=random, requires_grad=True) for heads in (2, 1, 1))
    lists = BlockLists.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    starts, sinks = torch.tensor([3]), torch.randn(2, generator=random, requires_grad=True)
    for name in ("triton", "torch"):
        with backend(name):
            torch.library.opcheck(ops.forward, (q, k, v, *lists, starts, None, sinks, 16, 16, True, 0.25, None))
            plain = q.detach(), k.detach()
            torch.library.opcheck(ops.maxima, (*plain, starts, None, None, 16, 16, 1, True, True, 0.25, None))


def test_compiled_there_is_one_graph_and_the_same_result():
    torch.compiler.reset()
    q, k, v = (torch.randn(1, heads, 20, 16, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.ones(1, 2, 2, 2, dtype=torch.bool)

    def attend(q, k, v, mask):
        lists = BlockLists.from_mask(mask)
        out = block_sparse(q * 2, k, v, lists, block=16)
        last = block_sparse_decode(out[:, :, -1:], k, v, BlockLists(*(x[:, :, 1:] for x in lists)), block=16)
        return out, last, block_maxima(q, k, block=16)

    with backend("triton"):
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        wanted, found = attend(q, k, v, mask), compiled(q, k, v, mask)
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(out[1].square().sum(), (q, k, v)) for out in (wanted, found)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("block", "size", "dtype", "trains", "message"),
    [
        (24, 16, torch.float32, False, "no blocks of 24 queries and 24 keys"),
        ((8, 16), 16, torch.float32, False, "no blocks of 8 queries and 16 keys"),
        (16, 136, torch.float32, False, "no heads of size 136 in float32"),
        (16, 264, torch.bfloat16, False, "no heads of size 264 in bfloat16"),
        (16, 136, torch.bfloat16, True, "no gradient for heads of size 136 in bfloat16"),
    ],
    ids=["block", "blocks", "float32", "bfloat16", "gradient"],
)
def test_what_the_kernels_do_not_have_is_left_to_torch_or_refused(block, size, dtype, trains, message):
    q, k, v = (torch.randn(1, 1, 4, size, dtype=dtype, requires_grad=trains) for _ in range(3))
    lists = BlockLists.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert block_sparse(q, k, v, lists, block=block).shape == q.shape
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        out = block_sparse(q, k, v, lists, block=block)
        out.sum().backward()


def test_values_of_another_size_are_left_to_torch():
    q, k, v = (torch.randn(1, 2, 6, size) for size in (16, 16, 8))
    lists = BlockLists.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert block_sparse(q, k, v, lists, block=16).shape == (1, 2, 6, 8)
    with backend("triton"), pytest.raises(RuntimeError, match="values of another size"):
        block_sparse(q, k, v, lists, block=16)


def test_maxima_of_large_blocks_in_float32_are_left_to_torch():
    q, k = torch.randn(1, 2, 70, 16), torch.randn(1, 1, 70, 16)
    assert block_maxima(q, k, block=64).shape == (1, 2, 2, 2)
    with backend("triton"), pytest.raises(RuntimeError, match="no maxima of blocks of 64 queries in float32"):
        block_maxima(q, k, block=64)
