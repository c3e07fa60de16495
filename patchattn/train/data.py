"""Sources of data into samples: the same samples in the same order, for any number of processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from . import packing, text
from .encoding import Encoder
from .packing import IGNORED
from .schema import ChatSource, DataSpec, ImageSource, Source, SyntheticSource, TextSource

Sample = dict[str, Any]


class Reader(Protocol):
    """One source of samples that can be indexed: the same for the same seed.

    Attributes:
        size: how many samples there are; None: without end.
        fingerprint: what was read, ready for JSON.
    """

    @property
    def size(self) -> int | None: ...

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def sample(self, index: int, draw: int) -> Sample:
        """The sample `index`, for the `draw`-th sample asked of this source, which seeds noise and augmentation."""

    def split(self, share: float) -> tuple[Any, Any]:
        """A reader of the training samples and one of the held-out samples, which have no document in common."""


class SyntheticReader:
    """A generated task, several of its samples to a row where they fit, none of them cut."""

    size = None

    def __init__(self, source: SyntheticSource, tokenizer: Any, layout: text.Layout, seed: int) -> None:
        from . import synthetic

        self.source, self.tokenizer, self.layout, self.seed = source, tokenizer, layout, seed
        self.generator = synthetic.make(source.generator, tokenizer, seed, **source.options)
        self.generator.try_out(layout.length)  # what does not fit is said now

    @property
    def fingerprint(self) -> dict[str, Any]:
        source = self.source
        said = {"kind": source.kind, "generator": source.generator, "options": source.options, "seed": self.seed}
        return said | Encoder(self.tokenizer).fingerprint

    def sample(self, index: int, draw: int) -> Sample:
        length = room = self.layout.length
        first = index * length  # a row holds fewer samples than tokens, so that no two rows share any
        row: list[Any] = []
        while room > 1:
            one = self.generator.sample(first + len(row), length=length)
            if len(one["input_ids"]) > room:
                break
            row.append(one)
            room = room - len(one["input_ids"]) if self.layout.packing else 0
        return self._joined(row)

    def _joined(self, row: list[Any]) -> Sample:
        ends = np.cumsum([len(one["input_ids"]) for one in row])
        pieces = np.stack([np.append(0, ends[:-1]), ends], axis=1)
        labels = np.concatenate([one["labels"] for one in row])
        tokens = np.concatenate([one["input_ids"] for one in row])
        sample = packing.row(tokens, labels != IGNORED, pieces)
        if self.layout.packing:
            return packing.fill(sample, self.layout.length, self.layout.pad)
        del sample["position_ids"]
        return sample

    def split(self, share: float) -> tuple[SyntheticReader, SyntheticReader]:
        """Another seed makes the held-out samples."""
        return self, SyntheticReader(self.source, self.tokenizer, self.layout, _seed(self.seed, 1))


class Plan:
    """Which source each item of a mixture comes from, and how often that source was drawn from before."""

    def __init__(self, chosen: Any, sources: int) -> None:
        self.source = np.asarray(chosen, dtype=np.uint16)
        self.draw = np.empty(len(self.source), dtype=np.int64)
        for index in range(sources):
            mine = self.source == index
            self.draw[mine] = np.arange(mine.sum())

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def by_weight(cls, weights: list[float], samples: int, seed: int) -> Plan:
        """At random; a longer plan begins like a shorter one."""
        shares = np.cumsum(weights) / np.sum(weights)
        random = np.random.default_rng([seed, 0]).random(samples)
        return cls(np.minimum(np.searchsorted(shares, random, side="right"), len(weights) - 1), len(weights))

    @classmethod
    def once(cls, readers: list[Reader], weights: list[float], samples: int) -> Plan:
        """Each source's share of the samples, but none of them twice."""
        wanted = [max(1, round(samples * weight / sum(weights))) for weight in weights]
        counts = [count if reader.size is None else min(count, reader.size) for count, reader in zip(wanted, readers)]
        return cls(np.repeat(np.arange(len(readers)), counts), len(readers))


class Mixture(Dataset[Sample]):
    """Items from several sources, in an order that follows from the seed alone.

    There is no state: an item is a function of its number, so that resuming is skipping, and every process sees the
    same order. A source is gone through in another permutation each time.
    """

    def __init__(self, readers: list[Reader], plan: Plan, seed: int) -> None:
        self.readers, self.plan, self.seed = readers, plan, seed
        self._orders: dict[int, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, item: int) -> Sample:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        source, draw = int(self.plan.source[item]), int(self.plan.draw[item])
        reader = self.readers[source]
        if reader.size is None:
            return reader.sample(draw, draw)
        epoch, place = divmod(draw, reader.size)
        return reader.sample(int(self._order(source, epoch)[place]), draw)

    def _order(self, source: int, epoch: int) -> Any:
        if self._orders.get(source, (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, 1 + source, epoch]).permutation(self.readers[source].size or 0)
            self._orders[source] = epoch, order
        return self._orders[source][1]


class MixedStream(IterableDataset[Sample]):
    """As Mixture, where a source can only be read from its beginning."""

    def __init__(self, readers: list[Any], plan: Plan, seed: int) -> None:
        self.indexed = Mixture(readers, plan, seed)

    def __len__(self) -> int:
        return len(self.indexed)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return  # a stream has one reader: two would mix up the order, or read everything twice
        readers = self.indexed.readers
        streams = {index: _endless(one) for index, one in enumerate(readers) if isinstance(one, text.TextStream)}
        for item, source in enumerate(self.indexed.plan.source.tolist()):
            yield next(streams[source]) if source in streams else self.indexed[item]


def _endless(stream: text.TextStream) -> Iterator[Sample]:
    for epoch in itertools.count():
        sample = None
        for sample in stream.epoch(epoch):
            yield sample
        if sample is None:
            raise ValueError(f"data: {stream.documents.source.path} gives no sample")


def collate(items: list[Sample], pad: int, length: int = 0) -> dict[str, torch.Tensor]:
    """A batch of token samples: packed ones as they are, others padded on the right, with an attention mask.

    They are padded to the longest, but at least to `length`.
    """
    if "position_ids" in items[0]:
        return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}
    longest = max(length, *(len(item["input_ids"]) for item in items))
    batch = {
        "input_ids": np.full((len(items), longest), pad),
        "labels": np.full((len(items), longest), IGNORED),
        "attention_mask": np.zeros((len(items), longest), dtype=np.int64),
    }
    for row, item in enumerate(items):
        size = len(item["input_ids"])
        batch["input_ids"][row, :size] = item["input_ids"]
        batch["labels"][row, :size] = item["labels"]
        batch["attention_mask"][row, :size] = 1
    return {name: torch.from_numpy(values) for name, values in batch.items()}


@dataclass(frozen=True)
class Data:
    """What a stage is trained and evaluated on."""

    train: Dataset[Sample]
    held_out: Dataset[Sample] | None
    collate: Callable[[list[Sample]], dict[str, torch.Tensor]]
    fingerprints: dict[str, Any]


def open_data(
    spec: DataSpec,
    *,
    task: str,
    processor: Any,
    length: int,
    seed: int,
    samples: int,
    cache: Path,
    model_config: Any = None,
) -> Data:
    """Open the sources of a recipe.

    Args:
        processor: the tokenizer (causal-lm), the processor (image-text), the noise schedule (denoising), or None.
        length: tokens in a sample.
        samples: how many training samples will be asked for.
        cache: folder for tokenized text; what is in it already is used again.
        model_config: says image size and channels where there is no processor.
    """
    open_one = functools.partial(
        _open,
        task=task,
        processor=processor,
        length=length,
        packing=spec.packing,
        cache=cache,
        model_config=model_config,
    )
    train = [open_one(source, seed=_seed(seed, 0, place)) for place, source in enumerate(spec.train)]
    held_sources, held_out = spec.train, []
    if isinstance(spec.held_out, list):
        held_sources = spec.held_out
        held_out = [open_one(source, seed=_seed(seed, 1, place)) for place, source in enumerate(held_sources)]
        held_out = [one.take(spec.held_out_samples)[1] if isinstance(one, text.TextStream) else one for one in held_out]
    elif spec.held_out:
        if not 0 < spec.held_out < 1:
            raise ValueError(f"data: held_out is {spec.held_out:g}; a share is at least 0 and less than 1")
        pairs = [
            one.take(spec.held_out_samples) if isinstance(one, text.TextStream) else one.split(spec.held_out)
            for one in train
        ]
        train, held_out = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    plan = Plan.by_weight([source.weight for source in spec.train], samples, seed)
    streaming = any(isinstance(one, text.TextStream) for one in train)
    kind = MixedStream if streaming else Mixture
    evaluation = None
    if held_out:
        weights = [source.weight for source in held_sources]
        evaluation = Mixture(held_out, Plan.once(held_out, weights, spec.held_out_samples), _seed(seed, 1))
    return Data(
        train=kind(train, plan, seed),
        held_out=evaluation,
        # accelerate joins the batches of a stream before it deals them out: they must be equally long.
        collate=_collate_for(task, processor, length if streaming else 0),
        fingerprints={
            "seed": seed,
            "length": length,
            "packing": spec.packing,
            "train": [one.fingerprint for one in train],
            "held_out": [one.fingerprint for one in held_out],
        },
    )


def try_generators(spec: DataSpec, tokenizer: Any, *, length: int, seed: int) -> None:
    """Raise if a generated task of `spec` cannot be made with these options and this tokenizer."""
    held_out = spec.held_out if isinstance(spec.held_out, list) else []
    for source in [*spec.train, *held_out]:
        if isinstance(source, SyntheticSource) and tokenizer is not None:
            SyntheticReader(source, tokenizer, text.Layout(length, spec.packing, cut=False, pad=0), seed)


def _open(
    source: Source, *, task: str, processor: Any, length: int, packing: bool, seed: int, cache: Path, model_config: Any
) -> Any:
    if task not in source.tasks:
        raise ValueError(f"data: kind: {source.kind} is for {', '.join(source.tasks)}; the model's task is {task}")
    if isinstance(source, ImageSource):
        from . import images

        return images.open_source(source, task=task, processor=processor, model_config=model_config, seed=seed)
    if processor is None:
        raise ValueError(f"data: kind: {source.kind} needs a tokenizer, and the model has none; set model.tokenizer")
    if isinstance(source, SyntheticSource):
        layout = text.Layout(length, packing, cut=False, pad=text.pad_id(processor))
        return SyntheticReader(source, processor, layout, seed)
    if isinstance(source, (TextSource, ChatSource)):
        return text.open_source(source, tokenizer=processor, length=length, packing=packing, seed=seed, cache=cache)
    raise TypeError(f"data: no reader for {type(source).__name__}")


def _collate_for(task: str, processor: Any, length: int) -> Callable[[list[Sample]], dict[str, torch.Tensor]]:
    if task == "causal-lm":
        return functools.partial(collate, pad=text.pad_id(processor), length=length)
    from . import images

    return images.collate(task)


def _seed(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
