"""Documents of any length into rows of one length.

A corpus is one long array of tokens; a *segment* is a document's `[start, end)` in it, a *piece* the part of a segment
that lies in one row. All three ways give `Rows`: the pieces of row `r` are `pieces[first[r] : first[r + 1]]`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token without a loss
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Which parts of the corpus each row holds."""

    pieces: Ints  # [P, 2]
    first: Ints  # [R + 1]

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, row: int) -> Ints:
        return self.pieces[self.first[row] : self.first[row + 1]]


def stream(segments: Ints, length: int) -> Rows:
    """One document after the other, cut where a row ends: no room is lost but in the last row."""
    sizes = segments[:, 1] - segments[:, 0]
    ends = np.cumsum(sizes)
    starts, total = ends - sizes, int(ends[-1])
    rows = np.arange(0, total, length)
    bounds = np.union1d(starts, rows)
    owner = np.searchsorted(starts, bounds, side="right") - 1
    begins = segments[owner, 0] + bounds - starts[owner]
    pieces = np.stack([begins, begins + np.diff(bounds, append=total)], axis=1)
    return Rows(pieces, np.append(np.searchsorted(bounds, rows), len(pieces)))


def alone(segments: Ints, length: int) -> Rows:
    """Each document by itself, in as many rows as it needs."""
    counts = -(-(segments[:, 1] - segments[:, 0]) // length)
    owner = np.repeat(np.arange(len(segments)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = segments[owner, 0] + place * length
    pieces = np.stack([begins, np.minimum(begins + length, segments[owner, 1])], axis=1)
    pieces = pieces[pieces[:, 1] - pieces[:, 0] > 1]  # a token alone has nothing to predict
    return Rows(pieces, np.arange(len(pieces) + 1))


def whole(segments: Ints, length: int) -> Rows:
    """Several documents to a row, none cut that fits one: best fit, longest first."""
    pieces = alone(segments, length).pieces
    sizes = pieces[:, 1] - pieces[:, 0]
    order = np.argsort(-sizes, kind="stable")
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows that have so much room left
    rooms: list[int] = []  # the keys of by_room, sorted
    for index, size in zip(order.tolist(), sizes[order].tolist()):
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(index)
        if (left := room - size) > 1:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    rows.sort()  # by their longest document, in the order of the documents: a stream should not go by size
    chosen = np.array([index for row in rows for index in row], dtype=np.int64)
    return Rows(pieces[chosen], np.cumsum([0, *map(len, rows)]))


def row(tokens: Any, labelled: Any, pieces: Ints) -> dict[str, Ints]:
    """The sample of one row as it is, without padding; `labelled` says which tokens carry a loss, None: all.

    A document's first token never carries one: what would predict it is another document.
    """
    ids = np.concatenate([tokens[start:end] for start, end in pieces]).astype(np.int64)
    sizes = pieces[:, 1] - pieces[:, 0]
    starts = np.cumsum(sizes) - sizes
    labels = ids.copy()
    if labelled is not None:
        labels[~np.concatenate([labelled[start:end] for start, end in pieces]).astype(bool)] = IGNORED
    labels[starts] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": np.arange(len(ids)) - np.repeat(starts, sizes)}


def fill(sample: dict[str, Ints], length: int, pad: int) -> dict[str, Ints]:
    """The sample at full length; the padding is a document of its own that carries no loss."""
    missing = length - len(sample["input_ids"])
    if not missing:
        return sample
    ends = {
        "input_ids": np.full(missing, pad),
        "labels": np.full(missing, IGNORED),
        "position_ids": np.arange(missing),
    }
    return {name: np.concatenate([values, ends[name]]) for name, values in sample.items()}
