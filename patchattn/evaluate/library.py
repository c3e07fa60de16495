"""The tasks and suites that ship with patchattn, and the local files that stand in for data sets of the hub."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOCAL = "local_"  # what the names of tasks on local files start with
SUITE = "suite_"  # and those of suites


def folder() -> Path:
    """What to give lm-eval as `--include_path`: in the installed package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    for place in (package / "evals", package.parent / "evals"):
        if (place / "tasks").is_dir():
            return place
    raise FileNotFoundError(f"this installation has no tasks: neither {package / 'evals'} nor beside the package")


def tasks() -> dict[str, str]:
    """The shipped tasks, each with what it is."""
    return _described("tasks")


def suites() -> dict[str, str]:
    """The shipped suites, by their short names, each with what it is."""
    return {name.removeprefix(SUITE): text for name, text in _described("suites").items()}


def _described(kind: str) -> dict[str, str]:
    """Names and the first comment of the files of a kind."""
    found = {}
    for file in sorted((folder() / kind).rglob("*.yaml")):
        if file.name.startswith("_"):
            continue
        first = file.read_text(encoding="utf-8").splitlines()[0]
        found[file.stem] = first.removeprefix("#").strip()
    return found


def require_harness() -> None:
    """Say what to install where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("evaluation needs lm-eval, which is not installed: pip install 'patchattn[eval]'")


def data_files(data: str | None, pattern: str, task: str) -> list[Path]:
    """The files of a folder of local data that a task reads, or an error that says which would do."""
    if not data:
        raise ValueError(
            f"{task} reads local files: name their folder, in `patchattn eval` by --data FOLDER, in lm_eval by "
            "--metadata data=FOLDER"
        )
    place = Path(data).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"{task}: there is no folder {data!r}")
    files = sorted(Path(name) for name in glob.glob(str(place / pattern)))
    if not files:
        raise FileNotFoundError(f"{task}: {data} has no file {pattern}")
    return files


def as_list(value: Any) -> list[Any]:
    """A setting that may be given once or several times."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
