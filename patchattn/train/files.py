"""Rows of txt, jsonl, json, csv and parquet files, one after the other, each with the place where it stands."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WHOLE = 256 * 2**20  # files up to this size are hashed whole
ENDS = 2**20  # of larger ones, this much of head and tail


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Path, size and SHA-256; of large files the hash of both ends, and the time of the last change."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(2**20):
                digest.update(block)
            return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}
        digest.update(file.read(ENDS))
        file.seek(-ENDS, 2)
        digest.update(file.read())
    note = f"first and last {ENDS} bytes only"
    changed = path.stat().st_mtime_ns
    return {"path": str(path), "bytes": size, "changed": changed, "sha256": digest.hexdigest(), "hashed": note}


def reason(error: BaseException) -> str:
    """An error in one line, with what is behind it."""
    said = " ".join(str(error).split())[:500] or type(error).__name__
    return said if error.__cause__ is None else f"{said} ({reason(error.__cause__)})"


def _read_txt(path: Path, column: str, separator: str | None) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        if separator is None:
            yield str(path), {column: file.read()}
            return
        rest, numbers = "", itertools.count(1)
        while block := file.read(2**20):
            *complete, rest = (rest + block).split(separator)
            for text in complete:
                yield f"{path}, document {next(numbers)}", {column: text.strip()}
        yield f"{path}, document {next(numbers)}", {column: rest.strip()}


def _read_jsonl(path: Path, column: str, separator: str | None) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _object(place, _parse(place, line))


def _read_json(path: Path, column: str, separator: str | None) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1024).lstrip()
    if not start.startswith("["):  # many a .json file holds lines
        yield from _read_jsonl(path, column, separator)
        return
    for number, row in enumerate(_parse(str(path), path.read_text(encoding="utf-8-sig"))):
        place = f"{path}, row {number}"
        yield place, _object(place, row)


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {place} is not JSON: {error}") from None


def _object(place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"data: {place} holds {type(row).__name__}, not an object with columns")
    return row


def _read_csv(path: Path, column: str, separator: str | None) -> Iterator[tuple[str, Row]]:
    import pandas

    try:
        # pandas rather than csv, which refuses long fields.
        for chunk in pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", chunksize=1000):
            for number, row in zip(chunk.index, chunk.to_dict("records")):
                yield f"{path}, row {number}", {str(key): value for key, value in row.items()}
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise ValueError(f"data: {path} is not a CSV table: {reason(error)}") from error


def _read_parquet(path: Path, column: str, separator: str | None) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            wanted = [column] if column in file.schema_arrow.names else None
            number = itertools.count()
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: {path} is not a Parquet file: {reason(error)}") from error


READERS: dict[str, Callable[[Path, str, str | None], Iterator[tuple[str, Row]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
