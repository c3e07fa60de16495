"""`sink_window` with heads of both kinds over the tiers of a cache, against the plainest formula in float64."""

from __future__ import annotations

import pytest
import torch

from patchattn_kernels import check, sink_window, sink_window_decode
from patchattn_kernels.sink_window import visible

FULL_HEADS = [(True, False, False), (False, True, True), (True, True, True), (False, False, False)]
SIZES = dict(sink=3, recent=7)


def tensors(length, pads=(0, 4), heads=6, groups=3, size=16):
    """q, k, v of a whole text and the rank of its tokens, padding first."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(pads), count, length, size) for count in (heads, groups, groups))
    rank = torch.arange(length)[None] - torch.tensor(pads)[:, None]
    return q, k, v, rank.clamp(min=-1)


def wanted(q, k, v, rank, full_heads):
    """Everything at once, in float64: a head's mask is its kind's."""
    kinds = torch.tensor(full_heads).repeat_interleave(q.shape[1] // k.shape[1])[None, :, None, None]
    window, causal = (visible(rank, rank, *rule) for rule in ((3, 7), (0, 1000)))
    return check.exact(q, k, v, torch.where(kinds, causal, window)).float()


def of(full_heads, kind):
    return [index for index, flag in enumerate(full_heads) if flag == kind]


@pytest.mark.parametrize("full_heads", FULL_HEADS)
def test_heads_of_both_kinds_in_one_call(full_heads):
    q, k, v, rank = tensors(40)
    ours = sink_window(q, k, v, rank, full_heads=full_heads, **SIZES)
    torch.testing.assert_close(ours, wanted(q, k, v, rank, full_heads))


def test_without_ranks_every_token_is_real():
    q, k, v, rank = tensors(40, pads=(0, 0))
    for full_heads in FULL_HEADS:
        ours = sink_window(q, k, v, full_heads=full_heads, **SIZES)
        torch.testing.assert_close(ours, wanted(q, k, v, rank, full_heads))


@pytest.mark.parametrize("full_heads", FULL_HEADS)
@pytest.mark.parametrize("ranks", [True, False])
def test_a_part_of_a_prompt_over_the_tiers_of_a_cache(full_heads, ranks):
    q, k, v, rank = tensors(40, pads=(0, 4) if ranks else (0, 0))
    truth = wanted(q, k, v, rank, full_heads)[:, :, 29:]
    full, streaming = of(full_heads, True), of(full_heads, False)
    kept = torch.randperm(29)  # a superset of what is needed, in any order
    past = (k[:, streaming][:, :, kept], v[:, streaming][:, :, kept], rank[:, kept]) if streaming else None
    whole = (k[:, full], v[:, full], rank if ranks else None) if full else None
    q, new_k, new_v, now = (x[..., 29:, :] for x in (q, k, v, rank[..., None]))
    ours = sink_window(q, new_k, new_v, now[..., 0], past=past, full_heads=full_heads, full=whole, **SIZES)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("full_heads", FULL_HEADS)
@pytest.mark.parametrize("ranks", [True, False])
def test_one_token_over_the_tiers_of_a_cache(full_heads, ranks):
    q, k, v, rank = tensors(40, pads=(0, 4) if ranks else (0, 0))
    full, streaming = of(full_heads, True), of(full_heads, False)
    kept = torch.randperm(40)
    tier = (k[:, streaming][:, :, kept], v[:, streaming][:, :, kept], rank[:, kept]) if streaming else None
    whole = (k[:, full], v[:, full], rank if ranks else None) if full else None
    ours = sink_window_decode(q[:, :, -1:], rank[:, -1:], kept=tier, full_heads=full_heads, full=whole, **SIZES)
    torch.testing.assert_close(ours, wanted(q, k, v, rank, full_heads)[:, :, -1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_heads": [True]}, "full_heads says something of 1 KV heads; there are 3"),
        ({"past": (torch.ones(2, 3, 2, 16), torch.ones(2, 3, 2, 16), None)}, "past was given without rank"),
    ],
)
def test_impossible_calls_are_refused(options, message):
    q, k, v, _ = tensors(5)
    with pytest.raises(ValueError, match=f"sink_window: {message}"):
        sink_window(q, k, v, **SIZES, **options)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({"kept": slice(0, 2), "full": slice(0, 1), "full_heads": [True, True, False]}, "full holds 1 KV heads, but"),
        ({"full": slice(0, 3)}, "full holds 3 KV heads, but full_heads asks for 0"),
        ({"kept": slice(0, 3)}, "streaming heads need the rank"),
        ({"full": slice(0, 2), "full_heads": [True, True]}, "q has 7 heads; that must be a multiple of the 2"),
    ],
)
def test_tiers_that_do_not_fit_the_heads_are_refused(tiers, message):
    q, k, v, _ = tensors(5, heads=7 if "7 heads" in message else 6)
    given = {name: (k[:, part], v[:, part]) if isinstance(part, slice) else part for name, part in tiers.items()}
    with pytest.raises(ValueError, match=f"sink_window_decode: {message}"):
        sink_window_decode(q[:, :, :1], **given, **SIZES)


def test_decoding_takes_one_token():
    q, k, v, rank = tensors(5)
    with pytest.raises(ValueError, match="q has 5 tokens a row; it takes 1"):
        sink_window_decode(q, rank, kept=(k, v, rank), **SIZES)
