"""The primitives against the plainest formula there is, in float64."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from patchattn_kernels import attention, check, masked_attention, sink_window
from patchattn_kernels.sink_window import cases, visible


def test_every_case_passes_with_torch_in_both_directions_and_dtypes():
    rows = list(check.check(check.cases(), "cpu", (torch.float32, torch.bfloat16), backends=["torch"]))
    assert {"result", "dq", "dk", "dv", "dsinks"} <= {row["what"] for row in rows}
    assert not [row for row in rows if not row["ok"]]


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_the_check_notices_a_wrong_result(wrong, monkeypatch, capsys):
    case = cases.CASES[0]
    spoilt = dataclasses.replace(case, run=lambda **inputs: wrong * case.run(**inputs), backends=("torch",))
    monkeypatch.setattr(cases, "CASES", (spoilt,))
    monkeypatch.setattr(sys, "argv", ["check", "sink_window", "--device", "cpu"])
    assert check.main() == 1
    assert "FAILED sink_window torch float32 result of" in capsys.readouterr().out


def test_the_check_notices_that_another_implementation_ran():
    case = dataclasses.replace(cases.CASES[0], run=cases.CASES[0].formula)
    with pytest.raises(RuntimeError, match=r"torch was asked for, and \{\} ran"):
        list(check.check([("sink_window", case)], "cpu", backends=["torch"]))


def test_a_primitive_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"no primitive is called sink_windows; there are .*sink_window"):
        list(check.cases(["sink_windows"]))


def test_a_window_over_everything_is_causal_attention():
    q, k, v = (torch.randn(2, heads, 37, 16) for heads in (4, 2, 2))
    rank = torch.arange(37).expand(2, -1)
    ours = sink_window(q, k, v, rank, sink=0, recent=37)
    torch.testing.assert_close(ours, masked_attention(q, k, v, causal=True))


def test_the_published_chunk_rule_reads_all_of_the_call_and_all_that_was_kept():
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    rank = torch.arange(20)[None]
    past = (k[:, :, [0, 1, 8, 9]], v[:, :, [0, 1, 8, 9]], torch.tensor([[0, 1, 8, 9]]))
    ours = sink_window(
        q[:, :, 10:], k[:, :, 10:], v[:, :, 10:], rank[:, 10:], sink=2, recent=2, past=past, chunked=True
    )
    seen = [0, 1, 8, 9, *range(10, 20)]
    keep = rank[:, None, 10:, None] >= rank[:, None, None, seen]
    wanted = check.exact(q[:, :, 10:], k[:, :, seen], v[:, :, seen], keep)
    torch.testing.assert_close(ours, wanted.float())


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_queries_change_nothing(block, monkeypatch):
    from patchattn_kernels.sink_window import reference

    case = cases.CASES[1]
    inputs = case.inputs(torch.Generator().manual_seed(0))
    wanted = case.run(**inputs)
    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    torch.testing.assert_close(case.run(**inputs), wanted)


def test_long_masks_are_made_in_blocks(monkeypatch):
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 50)
    made = []

    def keep(first, last):
        made.append((first, last))
        return torch.ones(1, 1, last - first, 20, dtype=torch.bool)

    q, k, v = (torch.randn(1, 1, n, 4) for n in (7, 20, 20))
    torch.testing.assert_close(masked_attention(q, k, v, keep), masked_attention(q, k, v))
    assert made == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_a_query_that_reads_nothing_gives_zeros():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    keep = torch.tensor([True, False, True])[None, None, :, None].expand(1, 1, 3, 3)
    for options in ({}, {"softcap": 5.0}):
        out = masked_attention(q, k, v, keep, **options)
        assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 4)) and out.isfinite().all()


def test_capped_scores_and_sink_logits():
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    sinks = torch.randn(4)
    scores = 2.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 0.3 / 2.0)
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
    weights = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1).softmax(-1)[..., :-1]
    wanted = weights @ v.repeat_interleave(2, 1)
    ours = masked_attention(q, k, v, causal=True, scale=0.3, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(ours, wanted)


def test_visible_says_the_rule():
    rank = torch.tensor([[-1, 0, 1, 2, 3, 4]])
    seen = visible(rank, rank, sink=1, recent=2)[0, 0].int().tolist()
    assert seen == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 0, 1, 1, 0],
        [0, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    ("sizes", "message"), [({"sink": -1, "recent": 4}, "sink is -1"), ({"sink": 1, "recent": 0}, "recent is 0")]
)
def test_impossible_sizes_are_refused(sizes, message):
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=f"sink_window: {message}; it must be"):
        sink_window(q, q, q, torch.arange(3)[None], **sizes)


def test_causal_and_keep_together_are_refused():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="put causality into keep"):
        masked_attention(q, q, q, torch.ones(3, 3, dtype=torch.bool), causal=True)


def test_the_primitives_import_without_triton_and_without_transformers():
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = None
import patchattn_kernels, patchattn_kernels.check
list(patchattn_kernels.check.cases())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
