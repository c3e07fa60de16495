"""Text and conversations as samples: packed, split, streamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import packing
from .corpus import Corpus, tokenized
from .documents import Documents
from .encoding import Encoded, Encoder, batches, encoder_for
from .packing import Ints, Rows
from .schema import ChatSource, TextSource

SHUFFLE = 1_000  # documents in the shuffle buffer of a stream

Sample = dict[str, Any]


class Layout(NamedTuple):
    """How documents become samples."""

    length: int
    packing: bool
    cut: bool  # documents where a row ends; otherwise only those longer than a row
    pad: int

    def rows(self, segments: Ints) -> Rows:
        arrange = packing.alone if not self.packing else packing.stream if self.cut else packing.whole
        return arrange(segments, self.length)

    def sample(self, corpus: Corpus, pieces: Ints) -> Sample:
        sample = packing.row(corpus.tokens, corpus.labelled, pieces)
        if self.packing:
            return packing.fill(sample, self.length, self.pad)
        del sample["position_ids"]
        return sample


class TextReader:
    """Rows of a corpus."""

    def __init__(
        self, corpus: Corpus, layout: Layout, fingerprint: dict[str, Any], seed: int, segments: Ints | None = None
    ) -> None:
        self.corpus, self.layout, self.seed, self.said = corpus, layout, seed, fingerprint
        self.segments = corpus.segments if segments is None else segments
        self.rows = layout.rows(self.segments)
        self.size = len(self.rows)
        if not self.size:
            raise ValueError(f"data: {fingerprint['path']} gives no sample: its documents have no two tokens")

    @property
    def fingerprint(self) -> dict[str, Any]:
        tokens = int((self.segments[:, 1] - self.segments[:, 0]).sum())
        counts = {"documents": len(self.segments), "empty": self.corpus.empty, "tokens": tokens, "rows": self.size}
        return self.said | counts

    def sample(self, index: int, draw: int) -> Sample:
        return self.layout.sample(self.corpus, self.rows[index])

    def split(self, share: float) -> tuple[TextReader, TextReader]:
        """Whole documents, chosen by the seed; of so few that no whole one would do, the last part of each."""
        segments = self.segments
        count = round(share * len(segments))
        if count or not self.layout.cut:
            held = np.zeros(len(segments), dtype=bool)
            held[np.random.default_rng(self.seed).permutation(len(segments))[: max(1, count)]] = True
            parts, how = (segments[~held], segments[held]), "whole documents"
        else:
            sizes = np.ceil((segments[:, 1] - segments[:, 0]) * share).astype(np.int64)
            cut = np.maximum(segments[:, 1] - np.maximum(sizes, 2), segments[:, 0])
            front, back = np.stack([segments[:, 0], cut], axis=1), np.stack([cut, segments[:, 1]], axis=1)
            parts, how = (front[cut > front[:, 0]], back), "the end of each document"
        if not all(map(len, parts)):
            raise ValueError(
                f"data: {self.said['path']} is too small to hold out {share:g} of it: {len(segments)} document(s), "
                f"{self.size} row(s) of {self.layout.length} tokens; give held_out sources of their own"
            )
        said = {"share": share, "by": how, "seed": self.seed}
        train, held_out = (
            TextReader(self.corpus, self.layout, self.said | {"held_out": said, "part": name}, self.seed, part)
            for name, part in zip(("train", "held out"), parts)
        )
        return train, held_out


class Fixed:
    """Samples in memory: what was taken off a stream."""

    def __init__(self, samples: list[Sample], fingerprint: dict[str, Any]) -> None:
        self.samples, self.fingerprint, self.size = samples, fingerprint, len(samples)

    def sample(self, index: int, draw: int) -> Sample:
        return self.samples[index]

    def split(self, share: float) -> tuple[Fixed, Fixed]:
        raise TypeError("samples taken off a stream are not split again")


class TextStream:
    """Documents tokenized and packed as they come, shuffled within a buffer; another order in each epoch."""

    def __init__(self, documents: Documents, encoder: Encoder, layout: Layout, seed: int, skip: int = 0) -> None:
        self.documents, self.encoder, self.layout, self.seed, self.skip = documents, encoder, layout, seed, skip

    @property
    def fingerprint(self) -> dict[str, Any]:
        said = self.documents.fingerprint | self.encoder.fingerprint
        return said | {"streaming": True, "skipped": self.skip, "seed": self.seed, "shuffle": SHUFFLE}

    def epoch(self, number: int) -> Iterator[Sample]:
        """The samples of one pass."""
        documents = itertools.islice(self.documents, self.skip, None)
        random = np.random.default_rng([self.seed, number])
        return self._samples(batches(shuffled(documents, random, SHUFFLE)))

    def take(self, count: int) -> tuple[TextStream, Fixed]:
        """The stream without its beginning, and the first samples off it."""
        documents = iter(self.documents)
        used = 0

        def counted() -> Iterator[list[Any]]:
            nonlocal used
            for document in documents:
                used += 1
                yield [document]

        samples = list(itertools.islice(self._samples(counted()), count))
        if next(documents, None) is None:
            raise ValueError(
                f"data: {self.documents.source.path} ends within its first {count} samples, which are held out; lower "
                "held_out_samples, or do without streaming"
            )
        said = self.fingerprint | {"part": "held out", "documents": used, "rows": len(samples)}
        return TextStream(self.documents, self.encoder, self.layout, self.seed, used), Fixed(samples, said)

    def _samples(self, batches: Iterator[list[Any]]) -> Iterator[Sample]:
        rest: list[Encoded] = []
        for batch in batches:
            corpus = Corpus.of(rest + self.encoder(batch), self.encoder.dtype)
            if not len(corpus.segments):  # documents that gave no token
                continue
            rows = self.layout.rows(corpus.segments)
            open_rows = 1 if self.layout.packing else 0  # the last row may have room for what comes
            for index in range(len(rows) - open_rows):
                yield self.layout.sample(corpus, rows[index])
            rest = [
                Encoded(corpus.tokens[start:end], None if corpus.labelled is None else corpus.labelled[start:end])
                for start, end in (rows[len(rows) - 1] if open_rows else ())
            ]
        if rest:
            corpus = Corpus.of(rest, self.encoder.dtype)
            yield self.layout.sample(corpus, corpus.segments)


def shuffled(items: Iterable[Any], random: np.random.Generator, size: int) -> Iterator[Any]:
    """Items in random order, as far as a buffer of this size allows."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(random.integers(size))
        yield buffer[place]
        buffer[place] = item
    for place in random.permutation(len(buffer)):
        yield buffer[place]


def open_source(
    source: TextSource | ChatSource, *, tokenizer: Any, length: int, packing: bool, seed: int, cache: Path
) -> TextReader | TextStream:
    """The reader of a text or chat source."""
    documents, encoder = Documents(source), encoder_for(source, tokenizer)
    layout = Layout(length, packing, cut=isinstance(source, TextSource), pad=pad_id(tokenizer))
    if source.streaming:
        return TextStream(documents, encoder, layout, seed)
    corpus = tokenized(documents, encoder, cache)
    return TextReader(corpus, layout, documents.fingerprint | encoder.fingerprint, seed)


def pad_id(tokenizer: Any) -> int:
    """What fills a row up: it carries no loss, and no token of a document sees it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
