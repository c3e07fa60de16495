"""Where text comes from: hub data sets, saved data sets, and txt, jsonl, json, csv or parquet files."""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import READERS, Row, fingerprint_file, reason
from .schema import ChatSource, TextSource

NOT_DATA = ("readme", "license", "licence", "notice", "dataset_infos")  # files beside the data
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Documents:
    """The documents of one source, in order: strings, or lists of messages.

    Every look at them reads the source anew, so that nothing but the document at hand is in memory. `missing`
    counts the empty ones that the last complete reading left out.
    """

    def __init__(self, source: TextSource | ChatSource) -> None:
        self.source = source
        self.chat = isinstance(source, ChatSource)
        self.missing = 0
        paths = [source.path] if isinstance(source.path, str) else source.path
        if not paths:
            raise ValueError("data: path is an empty list; name a data set, file, folder or glob")
        self._parts = [part for path in paths for part in self._resolve(path)]

    def __iter__(self) -> Iterator[Any]:
        self.missing = 0
        found = 0
        for place, row in self._rows():
            document = self._document(place, row)
            if not document or (isinstance(document, str) and not document.strip()):
                self.missing += 1
                continue
            found += 1
            yield document
            if found == self.source.limit:
                return
        if not found:
            raise ValueError(f"data: {self.source.path} holds no text: {self.missing} documents, all of them empty")

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What was read, so that it can be told whether it is still the same."""
        source = self.source
        said: dict[str, Any] = {"kind": source.kind, "path": source.path, "column": source.column}
        if isinstance(source, TextSource) and source.separator is not None:
            said["separator"] = source.separator
        if source.limit is not None:
            said["limit"] = source.limit
        return said | {"parts": [part.fingerprint() for part in self._parts]}

    def _rows(self) -> Iterator[tuple[str, Row]]:
        for part in self._parts:
            yield from part.rows()

    def _document(self, place: str, row: Row) -> Any:
        column = self.source.column
        if column not in row:
            raise ValueError(f"data: {place} has no column {column!r}; there: {', '.join(map(repr, row))}")
        value = row[column]
        if value is None:
            return None
        if self.chat:
            return _messages(place, column, value)
        if not isinstance(value, str):
            hint = "; for conversations use kind: chat" if isinstance(value, list) else ""
            raise ValueError(f"data: {place}: column {column!r} holds {type(value).__name__}, not text{hint}")
        return value

    def _resolve(self, path: str) -> list[_File | _Hub | _Saved]:
        source = self.source
        place = Path(path).expanduser()
        if place.is_file():
            return [_File(place, source)]
        if place.is_dir():
            return self._resolve_folder(place)
        if glob.has_magic(path):
            files = sorted(Path(found) for found in glob.glob(str(place), recursive=True) if Path(found).is_file())
            if not files:
                raise FileNotFoundError(f"data: no file matches {path!r} (from {Path.cwd()})")
            return [_File(file, source) for file in files]
        if place.suffix in READERS or not HUB_NAME.fullmatch(path):
            raise FileNotFoundError(f"data: there is no file or folder {path!r} (from {Path.cwd()})")
        return [_Hub(path, source)]

    def _resolve_folder(self, folder: Path) -> list[_File | _Hub | _Saved]:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            return [_Saved(folder, self.source)]
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        data = [file for file in files if file.suffix in READERS and file.stem.lower() not in NOT_DATA]
        kinds = {file.suffix for file in data}
        if kinds == {".txt"}:
            return [_File(file, self.source) for file in data]
        if ".txt" in kinds:
            raise ValueError(
                f"data: {folder} holds files of several kinds: {', '.join(sorted(kinds))}; say which with a glob such "
                f"as {folder}/*.txt"
            )
        if not kinds:
            there = ", ".join(file.name for file in files[:10]) or "nothing"
            raise FileNotFoundError(
                f"data: {folder} holds no {', '.join(READERS)} file and no saved data set; there: {there}"
            )
        # The copy of a hub repository: `datasets` finds its splits and configurations by its own rules.
        return [_Hub(str(folder), self.source, files=files)]


def _messages(place: str, column: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"data: {place}: column {column!r} holds {type(value).__name__}, not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            there = f"the keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"data: {place}: a message of {column!r} has {there}; it must have role and content")
    # Arrow tables fill in the keys that only other messages have.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


class _File:
    """One local file."""

    def __init__(self, path: Path, source: TextSource | ChatSource) -> None:
        if path.suffix not in READERS:
            raise ValueError(f"data: {path} ends in {path.suffix!r}; readable are {', '.join(READERS)}")
        if path.suffix == ".txt" and isinstance(source, ChatSource):
            raise ValueError(
                f"data: {path} is plain text, without messages; kind: chat reads .jsonl, .json or .parquet"
            )
        self.path, self.source = path, source

    def rows(self) -> Iterator[tuple[str, Row]]:
        separator = getattr(self.source, "separator", None)
        try:
            yield from READERS[self.path.suffix](self.path, self.source.column, separator)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data: {self.path} is not UTF-8 ({error.reason}: {error.object[error.start]:#x}); convert it, e.g. "
                "with iconv -f latin1 -t utf-8"
            ) from None
        except OSError as error:
            raise ValueError(f"data: {self.path} cannot be read: {error}") from error

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_file(self.path)


class _Hub:
    """A data set that `datasets` opens: from the hub, or the copy of its repository in a folder."""

    def __init__(self, path: str, source: TextSource | ChatSource, files: list[Path] | None = None) -> None:
        self.path, self.source, self.files = path, source, files
        self._opened: Any = None

    def open(self) -> Any:
        if self._opened is None:
            import datasets

            source = self.source
            try:
                self._opened = datasets.load_dataset(
                    self.path, source.name, split=source.split, streaming=source.streaming or self.files is not None
                )
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                what = "a folder that" if self.files else "no file or folder, and as a data set of the hub"
                raise ValueError(f"data: {self.path!r} is {what} cannot be opened: {reason(error)}") from error
        return self._opened

    def rows(self) -> Iterator[tuple[str, Row]]:
        return _numbered(self.path, self.open(), self.source.column)

    def fingerprint(self) -> dict[str, Any]:
        said: dict[str, Any] = {"path": self.path, "name": self.source.name, "split": self.source.split}
        if self.files is not None:
            return said | {"files": [fingerprint_file(file) for file in self.files]}
        return said | _fingerprint_dataset(self.open())


class _Saved:
    """A folder that `Dataset.save_to_disk` wrote."""

    def __init__(self, folder: Path, source: TextSource | ChatSource) -> None:
        self.folder, self.source = folder, source

    def open(self) -> Any:
        import datasets

        saved = datasets.load_from_disk(str(self.folder))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if self.source.split not in saved:
            raise ValueError(f"data: {self.folder} has no split {self.source.split!r}; there: {', '.join(saved)}")
        return saved[self.source.split]

    def rows(self) -> Iterator[tuple[str, Row]]:
        return _numbered(str(self.folder), self.open(), self.source.column)

    def fingerprint(self) -> dict[str, Any]:
        return {"path": str(self.folder)} | _fingerprint_dataset(self.open())


def _numbered(path: str, rows: Any, column: str) -> Iterator[tuple[str, Row]]:
    if column in (rows.column_names or ()):
        rows = rows.select_columns([column])
    number = 0
    try:
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except (OSError, ValueError) as error:
        raise ValueError(f"data: {path} cannot be read after row {number}: {reason(error)}") from error


def _fingerprint_dataset(dataset: Any) -> dict[str, Any]:
    said = {"fingerprint": getattr(dataset, "_fingerprint", None), "rows": getattr(dataset, "num_rows", None)}
    version = getattr(dataset.info, "version", None)
    return {key: value for key, value in said.items() if value} | ({"version": str(version)} if version else {})
