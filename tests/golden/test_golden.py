"""Our methods compute what their authors' code computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from patchattn.method import methods

from . import loader

CASES = list(loader.cases())


def registered(folder_name: str) -> str | None:
    squashed = re.sub(r"[-_]", "", folder_name)
    return next((name for name in methods() if name.replace("_", "") == squashed), None)


@pytest.mark.skipif(bool(CASES), reason="golden cases are there and run below")
def test_golden_folder_is_there():
    pytest.skip(f"no golden cases in {loader.folder()}; name their folder in PATCHATTN_GOLDEN")


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_method_reproduces_the_official_code(path: Path):
    method = registered(path.parent.name)
    if method is None:
        pytest.skip(f"pending: {path.parent.name} is not a registered method yet")
    adapter = loader.adapter(method)
    assert adapter is not None, f"{method} is registered but tests/golden/{method}.py is missing"
    compared = list(adapter.check(loader.load(path)))
    assert compared, f"the adapter of {method} found nothing to compare in {path.name}"
    wrong = [f"{c.name}: error {c.error():.2e} > {c.tolerance:.0e}" for c in compared if not c.error() <= c.tolerance]
    assert not wrong, "\n".join(wrong)
