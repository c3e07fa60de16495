"""Retrieval-head patterns of DuoAttention: read, write, binarise and identify them.

A pattern is an array `[layers, KV heads]` of gate values in [0, 1]; heads near 1 need the whole context.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .context import AttentionContext
    from .sites import Site

PATTERN_FILE = "full_attention_heads.tsv"
Rows = list[list[float]]


def as_rows(values: Any) -> Rows:
    """Any array `[layers, KV heads]` as nested lists of numbers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    elif hasattr(values, "tolist"):
        values = values.tolist()
    try:
        rows = [[float(value) if value != int(value) else int(value) for value in row] for row in values]
    except (TypeError, ValueError):
        raise ValueError(f"DuoAttention: heads is {values!r}; it must be a share from 0 to 1, an array "
                         "[layers, KV heads] of numbers, or a pattern file") from None  # fmt: skip
    if not rows or not all(rows):
        raise ValueError("DuoAttention: heads is empty; it must have a row for each layer")
    return rows


def load_pattern(path: str | os.PathLike[str]) -> Rows:
    """Gate values `[layers][KV heads]` of a published pattern, clipped to [0, 1].

    Args:
        path: a tab-separated file with a line for each layer, a JSON file with nested lists (bare or under
            "heads"), or the folder that holds `full_attention_heads.tsv`.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PATTERN_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no pattern at {file}; give a .tsv or .json file, or a folder with {PATTERN_FILE}")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            values = json.loads(text)
            rows = values["heads"] if isinstance(values, dict) else values
        else:
            rows = [[float(value) for value in line.split()] for line in text.splitlines() if line.strip()]
        rows = [[min(1.0, max(0.0, float(value))) for value in row] for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no pattern: {error}; it must hold one line of numbers for each layer") from None
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(f"{file} is no pattern: its {len(rows)} lines must be equally long and not empty")
    return rows


def load_settings(path: str | os.PathLike[str]) -> dict[str, int]:
    """`sink` and `recent` that a published pattern folder was trained with, from its config.json."""
    values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return {"sink": values["sink_size"], "recent": values["recent_size"]}


def save_pattern(path: str | os.PathLike[str], gates: Any, sink: int, recent: int) -> Path:
    """Write gate values in the published layout: a folder with a TSV and a config.json."""
    rows, folder = as_rows(gates), Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(repr(float(value)) for value in row) for row in rows]
    (folder / PATTERN_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"sink_size": sink, "recent_size": recent}, indent=2) + "\n")
    return folder


def binarise(gates: Any, share: float | None) -> list[list[int]]:
    """1 for heads that stay full, 0 for streaming ones; `share` of all heads of the model stay full.

    Ties go to the lower layer, then the lower head, so that the same gates always give the same pattern.
    """
    rows = as_rows(gates)
    flat = [value for row in rows for value in row]
    if share is None:
        if any(value not in (0, 1) for value in flat):
            raise ValueError("DuoAttention: heads holds gate values, so share must say how many heads stay full, "
                             "for example share=0.5")  # fmt: skip
        return [[int(value) for value in row] for row in rows]
    sparsity = 1 - share
    streaming = len(flat) if sparsity == 1 else math.ceil((len(flat) - 1) * sparsity - 1e-9)
    clipped = [min(1.0, max(0.0, value)) for value in flat]
    order = sorted(range(len(flat)), key=lambda index: (clipped[index], -index))
    dropped = set(order[:streaming])
    places = iter(range(len(flat)))
    return [[int(next(places) not in dropped) for _ in row] for row in rows]


def spread(share: float, kv_heads: Sequence[int]) -> list[list[int]]:
    """A pattern without knowledge: in every layer the first heads stay full, `share` of all in sum."""
    rows, given, wanted = [], 0, 0.0
    for count in kv_heads:
        wanted += share * count
        full = min(count, max(0, math.floor(wanted + 0.5) - given))
        given += full
        rows.append([int(head < full) for head in range(count)])
    return rows
