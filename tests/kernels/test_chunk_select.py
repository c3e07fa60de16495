"""The chunk primitives against the method's definition spelled out, token by token and key by key."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from patchattn_kernels import check
from patchattn_kernels.chunk_select import chunk_attention, complete_chunks, select_chunks

CHUNK, CHUNKS = 4, 5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def angles(positions: Tensor, size: int) -> Tensor:
    frequencies = 100.0 ** (-torch.arange(0, size, 2) / size)
    return (positions[..., None] * frequencies).repeat_interleave(2, dim=-1).unflatten(-1, (-1, 2)).mT.flatten(-2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    angle = angles(positions, x.shape[-1]).to(x.dtype)
    return x * angle.cos() + half_turned(x) * angle.sin()


def spelled_out(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, opened: Tensor, place: Tensor, scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Raw q and k: each token's chosen chunks are laid side by side, every key rotated by its new position."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        chosen = [index for index in selected[b, h, t].tolist() if index >= 0]
        if not chosen:
            continue
        tokens = [c * CHUNK + j for c in chosen[:-1] for j in range(CHUNK)]
        tokens += [chosen[-1] * CHUNK + j for j in range(int(opened[b, t]))]
        group = h // (q.shape[1] // k.shape[1])
        keys = rotate(k[b, group, tokens], torch.arange(len(tokens)))
        mine = rotate(q[b, h, t], torch.tensor((len(chosen) - 1) * CHUNK + int(place[b, t]) % CHUNK))
        scores = keys @ mine * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            weights = torch.cat([scores, sinks[h : h + 1].to(scores.dtype)]).softmax(dim=0)[:-1]
        else:
            weights = scores.softmax(dim=0)
        out[b, h, t] = weights @ v[b, group, tokens]
    return out


def case(heads: int = 4, groups: int = 2, length: int = 43, size: int = 6, queries: int | None = None) -> dict:
    """Two rows, the second with five tokens of padding first; random choices of chunks."""
    q = random(2, heads, length, size)
    k, v = (random(2, groups, length, size, seed=seed) for seed in (1, 2))
    place = torch.stack([torch.arange(length), torch.arange(length) - 5]).clamp(min=-1)
    current = torch.where(place >= 0, place // CHUNK, -1)
    chunk_keys = random(2, heads, length // CHUNK, size, seed=3)
    selected = select_chunks(q, chunk_keys, current, chunks=CHUNKS)
    given = dict(q=q, k=k, v=v, place=place, current=current, selected=selected, opened=place % CHUNK + 1)
    last = slice(None) if queries is None else slice(length - queries, length)
    for name in ("q", "selected"):
        given[name] = given[name][:, :, last]
    for name in ("place", "current", "opened"):
        given[name] = given[name][:, last]
    return given


def attend(c: dict, **options: object) -> Tensor:
    place = c["place"]
    q = rotate(c["q"], (place % CHUNK)[:, None])
    k = rotate(c["k"], torch.arange(c["k"].shape[2]) % CHUNK)
    angle = angles(torch.arange(CHUNKS) * CHUNK, q.shape[3])
    return chunk_attention(q, half_turned(q), k, c["v"], angle.cos(), angle.sin(), c["selected"], c["opened"],
                           chunk=CHUNK, **options)  # fmt: skip


@pytest.mark.parametrize("queries", [None, 7, 1])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_turning_the_query_is_rotating_every_chosen_key_to_its_new_place(groups, queries):
    c = case(groups=groups, queries=queries)
    wanted = spelled_out(c["q"], c["k"], c["v"], c["selected"], c["opened"], c["place"], 6**-0.5)
    torch.testing.assert_close(attend(c), wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("queries", [None, 1])
def test_soft_caps_sinks_and_scales_are_the_models_own(queries):
    c, sinks = case(queries=queries), random(4, seed=5)
    wanted = spelled_out(c["q"], c["k"], c["v"], c["selected"], c["opened"], c["place"], 0.9, 1.5, sinks)
    torch.testing.assert_close(attend(c, scale=0.9, softcap=1.5, sinks=sinks), wanted, atol=2e-6, rtol=0)


def test_blocks_of_queries_change_nothing(monkeypatch):
    c = case()
    whole = attend(c)
    monkeypatch.setattr("patchattn_kernels.chunk_select.reference.BLOCK_ELEMENTS", 2000)
    torch.testing.assert_close(attend(c), whole, atol=1e-6, rtol=0)
    chunk_keys = random(2, 4, 10, 6, seed=3)
    blocked = select_chunks(c["q"], chunk_keys, c["current"], chunks=CHUNKS)
    assert torch.equal(blocked, c["selected"])


def test_gradients_are_those_of_the_definition():
    c, sinks = case(length=31), random(4, seed=5, dtype=torch.float64)
    tensors = {name: c[name].double().requires_grad_() for name in ("q", "k", "v")}
    sinks.requires_grad_()
    upstream = random(2, 4, 31, 6, seed=9)
    wanted = spelled_out(
        tensors["q"], tensors["k"], tensors["v"], c["selected"], c["opened"], c["place"], 0.4, 2.0, sinks
    )
    theirs = torch.autograd.grad((wanted * upstream).sum(), [*tensors.values(), sinks])
    mine = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    logits = sinks.detach().float().requires_grad_()
    out = attend({**c, **mine}, scale=0.4, softcap=2.0, sinks=logits)
    ours = torch.autograd.grad((out * upstream).sum(), [*mine.values(), logits])
    for name, a, b in zip((*tensors, "sinks"), ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_selection_takes_the_best_and_always_the_first_and_the_last_two():
    c = case()
    chunk_keys = random(2, 4, 10, 6, seed=3)
    scores = c["q"] @ chunk_keys.mT
    for b, h, t in itertools.product(range(2), range(4), range(43)):
        current = int(c["current"][b, t])
        chosen = [index for index in c["selected"][b, h, t].tolist() if index >= 0]
        between = sorted(range(1, current - 1), key=lambda index: -scores[b, h, t, index])[: CHUNKS - 3]
        wanted = sorted({0, current - 1, current, *between} & set(range(current + 1)))
        assert chosen == wanted, (b, h, t)


def test_a_dense_beginning_reads_everything_there_is():
    c, chunk_keys = case(), random(2, 4, 10, 6, seed=3)
    selected = select_chunks(c["q"], chunk_keys, c["current"], chunks=CHUNKS, dense=8)
    assert selected.shape == (2, 4, 43, 8)
    for t in range(43):
        chosen = selected[0, 0, t][selected[0, 0, t] >= 0].tolist()
        assert chosen == list(range(t // CHUNK + 1)) if t // CHUNK < 8 else len(chosen) == CHUNKS


@pytest.mark.parametrize("groups", [1, 4])
def test_a_chunk_key_is_gathered_by_the_mean_of_attention_inside_the_chunk(groups):
    chunk_keys = torch.full((2, 4, 6, 6), 7.0)
    q = random(2, 4, 8 * CHUNK + 1, 6)
    k, v = (random(2, groups, 8 * CHUNK + 1, 6, seed=seed) for seed in (1, 2))
    before, after = torch.tensor([6, 9]), torch.tensor([21, 11])
    complete_chunks(chunk_keys, q, k, v, before, after, chunk=CHUNK)
    for b, h, g in itertools.product(range(2), range(4), range(6)):
        if not before[b] // CHUNK <= g < after[b] // CHUNK:
            assert (chunk_keys[b, h, g] == 7).all(), "a chunk that was complete before, or is not yet, was touched"
            continue
        tokens, group = slice(g * CHUNK, (g + 1) * CHUNK), h // (4 // groups)
        inside = (q[b, h, tokens] @ k[b, group, tokens].mT * 6**-0.5).softmax(dim=-1) @ v[b, group, tokens]
        wanted = (inside.mean(dim=0) @ k[b, group, tokens].mT * 6**-0.5).softmax(dim=-1) @ k[b, group, tokens]
        torch.testing.assert_close(chunk_keys[b, h, g], wanted, atol=1e-6, rtol=0)


def test_queries_may_come_from_a_ring():
    q, k, v = (random(1, 2, 10 * CHUNK + 1, 6, seed=seed) for seed in range(3))
    whole, ring = torch.zeros(1, 2, 10, 6), q.new_zeros(1, 2, 2 * CHUNK + 1, 6)
    complete_chunks(whole, q, k, v, torch.tensor([36]), torch.tensor([40]), chunk=CHUNK)
    ring[:, :, torch.arange(32, 40) % (2 * CHUNK)] = q[:, :, 32:40]
    again = torch.zeros(1, 2, 10, 6)
    complete_chunks(again, ring, k, v, torch.tensor([36]), torch.tensor([40]), chunk=CHUNK)
    assert torch.equal(again, whole) and whole[:, :, 9].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_chunks(random(1, 1, 1, 2), random(1, 1, 1, 2), torch.zeros(1, 1), chunks=3), "chunks is 3"),
        (
            lambda: complete_chunks(*(random(1, 1, 6, 2) for _ in range(4)), torch.zeros(1), torch.zeros(1), chunk=4),
            "q has 5 slots and one more",
        ),
        (lambda: attend({**case(), "selected": torch.zeros(2, 4, 3, 2)}), r"selected is \[2, 4, 3, 2\]; q"),
        (lambda: attend({**case(), "q": random(2, 3, 43, 6)}), "3 query heads cannot share 2 key heads"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_operators_are_registered_as_torch_wants_them():
    c = case(length=21)
    angle = angles(torch.arange(CHUNKS) * CHUNK, 6)
    q = c["q"].requires_grad_()
    arguments = (q, half_turned(q).detach(), c["k"], c["v"], angle.cos(), angle.sin(), c["selected"], c["opened"])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.patchattn.chunk_attention, (*arguments, None, CHUNK, 0.4, None), test_utils=checks)
    torch.library.opcheck(
        torch.ops.patchattn.select_chunks,
        (q.detach(), random(2, 4, 5, 6), c["current"], CHUNKS, CHUNKS),
        test_utils=checks,
    )


@pytest.mark.parametrize("case", [case for _, case in check.cases(["chunk_select"])], ids=lambda case: case.label)
def test_both_backends_are_as_exact_as_torchs_own_arithmetic(case):
    rows = list(check.check([("chunk_select", case)], "cpu", (torch.float32,)))
    assert {row["backend"] for row in rows} == set(check.available("cpu"))
    assert not [row for row in rows if not row["ok"]]


def test_keys_that_end_one_past_a_chunk_are_read():
    c = case(length=CHUNK * 7 + 1, queries=1)
    wanted = spelled_out(c["q"], c["k"], c["v"], c["selected"], c["opened"], c["place"], 6**-0.5)
    torch.testing.assert_close(attend(c), wanted, atol=2e-6, rtol=0)
