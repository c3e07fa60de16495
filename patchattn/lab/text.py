"""What a causal language model learned: bits per byte on held-out text, recall, and what its heads attend to."""

from __future__ import annotations

import glob
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..train.synthetic import IGNORED, Generator, Sample, make


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts text. `bits_per_byte` does not depend on the tokenizer."""

    bits_per_byte: float
    nats_per_token: float
    bytes: int
    tokens: int


@dataclass(frozen=True)
class RecallScore:
    """Shares of right answers.

    `exact`: samples with every token of every answer the likeliest one, given the right tokens before it.
    `tokens`: answer tokens of which that is so. `generated`: samples whose last answer greedy decoding writes.
    """

    exact: float
    tokens: float
    generated: float
    samples: int
    length: int


@dataclass(frozen=True)
class HeadFacts:
    """What the heads of a model attend to, each array `[layers][heads]`, means over queries.

    `first`: weight on the first token. `local`: weight on the last 16 tokens. `retrieval`: where a value is asked for
    that was given before (`mqar`), weight on the places where it stands.
    """

    first: list[list[float]]
    local: list[list[float]]
    retrieval: list[list[float]]


LOCAL = 16
TASK_SEED = 1_000_003  # of generated questions: training draws its own from other seeds


def read_texts(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """The texts of a file, a folder of .txt files, a glob, or several of these."""
    places = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    texts = []
    for place in places:
        path = Path(place).expanduser()
        files = sorted(path.rglob("*.txt")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
        if not files:
            raise FileNotFoundError(f"no text at {place}; give .txt files, a folder of them, or a glob")
        texts += [file.read_text(encoding="utf-8") for file in files]
    return texts


def windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Places `start, counted from, end` that cover all tokens, each counted once, after at least `length - stride`
    tokens of context where there are so many."""
    counted, start = 1, 0
    while counted < tokens:
        end = min(start + length, tokens)
        yield start, counted, end
        counted, start = end, end - max(length - stride, 1)  # its first token is not counted


@torch.no_grad()
def bits_per_byte(
    model: Any, tokenizer: Any, texts: Iterable[str], *, length: int = 1024, stride: int | None = None, batch: int = 8
) -> TextScore:
    """Cross-entropy of texts in bits per byte of UTF-8.

    Every text starts with the BOS token (EOS where there is none), which is not counted.

    Args:
        length: tokens the model sees at most.
        stride: tokens by which the windows of a long text move on; default: half of `length`.
    """
    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    rows: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
    count = size = 0
    for text in texts:
        ids = start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size, count = size + len(text.encode()), count + len(ids) - 1
        for first, counted, end in windows(len(ids), length, stride or length // 2):
            rows[end - first].append((ids[first:end], counted - first))
    if not count:
        raise ValueError("bits_per_byte: there is no text")
    total = 0.0
    with evaluating(model):
        for same in rows.values():
            for some in range(0, len(same), batch):
                ids = torch.tensor([row for row, _ in same[some : some + batch]], device=model.device)
                loss = _losses(model, ids)
                places = torch.arange(1, ids.shape[1], device=ids.device)
                kept = torch.tensor([counted for _, counted in same[some : some + batch]], device=ids.device)
                total += loss[places >= kept[:, None]].sum().item()
    return TextScore(total / math.log(2) / size, total / count, size, count)


def _losses(model: Any, ids: Tensor) -> Tensor:
    """Cross-entropy of each next token, `[B, T - 1]`."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def recall(model: Any, generator: Generator, *, length: int, samples: int = 64, batch: int = 16) -> RecallScore:
    """How often a model answers a generated task, teacher-forced and decoding greedily.

    Samples `0` to `samples - 1` of the generator: give it a seed that training did not use.
    """
    exact = right = answers = written = 0
    with evaluating(model):
        for same in _batches([generator.sample(index, length) for index in range(samples)], batch):
            ids, labels = (
                torch.tensor([s[name] for s in same], device=model.device) for name in ("input_ids", "labels")
            )
            best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(dim=-1)
            asked = labels[:, 1:] != IGNORED
            hit = (best == labels[:, 1:]) & asked
            exact += int((hit == asked).all(dim=1).sum())
            right, answers = right + int(hit.sum()), answers + int(asked.sum())
        questions = [generator.question(index, length) for index in range(samples)]
        pairs = [{"input_ids": prompt, "answer": answer} for prompt, answer in questions]
        for same in _batches(pairs, batch):
            written += _generated(model, same)
    return RecallScore(exact / samples, right / answers, written / samples, samples, length)


def _batches(samples: list[Any], batch: int) -> Iterator[list[Any]]:
    """Batches of samples whose fields are equally long, so that none needs padding."""
    groups = defaultdict(list)
    for sample in samples:
        groups[tuple(len(values) for values in sample.values())].append(sample)
    for same in groups.values():
        for first in range(0, len(same), batch):
            yield same[first : first + batch]


def _generated(model: Any, pairs: list[dict[str, list[int]]]) -> int:
    """How many answers greedy decoding writes as they are."""
    prompts = torch.tensor([pair["input_ids"] for pair in pairs], device=model.device)
    answers = torch.tensor([pair["answer"] for pair in pairs], device=model.device)
    count = answers.shape[1]
    config = model.generation_config
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=count, max_new_tokens=count,
        pad_token_id=pad,
    )  # fmt: skip
    return int((out[:, prompts.shape[1] :] == answers).all(dim=1).sum())


@torch.no_grad()
def head_facts(model: Any, tokenizer: Any, texts: Iterable[str], *, length: int = 512, samples: int = 16) -> HeadFacts:
    """What each head attends to, on text and on questions.

    A model that is patched must have been loaded with `attn_implementation="eager"`: no other attention gives its
    weights.
    """
    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    task = make("mqar", tokenizer, TASK_SEED, pairs=8)
    if len(ids) < length:
        raise ValueError(f"head_facts: the texts have {len(ids)} tokens; with length {length} they must have as many")
    places = torch.linspace(0, len(ids) - length, samples).long().tolist()
    with evaluating(model), weighed(model):
        rows = [_weights(model, start + ids[place : place + length - 1]) for place in places]
        asked = [_on_answers(model, task.sample(index, length)) for index in range(samples)]
    text, retrieval = torch.stack(rows).mean(dim=0), torch.stack(asked).mean(dim=0)
    query = torch.arange(length)
    near = (query[:, None] - query[None, :] < LOCAL) & (query[:, None] >= query[None, :])
    far = query >= 2 * LOCAL  # queries for which the first token is not near
    first = text[..., far, 0].mean(dim=-1)
    local = (text * near).sum(dim=-1)[..., far].mean(dim=-1)
    return HeadFacts(first.tolist(), local.tolist(), retrieval.tolist())


def _weights(model: Any, row: list[int]) -> Tensor:
    """Attention weights on one row: `[layers, H, T, T]`."""
    out = model(input_ids=torch.tensor([row], device=model.device), use_cache=False, output_attentions=True)
    if not out.attentions or any(weights is None for weights in out.attentions):
        raise ValueError("head_facts: this model gives no attention weights; load it with "
                         'attn_implementation="eager" before patching it')  # fmt: skip
    return torch.stack([weights[0].float().cpu() for weights in out.attentions])


def _on_answers(model: Any, sample: Sample) -> Tensor:
    """Weight on the earlier places of each answer's token, where it is to be said next: `[layers, H]`."""
    weights, ids = _weights(model, sample["input_ids"]), torch.tensor(sample["input_ids"])
    labels = torch.tensor(sample["labels"])
    places = (labels != IGNORED).nonzero().flatten()
    earlier = (ids[None, :] == ids[places, None]) & (torch.arange(len(ids)) < places[:, None])  # [answers, T]
    return (weights[:, :, places - 1] * earlier).sum(dim=-1).mean(dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def weighed(model: Any) -> Iterator[None]:
    """A model that is not patched with the attention that returns its weights, and as it was afterwards."""
    from ..record import patch_of

    before = model.config._attn_implementation
    if patch_of(model) is not None:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
