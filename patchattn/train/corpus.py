"""Tokenized documents, kept in memory-mapped files: written once, by one of many processes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .documents import Documents
from .encoding import Encoded, Encoder, batches
from .packing import Ints

FORMAT = 1  # of these files


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
    if not total:
        raise ValueError(f"data: {documents.source.path} gives no token with this tokenizer")
    if encoder.labels and not labels:
        raise ValueError(f"data: {documents.source.path} has no token of an assistant to train on")
    np.save(folder / "ends.npy", np.concatenate(ends))
    written = said | {"dtype": np.dtype(encoder.dtype).name, "tokens": total, "empty": documents.missing}
    (folder / "corpus.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
