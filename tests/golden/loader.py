"""Golden cases: inputs and outputs of the methods' official code, as pairs of .json and .safetensors files.

The folder is named by PATCHATTN_GOLDEN and holds one folder a method. An adapter for a method is the module
here of the method's name; its `check(case)` yields what to compare, computed through the public API.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor

DEFAULT = Path(__file__).parents[3] / "shared" / "golden"


def folder() -> Path:
    return Path(os.environ.get("PATCHATTN_GOLDEN") or DEFAULT)


@dataclass(frozen=True)
class Case:
    """One golden case: its settings and its tensors."""

    method: str
    name: str
    config: dict
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def load(path: Path) -> Case:
    described = json.loads(path.read_text())
    return Case(path.parent.name, path.stem, described["config"], load_file(path.with_suffix(".safetensors")))


def cases() -> Iterator[Path]:
    if folder().is_dir():
        yield from sorted(folder().glob("*/*.json"))


def adapter(method: str) -> ModuleType | None:
    name = f"{__package__}.{method}"
    return import_module(name) if find_spec(name) is not None else None


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs. `relative`: the error is measured against their largest entry."""

    name: str
    ours: Tensor
    theirs: Tensor
    tolerance: float = 1e-5
    relative: bool = False

    def error(self) -> float:
        ours, theirs = self.ours.detach().double(), self.theirs.detach().double()
        assert ours.shape == theirs.shape, f"{self.name}: ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
        if not ours.numel():
            return 0.0
        worst = (ours - theirs).abs().max().item()
        return worst / max(theirs.abs().max().item(), 1e-12) if self.relative else worst


def exactly(name: str, ours: object, theirs: object) -> Comparison:
    return Comparison(name, torch.as_tensor(ours), torch.as_tensor(theirs), tolerance=0.0)
