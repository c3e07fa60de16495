"""`block_sparse` and `block_maxima` in torch, beside what they stand for; the cases of the check say the rest."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchattn_kernels import BlockLists, block_maxima, block_sparse, block_sparse_decode, masked_attention
from patchattn_kernels.block_sparse import list_rows, reference
from patchattn_kernels.dispatch import recording


def heads(queries, keys, size=16, batch=1, query_heads=4, groups=2):
    random = torch.Generator().manual_seed(queries)
    shapes = ((query_heads, queries), (groups, keys), (groups, keys))
    return [torch.randn(batch, *shape, size, generator=random) for shape in shapes]


def lists(*shape, density=0.4):
    return BlockLists.from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density)


def test_lists_say_what_the_mask_says():
    mask = torch.tensor([[False, True, False, True], [False, False, False, False], [True, True, True, True]])
    made = BlockLists.from_mask(mask[None, None])
    assert made.counts.tolist() == [[[2, 0, 4]]]
    assert made.indices[0, 0, 0, :2].tolist() == [1, 3] and made.indices[0, 0, 2].tolist() == [0, 1, 2, 3]
    assert torch.equal(made.mask(4), mask[None, None])
    few = BlockLists.from_mask(mask[None, None], most=2)
    assert few.indices.shape[-1] == 2
    assert few.mask(4)[0, 0].tolist() == [mask[0].tolist(), mask[1].tolist(), [True, True, False, False]]


@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_give_ordinary_attention(causal):
    q, k, v = heads(53, 53)
    out = block_sparse(q, k, v, lists(1, 1, 4, 4, density=1.1), block=16, causal=causal)
    torch.testing.assert_close(out, masked_attention(q, k, v, causal=causal))


def test_a_padded_row_equals_the_row_alone():
    q, k, v = heads(50, 50, batch=2)
    listed = lists(2, 4, 4, 4)
    starts = torch.tensor([0, 21])
    out = block_sparse(q, k, v, listed, block=16, starts=starts)
    q, k, v = (x[1:, :, 21:] for x in (q, k, v))
    alone = block_sparse(q, k, v, BlockLists(*(x[1:, :, :2] for x in listed)), block=16)
    assert torch.equal(out[1, :, :21], torch.zeros(4, 21, 16))
    torch.testing.assert_close(out[1:, :, 21:], alone)


@pytest.mark.parametrize("past", [16, 23, 47])
def test_parts_of_a_prompt_equal_the_whole(past):
    q, k, v = heads(60, 60)
    listed = lists(1, 2, 4, 4)
    whole = block_sparse(q, k, v, listed, block=16)
    later = BlockLists(*(x[:, :, past // 16 :] for x in listed))
    assert list_rows(60 - past, 60, 16) == later.counts.shape[2]
    part = block_sparse(q[:, :, past:], k, v, later, block=16)
    torch.testing.assert_close(part, whole[:, :, past:])


def test_a_token_equals_the_last_of_a_prompt():
    q, k, v = heads(60, 60)
    listed = lists(1, 2, 4, 4)
    whole = block_sparse(q, k, v, listed, block=16)
    own = BlockLists(*(x[:, :, 3:] for x in listed))
    torch.testing.assert_close(block_sparse_decode(q[:, :, -1:], k, v, own, block=16), whole[:, :, -1:])


def test_what_a_cache_has_not_filled_is_not_read():
    q, k, v = heads(1, 40)
    listed = lists(1, 1, 1, 5, density=1.1)
    wanted = block_sparse_decode(q, k[:, :, :27], v[:, :, :27], BlockLists(listed.counts, listed.indices), block=8)
    k[:, :, 27:] = v[:, :, 27:] = float("nan")
    torch.testing.assert_close(block_sparse_decode(q, k, v, listed, block=8, ends=torch.tensor([27])), wanted)


def test_nothing_of_a_block_that_is_not_listed_is_seen():
    q, k, v = (x.requires_grad_() for x in heads(64, 64))
    mask = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 1] = False
    listed = BlockLists.from_mask(mask)

    def run(k, v):
        out = block_sparse(q, k, v, listed, block=16)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    spoilt = [x.detach().clone() for x in (k, v)]
    for x in spoilt:
        x[:, :, 16:32] = float("nan")
    for mine, wanted in zip(run(*(x.requires_grad_() for x in spoilt)), run(k, v), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_query_without_blocks_gives_zeros_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in heads(40, 40))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1] = False
    out = block_sparse(q, k, v, BlockLists.from_mask(mask), block=16)
    assert torch.equal(out[:, :, 16:32], torch.zeros(1, 4, 16, 16)) and out[:, :, 32:].abs().min() > 0
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(dq[:, :, 16:32], torch.zeros(1, 4, 16, 16)) and dq.isfinite().all()


@pytest.mark.parametrize("elements", [1, 3000])
def test_how_many_lists_are_taken_together_changes_nothing(elements, monkeypatch):
    q, k, v = heads(70, 70)
    listed = lists(1, 4, 5, 5)
    wanted = block_sparse(q, k, v, listed, block=16), block_maxima(q, k, block=16)
    monkeypatch.setattr(reference, "ELEMENTS", elements)
    torch.testing.assert_close((block_sparse(q, k, v, listed, block=16), block_maxima(q, k, block=16)), wanted)


def test_maxima_are_those_of_the_softmax():
    q, k, _ = heads(48, 48)
    weights = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~torch.ones(48, 48).tril().bool(), float("-inf"))
    weights = weights.softmax(dim=-1)
    tiles = weights.view(1, 4, 3, 16, 3, 16).amax(dim=(3, 5))
    torch.testing.assert_close(block_maxima(q, k, block=16), tiles)
    rows = weights.view(1, 2, 2, 48, 3, 16).amax(dim=(2, 5))
    torch.testing.assert_close(block_maxima(q, k, block=(1, 16), shared=True), rows)


class Work(TorchDispatchMode):
    """The largest tensor that is made, and the numbers that matrix products read."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if "mm" in str(func):
            self.products += sum(x.numel() for x in args if isinstance(x, torch.Tensor))
        return out


def test_long_inputs_hold_no_square_of_their_length():
    length, block = 1 << 15, 64
    q, k, v = heads(length, length, size=8, query_heads=2, groups=1)
    blocks = length // block
    here = torch.arange(blocks)
    mask = (here[:, None] - here < 2) & (here <= here[:, None]) | (here == 0)
    listed = BlockLists.from_mask(mask[None, None])
    with Work() as work:
        out = reference.block_sparse_reference(q, k, v, *listed, None, None, None, (block, block), True, 0.3, None)[0]
    assert work.largest < length * length / 256 and out.isfinite().all()
    tail = slice(length - 256, length)
    seen = mask.repeat_interleave(block, 0)[tail].repeat_interleave(block, 1)
    seen &= torch.arange(length) <= torch.arange(length)[tail, None]
    wanted = masked_attention(q[:, :, tail], k, v, seen[None, None], scale=0.3)
    torch.testing.assert_close(out[:, :, tail], wanted)


def test_what_is_multiplied_falls_with_the_density():
    q, k, v = heads(512, 512)
    read = {}
    for density in (1.0, 0.25):
        mask = torch.zeros(1, 4, 32, 32, dtype=torch.bool)
        mask[..., : int(32 * density)] = True
        with Work() as work:
            reference.block_sparse_reference(
                q, k, v, *BlockLists.from_mask(mask), None, None, None, (16, 16), False, 1.0, None
            )
        read[density] = work.products
    assert read[0.25] < 0.4 * read[1.0]


def test_maxima_of_long_inputs_hold_no_square_of_their_length():
    q, k, _ = heads(6000, 6000, size=8, query_heads=2, groups=1)
    with Work() as work:
        reference.block_maxima_reference(q, k, None, None, None, (64, 64), 94, True, False, 0.3, None)
    assert work.largest < 6000 * 6000 / 8


def test_compiled_there_is_one_graph_and_the_same_result():
    torch.compiler.reset()
    q, k, v = (x.requires_grad_() for x in heads(40, 40))
    mask = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.7

    def attend(q, k, v, mask):
        out = block_sparse(q * 2, k, v, BlockLists.from_mask(mask), block=16, starts=torch.tensor([3]))
        own = BlockLists.from_mask(mask[:, :, -1:])
        return out, block_sparse_decode(out[:, :, -1:], k, v, own, block=16), block_maxima(q, k, block=16)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    wanted, found = attend(q, k, v, mask), compiled(q, k, v, mask)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(out[1].square().sum(), (q, k, v)) for out in (wanted, found)]
    torch.testing.assert_close(*gradients)


def test_what_ran_is_known():
    ran = {}
    q, k, v = heads(9, 9)
    with recording(ran):
        block_sparse(q, k, v, lists(1, 1, 1, 1), block=16)
        block_maxima(q, k, block=16)
    assert ran == dict.fromkeys(("block_lists", "block_sparse", "block_maxima"), "torch (on cpu)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block=0), "block is 0; blocks have at least 1 token"),
        (dict(q=torch.zeros(1, 3, 40, 16)), "q has 3 heads; that must be a multiple of the 2 KV heads"),
        (dict(v=torch.zeros(1, 2, 39, 16)), r"k is \[1, 2, 40, 16\] and v \[1, 2, 39, 16\]; they must have the same"),
        (dict(lists=lists(1, 3, 3, 3)), "lists for 1 rows and 3 heads; q and k need them for 1 rows and 1 or 2 or 4"),
        (dict(lists=lists(2, 1, 3, 3)), "lists for 2 rows and 1 heads"),
        (dict(lists=lists(1, 1, 2, 3)), "lists for 2 blocks of queries; 40 queries of 40 keys in blocks of 16 may"),
        (dict(lists=BlockLists(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4, 2))), "the indices need the shape of the co"),
    ],
    ids=["block", "heads", "values", "list heads", "list rows", "too few lists", "indices"],
)
def test_what_does_not_fit_together_is_refused(change, message):
    q, k, v = heads(40, 40)
    given = dict(q=q, k=k, v=v, lists=lists(1, 1, 3, 3), block=16) | change
    with pytest.raises(ValueError, match=f"block_sparse: .*{message}"):
        block_sparse(**given)


def test_a_mask_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"the mask is \[3, 3\] of torch.float32; it must be \[B or 1, H or G or 1"):
        BlockLists.from_mask(torch.ones(3, 3))
