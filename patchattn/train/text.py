"""Text and conversations into samples: tokens, labels, packing, streaming; and a tokenizer trained on the text."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import packing
from .documents import Documents
from .packing import Ints, Rows
from .schema import ChatSource, Source, TextSource, TokenizerSpec

FORMAT = 1  # of the token cache
BATCH = 1_000_000  # characters that are tokenized at once
SHUFFLE = 1_000  # documents in the shuffle buffer of a stream
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks the assistant's part of a chat template

Sample = dict[str, Any]


class Encoded(NamedTuple):
    """A document's tokens, and which of them carry a loss (None: all)."""

    ids: list[int] | NDArray[Any]
    labelled: list[bool] | NDArray[Any] | None


class Encoder:
    """Documents to tokens: each ends with the tokenizer's EOS if it has one, and starts with BOS where it adds one."""

    labels = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32

    def __call__(self, texts: list[Any]) -> list[Encoded]:
        eos = self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        return [Encoded(ids if eos is None or ids[-1:] == [eos] else [*ids, eos], None) for ids in encoded]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the tokenizer, as far as it matters here."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            content = json.loads(tokenizer.backend_tokenizer.to_str())
            content.update(truncation=None, padding=None)  # these follow the last call
        else:
            content = tokenizer.get_vocab()
        said = [content, tokenizer.eos_token_id]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return {"tokenizer": digest, "vocabulary": len(tokenizer)}


class ChatEncoder(Encoder):
    """Conversations to tokens by the tokenizer's chat template; the assistant's tokens carry the loss."""

    def __init__(self, tokenizer: Any, all_tokens: bool) -> None:
        super().__init__(tokenizer)
        self.labels = not all_tokens
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ValueError(
                f"data: kind: chat needs a chat template, and the tokenizer {name!r} has none; use the tokenizer of an "
                "instruct model, or kind: text"
            ) from None

    def __call__(self, chats: list[Any]) -> list[Encoded]:
        if not self.labels:
            return [Encoded(self._render(chat), None) for chat in chats]
        if not GENERATION.search(self.template):
            return [self._by_prefixes(chat) for chat in chats]
        marked = [
            self.tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
            for chat in chats
        ]
        return [Encoded(one["input_ids"], [bool(flag) for flag in one["assistant_masks"]]) for one in marked]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {"template": hashlib.sha256(self.template.encode()).hexdigest()}

    def _render(self, chat: Any, **options: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(chat, return_dict=True, **options)["input_ids"]

    def _by_prefixes(self, chat: list[dict[str, Any]]) -> Encoded:
        """What an assistant's message adds to the conversation before it, generation prompt included, is its own."""
        ids = self._render(chat)
        labelled = np.zeros(len(ids), dtype=bool)
        for index, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = self._render(chat[:index], add_generation_prompt=True) if index else []
            after = self._render(chat[: index + 1])
            if not before or after[: len(before)] != before or ids[: len(after)] != after:
                raise ValueError(
                    f"data: this tokenizer's chat template does not render message {index} "
                    f"({str(message['content'])[:40]!r}) as a continuation of those before it, so the assistant's "
                    "tokens cannot be told; mark them in the template with {% generation %}, or train on all tokens "
                    "(all_tokens: true)"
                )
            labelled[len(before) : len(after)] = True
        return Encoded(ids, labelled)


def encoder_for(source: TextSource | ChatSource, tokenizer: Any) -> Encoder:
    return ChatEncoder(tokenizer, source.all_tokens) if isinstance(source, ChatSource) else Encoder(tokenizer)


def batches(documents: Iterable[Any], size: int = BATCH) -> Iterator[list[Any]]:
    """Documents in lists of about so many characters."""
    batch: list[Any] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document) if isinstance(document, str) else sum(len(str(message)) for message in document)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


# ---- a corpus on disk --------------------------------------------------------------------------------------------


class Corpus:
    """Tokenized documents, one after the other: in memory, or mapped from the files of a cache folder."""

    def __init__(self, tokens: Any, labelled: Any, ends: Ints, empty: int = 0, folder: Path | None = None) -> None:
        self.tokens, self.labelled, self.ends, self.empty, self.folder = tokens, labelled, ends, empty, folder

    @classmethod
    def of(cls, documents: list[Encoded], dtype: Any) -> Corpus:
        labelled = None
        if documents[0].labelled is not None:
            labelled = np.concatenate([np.asarray(one.labelled, dtype=bool) for one in documents])
        tokens = np.concatenate([np.asarray(one.ids, dtype=dtype) for one in documents])
        return cls(tokens, labelled, np.cumsum([len(one.ids) for one in documents]))

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        said = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        ends = np.load(folder / "ends.npy")
        tokens = np.memmap(folder / "tokens.bin", dtype=said["dtype"], mode="r")
        labelled = np.memmap(folder / "labelled.bin", dtype=bool, mode="r") if said["labels"] else None
        if not len(tokens) == ends[-1] == len(tokens if labelled is None else labelled):
            raise ValueError(f"data: the token cache {folder} is damaged; delete that folder")
        return cls(tokens, labelled, ends, said["empty"], folder)

    def __reduce__(self) -> Any:
        """A worker process maps the files itself instead of being sent what is in them."""
        if self.folder is None:
            return Corpus, (self.tokens, self.labelled, self.ends, self.empty)
        return Corpus.open, (self.folder,)

    @property
    def segments(self) -> Ints:
        segments = np.stack([np.append(0, self.ends[:-1]), self.ends], axis=1)
        return segments[segments[:, 1] > segments[:, 0]]


def tokenized(documents: Documents, encoder: Encoder, cache: Path) -> Corpus:
    """The corpus of these documents, from the cache if it is there.

    Of many processes one writes and the others wait: by a lock on a file, which holds as long as it takes and is
    gone with its process.
    """
    from filelock import FileLock

    said = {"format": FORMAT, "labels": encoder.labels} | encoder.fingerprint | documents.fingerprint
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"tokens-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"tokens-{key}.lock"):
        if not folder.is_dir():
            unfinished = cache / f"tokens-{key}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            unfinished.mkdir()
            try:
                _write(documents, encoder, unfinished, said)
            except BaseException as error:
                shutil.rmtree(unfinished, ignore_errors=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(error.errno, f"data: no room for the token cache {folder}") from error
                raise
            os.replace(unfinished, folder)
    return Corpus.open(folder)


def _write(documents: Documents, encoder: Encoder, folder: Path, said: dict[str, Any]) -> None:
    from tqdm.auto import tqdm

    ends: list[Ints] = []
    total = labels = 0
    progress = tqdm(desc=f"tokenizing {documents.source.path}", unit=" tokens", unit_scale=True, disable=None)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "labelled.bin", "wb") as labelled, progress:
        for batch in batches(documents):
            corpus = Corpus.of(encoder(batch), encoder.dtype)
            tokens.write(corpus.tokens.tobytes())
            if corpus.labelled is not None:
                labelled.write(corpus.labelled.tobytes())
                labels += int(corpus.labelled.sum())
            ends.append(corpus.ends + total)
            total += len(corpus.tokens)
            progress.update(len(corpus.tokens))
    if encoder.labels and not labels:
        raise ValueError(f"data: {documents.source.path} has no token of an assistant to train on")
    np.save(folder / "ends.npy", np.concatenate(ends))
    written = said | {"dtype": np.dtype(encoder.dtype).name, "tokens": total, "empty": documents.missing}
    (folder / "corpus.json").write_text(json.dumps(written, indent=1), encoding="utf-8")


# ---- readers -----------------------------------------------------------------------------------------------------


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
            cut = segments[:, 1] - np.maximum(sizes, 2)
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


# ---- a tokenizer of one's own ------------------------------------------------------------------------------------

TRAINING_TEXT = 100_000_000  # characters that a tokenizer is trained on at most
END, PAD, IMAGE, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<image>", "<|user|>", "<|assistant|>"
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|assistant|>' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user|>' + message['content'] -}}
  {%- else -%}
    {{- message['content'] -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def training_texts(sources: list[Source]) -> Iterator[str]:
    """The text of these sources, for training a tokenizer: the beginning, if there is very much of it."""
    left = TRAINING_TEXT
    for source in sources:
        if not isinstance(source, (TextSource, ChatSource)):
            continue
        for document in Documents(source):
            for part in [document] if isinstance(document, str) else [str(message["content"]) for message in document]:
                if left <= 0:
                    return
                yield part[:left]
                left -= len(part)
    if left == TRAINING_TEXT:
        raise ValueError("data: a tokenizer is trained on text, and no source of the recipe has any")


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> Any:
    """A byte-level BPE of this size, trained on these texts: any text goes in and comes out the same.

    `<|endoftext|>` begins a text and ends a document; `<|user|>` and `<|assistant|>` are the chat template's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, PAD, IMAGE, USER, ASSISTANT]
    tokenizer = Tokenizer(models.BPE())
    pieces: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if spec.split_digits:
        pieces.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[IMAGE, USER, ASSISTANT],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
