"""Import one module right after another, without importing that other ourselves."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, then: str) -> None:
    """Import the module `then` once the module `name` is imported: now, if it is, else when somebody imports it.

    If `then` cannot be imported, that is a warning: whoever imports `name` did not ask for it.
    """
    if name in sys.modules:
        _import(then)
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))


def _import(then: str) -> None:
    try:
        import_module(then)
    except ImportError as error:
        warnings.warn(f"{then} cannot be used with what is installed: {error}", RuntimeWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds nothing itself: lets the others find the module, and steps out of the way for good."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, then: str) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        _import(self.then)
