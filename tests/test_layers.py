"""Which file may import which: imports point down, and the package costs nothing until it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import patchattn

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "patchattn").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
CORE = {"context", "masks", "sites", "method", "cache", "_compat"}


def imported(path: Path) -> list[tuple[int, str]]:
    """Absolute names of what a file imports at run time, with their lines."""
    package = ".".join(
        path.relative_to(ROOT / "kernels" if "kernels" in path.parts[:-2] else ROOT).with_suffix("").parts
    )
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
              for n in ast.walk(block)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".")
                depth = node.level - (path.name == "__init__.py")
                base = ".".join(parts[: len(parts) - depth - (path.name == "__init__.py")])
                names += [
                    (node.lineno, f"{base}.{node.module}" if node.module else f"{base}.{a.name}") for a in node.names
                ]
            else:
                names.append((node.lineno, node.module or ""))
    return names


def offences(paths: list[Path], forbidden) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imported(path)
        if forbidden(name)
    ]


def test_primitives_know_no_library_above_them():
    kernels = [path for path in SOURCES if "kernels" in path.relative_to(ROOT).parts[0]]
    assert kernels
    assert not offences(kernels, lambda name: name.split(".")[0] in ("patchattn", "transformers", "diffusers", "peft"))


def test_methods_know_neither_transformers_nor_each_other_nor_how_they_are_attached():
    files = [path for path in SOURCES if path.parent.name == "methods" and path.name != "__init__.py"]
    assert len(files) >= 3
    above = ("patchattn.attach", "patchattn.hub", "patchattn.cli", "patchattn.testing", "patchattn.families")
    wrong = offences(
        files, lambda name: name.split(".")[0] in ("transformers", "diffusers", "peft") or name.startswith(above)
    )
    wrong += offences(files, lambda name: name.startswith("patchattn.methods."))
    assert not wrong


def test_the_core_knows_no_method_and_nothing_built_on_it():
    files = [path for path in SOURCES if path.parent.name == "patchattn" and path.stem in CORE]
    above = (
        "patchattn.methods.",
        "patchattn.hub",
        "patchattn.cli",
        "patchattn.testing",
        "patchattn.demo",
        "patchattn.duo",
    )
    assert len(files) == len(CORE)
    assert not offences(files, lambda name: name.startswith(above))


def test_every_public_name_can_be_had():
    for name in patchattn.__all__:
        assert getattr(patchattn, name) is not None
    assert set(patchattn._HOMES) <= set(patchattn.__all__)
    assert sorted(patchattn.__all__) == sorted(set(patchattn.__all__))
    with pytest.raises(AttributeError, match="no attribute 'DoubleAttention'"):
        patchattn.DoubleAttention  # noqa: B018


def test_importing_patchattn_takes_less_than_a_second_and_a_half_more_than_transformers():
    def seconds(code: str) -> float:
        runs = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            runs.append(time.perf_counter() - started)
        return min(runs)

    assert seconds("import patchattn") - seconds("import transformers") < 1.5


def test_the_repositorys_root_does_not_shadow_the_library_called_kernels():
    code = "import kernels; assert 'site-packages' in kernels.__file__; from transformers import LlamaForCausalLM"
    pytest.importorskip("kernels")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
