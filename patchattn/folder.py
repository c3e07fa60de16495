"""Folders that patches and patched models are written to: all of the new files, or all of the old ones."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from . import card
from .description import CONFIG
from .tensors import TENSORS

CARD = "README.md"
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model|patchattn)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|(pytorch_model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.bin(\.index\.json)?"
)


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str], stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A temporary folder whose files take the place of those in `directory`, unless an error stops the writing.

    Args:
        stale: which other files of `directory` belong to what is replaced, and go.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{os.fspath(directory)} is a file; give a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = not target.exists() or target.parent.stat().st_dev == target.stat().st_dev
    parent = target.parent if beside and os.access(target.parent, os.W_OK) else target
    folder = parent / f".{target.name}-{uuid.uuid4().hex}.tmp"
    folder.mkdir()
    try:
        yield folder
        written = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if not written:  # one of several processes, and not the one that writes
            return
        if not target.exists():
            try:
                folder.rename(target)
                return
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
        names = [file.relative_to(folder) for file in written]
        old = [file for file in target.iterdir() if file.is_file() and stale(file.name)]
        configs = [name for name in names if name.suffix == ".json"]
        _move(folder, target, [name for name in names if name not in configs])
        for file in old:
            if file.relative_to(target) not in names:
                file.unlink()
        _move(folder, target, configs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path, names: list[Path]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).replace(target / name)


def keep_foreign_card(folder: Path, existing: Path) -> None:
    """Leave a README.md that somebody else wrote as it is."""
    if existing.is_file() and not card.is_ours(existing.read_text(encoding="utf-8", errors="replace")):
        (folder / CARD).unlink(missing_ok=True)


def is_patch_file(name: str) -> bool:
    """Whether a patch alone consists of such files."""
    return name in (CONFIG, TENSORS)


def is_weights(name: str, variant: str | None = None) -> bool:
    """Whether a whole checkpoint consists of such files, so that it replaces an earlier one's."""
    if variant and f".{variant}." not in name:
        return False
    plain = name.replace(f".{variant}", "") if variant else name
    return plain == CONFIG or _WEIGHTS.fullmatch(plain) is not None


def contents(folder: str | os.PathLike[str]) -> list[str]:
    """The files below a folder that are not hidden, by their paths inside it."""
    paths = (file.relative_to(folder) for file in Path(folder).rglob("*") if file.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
